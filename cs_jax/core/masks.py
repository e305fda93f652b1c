"""Scores to masks and back: the formulas of Continuous Sparsification as pure functions on pytrees.

A *score* is a trainable number, one per maskable weight. A *mask* is what multiplies the weight. Every function
here takes one array or any pytree of JAX or NumPy arrays and keeps its structure and dtypes; a NumPy array of
float64 stays float64 whether or not JAX's 64-bit mode is on.

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
"""Least initial score: below it the mask scale 1/sigmoid(init_value) leaves float32."""


def init_scores(masks: PyTree, value: ArrayLike, *, dtype: DTypeLike | None = None) -> PyTree:
    """Scores of the same structure and shapes as `masks`, every entry `value`.

    Args:
        masks: arrays, any shapes; one leaf per masked weight array (for a Flax model, its "masks" collection).
        value: initial score (s0 in the paper), finite and at least -80; higher keeps more weights. May be traced.
        dtype: float dtype of the scores; by default that of each mask, but float32 where the mask's is narrower,
            because small steps vanish in bfloat16.

    Returns:
        Tree like `masks` of constant arrays.

    Raises:
        ValueError: `value` is not finite or below -80, or `dtype` is not a float dtype.

    >>> init_scores({"kernel": jnp.ones((1, 2), jnp.bfloat16)}, -0.02)
    {'kernel': Array([[-0.02, -0.02]], dtype=float32)}
    """
    _check_init_value(value, name="value")
    _check_arrays(masks, "masks")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {jnp.dtype(dtype)}, wanted a float dtype")

    def fill(mask: Any) -> jax.Array:
        kind = jnp.promote_types(mask.dtype, jnp.float32) if dtype is None else dtype
        return jnp.full_like(mask, value, dtype=kind)  # which is where the mask is, too

    return map_leaves(fill, masks)


def soft_mask(scores: PyTree, temperature: ArrayLike, *, init_value: ArrayLike) -> PyTree:
    """Relaxed mask `sigmoid(temperature * score) / sigmoid(init_value)`, leaf by leaf.

    Multiplies the weights while scores are trained, and tends to `hard_mask` as the temperature (beta in the paper)
    grows. It is 1, to rounding, where a score still has its initial value and the temperature is 1. Values and
    gradients are finite for every finite score and temperature.

    Args:
        scores: float arrays, any shapes; one leaf per masked weight array.
        temperature: scalar > 0, dimensionless, may be traced; larger is harder.
        init_value: the value that every score started from, at least -80; fixes the scale. May be traced.

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
    """Ticket's mask `[score > 0] / sigmoid(init_value)`, leaf by leaf.

    The inequality is strict: a score of exactly 0 is off. The scale stays, so at `init_value` 0 a kept weight is
    multiplied by 2: it is what the network was trained with while masks were soft.

    Args:
        scores: float arrays, any shapes.
        init_value: the value that every score started from, at least -80. May be traced.

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

    Positive evidence is forgotten, negative evidence kept. With the temperature that the round ended on, this is the
    paper's reset, after which pruned entries stay pruned; with temperature 1 it is the one that the authors' script
    performs, after which they can come back.

    Afterwards no score exceeds `init_value`, so for `init_value <= 0` the hard mask is empty: evaluate a ticket
    before the reset, never right after it.

    Args:
        scores: float arrays, any shapes.
        temperature: scalar > 0, may be traced.
        init_value: the value that every score started from, at least -80. May be traced.

    Returns:
        Tree like `scores` (structure, shapes, dtypes). A product too large for the dtype becomes its lowest finite
        value.

    Raises:
        ValueError: a leaf is not a float array, or the temperature or initial value, where concrete, is out of range.

    >>> prune_scores({"kernel": jnp.array([-0.5, 0.25])}, temperature=4.0, init_value=0.0)
    {'kernel': Array([-2.,  0.], dtype=float32)}
    """
    _check_temperature(temperature)
    _check_init_value(init_value)
    _check_floats(scores, "scores")

    def reset(score: jax.Array) -> jax.Array:
        evidence = jnp.minimum(temperature * at_least_float32(score), init_value)
        return jnp.maximum(evidence, float(jnp.finfo(score.dtype).min)).astype(score.dtype)

    return map_leaves(reset, scores)


