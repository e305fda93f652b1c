"""Prunable channels of a network: one score per channel, and the multiply-adds of a network with fewer channels.

The prunable channels are found from the wiring of the network. The output channels of a layer are prunable if they are
not added to the output channels of another layer, and if no layer needs all of them. Attention heads are prunable, too.
Once a mask removes channels, `cs_jax.tickets.shrink` makes the network smaller.

A channel is masked in the layer that makes the channel, with one exception. If BatchNorm follows this layer and exactly
one layer reads the channel, the channel is masked in the reading layer. BatchNorm would undo a soft mask before it,
because the mask only changes the scale of BatchNorm's input.
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
from cs_jax.models.multiply_adds import REST, abstract_variables, weight_multiply_adds
from cs_jax.models.wiring import Attention, BatchNorm, Linear, Signal, Wiring


@dataclass(frozen=True)
class Product:
    """Multiply-adds of one matrix product or convolution, and the channels that they depend on.

    Attributes:
        multiply_adds: multiply-adds with all channels, for one image.
        members: indices into `Channels.scored`, of the arrays whose channels are inputs or outputs of the product.
    """

    multiply_adds: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """The prunable channels of a network; made by `of_model`. Hashable.

    Attributes:
        scored: masked arrays with prunable channels; each has one score per channel.
        unscored: paths of the other masked arrays. Their masks are ones, and are present only in the trees of masks
            with which the network is applied.
        needs_constant: for each scored array, whether the smaller network computes one more channel than it keeps, if a
            channel is removed. True if removed channels become constants that a reading layer cannot absorb: the layer
            pads with zeros, or has neither a bias nor a BatchNorm after it.
        features_per_channel: for each scored array, features in one channel: the size of a head, otherwise 1.
        products: all matrix products and convolutions of the network.
    """

    scored: tuple[Grouping, ...]
    unscored: tuple[Path, ...]
    needs_constant: tuple[bool, ...]
    features_per_channel: tuple[int, ...]
    products: tuple[Product, ...]

    @functools.cached_property
    def selection(self) -> Selection:
        """The scored arrays as a selection, without budgets."""
        return Selection(self.scored)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of channels of each scored array."""
        return tuple(math.prod(leaf.score_shape) for leaf in self.scored)

    def only_scored(self, masks: PyTree) -> PyTree:
        """The masks of the scored arrays, without the masks of `unscored`."""
        leaves = trees.leaves_by_path(masks)
        return self.selection.nest(leaves[leaf.path] for leaf in self.scored)

    def complete(self, masks: PyTree, params: PyTree) -> PyTree:
        """The masks of the scored arrays, and masks of ones for `unscored`."""
        known, weights = trees.leaves_by_path(masks), trees.leaves_by_path(params)
        return trees.nest({path: jnp.ones_like(weights[path]) for path in self.unscored} | known)

    def first_entries(self, arrays: PyTree) -> PyTree:
        """First entry of every channel: maps arrays in the shapes of the scored arrays to the shapes of the scores."""

        def first(leaf: Grouping, array: jax.Array) -> jax.Array:
            return array[tuple(slice(None, None, step) for step in leaf.block)]

        return self._map(first, arrays)

    def means(self, arrays: PyTree) -> PyTree:
        """Mean over every channel: maps arrays in the shapes of the scored arrays to the shapes of the scores."""

        def mean(leaf: Grouping, array: jax.Array) -> jax.Array:
            axes = tuple(axis for axis, step in enumerate(leaf.block) if step > 1)
            return jnp.mean(array, axis=axes, keepdims=True)

        return self._map(mean, arrays)

    def _map(self, function: Any, arrays: PyTree) -> PyTree:
        leaves = trees.leaves_by_path(arrays)
        return self.selection.nest(function(leaf, leaves[leaf.path]) for leaf in self.scored)

    def multiply_adds(self, kept: Sequence[int]) -> int:
        """Upper bound of the multiply-adds for one image in the smaller network.

        A layer without kept channels counts as a layer with one channel.

        Args:
            kept: number of kept channels for each scored array.
        """
        left = [
            min(size, max(count, 1) + constant)
            for count, size, constant in zip(kept, self.sizes, self.needs_constant, strict=True)
        ]
        return sum(
            product.multiply_adds
            * math.prod(left[member] for member in product.members)
            // math.prod(self.sizes[member] for member in product.members)
            for product in self.products
        )


