"""A ticket as a smaller dense network that computes the same: without the channels that no longer matter.

A channel does not matter if no weight after it reads it, or if nothing flows into it: then it is a constant, which is
folded into what follows. Where a convolution pads its input with zeros, a constant is none at the border, so it cannot
become a bias there; but all the constant channels of a layer can be put together into one, exactly. What remains has
fewer weights that are not 0, so other channels may not matter any more, and it begins anew until nothing changes.
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
"""Arrays of a network by collection and path, "params/conv0/kernel"."""


def shrink(
    model: nn.Module, variables: Mapping[str, PyTree], image_shape: Sequence[int]
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A smaller network of the same family that computes the same as a masked one in evaluation mode, to rounding.

    Its masks are those of the weights that are left, so it can be trained on as a ticket. Of every layer one channel
    is left at least. It is compared with the one that was given on random images before it is returned.

    Args:
        model: a Linen module that says how it is wired: see `cs_jax.wiring`. All of `cs_jax.models` do.
        variables: "params", "masks" and, where there are any, "batch_stats".
        image_shape: of one image, as in (32, 32, 3).

    Returns:
        The module and its variables. If nothing can be taken out, those that were given.

    Raises:
        TypeError: the module does not say how it is wired.
        ConfigError: a mask keeps nothing of its layer, or an entry is not finite.
        ValueError: the model takes no such images, or the wiring does not fit the variables, or is wrong.
    """
    equivalence.check_finite(variables)
    arrays = {
        f"{collection}/{trees.name(path)}": np.asarray(on_host(leaf))
        for collection, tree in variables.items()
        for path, leaf in trees.leaves_by_path(tree).items()
    }
    _check_masks(arrays)
    equivalence.check_takes(model, variables, image_shape)
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
        model,
        variables,
        smaller,
        found,
        image_shape,
        unfit=f"`resize` of {name} does not fit its wiring",
        wrong=f"the wiring of {name} is wrong: without the channels that do not matter by it",
    )
    return smaller, found


def _check_masks(arrays: Arrays) -> None:
    """Raises unless every mask keeps a weight."""
    for name, array in arrays.items():
        if name.startswith("masks/") and not array.any():
            layer = name.removeprefix("masks/").rpartition("/")[0]
            raise ConfigError(f"layer {layer!r}: its mask keeps no weight, wanted one at least: the network is broken")


def shrink_ticket(ticket: LoadedTicket) -> LoadedTicket:
    """`shrink` of a ticket whose model is one of `cs_jax.models`; without the network that it was rewound to.

    Raises:
        ConfigError: it names no such model, or a mask keeps nothing of its layer.
    """
    model, variables = shrink(*ticket.known_network())
    features = dict(model.features)  # pyright: ignore[reportAttributeAccessIssue]
    metadata = {**ticket.metadata, "model": {**ticket.metadata["model"], "features": features}}
    return LoadedTicket(variables, None, model, metadata)


class _Use(NamedTuple):
    """A product that reads a space."""

    layer: Linear
    weights: np.ndarray  # (window or positions, channels, out), masked
    constants: np.ndarray  # (channels,), NaN for a channel that is none
    absorber: str | None  # array that takes a constant that is added to its output; None where there is none
    sign: int  # with which it does

    @property
    def is_read(self) -> np.ndarray:
        return np.any(self.weights, axis=(0, 2))

    @property
    def can_fold(self) -> np.ndarray:
        """Which channels can go with nothing but a constant in their place."""
        folded = self.constants == 0 if self.absorber is None else ~np.isnan(self.constants)
        return ~self.is_read | folded


class _Plan(NamedTuple):
    """What becomes of the channels of a space."""

    kept: np.ndarray  # (channels,), bool
    merged: np.ndarray  # those that one of the kept stands for
    into: int  # that one


