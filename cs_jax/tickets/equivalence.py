"""Whether a network that was made of another one computes the same as that."""

import functools
from collections.abc import Mapping, Sequence

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
"""Difference of outputs, relative to the largest, beyond which a network is refused: it is rounding below.

For weights in fewer bits than float32 it is four times their precision.
"""


def check_finite(variables: Mapping[str, PyTree]) -> None:
    """Raises a ConfigError that names the array, unless all entries are finite: others cannot be compared."""
    for path, leaf in trees.leaves_by_path(variables).items():
        if not np.isfinite(np.asarray(on_host(leaf), np.float64)).all():
            raise ConfigError(f"{trees.name(path)}: got entries that are not finite, wanted numbers")


def check_takes(model: nn.Module, variables: Mapping[str, PyTree], image_shape: Sequence[int]) -> None:
    """Raises a ValueError, in one line, unless a network with these variables takes images of a shape."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    apply = functools.partial(model.apply, **evaluation_mode(model))
    try:
        jax.eval_shape(apply, dict(variables), image)
    except (TypeError, ValueError, ArithmeticError, LookupError, FlaxError) as error:
        name, reason = type(model).__name__, str(error).splitlines()[0]
        message = f"image_shape: got {tuple(image_shape)}, which {name} does not take with these variables: {reason}"
        raise ValueError(message) from error


def check_same_outputs(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    made: nn.Module,
    found: Mapping[str, PyTree],
    image_shape: Sequence[int],
    *,
    unfit: str,
    wrong: str,
) -> None:
    """Raises unless two networks compute the same of some random images in evaluation mode, to rounding.

    Args:
        model: what was given.
        variables: its own.
        made: what was made of it.
        found: the variables of that.
        image_shape: of one image, as in (32, 32, 3).
        unfit: what to say, before the reason, if `made` cannot be applied to `found`.
        wrong: what to say, before the difference, if outputs differ.

    Raises:
        ValueError: in one line.
    """
    images = jax.random.normal(jax.random.key(0), (4, *image_shape))
    wanted = outputs(model, variables, images)
    try:
        got = outputs(made, found, images)
    except (TypeError, ValueError, FlaxError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{unfit}: {reason}") from error
    difference = np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    precisions = [float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(found["params"])]
    limit = max(AGREEMENT, 4 * max(precisions))  # what is folded is rounded to what holds it
    if not difference <= limit:
        raise ValueError(f"{wrong}, outputs differ by {difference:.1e} of the largest; wanted at most {limit:g}")


def outputs(model: nn.Module, variables: Mapping[str, PyTree], images: jax.Array) -> np.ndarray:
    """What a network makes of images in evaluation mode, in the precision of its weights on any device."""
    wide = model.clone(dtype=None) if hasattr(model, "dtype") else model
    # For a CPU compiled fast rather than well: it runs once.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    apply = jax.jit(functools.partial(wide.apply, **evaluation_mode(model)), compiler_options=options)
    with jax.default_matmul_precision("highest"):  # accelerators multiply float32 with fewer bits otherwise
        return np.asarray(apply(variables, images), np.float64)
