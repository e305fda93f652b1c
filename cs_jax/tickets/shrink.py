"""Shrinking: removes the channels of a masked network that have no effect; the outputs stay the same.

A channel has no effect if no later weight reads it. A channel is constant if it is computed from constant channels
only; its value is folded into the next layer. At the border, a convolution with zero padding reads 0 instead of the
constant. The constant then cannot become a bias, but all constant channels of a layer can be merged exactly into one.
After a pass, fewer weights are nonzero and more channels may be removable, so passes are repeated until nothing
changes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError
from cs_jax.models import wiring
from cs_jax.models.wiring import Activation, Add, Attention, BatchNorm, Fixed, Input, Linear, Pool, Signal, Wiring
from cs_jax.tickets import equivalence
from cs_jax.tickets.ticket import LoadedTicket

Arrays = dict[str, np.ndarray]
"""Arrays of a network by name, "params/conv0/kernel"."""


def shrink(
    model: nn.Module, variables: Mapping[str, PyTree], image_shape: Sequence[int]
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A smaller network of the same family, with the outputs of a masked network in evaluation mode, up to rounding.

    The remaining weights keep their masks, so the smaller network can be trained further as a ticket. Every layer keeps
    at least one channel. The outputs of both networks are compared on random images before the result is returned.

    Args:
        model: Linen module with the methods `wire` and `resize`, like all in `cs_jax.models`; see
            `cs_jax.models.wiring`.
        variables: "params", "masks" and, if the network has BatchNorm, "batch_stats".
        image_shape: shape of one image, for example (32, 32, 3).

    Returns:
        The smaller module and its variables; `model` and `variables` if nothing can be removed.

    Raises:
        TypeError: the module does not describe its wiring.
        ConfigError: a mask keeps no weight of its layer, or an entry of `variables` is not finite.
        ValueError: the model does not accept such images, or its wiring is wrong or does not fit the variables.
    """
    equivalence.check_finite(variables)
    arrays = {
        f"{collection}/{trees.name(path)}": np.asarray(on_host(leaf))
        for collection, tree in variables.items()
        for path, leaf in trees.leaves_by_path(tree).items()
    }
    _check_masks(arrays)
    equivalence.check_accepts(model, variables, image_shape)
    net, output = wiring.wiring_of(model)
    network = _Network(net, output, arrays, image_shape[-1])
    while network.shrink_once():
        pass
    if not network.features:
        return model, dict(variables)
    smaller = model.resize(network.features)  # pyright: ignore[reportAttributeAccessIssue]
    leaves = {tuple(name.split("/")): jnp.asarray(array) for name, array in network.arrays.items()}
    found = {collection: {} for collection in variables} | trees.nest(leaves)
    name = type(model).__name__
    equivalence.check_same_outputs(
        equivalence.Network(model, variables),
        equivalence.Network(smaller, found),
        image_shape,
        unfit=f"`resize` of {name} does not fit its wiring",
        wrong=f"wiring of {name} is wrong: removing channels changes the network",
    )
    return smaller, found


def _check_masks(arrays: Arrays) -> None:
    """Raises a ConfigError unless every mask keeps a weight."""
    for name, array in arrays.items():
        if name.startswith("masks/") and not array.any():
            layer = name.removeprefix("masks/").rpartition("/")[0]
            raise ConfigError(f"layer {layer!r}: its mask keeps no weight; must keep at least one")


def shrink_ticket(ticket: LoadedTicket) -> LoadedTicket:
    """Shrunk ticket, for a model of `cs_jax.models`; has no rewound network.

    Raises:
        ConfigError: the ticket has a custom model, a mask keeps no weight of its layer, or an entry is not finite.
    """
    model, variables = shrink(*ticket.known_network())
    features = dict(model.features)  # pyright: ignore[reportAttributeAccessIssue]
    metadata = {**ticket.metadata, "model": {**ticket.metadata["model"], "features": features}}
    return LoadedTicket(variables, None, model, metadata)


class _Use(NamedTuple):
    """A linear layer that reads a channel space."""

    layer: Linear
    weights: np.ndarray  # (window or positions, channels, out), masked
    constants: np.ndarray  # (channels,), NaN for a channel that varies
    absorber: str | None  # array to which a constant for the layer's output can be added; None if there is none
    sign: int  # sign of the constant in the absorber

    @property
    def is_read(self) -> np.ndarray:
        """(channels,), True for channels with a nonzero weight."""
        return np.any(self.weights, axis=(0, 2))

    @property
    def can_fold(self) -> np.ndarray:
        """(channels,), True for channels that can be removed, or replaced by a constant in the absorber."""
        folded = self.constants == 0 if self.absorber is None else ~np.isnan(self.constants)
        return ~self.is_read | folded