class _Network:
    """Arrays and wiring of a network, from which channels are taken out.

    It is taken apart by spaces: see `wiring.spaces`.
    """

    def __init__(self, net: Wiring, output: Signal, arrays: Arrays, image_channels: int) -> None:
        self.arrays = dict(arrays)
        self.features: dict[str, int] = {}  # those that have changed, as `resize` wants them
        self._nodes, self._output, self._image_channels = net.nodes, output, image_channels
        wiring.check_names(net, arrays)
        self._space = wiring.spaces(net)
        self._fixed = wiring.fixed_spaces(net, output)

    def shrink_once(self) -> bool:
        """Takes out what does not matter now; whether there was anything."""
        constants = self._constants()
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
        heads = [self._drop_heads(node) for node in self._nodes if isinstance(node, Attention)]
        return any(heads) or any(not plan.kept.all() for plan in plans.values())

    def _get(self, name: str, default: float) -> np.ndarray:
        return np.asarray(self.arrays.get(name, default), np.float64)

    def _weights(self, name: str) -> np.ndarray:
        """A kernel with its mask multiplied in."""
        return self._get(f"params/{name}/kernel", 0) * self._get(f"masks/{name}/kernel", 1)

    def _constants(self) -> list[np.ndarray]:
        """For every signal the value of each channel where it is a constant, NaN for others."""
        found: list[np.ndarray] = []
        for node in self._nodes:
            found.append(self._constant(node, found))
        return found

    def _constant(self, node: wiring.Node, found: Sequence[np.ndarray]) -> np.ndarray:
        match node:
            case Input():
                return np.full(self._image_channels, np.nan)
            case Linear(source, name, zero_padded):
                weights = self._weights(name)
                weights = weights.reshape(-1, len(found[source]), weights.shape[-1])
                inputs = found[source]
                varies = np.isnan(inputs) | (zero_padded & (inputs != 0))
                total = np.where(varies, 0, inputs) @ weights.sum(axis=0) + self._get(f"params/{name}/bias", 0)
                return np.where(weights[:, varies].any(axis=(0, 1)), np.nan, total)
            case BatchNorm(source, name, epsilon):
                mean, var = (self._get(f"batch_stats/{name}/{kind}", 0) for kind in ("mean", "var"))
                scale, bias = self._get(f"params/{name}/scale", 1), self._get(f"params/{name}/bias", 0)
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
                return np.full(self.arrays[f"params/{name}/out/kernel"].shape[-1], np.nan)

    def _use(self, signal: int, layer: Linear, constants: np.ndarray) -> _Use:
        weights = self._weights(layer.name)
        weights = weights.reshape(-1, len(constants), weights.shape[-1])
        norm = wiring.norm_after(self._nodes, Signal(signal))
        absorber, sign = None, 1
        if not layer.zero_padded and f"params/{layer.name}/bias" in self.arrays:
            absorber = f"params/{layer.name}/bias"
        elif not layer.zero_padded and norm is not None:
            absorber, sign = f"batch_stats/{norm.name}/mean", -1
        return _Use(layer, weights, constants, absorber, sign)

    def _fold(self, use: _Use, plan: _Plan) -> None:
        """Puts what channels send on into what a product keeps, before they are taken out."""
        constants = np.nan_to_num(use.constants)
        folded = ~plan.kept & use.can_fold & use.is_read
        if (constants[folded] != 0).any():
            assert use.absorber is not None
            shift = constants[folded] @ use.weights[:, folded].sum(axis=0)
            self._put(use.absorber, self._get(use.absorber, 0) + use.sign * shift)
        moved = plan.merged & ~use.can_fold
        if moved.any():
            weights = use.weights.copy()
            shares = constants[moved] / constants[plan.into]
            weights[:, plan.into] += np.einsum("c,wco->wo", shares, weights[:, moved])
            self._put_weights(use.layer.name, weights)

    def _put(self, name: str, values: np.ndarray) -> None:
        before = self.arrays[name]
        self.arrays[name] = values.reshape(before.shape).astype(before.dtype)

    def _put_weights(self, name: str, weights: np.ndarray) -> None:
        """Weights in place of a kernel's, which is masked where they are 0 if it has a mask."""
        mask = self.arrays.get(f"masks/{name}/kernel")
        scale = 1.0 if mask is None else float(mask.max())
        if mask is not None:
            self._put(f"masks/{name}/kernel", scale * (weights != 0))
        self._put(f"params/{name}/kernel", weights / scale)

    def _slice(self, space: int, kept: np.ndarray) -> None:
        """Leaves the kept channels in all arrays that have an axis of the space's."""
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

    def _drop_heads(self, node: Attention) -> bool:
        """Takes out heads whose output is not read, or that give a constant: whether there were any.

        The weights of attention sum to one, so a head whose values are biases alone gives these.
        """
        out, values = self._weights(f"{node.name}/out"), self._weights(f"{node.name}/value")
        bias = self._get(f"params/{node.name}/value/bias", 0)
        kept = np.any(out, axis=(1, 2)) & np.any(values, axis=(0, 2))
        if not kept.any():
            kept[0] = True
        if kept.all():
            return False
        shift = np.einsum("hs,hso->o", bias[~kept], out[~kept])
        self._put(f"params/{node.name}/out/bias", self._get(f"params/{node.name}/out/bias", 0) + shift)
        axes = {f"{layer}/{kind}": kind == "kernel" for layer in wiring.PROJECTIONS[:3] for kind in ("kernel", "bias")}
        for name, axis in (axes | {"out/kernel": 0}).items():
            for key in (f"{collection}/{node.name}/{name}" for collection in ("params", "masks")):
                if key in self.arrays:
                    self.arrays[key] = np.compress(kept, self.arrays[key], axis=int(axis))
        self.features[node.name] = int(kept.sum())
        return True


def _plan(uses: Sequence[_Use]) -> _Plan:
    """Which channels of a space are kept, by all that read it.

    Of those that are constants wherever they are read, but cannot be folded everywhere, one can stand for the others.
    It is the one whose constants are largest, and stands for those that it has a constant for.
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
    """A kernel that reads the kept channels alone, of one position or of several."""
    *window, inputs, outputs = kernel.shape
    positions = inputs // len(kept)
    sliced = kernel.reshape(*window, positions, len(kept), outputs)[..., kept, :]
    return sliced.reshape(*window, positions * int(kept.sum()), outputs)
