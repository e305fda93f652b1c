"""Channels that can be taken out of a network: what scores stand for them, and what is computed with fewer of them.

Which there are is read off the network's wiring: channels that one layer makes, if no other layer's are added to them
and nothing wants them all, and the heads of attention. `cs_jax.shrink` takes them out once a mask removes them.

A channel is masked in the layer that makes it, or, where BatchNorm follows on that one, in the layer that reads it:
BatchNorm undoes the scale of what it is given, so a mask before it would change nothing while it is soft.
"""

import collections
import functools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.groups import Axes, Grouping, grouping
from cs_jax.core.selection import Selection
from cs_jax.core.trees import Path
from cs_jax.models import wiring
from cs_jax.models.multiply_adds import REST, evaluation_mode, weight_multiply_adds
from cs_jax.models.wiring import Attention, BatchNorm, Linear, Signal, Wiring


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
            missing: channels that are masked where they are made are constants, which a convolution that pads with
            zeros needs.
        widths: of each scored array, features that go with one of its channels: those of a head, or 1.
        products: all products of the network.
    """

    scored: tuple[Grouping, ...]
    whole: tuple[Path, ...]
    stays: tuple[bool, ...]
    widths: tuple[int, ...]
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
    variables = jax.eval_shape(lambda x: nn.unbox(model.init(jax.random.key(0), x, **modes)), image)
    masked = trees.leaves_by_path(variables.get("masks", {}))
    shapes = {path: array.shape for path, array in trees.leaves_by_path(variables["params"]).items()}
    wiring.check_names(net, map(trees.name, trees.leaves_by_path(variables)))
    owners = _owners(net, output, shapes, masked.keys())
    if not owners:
        raise ValueError(f"{type(model).__name__} has no masked layer with channels that can be taken out")
    in_order = sorted(owners, key=lambda owner: [*masked].index(owner.path))
    groups = tuple(grouping(owner.path, masked[owner.path], Axes((owner.axis,))) for owner in in_order)
    return Channels(
        scored=groups,
        whole=tuple(path for path in masked if path not in {leaf.path for leaf in groups}),
        stays=tuple(owner.makes and _needs_constants(net, owner.space, shapes) for owner in in_order),
        widths=tuple(shapes[owner.path][1] if owner.space < 0 else 1 for owner in in_order),
        products=tuple(_products(net, [owner.space for owner in in_order], weight_multiply_adds(model, image_shape))),
    )


@dataclass(frozen=True)
class _Owner:
    """Where the channels of a space are masked.

    Attributes:
        space: of the wiring; heads have one below 0.
        path: of the array.
        axis: of the array.
        makes: whether the array makes the channels; otherwise it reads them.
    """

    space: int
    path: Path
    axis: int
    makes: bool


def _kernel(name: str) -> Path:
    return (*name.split("/"), "kernel")


def _owners(net: Wiring, output: Signal, shapes: Mapping[Path, tuple[int, ...]], masked: Set[Path]) -> list[_Owner]:
    """Where the channels of each space are masked that one layer makes, if anywhere; every array once."""
    spaces, fixed = wiring.spaces(net), wiring.fixed_spaces(net, output)
    makers, readers = collections.defaultdict(list), collections.defaultdict(list)
    normalized = {spaces[signal] for signal, node in enumerate(net.nodes) if isinstance(node, BatchNorm)}
    found = []
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear):
            makers[spaces[signal]].append(_kernel(node.name))
            readers[spaces[node.source]].append(_kernel(node.name))
        if isinstance(node, Attention) and (out := _kernel(f"{node.name}/out")) in masked:
            found.append(_Owner(_heads(signal), out, 0, makes=False))
    taken = set()
    for space, (maker, *others) in makers.items():
        if others or space in fixed:
            continue
        made, read = _Owner(space, maker, -1, makes=True), readers[space]
        # What is flattened in between is read in other numbers.
        alone = len(read) == 1 and shapes[read[0]][-2] == shapes[maker][-1]
        wanted = [_Owner(space, read[0], -2, makes=False), made] if alone and space in normalized else [made]
        possible = [owner for owner in wanted if owner.path in masked and owner.path not in taken]
        found += possible[:1]
        taken |= {owner.path for owner in possible[:1]}
    return found


def _heads(signal: int) -> int:
    return -1 - signal


def _needs_constants(net: Wiring, space: int, shapes: Mapping[Path, Any]) -> bool:
    """Whether a layer that reads a space cannot take its constants in: into a bias, or a BatchNorm that follows."""
    spaces = wiring.spaces(net)
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear) and spaces[node.source] == space:
            absorbs = (*node.name.split("/"), "bias") in shapes or wiring.norm_after(net.nodes, Signal(signal))
            if node.zero_padded or not absorbs:
                return True
    return False


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
