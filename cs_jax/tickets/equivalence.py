"""Equivalence checks: a transformed network must compute the same outputs as the original."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import FlaxError
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError
from cs_jax.models.multiply_adds import evaluation_mode

AGREEMENT = 1e-4
"""Largest allowed difference of outputs, relative to the largest output. Smaller differences count as rounding.

For weights of lower precision than float32, the limit is four times the precision of their dtype.
"""


class Network(NamedTuple):
    """A module with its variables."""

    model: nn.Module
    variables: Mapping[str, PyTree]


def check_finite(variables: Mapping[str, PyTree]) -> None:
    """Raises a ConfigError that names an array with an entry that is not finite: outputs could not be compared."""
    for path, leaf in trees.leaves_by_path(variables).items():
        if not np.isfinite(np.asarray(on_host(leaf), np.float64)).all():
            raise ConfigError(f"{trees.name(path)}: entries must be finite")


def check_accepts(model: nn.Module, variables: Mapping[str, PyTree], image_shape: Sequence[int]) -> None:
    """Raises a one-line ValueError unless a network with these variables accepts images of a shape."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    apply = functools.partial(model.apply, **evaluation_mode(model))
    try:
        jax.eval_shape(apply, dict(variables), image)
    except (TypeError, ValueError, ArithmeticError, LookupError, FlaxError) as error:
        name, reason = type(model).__name__, str(error).splitlines()[0]
        message = f"image_shape {tuple(image_shape)}: not accepted by {name} with these variables: {reason}"
        raise ValueError(message) from error


def check_same_outputs(
    original: Network,
    made: Network,
    image_shape: Sequence[int],
    *,
    unfit: str,
    wrong: str,
) -> None:
    """Raises unless two networks have equal outputs for 4 random images in evaluation mode, up to rounding.

    Args:
        original: network before a transformation.
        made: network after the transformation.
        image_shape: shape of one image, for example (32, 32, 3).
        unfit: start of the error message if `made` cannot be applied.
        wrong: start of the error message if outputs differ.

    Raises:
        ValueError: `made` cannot be applied, or the outputs differ.
    """
    images = jax.random.normal(jax.random.key(0), (4, *image_shape))
    wanted = outputs(*original, images)
    try:
        got = outputs(*made, images)
    except (TypeError, ValueError, FlaxError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{unfit}: {reason}") from error
    difference = np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    precisions = [float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(made.variables["params"])]
    limit = max(AGREEMENT, 4 * max(precisions))  # folded weights are rounded to their dtype
    if not difference <= limit:
        raise ValueError(
            f"{wrong}: outputs differ by {difference:.1e} of the largest output; must be at most {limit:g}"
        )


def outputs(model: nn.Module, variables: Mapping[str, PyTree], images: jax.Array) -> np.ndarray:
    """Outputs of a network in evaluation mode as float64, computed in the precision of the weights on any device."""
    wide = model.clone(dtype=None) if hasattr(model, "dtype") else model
    # On a CPU, compile without optimization, which is faster: the compiled function runs once.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    apply = jax.jit(functools.partial(wide.apply, **evaluation_mode(model)), compiler_options=options)
    with jax.default_matmul_precision("highest"):  # by default, accelerators multiply float32 in lower precision
        return np.asarray(apply(variables, images), np.float64)