def mask_penalty(masks: PyTree) -> jax.Array:
    """Sum of all mask entries, a scalar: the penalty that, times its weight (lambda in the paper), joins the loss.

    Entries are counted with their scale `1 / sigmoid(init_value)`, as in the authors' code.

    Args:
        masks: arrays, any shapes.

    Returns:
        Scalar array, accumulated in at least float32; 0 for a tree without leaves.

    >>> mask_penalty({"kernel": jnp.array([0.0, 0.5, 2.0])})
    Array(2.5, dtype=float32)
    """
    _check_arrays(masks, "masks")

    def total(mask: Any) -> jax.Array:
        return jnp.sum(mask, dtype=jnp.promote_types(mask.dtype, jnp.float32))

    return sum(jax.tree.leaves(map_leaves(total, masks)), start=jnp.zeros((), jnp.float32))


def density(masks: PyTree) -> Any:
    """Share of nonzero entries over the whole tree of hard masks, in [0, 1].

    Entries are counted in integers over all leaves together, so large layers weigh more than small ones. Soft masks
    are hardly ever exactly 0: count `hard_mask(scores, ...)`.

    Args:
        masks: hard masks (of any dtype), any shapes; not all empty.

    Returns:
        A Python float; a scalar array where a mask is traced.

    Raises:
        ValueError: there is no entry to count.

    >>> density({"a": jnp.array([0.0, 2.0, 2.0]), "b": jnp.zeros(5)})
    0.25
    """
    _check_arrays(masks, "masks")
    leaves = jax.tree.leaves(masks)
    total = sum(math.prod(mask.shape) for mask in leaves)
    if total == 0:
        raise ValueError("density of masks without any entry: wanted at least one")
    if any(isinstance(mask, Tracer) for mask in leaves):
        return jnp.asarray(sum(jnp.count_nonzero(mask) for mask in leaves) / total)
    # Rows are counted where the masks are and added up on the host: no 32-bit count can overflow.
    counts = on_host([_count_rows(mask) for mask in leaves])
    return sum(int(np.sum(count, dtype=np.int64)) for count in counts) / total


def _count_rows(mask: Any) -> Any:
    if isinstance(mask, np.ndarray):
        return np.count_nonzero(mask)
    return jnp.count_nonzero(mask, axis=-1 if mask.ndim else None)


def _path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _scale(init_value: ArrayLike, dtype: DTypeLike) -> ArrayLike:
    """Scale `1 / sigmoid(init_value)`, as `1 + exp(-init_value)`: exactly 2 at 0."""
    if isinstance(init_value, jax.Array):
        return 1 + jnp.exp(-init_value.astype(dtype))
    return 1 + math.exp(-float(np.asarray(init_value)))


def _check_arrays(tree: PyTree, what: str) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"{_leaf_name(path, what)}: got {leaf!r}, wanted an array")


def _check_floats(tree: PyTree, what: str) -> None:
    _check_arrays(tree, what)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{_leaf_name(path, what)}: got dtype {leaf.dtype}, wanted a float dtype")


def _leaf_name(path: tuple, what: str) -> str:
    return f"{what} {_path_name(path)!r}" if path else what


def _check_temperature(temperature: ArrayLike) -> None:
    value = _concrete_scalar(temperature, "temperature")
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"temperature: got {value:g}, wanted a finite number above 0")


def _check_init_value(init_value: ArrayLike, name: str = "init_value") -> None:
    value = _concrete_scalar(init_value, name)
    if value is not None and not (math.isfinite(value) and value >= MIN_INIT_VALUE):
        raise ValueError(f"{name}: got {value:g}, wanted a finite number of at least {MIN_INIT_VALUE:g}")


def _concrete_scalar(value: ArrayLike, name: str) -> float | None:
    """`value` as a Python float; None where it is traced."""
    if isinstance(value, Tracer):
        if value.shape != ():
            raise ValueError(f"{name}: got an array of shape {value.shape}, wanted a scalar")
        return None
    array = np.asarray(value)
    if array.shape != ():
        raise ValueError(f"{name}: got an array of shape {array.shape}, wanted a scalar")
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"{name}: got {value!r}, wanted a real number")
    return float(array)