class _Plan(NamedTuple):
    """Kept and merged channels of a space."""

    kept: np.ndarray  # (channels,), bool
    merged: np.ndarray  # (channels,), bool: constant channels that a kept channel replaces
    into: int  # index of the kept channel that replaces the merged channels


class _Network:
    """Arrays and wiring of a network, from which channels are removed space by space; see `wiring.spaces`."""

    def __init__(self, net: Wiring, output: Signal, arrays: Arrays, image_channels: int) -> None:
        self.arrays = dict(arrays)
        self.features: dict[str, int] = {}  # new numbers of channels or heads by layer, for `resize`
        self._nodes, self._output, self._image_channels = net.nodes, output, image_channels
        wiring.check_names(net, arrays)
        self._space = wiring.spaces(net)
        self._fixed = wiring.fixed_spaces(net, output)

    def shrink_once(self) -> bool:
        """Runs one pass over all spaces and attention modules; returns True if channels or heads were removed."""
        constants: list[np.ndarray] = []
        for node in self._nodes:
            constants.append(_constants(node, constants, self.arrays, self._image_channels))
        uses: dict[int, list[_Use]] = {space: [] for space in self._space if space not in self._fixed}
        for signal, node in enumerate(self._nodes):
            if isinstance(node, Linear) and self._space[node.source] in uses:
                uses[self._space[node.source]].append(self._use(signal, node, constants[node.source]))
        plans = {space: _plan(found) for space, found in uses.items() if found}
        for space, plan in plans.items():
            for use in uses[space]:
                self._fold(use, plan)
        for space, plan in plans.items():
            if not plan.kept.all():
                self._slice(space, plan.kept)
        heads = [self._drop_heads(node.name) for node in self._nodes if isinstance(node, Attention)]
        return any(heads) or any(not plan.kept.all() for plan in plans.values())

    def _use(self, signal: int, layer: Linear, constants: np.ndarray) -> _Use:
        weights = _masked_kernel(self.arrays, layer.name)
        weights = weights.reshape(-1, len(constants), weights.shape[-1])
        norm = wiring.norm_after(self._nodes, Signal(signal))
        absorber, sign = None, 1
        if not layer.zero_padded and f"params/{layer.name}/bias" in self.arrays:
            absorber = f"params/{layer.name}/bias"
        elif not layer.zero_padded and norm is not None:
            absorber, sign = f"batch_stats/{norm.name}/mean", -1
        return _Use(layer, weights, constants, absorber, sign)

    def _fold(self, use: _Use, plan: _Plan) -> None:
        """Moves the contribution of channels to be removed into the arrays of a layer that reads them."""
        constants = np.nan_to_num(use.constants)
        folded = ~plan.kept & use.can_fold & use.is_read
        if (constants[folded] != 0).any():
            assert use.absorber is not None
            shift = constants[folded] @ use.weights[:, folded].sum(axis=0)
            self._put(use.absorber, _get(self.arrays, use.absorber, 0) + use.sign * shift)
        moved = plan.merged & ~use.can_fold
        if moved.any():
            weights = use.weights.copy()
            shares = constants[moved] / constants[plan.into]
            weights[:, plan.into] += np.einsum("c,wco->wo", shares, weights[:, moved])
            self._put_kernel(use.layer.name, weights)

    def _put(self, name: str, values: np.ndarray) -> None:
        before = self.arrays[name]
        self.arrays[name] = values.reshape(before.shape).astype(before.dtype)

    def _put_kernel(self, name: str, weights: np.ndarray) -> None:
        """Replaces a kernel by masked weights. Its mask, if it has one, becomes 0 where the weights are 0."""
        mask = self.arrays.get(f"masks/{name}/kernel")
        scale = 1.0 if mask is None else float(mask.max())
        if mask is not None:
            self._put(f"masks/{name}/kernel", scale * (weights != 0))
        self._put(f"params/{name}/kernel", weights / scale)

    def _slice(self, space: int, kept: np.ndarray) -> None:
        """Keeps only the kept channels in all arrays that have an axis of the space."""
        for signal, node in enumerate(self._nodes):
            if isinstance(node, Linear):
                for collection in ("params", "masks"):
                    name = f"{collection}/{node.name}/kernel"
                    if self._space[node.source] == space and name in self.arrays:
                        self.arrays[name] = _slice_inputs(self.arrays[name], kept)
            if self._space[signal] != space:
                continue
            if isinstance(node, Linear):
                self.features[node.name] = int(kept.sum())
            for name in wiring.names(node):
                for key in (key for key in self.arrays if key.partition("/")[2].startswith(f"{name}/")):
                    self.arrays[key] = self.arrays[key][..., kept]

    def _drop_heads(self, name: str) -> bool:
        """Removes heads of an attention module that are not read or have constant values; returns True if it did.

        Attention weights sum to one, so a head whose values are only biases outputs these biases.
        """
        out, values = (_masked_kernel(self.arrays, f"{name}/{layer}") for layer in ("out", "value"))
        kept = np.any(out, axis=(1, 2)) & np.any(values, axis=(0, 2))
        if not kept.any():
            kept[0] = True
        if kept.all():
            return False
        bias = _get(self.arrays, f"params/{name}/value/bias", 0)
        shift = np.einsum("hs,hso->o", bias[~kept], out[~kept])
        self._put(f"params/{name}/out/bias", _get(self.arrays, f"params/{name}/out/bias", 0) + shift)
        for array, axis in _HEAD_AXES.items():
            for key in (f"{collection}/{name}/{array}" for collection in ("params", "masks")):
                if key in self.arrays:
                    self.arrays[key] = np.compress(kept, self.arrays[key], axis=axis)
        self.features[name] = int(kept.sum())
        return True


