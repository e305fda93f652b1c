"""Fewer bits: what is computed or stored in bfloat16, and how a value that is stored in it is rounded.

Whoever trains in bfloat16 keeps float32 where sums of small numbers need it: weights, their momentum, BatchNorm
statistics, masks, logits and the loss.
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
    """The array in float32 where its dtype is narrower, else as it is: a bfloat16 has three digits."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def map_leaves(function: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """`jax.tree.map` that does not narrow NumPy's 64-bit leaves where JAX's 64-bit mode is off."""

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
"""What `--dtype` and `--score-dtype` can name. None leaves an array as wide as what it is made of, float32 at least."""


def of_logits(dtype: DTypeLike | None) -> DTypeLike | None:
    """The dtype in which a network that computes in `dtype` computes its logits: float32 at least.

    Of two classes with nearly the same logit, three digits do not tell the better one; the classifier is cheap.

    >>> of_logits(jnp.bfloat16) == jnp.float32
    True
    """
    return None if dtype is None else jnp.promote_types(dtype, jnp.float32)


def widen(tree: PyTree) -> PyTree:
    """The tree's arrays in float32 where their dtype is narrower, else as they are."""
    return jax.tree.map(at_least_float32, tree)


def narrow_like(key: jax.Array, values: PyTree, like: PyTree) -> PyTree:
    """The arrays of `values` in the dtypes of `like`; those that become bfloat16 are rounded at random.

    Args:
        key: PRNG key; nothing is drawn where no dtype changes. The draws do not depend on where the arrays lie.
        values: arrays.
        like: tree of the same structure, whose dtypes count.
    """
    arrays, treedef = jax.tree.flatten(values)
    dtypes = [leaf.dtype for leaf in treedef.flatten_up_to(like)]
    if all(array.dtype == dtype for array, dtype in zip(arrays, dtypes, strict=True)):
        return values
    keys, narrowed = jax.random.split(key, len(arrays)), []
    for number, dtype in enumerate(dtypes):
        # One after another: what is drawn for all would be in memory at once, and wider than what is saved.
        array, own_key, narrowed = lax.optimization_barrier((arrays[number], keys[number], narrowed))
        narrowed.append(round_at_random(own_key, array) if dtype == jnp.bfloat16 else array.astype(dtype))
    return treedef.unflatten(narrowed)


def round_at_random(key: jax.Array, array: jax.Array) -> jax.Array:
    """An array in bfloat16, each entry one of its two neighbours there, so that its mean over keys is the entry.

    Rounded to nearest, a score of 1 would not move by steps of less than 0.002, however many of them come.

    Args:
        key: PRNG key.
        array: floats; what is not finite stays as it is, and so does what bfloat16 has exactly.
    """
    exact = array.astype(jnp.float32)
    # A bfloat16 is the upper half of a float32: what carries over from the lower half does so as often as it should.
    noise = jax.random.bits(key, array.shape, jnp.uint16).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(exact, jnp.uint32) + noise
    rounded = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(exact), rounded, exact).astype(jnp.bfloat16)


def on_host(tree: PyTree) -> PyTree:
    """NumPy arrays of all entries, wherever they are; each process has all of them on its own devices."""
    return jax.tree.map(_on_host, tree)


def _on_host(array: Any) -> np.ndarray:
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    host = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        host[shard.index] = shard.data
    return host
