"""Channels that can be taken out of a network: what scores stand for them, and what is computed with fewer of them.

Which there are is read off the network's wiring: the output channels of a masked layer if no other layer's are added to
them and nothing wants them all, and the heads of attention. `cs_jax.shrink` takes them out once a mask removes them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cs_jax import trees, wiring
from cs_jax.groups import Axes, Grouping, grouping
from cs_jax.multiply_adds import REST, evaluation_mode, weight_multiply_adds
from cs_jax.selection import Selection
from cs_jax.trees import Path
from cs_jax.wiring import Attention, Linear, Signal, Wiring

PyTree = Any


@dataclass(frozen=True)
class Product:
    """A product of the network.

    Attributes:
        multiply_adds: with all channels.
        members: indices into `Channels.scored`, of those whose channels go into it or come out of it.
    """

    multiply_adds: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """The channels of a network that scores stand for; made by `of_model`. Hashable.

    Attributes:
        scored: the masked arrays, each with a score for every channel.
        whole: paths of arrays that the network masks, but that have no such channels: their masks are ones, and are
            left out of all trees of masks but those that the network is applied with.
        stays: of each scored array, whether one channel more than those that are kept is computed as long as any is
            missing: channels without weights are constants, which a convolution that pads with zeros needs.
        products: all products of the network.
    """

    scored: tuple[Grouping, ...]
    whole: tuple[Path, ...]
    stays: tuple[bool, ...]
    products: tuple[Product, ...]

    @functools.cached_property
    def selection(self) -> Selection:
        """The scored arrays, without budgets."""
        return Selection(self.scored)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Channels of each scored array."""
        return tuple(math.prod(leaf.score_shape) for leaf in self.scored)

    def only_scored(self, masks: PyTree) -> PyTree:
        """The masks of the scored arrays alone."""
        leaves = trees.leaves_by_path(masks)
        return self.selection.nest(leaves[leaf.path] for leaf in self.scored)

    def complete(self, masks: PyTree, params: PyTree) -> PyTree:
        """The masks, and ones for every other array that the network masks."""
        found, weights = trees.leaves_by_path(masks), trees.leaves_by_path(params)
        return trees.nest({path: jnp.ones_like(weights[path]) for path in self.whole} | found)

    def firsts(self, arrays: PyTree) -> PyTree:
        """The first entry of every channel, in the scores' shapes, of arrays of the scored ones' shapes."""

        def first(leaf: Grouping, array: jax.Array) -> jax.Array:
            return array[tuple(slice(None, None, step) for step in leaf.block)]

        return self._map(first, arrays)

    def means(self, arrays: PyTree) -> PyTree:
        """The mean over every channel, in the scores' shapes, of arrays of the scored ones' shapes."""

        def mean(leaf: Grouping, array: jax.Array) -> jax.Array:
            axes = tuple(axis for axis, step in enumerate(leaf.block) if step > 1)
            return jnp.mean(array, axis=axes, keepdims=True)

        return self._map(mean, arrays)

    def _map(self, function: Any, arrays: PyTree) -> PyTree:
        leaves = trees.leaves_by_path(arrays)
        return self.selection.nest(function(leaf, leaves[leaf.path]) for leaf in self.scored)

    def multiply_adds(self, kept: Sequence[int]) -> int:
        """Multiply-adds of an image's forward pass through the smaller network, at most: a layer has one channel.

        Args:
            kept: channels that are kept of each scored array.
        """
        left = [
            min(size, max(count, 1) + stays) for count, size, stays in zip(kept, self.sizes, self.stays, strict=True)
        ]
        return sum(
            product.multiply_adds
            * math.prod(left[member] for member in product.members)
            // math.prod(self.sizes[member] for member in product.members)
            for product in self.products
        )


