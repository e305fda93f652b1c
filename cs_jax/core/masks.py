"""Masks from scores, and the reset of scores: the formulas of Continuous Sparsification as pure functions on pytrees.

A *score* is a trainable number, one per maskable weight. A *mask* multiplies the weight. Every function accepts one
array or any pytree of JAX or NumPy arrays. Functions that return a tree keep the structure of the argument;
`soft_mask`, `hard_mask` and `prune_scores` also keep dtypes. A NumPy array of float64 stays float64, with JAX's 64-bit
mode on or off.

References:
    Savarese, Silva and Maire, "Winning the Lottery with Continuous Sparsification", NeurIPS 2020, arXiv:1912.04427.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from cs_jax.core.arrays import at_least_float32, map_leaves, on_host

MIN_INIT_VALUE = -80.0
"""Lowest initial score. The mask scale 1 / sigmoid(init_value) overflows float32 below about -88; the difference is a
margin for products with the scale."""


def init_scores(masks: PyTree, value: ArrayLike, *, dtype: DTypeLike | None = None) -> PyTree:
    """Scores of the same structure and shapes as `masks`, every entry `value`.

    Args:
        masks: arrays, any shapes; one leaf per masked weight array (for a Flax model, its "masks" collection).
        value: initial score (s0 in the paper), finite and at least -80; higher keeps more weights. May be traced.
        dtype: float dtype of the scores; None: the dtype of each mask, but at least float32, because bfloat16 loses
            small steps.

    Returns:
        Tree like `masks` (structure, shapes) of constant arrays, on the devices of the masks.

    Raises:
        ValueError: a leaf is not an array; `value` is not a scalar or, where concrete, is not a finite real number
            of at least -80; `dtype` is not a float dtype.

    >>> init_scores({"kernel": jnp.ones((1, 2), jnp.bfloat16)}, -0.02)
    {'kernel': Array([[-0.02, -0.02]], dtype=float32)}
    """
    _check_init_value(value, name="value")
    _check_arrays(masks, "masks")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype {jnp.dtype(dtype)}: must be a float dtype")

    def fill(mask: Any) -> jax.Array:
        kind = jnp.promote_types(mask.dtype, jnp.float32) if dtype is None else dtype
        return jnp.full_like(mask, value, dtype=kind)  # with the sharding of the mask

    return map_leaves(fill, masks)


def soft_mask(scores: PyTree, temperature: ArrayLike, *, init_value: ArrayLike) -> PyTree:
    """Relaxed mask `sigmoid(temperature * score) / sigmoid(init_value)`, leaf by leaf.

    The soft mask multiplies the weights while scores are trained. It tends to `hard_mask` as the temperature (beta in
    the paper) grows. It is 1, to rounding, where a score has its initial value and the temperature is 1. Values and
    gradients are finite for every finite score and temperature.

    Args:
        scores: float arrays, any shapes; one leaf per masked weight array.
        temperature: finite scalar > 0, dimensionless; larger is harder. May be traced.
        init_value: initial value of all scores, finite, at least -80; fixes the scale. May be traced.

    Returns:
        Tree like `scores` (structure, shapes, dtypes), entries in [0, 1 / sigmoid(init_value)].

    Raises:
        ValueError: a leaf is not a float array, or the temperature or initial value, where concrete, is out of range.

    References:
        Savarese et al., 2020, arXiv:1912.04427, section 3.

    >>> soft_mask({"kernel": jnp.zeros(2)}, temperature=1.0, init_value=0.0)
    {'kernel': Array([1., 1.], dtype=float32)}
    """
    _check_temperature(temperature)
    _check_init_value(init_value)
    _check_floats(scores, "scores")

    def soften(score: jax.Array) -> jax.Array:
        wide = at_least_float32(score)
        return (jax.nn.sigmoid(temperature * wide) * _scale(init_value, wide.dtype)).astype(score.dtype)

    return map_leaves(soften, scores)


def hard_mask(scores: PyTree, *, init_value: ArrayLike) -> PyTree:
    """Mask of a ticket, `[score > 0] / sigmoid(init_value)`, leaf by leaf.

    The inequality is strict: a score of exactly 0 gives a mask of 0. Kept entries have the scale of the soft masks,
    because the network was trained with this scale: at `init_value` 0 a kept weight is multiplied by 2.

    Args:
        scores: float arrays, any shapes.
        init_value: initial value of all scores, finite, at least -80; fixes the scale. May be traced.

    Returns:
        Tree like `scores` (structure, shapes, dtypes); entries are 0 or `1 / sigmoid(init_value)`.

    Raises:
        ValueError: a leaf is not a float array, or the initial value, where concrete, is out of range.

    >>> hard_mask({"kernel": jnp.array([-0.5, 0.0, 0.5])}, init_value=0.0)
    {'kernel': Array([0., 0., 2.], dtype=float32)}
    """
    _check_init_value(init_value)
    _check_floats(scores, "scores")

    def harden(score: jax.Array) -> jax.Array:
        wide = at_least_float32(score)
        return jnp.where(wide > 0, _scale(init_value, wide.dtype), 0).astype(score.dtype)

    return map_leaves(harden, scores)


def prune_scores(scores: PyTree, temperature: ArrayLike, *, init_value: ArrayLike) -> PyTree:
    """Scores after the reset between rounds, `min(temperature * score, init_value)`, leaf by leaf.

    A score above `init_value / temperature` becomes `init_value`. A lower score is multiplied by the temperature. With
    the temperature at the end of the round, this is the paper's reset: clearly negative scores become so low that the
    entries stay pruned. With temperature 1, this is the reset of the authors' script: pruned entries can return.

    After the reset, no score exceeds `init_value`. For `init_value <= 0` the hard mask is then 0 everywhere: evaluate a
    ticket before the reset, never right after it.

    Args:
        scores: float arrays, any shapes.
        temperature: finite scalar > 0, dimensionless. May be traced.
        init_value: initial value of all scores, finite, at least -80. May be traced.

    Returns:
        Tree like `scores` (structure, shapes, dtypes). A product below the range of the dtype becomes the lowest
        finite value of the dtype.

    Raises:
        ValueError: a leaf is not a float array, or the temperature or initial value, where concrete, is out of range.

    >>> prune_scores({"kernel": jnp.array([-0.5, 0.25])}, temperature=4.0, init_value=0.0)
    {'kernel': Array([-2.,  0.], dtype=float32)}
    """
    _check_temperature(temperature)
    _check_init_value(init_value)
    _check_floats(scores, "scores")

    def reset(score: jax.Array) -> jax.Array:
        limited = jnp.minimum(temperature * at_least_float32(score), init_value)
        return jnp.maximum(limited, float(jnp.finfo(score.dtype).min)).astype(score.dtype)

    return map_leaves(reset, scores)


def mask_penalty(masks: PyTree) -> jax.Array:
    """Penalty on the masks: the sum of all entries. The weight of the penalty in the loss is lambda in the paper.

    Entries include the scale `1 / sigmoid(init_value)`, as in the authors' code.

    Args:
        masks: arrays, any shapes.

    Returns:
        Scalar array, accumulated in at least float32; 0 for a tree without leaves.

    Raises:
        ValueError: a leaf is not an array.

    >>> mask_penalty({"kernel": jnp.array([0.0, 0.5, 2.0])})
    Array(2.5, dtype=float32)
    """
    _check_arrays(masks, "masks")

    def total(mask: Any) -> jax.Array:
        return jnp.sum(mask, dtype=jnp.promote_types(mask.dtype, jnp.float32))

    return sum(jax.tree.leaves(map_leaves(total, masks)), start=jnp.zeros((), jnp.float32))


def density(masks: PyTree) -> Any:
    """Density of a tree of hard masks: share of nonzero entries, in [0, 1].

    Entries of all leaves are counted together, so large layers have more influence than small layers. Entries of
    soft masks are almost never exactly 0: pass `hard_mask(scores, ...)`.

    Args:
        masks: hard masks, any dtypes and shapes; at least one entry in total.

    Returns:
        A Python float; a scalar array if a mask is traced.

    Raises:
        ValueError: a leaf is not an array, or there is no entry.

    >>> density({"a": jnp.array([0.0, 2.0, 2.0]), "b": jnp.zeros(5)})
    0.25
    """
    _check_arrays(masks, "masks")
    leaves = jax.tree.leaves(masks)
    total = sum(math.prod(mask.shape) for mask in leaves)
    if total == 0:
        raise ValueError("masks without entries: must have at least one entry")
    if any(isinstance(mask, Tracer) for mask in leaves):
        return jnp.asarray(sum(jnp.count_nonzero(mask) for mask in leaves) / total)
    # Rows are counted on the devices of the masks and added on the host, so that a 32-bit count cannot overflow.
    counts = on_host([_count_rows(mask) for mask in leaves])
    return sum(int(np.sum(count, dtype=np.int64)) for count in counts) / total


def _count_rows(mask: Any) -> Any:
    if isinstance(mask, np.ndarray):
        return np.count_nonzero(mask)
    return jnp.count_nonzero(mask, axis=-1 if mask.ndim else None)


def _path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _scale(init_value: ArrayLike, dtype: DTypeLike) -> ArrayLike:
    """Scale `1 / sigmoid(init_value)`, computed as `1 + exp(-init_value)`, which is exactly 2 at 0."""
    if isinstance(init_value, jax.Array):
        return 1 + jnp.exp(-init_value.astype(dtype))
    return 1 + math.exp(-float(np.asarray(init_value)))


def _check_arrays(tree: PyTree, what: str) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"{_leaf_name(path, what)} {leaf!r}: must be an array")


def _check_floats(tree: PyTree, what: str) -> None:
    _check_arrays(tree, what)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{_leaf_name(path, what)} of dtype {leaf.dtype}: must have a float dtype")


def _leaf_name(path: tuple, what: str) -> str:
    return f"{what} {_path_name(path)!r}" if path else what


def _check_temperature(temperature: ArrayLike) -> None:
    value = _concrete_scalar(temperature, "temperature")
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"temperature {value:g}: must be a finite number above 0")


def _check_init_value(init_value: ArrayLike, name: str = "init_value") -> None:
    value = _concrete_scalar(init_value, name)
    if value is not None and not (math.isfinite(value) and value >= MIN_INIT_VALUE):
        raise ValueError(f"{name} {value:g}: must be a finite number of at least {MIN_INIT_VALUE:g}")


def _concrete_scalar(value: ArrayLike, name: str) -> float | None:
    """`value` as a Python float; None if it is traced."""
    array = value if isinstance(value, Tracer) else np.asarray(value)
    if array.shape != ():
        raise ValueError(f"{name} of shape {array.shape}: must be a scalar")
    if isinstance(array, Tracer):
        return None
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"{name} {value!r}: must be a real number")
    return float(array)