_HEAD_AXES = {
    **{f"{layer}/kernel": 1 for layer in wiring.PROJECTIONS[:3]},
    **{f"{layer}/bias": 0 for layer in wiring.PROJECTIONS[:3]},
    "out/kernel": 0,
}
"""Axis of the heads in the arrays of an attention module."""


def _get(arrays: Arrays, name: str, default: float) -> np.ndarray:
    return np.asarray(arrays.get(name, default), np.float64)


def _masked_kernel(arrays: Arrays, name: str) -> np.ndarray:
    """Kernel of a layer multiplied by its mask, in float64."""
    return _get(arrays, f"params/{name}/kernel", 0) * _get(arrays, f"masks/{name}/kernel", 1)


def _constants(node: wiring.Node, found: Sequence[np.ndarray], arrays: Arrays, image_channels: int) -> np.ndarray:
    """Values of the constant channels that a node outputs, (channels,); NaN for channels that vary.

    Args:
        node: node of the wiring.
        found: constants of all signals before the node.
        arrays: arrays of the network.
        image_channels: number of channels of the images.
    """
    match node:
        case Input():
            return np.full(image_channels, np.nan)
        case Linear(source, name, zero_padded):
            weights = _masked_kernel(arrays, name)
            weights = weights.reshape(-1, len(found[source]), weights.shape[-1])
            inputs = found[source]
            varies = np.isnan(inputs) | (zero_padded & (inputs != 0))
            total = np.where(varies, 0, inputs) @ weights.sum(axis=0) + _get(arrays, f"params/{name}/bias", 0)
            return np.where(weights[:, varies].any(axis=(0, 1)), np.nan, total)
        case BatchNorm(source, name, epsilon):
            mean, var = (_get(arrays, f"batch_stats/{name}/{kind}", 0) for kind in ("mean", "var"))
            scale, bias = _get(arrays, f"params/{name}/scale", 1), _get(arrays, f"params/{name}/bias", 0)
            return (found[source] - mean) / np.sqrt(var + epsilon) * scale + bias
        case Activation(source, function):
            values = found[source].copy()
            known = ~np.isnan(values)
            with jax.enable_x64(True):
                values[known] = function(jnp.asarray(values[known]))
            return values
        case Add(left, right):
            return found[left] + found[right]
        case Pool(source):
            return found[source]
        case Fixed(source):
            return np.full(len(found[source]), np.nan)
        case Attention(name=name):
            return np.full(arrays[f"params/{name}/out/kernel"].shape[-1], np.nan)


def _plan(uses: Sequence[_Use]) -> _Plan:
    """Kept and merged channels of a space, from all layers that read it.

    Channels that are constant in every layer that reads them, but cannot be folded into all these layers, are merged
    into the channel with the largest constants, `into`. A channel is merged only if, in each layer into which it cannot
    be folded, the constant of `into` is nonzero.
    """
    removed = np.logical_and.reduce([use.can_fold for use in uses])
    if removed.all():
        removed[0] = False
    known = [~use.is_read | ~np.isnan(use.constants) for use in uses]
    constant = np.logical_and.reduce(known) & ~removed
    strict = [use for use in uses if use.absorber is None]
    merged, into = np.zeros(len(removed), bool), 0
    if constant.sum() > 1 and strict:
        sizes = np.min([np.abs(np.nan_to_num(use.constants)) for use in strict], axis=0)
        into = int(np.argmax(np.where(constant, sizes, -1)))
        stands = [use.can_fold | bool(np.nan_to_num(use.constants[into]) != 0) for use in strict]
        merged = constant & np.logical_and.reduce(stands)
        merged[into] = False
    return _Plan(~(removed | merged), merged, into)


def _slice_inputs(kernel: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """A kernel without the inputs of removed channels; its input axis may contain flattened spatial positions."""
    *window, inputs, outputs = kernel.shape
    positions = inputs // len(kept)
    sliced = kernel.reshape(*window, positions, len(kept), outputs)[..., kept, :]
    return sliced.reshape(*window, positions * int(kept.sum()), outputs)