def of_model(model: nn.Module, image_shape: Sequence[int]) -> Channels:
    """The channels that can be taken out of a network.

    Args:
        model: a Linen module that says how it is wired.
        image_shape: of one image, as in (32, 32, 3).

    Raises:
        TypeError: the module does not say how it is wired.
        ValueError: none of its masked layers has channels that can be taken out, or its wiring names a layer that it
            does not have.
    """
    net, output = wiring.wiring_of(model)
    modes = evaluation_mode(model)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    masks = jax.eval_shape(lambda x: nn.unbox(model.init(jax.random.key(0), x, **modes)), image).get("masks", {})
    masked = trees.leaves_by_path(masks)
    owners = {path: (space, axis) for space, (path, axis) in _owners(net, output).items()}
    scored = {
        owners[path][0]: grouping(path, weights, Axes((owners[path][1],)), "auto")
        for path, weights in masked.items()
        if path in owners
    }
    if not scored:
        raise ValueError(f"{type(model).__name__} has no masked layer with channels that can be taken out")
    groups = tuple(scored.values())
    return Channels(
        scored=groups,
        whole=tuple(path for path in masked if path not in {leaf.path for leaf in groups}),
        stays=tuple(_stays(net, space) for space in scored),
        products=tuple(_products(net, [*scored], weight_multiply_adds(model, image_shape))),
    )


def _kernel(name: str) -> Path:
    return (*name.split("/"), "kernel")


def _owners(net: Wiring, output: Signal) -> dict[int, tuple[Path, int]]:
    """The array, and its axis, that channels of each space are taken out by; heads have spaces below 0."""
    space, fixed = wiring.spaces(net), wiring.fixed_spaces(net, output)
    makers: dict[int, list[str]] = {}
    found = {}
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear) and space[signal] not in fixed:
            makers.setdefault(space[signal], []).append(node.name)
        if isinstance(node, Attention):
            found[_heads(signal)] = _kernel(f"{node.name}/out"), 0
    return found | {space: (_kernel(names[0]), -1) for space, names in makers.items() if len(names) == 1}


def _heads(signal: int) -> int:
    return -1 - signal


def _stays(net: Wiring, space: int) -> bool:
    """Whether constants of a space's channels may have to stay, because a layer that reads them cannot take them in.

    A layer that does not pad can, into its bias or into the averages of the BatchNorm that follows, as all of
    `cs_jax.models` have one of them.
    """
    spaces = wiring.spaces(net)
    return any(isinstance(node, Linear) and spaces[node.source] == space and node.zero_padded for node in net.nodes)


def _products(net: Wiring, scored: Sequence[int], costs: dict[str, int]) -> list[Product]:
    """The products of the network, and which of the scored spaces they are with."""
    spaces, rest = wiring.spaces(net), costs.pop(REST)
    attentions = {signal: node for signal, node in enumerate(net.nodes) if isinstance(node, Attention)}
    members: dict[str, list[int]] = {}
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear):
            members[trees.name(_kernel(node.name))] = [spaces[node.source], spaces[signal]]
        if isinstance(node, Attention):
            names = (trees.name(_kernel(f"{node.name}/{layer}")) for layer in wiring.PROJECTIONS)
            members |= {name: [_heads(signal)] for name in names}
    unknown = sorted(members.keys() - costs.keys())
    if unknown:
        raise ValueError(f"wiring: names {unknown[0]!r}, but there is no such array among the params")
    products = [(cost, members.get(name, [])) for name, cost in costs.items() if cost]
    # What heads do with each other has no array: it is shared out as the products with what they give are.
    outs = {signal: costs[trees.name(_kernel(f"{node.name}/out"))] for signal, node in attentions.items()}
    for signal, cost in outs.items():
        share = rest * cost // sum(outs.values())
        products.append((share, [_heads(signal)]))
        rest -= share
        outs = outs | {signal: 0}
    products.append((rest, []))
    places = {space: index for index, space in enumerate(scored)}
    return [Product(cost, tuple(places[space] for space in joined if space in places)) for cost, joined in products]
