"""Plain network of a ticket for serving: masks multiplied into weights, BatchNorm folded into the preceding layer."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.arrays import on_host
from cs_jax.layers.masked import Masked
from cs_jax.models import wiring
from cs_jax.models.wiring import BatchNorm, Linear, Signal, Wiring
from cs_jax.tickets import equivalence

LAYER_FIELDS = ("conv", "dense")
"""Module fields with the classes of its masked layers."""


def fold(
    model: nn.Module, variables: Mapping[str, PyTree], image_shape: Sequence[int], *, batch_norm: bool = False
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A network without masks, with the outputs of a masked network in evaluation mode, up to rounding.

    Weights are multiplied by their masks. With `batch_norm`, every BatchNorm is folded into the kernel and bias of the
    preceding layer, according to the module's wiring. The folded network is for inference only. A BatchNorm that cannot
    be folded is an error. LayerNorm is kept, because its statistics depend on the input.

    The outputs of both networks are compared on random images before the result is returned.

    Args:
        model: Linen module with named masked layers. The fields `conv` and `dense` hold the classes of these layers, as
            in `cs_jax.models`; one of the two fields is enough. With `batch_norm`, the module must also have a method
            `wire` and a field `folded`.
        variables: "params", "masks" and, if the network has BatchNorm, "batch_stats".
        image_shape: shape of one image, for example (32, 32, 3).
        batch_norm: fold BatchNorm too.

    Returns:
        The module with plain Flax layers, and its variables: "params", and "batch_stats" if a BatchNorm remains.

    Raises:
        TypeError: the module lacks a field or method named above.
        ConfigError: an entry of `variables` is not finite.
        ValueError: the model does not accept such images; a mask does not fit its weights; a BatchNorm cannot be
            folded; the class of a masked layer is not in the fields; or the wiring is wrong.
    """
    equivalence.check_finite(variables)
    equivalence.check_accepts(model, variables, image_shape)
    params = trees.apply_masks(variables["params"], variables.get("masks", {}))
    batch_stats = variables.get("batch_stats", {})
    made, name = plain(model), type(model).__name__
    wrong = f"fields `conv` and `dense` of {name} do not cover all masked layers"
    if batch_norm and batch_stats:
        made, params = _without_norms(made), _folded(model, params, batch_stats)
        batch_stats, wrong = {}, f"wiring of {name} is wrong: folding its norms changes the network"
    found = {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}
    unfit = f"{name} cannot be applied without masks{' and norms' if batch_norm else ''}"
    original, folded = equivalence.Network(model, variables), equivalence.Network(made, found)
    equivalence.check_same_outputs(original, folded, image_shape, unfit=unfit, wrong=wrong)
    return made, found


def plain(model: nn.Module) -> nn.Module:
    """The module with plain Flax layers in place of masked layers. Its variables are the same, without "masks".

    A masked layer class that a user defined is replaced by a subclass without masks.

    Raises:
        TypeError: the module has none of the fields `LAYER_FIELDS`.
    """
    fields: dict[str, Any] = {name: getattr(model, name) for name in LAYER_FIELDS if hasattr(model, name)}
    if not fields:
        raise TypeError(f"model {type(model).__name__}: must have a field `conv` or `dense` for its masked layers")
    plain_layers: dict[str, Any] = {name: _unmasked(layer) for name, layer in fields.items()}
    return model.clone(**plain_layers)


@functools.cache  # modules made from one class must compare equal
def _unmasked(layer: type[nn.Module]) -> type[nn.Module]:
    """The Flax base class of a layer of `cs_jax.layers`; for other masked classes, a subclass without masks."""
    if not issubclass(layer, Masked):
        return layer
    if layer.__module__ == Masked.__module__:
        return layer.__bases__[-1]
    return type(f"Unmasked{layer.__name__}", (layer,), {"masked_params": (), "__module__": __name__})


def _without_norms(model: nn.Module) -> nn.Module:
    if not hasattr(model, "folded"):
        raise TypeError(f"model {type(model).__name__}: must have a field `folded` to fold its norms")
    return model.clone(folded=True)


def _folded(model: nn.Module, params: PyTree, batch_stats: PyTree) -> PyTree:
    """Weights of the network without norms, computed in float64, in the dtypes of `params`."""
    leaves = {trees.name(path): leaf for path, leaf in trees.leaves_by_path(params).items()}
    stats = {trees.name(path): leaf for path, leaf in trees.leaves_by_path(batch_stats).items()}

    def wide(arrays: Mapping[str, Any], name: str, default: float) -> np.ndarray:
        return np.asarray(on_host(arrays[name]) if name in arrays else default, np.float64)

    net, output = wiring.wiring_of(model)
    wiring.check_names(net, (*(f"params/{name}" for name in leaves), *(f"batch_stats/{name}" for name in stats)))
    for layer, norm in _layers_and_norms(net, output):
        kernel, dtype = f"{layer}/kernel", leaves[f"{layer}/kernel"].dtype
        factor = wide(leaves, f"{norm.name}/scale", 1) / np.sqrt(wide(stats, f"{norm.name}/var", 1) + norm.epsilon)
        bias = (wide(leaves, f"{layer}/bias", 0) - wide(stats, f"{norm.name}/mean", 0)) * factor
        bias = bias + wide(leaves, f"{norm.name}/bias", 0)
        leaves[kernel] = jnp.asarray((wide(leaves, kernel, 0) * factor).astype(dtype))
        leaves[f"{layer}/bias"] = jnp.asarray(bias.astype(dtype))
        for name in ("scale", "bias"):
            leaves.pop(f"{norm.name}/{name}", None)
    return trees.nest({tuple(name.split("/")): leaf for name, leaf in leaves.items()})


def _layers_and_norms(net: Wiring, output: Signal) -> list[tuple[str, BatchNorm]]:
    """Name of the preceding layer, and the BatchNorm, for each BatchNorm.

    Raises:
        ValueError: a BatchNorm does not follow a layer, or another node reads the layer too.
    """
    pairs = []
    for norm in net.nodes:
        if not isinstance(norm, BatchNorm):
            continue
        before = net.nodes[norm.source]
        alone = norm.source != output and sum(norm.source in wiring.sources(node) for node in net.nodes) == 1
        if not (isinstance(before, Linear) and alone):
            raise ValueError(
                f"norm {norm.name!r}: cannot be folded; must follow a convolution or dense layer whose output no other "
                "layer reads"
            )
        pairs.append((before.name, norm))
    return pairs
