"""A ticket as a plain network for serving: masks multiplied in, and BatchNorm folded into the layer before it."""

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
"""Fields of a module that hold the classes of its masked layers."""


def fold(
    model: nn.Module, variables: Mapping[str, PyTree], image_shape: Sequence[int], *, batch_norm: bool = False
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A network without masks that computes the same in evaluation mode as a masked one.

    Weights are multiplied by their masks. With `batch_norm` there are no norms either: each becomes part of the kernel
    and the bias of the convolution that it follows, as the module's wiring tells. That is the same to rounding, and not
    for training any more. A norm that follows anything else is refused. LayerNorms stay: they are no constants.

    It is compared with the one that was given on random images before it is returned.

    Args:
        model: a Linen module whose masked layers have names, and are of the classes in its fields `conv` or `dense`, as
            those of `cs_jax.models`; with `batch_norm` also one that says how it is wired, and has a field `folded`.
        variables: "params", "masks" and, where there are any, "batch_stats".
        image_shape: of one image, as in (32, 32, 3).
        batch_norm: fold BatchNorm too.

    Returns:
        The module, with layers of Flax's own in place of those of `cs_jax`, and its variables: "params", and
        "batch_stats" where norms are left.

    Raises:
        TypeError: the module has no such fields, or does not say how it is wired.
        ConfigError: an entry is not finite.
        ValueError: the model takes no such images; a mask has no weights, or another shape; a BatchNorm does not follow
            a layer of its own; a masked layer is of no class in those fields; or the wiring is wrong.
    """
    equivalence.check_finite(variables)
    equivalence.check_takes(model, variables, image_shape)
    params = trees.apply_masks(variables["params"], variables.get("masks", {}))
    batch_stats = variables.get("batch_stats", {})
    served, name = plain(model), type(model).__name__
    wrong = f"the fields `conv` and `dense` of {name} are not all of its masked layers: with plain ones"
    if batch_norm and batch_stats:
        served, params = _without_norms(served), _folded(model, params, batch_stats)
        batch_stats, wrong = {}, f"the wiring of {name} is wrong: with norms folded by it"
    found = {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}
    unfit = f"{name} cannot be applied without masks{' and norms' if batch_norm else ''}"
    equivalence.check_same_outputs(model, variables, served, found, image_shape, unfit=unfit, wrong=wrong)
    return served, found


def plain(model: nn.Module) -> nn.Module:
    """The module with the layers that its masked ones are made from; its variables are the same but for the masks.

    Masked layers of a user's own stay what they are, but mask nothing.

    Raises:
        TypeError: it has no field with their class.
    """
    fields: dict[str, Any] = {name: getattr(model, name) for name in LAYER_FIELDS if hasattr(model, name)}
    if not fields:
        raise TypeError(f"model: got {type(model).__name__}, wanted a module with a field `conv` or `dense`")
    plain_layers: dict[str, Any] = {name: _unmasked(layer) for name, layer in fields.items()}
    return model.clone(**plain_layers)


@functools.cache  # so that two modules made of one class are equal
def _unmasked(layer: type[nn.Module]) -> type[nn.Module]:
    """The layer of Flax's own that one of `cs_jax.layers` masks; of another masked class, one that masks nothing."""
    if not issubclass(layer, Masked):
        return layer
    if layer.__module__ == Masked.__module__:
        return layer.__bases__[-1]
    return type(f"Unmasked{layer.__name__}", (layer,), {"masked_params": (), "__module__": __name__})


def _without_norms(model: nn.Module) -> nn.Module:
    if not hasattr(model, "folded"):
        raise TypeError(f"model: got {type(model).__name__}, wanted a module with a field `folded` to fold its norms")
    return model.clone(folded=True)


def _folded(model: nn.Module, params: PyTree, batch_stats: PyTree) -> PyTree:
    """Weights of the network without norms, in the dtypes of those with; computed in float64."""
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
    """Every norm with the name of the layer before it."""
    pairs = []
    for norm in net.nodes:
        if not isinstance(norm, BatchNorm):
            continue
        before = net.nodes[norm.source]
        alone = norm.source != output and sum(norm.source in wiring.sources(node) for node in net.nodes) == 1
        if not (isinstance(before, Linear) and alone):
            raise ValueError(
                f"norm {norm.name!r}: follows what is no convolution or dense layer, or what others read too; wanted "
                "one of its own, to fold it into"
            )
        pairs.append((before.name, norm))
    return pairs