def of_model(model: nn.Module, image_shape: Sequence[int]) -> Channels:
    """The prunable channels of a network.

    Args:
        model: Linen module that declares its wiring: see `cs_jax.models.wiring`.
        image_shape: shape of one image, as in (32, 32, 3).

    Raises:
        TypeError: the module does not declare its wiring.
        ValueError: no masked layer has prunable channels, or the wiring does not name exactly the layers of the module.
    """
    net, output = wiring.wiring_of(model)
    variables = abstract_variables(model, image_shape)
    masked = trees.leaves_by_path(variables.get("masks", {}))
    shapes = {path: array.shape for path, array in trees.leaves_by_path(variables["params"]).items()}
    wiring.check_names(net, map(trees.name, trees.leaves_by_path(variables)))
    sites = _mask_sites(net, output, shapes, masked.keys())
    if not sites:
        raise ValueError(f"model {type(model).__name__}: no masked layer has prunable channels")
    in_order = sorted(sites, key=lambda site: [*masked].index(site.path))
    scored = tuple(grouping(site.path, masked[site.path], Axes((site.axis,))) for site in in_order)
    return Channels(
        scored=scored,
        unscored=tuple(path for path in masked if path not in {leaf.path for leaf in scored}),
        needs_constant=tuple(site.makes and _needs_constant(net, site.space, shapes) for site in in_order),
        features_per_channel=tuple(shapes[site.path][1] if site.space < 0 else 1 for site in in_order),
        products=tuple(_products(net, [site.space for site in in_order], weight_multiply_adds(model, image_shape))),
    )


@dataclass(frozen=True)
class _MaskSite:
    """The array in which the channels of a channel space are masked.

    Attributes:
        space: channel space of the wiring, or `_head_space`, which is negative.
        path: path of the array.
        axis: axis of the array along which the channels lie.
        makes: whether the array makes the channels; otherwise, the array reads the channels.
    """

    space: int
    path: Path
    axis: int
    makes: bool


def _kernel(name: str) -> Path:
    return (*name.split("/"), "kernel")


def _mask_sites(
    net: Wiring, output: Signal, shapes: Mapping[Path, tuple[int, ...]], masked: Set[Path]
) -> list[_MaskSite]:
    """Mask sites of all prunable channel spaces; each array is used at most once.

    A channel space is prunable if exactly one layer makes its channels and no layer needs all of them.
    """
    spaces, fixed = wiring.spaces(net), wiring.fixed_spaces(net, output)
    makers, readers = collections.defaultdict(list), collections.defaultdict(list)
    normalized = {spaces[signal] for signal, node in enumerate(net.nodes) if isinstance(node, BatchNorm)}
    sites = []
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear):
            makers[spaces[signal]].append(_kernel(node.name))
            readers[spaces[node.source]].append(_kernel(node.name))
        if isinstance(node, Attention) and (out := _kernel(f"{node.name}/out")) in masked:
            sites.append(_MaskSite(_head_space(signal), out, 0, makes=False))
    used = set()
    for space, (maker, *others) in makers.items():
        if others or space in fixed:
            continue
        made, reading = _MaskSite(space, maker, -1, makes=True), readers[space]
        # After flattening, the reading layer has several inputs per channel, so its input axis has no channels.
        same_axis = len(reading) == 1 and shapes[reading[0]][-2] == shapes[maker][-1]
        read_first = same_axis and space in normalized
        candidates = [_MaskSite(space, reading[0], -2, makes=False), made] if read_first else [made]
        possible = [site for site in candidates if site.path in masked and site.path not in used]
        sites += possible[:1]
        used |= {site.path for site in possible[:1]}
    return sites


def _head_space(signal: int) -> int:
    """Identifies the heads of the attention that makes `signal`; negative, unlike the channel spaces of the wiring."""
    return -1 - signal


def _needs_constant(net: Wiring, space: int, shapes: Mapping[Path, Any]) -> bool:
    """Whether a layer that reads `space` cannot absorb constant inputs into its bias or into a BatchNorm after it."""
    spaces = wiring.spaces(net)
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear) and spaces[node.source] == space:
            absorbs = (*node.name.split("/"), "bias") in shapes or wiring.norm_after(net.nodes, Signal(signal))
            if node.zero_padded or not absorbs:
                return True
    return False


def _products(net: Wiring, scored: Sequence[int], costs: dict[str, int]) -> list[Product]:
    """The products of the network.

    Args:
        net: wiring of the network.
        scored: channel space of each scored array.
        costs: multiply-adds by name of the array, from `weight_multiply_adds`.
    """
    spaces, rest = wiring.spaces(net), costs.pop(REST)
    attentions = {signal: node for signal, node in enumerate(net.nodes) if isinstance(node, Attention)}
    members: dict[str, list[int]] = {}
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear):
            members[trees.name(_kernel(node.name))] = [spaces[node.source], spaces[signal]]
        if isinstance(node, Attention):
            names = (trees.name(_kernel(f"{node.name}/{layer}")) for layer in wiring.PROJECTIONS)
            members |= {name: [_head_space(signal)] for name in names}
    unknown = sorted(members.keys() - costs.keys())
    if unknown:
        raise ValueError(f"wiring of array {unknown[0]!r}: no such array in the params; correct `wire`")
    products = [(cost, members.get(name, [])) for name, cost in costs.items() if cost]
    # Products of query, key and value have no array of weights: distributed over the attentions in proportion to "out".
    outs = {signal: costs[trees.name(_kernel(f"{node.name}/out"))] for signal, node in attentions.items()}
    for signal, cost in outs.items():
        share = rest * cost // sum(outs.values())
        products.append((share, [_head_space(signal)]))
        rest -= share
        outs = outs | {signal: 0}
    products.append((rest, []))
    index_of = {space: index for index, space in enumerate(scored)}
    return [Product(cost, tuple(index_of[space] for space in joined if space in index_of)) for cost, joined in products]
