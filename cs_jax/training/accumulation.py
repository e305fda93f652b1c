"""Gradient accumulation: computes a batch in parts, one after another, with the memory for one part."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from cs_jax.core.arrays import widen

Compute = Callable[..., tuple[PyTree, PyTree]]


def num_parts(count: int, part_size: int | None) -> int:
    """Smallest number of parts of at most `part_size` examples for `count` examples; 1 if `part_size` is None."""
    return 1 if part_size is None else -(-count // part_size)


def mean_over_parts(
    part_size: int | None, compute: Compute, carry: PyTree, *arrays: jax.Array
) -> tuple[PyTree, PyTree]:
    """Means over a batch, computed in the smallest number of parts of at most `part_size` examples.

    The sizes of the parts differ by at most one. With k parts, a part takes every k-th example, so that a batch that is
    split over devices stays split. On a CPU, the loop over the parts is unrolled, because XLA computes convolutions
    slowly inside loops there (jax-ml/jax#12868). On other devices, the loop is unrolled only if the part sizes differ.

    Args:
        part_size: maximum number of examples in a part, at least 1; None computes the whole batch at once.
        compute: function of a carry and a part of every array. Returns the next carry, with the same shapes and dtypes,
            and means over the examples of the part.
        carry: carry for the first part.
        arrays: examples along the first axis; all arrays have the same number of examples.

    Returns:
        The last carry, and the means over all examples, in the dtypes of the means of `compute`.
    """
    count = len(arrays[0])
    parts = num_parts(count, part_size)
    if parts == 1:
        return compute(carry, *arrays)
    means = jax.eval_shape(lambda: compute(carry, *[array[::parts] for array in arrays])[1])
    in_a_loop = count % parts == 0 and jax.default_backend() != "cpu"
    carry, total = (_looped if in_a_loop else _unrolled)(parts, compute, carry, means, arrays)
    return carry, jax.tree.map(lambda mean, like: mean.astype(like.dtype), total, means)


def _unrolled(
    parts: int, compute: Compute, carry: PyTree, means: PyTree, arrays: tuple[jax.Array, ...]
) -> tuple[PyTree, PyTree]:
    total = _zeros(means)
    for number in range(parts):
        part = [array[number::parts] for array in arrays]
        # Without the barrier, parts could be computed at the same time, and all would be in memory together.
        part, carry, total = lax.optimization_barrier((part, carry, total))
        carry, values = compute(carry, *part)
        total = _add(total, values, len(part[0]) / len(arrays[0]))
    return carry, total


def _looped(
    parts: int, compute: Compute, carry: PyTree, means: PyTree, arrays: tuple[jax.Array, ...]
) -> tuple[PyTree, PyTree]:
    def body(both: tuple[PyTree, PyTree], part: list[jax.Array]) -> tuple[tuple[PyTree, PyTree], None]:
        carry, values = compute(both[0], *part)
        return (carry, _add(both[1], values, 1 / parts)), None

    stacked = [array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1) for array in arrays]
    both, _ = lax.scan(body, (carry, _zeros(means)), stacked)
    return both


def _zeros(means: PyTree) -> PyTree:
    """Zero sums, in float32 or wider."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), means)


def _add(total: PyTree, values: PyTree, share: float) -> PyTree:
    return jax.tree.map(lambda old, value: old + share * value, total, widen(values))
