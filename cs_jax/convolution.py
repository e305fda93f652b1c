"""Convolution that trains fast on a CPU.

XLA's CPU backend computes the gradient of a kernel from transposed activations, and fuses into the transposition
whatever made these since the last convolution, in residual networks since several: all that is then computed again, in
an order that no cache likes. An array that is kept from being fused is computed once.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def chosen() -> Callable[..., jax.Array]:
    """`convolve`, as Flax's `conv_general_dilated_cls` wants it."""
    return convolve


def convolve(lhs: jax.Array, rhs: jax.Array, *window: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with the same arguments, result and gradients."""
    if jax.default_backend() == "cpu":
        lhs = _computed_once(lhs, rhs)
    return lax.conv_general_dilated(lhs, rhs, *window, **options)


def _computed_once(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array, behind what XLA does not fuse across: a choice between it and itself, known at run time alone.

    An `optimization_barrier` does not suffice: it is gone before the CPU backend fuses.
    """
    return lax.cond(other.ravel()[0] > 0, lambda array: array, lax.optimization_barrier, array)
