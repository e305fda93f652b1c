"""Convolution that trains fast on a CPU, and what is otherwise in programs that are exported.

XLA's CPU backend computes the gradient of a kernel from transposed activations, and fuses into the transposition
whatever made these since the last convolution, in residual networks since several: all that is then computed again, in
an order that no cache likes. An array that is kept from being fused is computed once. A program that is
exported has no use for that.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_trains = ContextVar("_trains", default=True)


@contextlib.contextmanager
def for_serving() -> Iterator[None]:
    """Networks that are traced meanwhile are for programs that are exported: they have JAX's own convolution."""
    token = _trains.set(False)
    try:
        yield
    finally:
        _trains.reset(token)


def chosen() -> Callable[..., jax.Array]:
    """`convolve`, as Flax's `conv_general_dilated_cls` wants it."""
    return convolve


def convolve(lhs: jax.Array, rhs: jax.Array, *window: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, with the same arguments, result and gradients."""
    if _trains.get() and jax.default_backend() == "cpu":
        lhs = _computed_once(lhs, rhs)
    return lax.conv_general_dilated(lhs, rhs, *window, **options)


def max_pool(x: jax.Array, window: tuple[int, int], *, strides: tuple[int, int], padding: tuple[int, int]) -> jax.Array:
    """Maxima over windows of (batch, height, width, channels), with so many pixels more on every side."""
    around = [(size, size) for size in padding]
    if not _trains.get():  # jax2onnx takes the padding of `nn.max_pool` for none, and says nothing
        x = jnp.pad(x, [(0, 0), *around, (0, 0)], constant_values=-jnp.inf)
        return nn.max_pool(x, window_shape=window, strides=strides)
    return nn.max_pool(x, window_shape=window, strides=strides, padding=around)  # pyright: ignore[reportArgumentType]


def _computed_once(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array, behind what XLA does not fuse across: a choice between it and itself, known at run time alone.

    An `optimization_barrier` does not suffice: it is gone before the CPU backend fuses.
    """
    return lax.cond(other.ravel()[0] > 0, lambda array: array, lax.optimization_barrier, array)
