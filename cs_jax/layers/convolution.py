"""Convolution and max pooling: fast in training on a CPU, and plain operations in exported networks.

XLA's CPU backend computes the gradient of a kernel from transposed activations. The backend fuses all operations since
the last convolution into the transposition; in residual networks, since earlier convolutions. The operations are then
computed again, in an order that is bad for caches. With a barrier against this fusion, the activations are computed
once. Exported networks need no barrier, because they compute no gradients.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_for_training = ContextVar("_for_training", default=True)


@contextlib.contextmanager
def for_serving() -> Iterator[None]:
    """Context manager for tracing networks to export or to time: they use JAX's convolution, without the barrier."""
    token = _for_training.set(False)
    try:
        yield
    finally:
        _for_training.reset(token)


def get_convolve() -> Callable[..., jax.Array]:
    """Function `convolve`; Flax's field `conv_general_dilated_cls` is a function that returns the convolution."""
    return convolve


def convolve(lhs: jax.Array, rhs: jax.Array, *window: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` with the same arguments, result and gradients, faster in training on a CPU."""
    if _for_training.get() and jax.default_backend() == "cpu":
        lhs = _computed_once(lhs, rhs)
    return lax.conv_general_dilated(lhs, rhs, *window, **options)


def max_pool(x: jax.Array, window: tuple[int, int], *, strides: tuple[int, int], padding: tuple[int, int]) -> jax.Array:
    """Maxima over windows of images.

    Args:
        x: float array (batch, height, width, channels).
        window: (height, width) of a window, in pixels.
        strides: (vertical, horizontal) distance of windows, in pixels.
        padding: (vertical, horizontal) number of pixels added on each of the two sides, with the value -infinity.

    Returns:
        Array (batch, new height, new width, channels).
    """
    sides = [(size, size) for size in padding]
    if not _for_training.get():  # jax2onnx silently ignores the padding of `nn.max_pool`
        x = jnp.pad(x, [(0, 0), *sides, (0, 0)], constant_values=-jnp.inf)
        return nn.max_pool(x, window_shape=window, strides=strides)
    return nn.max_pool(x, window_shape=window, strides=strides, padding=sides)  # pyright: ignore[reportArgumentType]


def _computed_once(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array, behind a barrier against fusion: a conditional with two equal branches, decided at run time.

    Only an `optimization_barrier` is not enough, because XLA removes the barrier before the CPU backend fuses.
    """
    return lax.cond(other.ravel()[0] > 0, lambda array: array, lax.optimization_barrier, array)
