"""Helpers for arrays: computation and storage in bfloat16, stochastic rounding, copies on the host.

Training in bfloat16 keeps weights, momentum of the weights, BatchNorm statistics, masks, logits and the loss in
float32, because bfloat16 has too few digits for them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import PyTree


def at_least_float32(array: jax.Array) -> jax.Array:
    """The array in float32 if its dtype is narrower, else unchanged; bfloat16 has about three decimal digits."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def map_leaves(function: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """`jax.tree.map` that keeps NumPy leaves of float64 in 64 bits, also if JAX's 64-bit mode is off."""

    def apply(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return function(leaf)
        if jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype or leaf.dtype != np.float64:
            return function(jnp.asarray(leaf))
        with jax.enable_x64(True):
            result = function(jnp.asarray(leaf))
        return result if isinstance(result, Tracer) else np.asarray(result)

    return jax.tree.map(apply, tree)


DTYPES: dict[str, DTypeLike | None] = {"float32": None, "bfloat16": jnp.bfloat16}
"""Choices of `--dtype` and `--score-dtype`. None keeps the dtype of the inputs or weights, at least float32."""


def logits_dtype(dtype: DTypeLike | None) -> DTypeLike | None:
    """Dtype of the logits of a network that computes in `dtype`: at least float32.

    In bfloat16, two different logits could become equal. The classifier is cheap, also in float32.

    Args:
        dtype: dtype of the other layers; None means the dtype of inputs and weights.

    Returns:
        A dtype, or None if `dtype` is None.

    >>> logits_dtype(jnp.bfloat16) == jnp.float32
    True
    """
    return None if dtype is None else jnp.promote_types(dtype, jnp.float32)


def widen(tree: PyTree) -> PyTree:
    """The tree with arrays in float32 if their dtype is narrower, else unchanged."""
    return jax.tree.map(at_least_float32, tree)


def narrow_like(key: jax.Array, values: PyTree, like: PyTree) -> PyTree:
    """The arrays of `values` in the dtypes of `like`, with stochastic rounding to bfloat16.

    Args:
        key: PRNG key; unused if no dtype changes. The draws do not depend on the sharding of the arrays.
        values: arrays, any shapes.
        like: tree with the same structure; its leaves have the wanted dtypes.

    Returns:
        Tree like `values`.
    """
    arrays, treedef = jax.tree.flatten(values)
    dtypes = [leaf.dtype for leaf in treedef.flatten_up_to(like)]
    if all(array.dtype == dtype for array, dtype in zip(arrays, dtypes, strict=True)):
        return values
    keys, narrowed = jax.random.split(key, len(arrays)), []
    for number, dtype in enumerate(dtypes):
        # The barrier makes XLA round one array after another. Random bits for all arrays at once would need more memory
        # than bfloat16 saves.
        array, array_key, narrowed = lax.optimization_barrier((arrays[number], keys[number], narrowed))
        narrowed.append(stochastic_round(array_key, array) if dtype == jnp.bfloat16 else array.astype(dtype))
    return treedef.unflatten(narrowed)


def stochastic_round(key: jax.Array, array: jax.Array) -> jax.Array:
    """The array in bfloat16, each entry rounded up or down at random, so that the expected value is the entry.

    With rounding to nearest, steps below 0.002 would never change a score of 1.

    Args:
        key: PRNG key.
        array: floats, any shape; entries that are not finite, or exact in bfloat16, are unchanged.

    Returns:
        bfloat16 array of the same shape.
    """
    exact = array.astype(jnp.float32)
    # A bfloat16 is the upper half of a float32. Uniform noise in the lower half carries into the upper half with the
    # probability of rounding up.
    noise = jax.random.bits(key, array.shape, jnp.uint16).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(exact, jnp.uint32) + noise
    rounded = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(exact), rounded, exact).astype(jnp.bfloat16)


def on_host(tree: PyTree) -> PyTree:
    """The tree as NumPy arrays, with all entries of sharded arrays.

    Args:
        tree: arrays, possibly sharded over several devices; the devices of this process must together have every entry.
    """
    return jax.tree.map(_array_on_host, tree)


def _array_on_host(array: Any) -> np.ndarray:
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    host = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        host[shard.index] = shard.data
    return host
