"""A batch computed in parts, one after another, for the memory of one: gradients of all its examples, added up."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from cs_jax.core.arrays import widen

Compute = Callable[..., tuple[PyTree, PyTree]]


def num_parts(count: int, part_size: int | None) -> int:
    """Least number of parts of `count` examples that have no more than `part_size` each; None is all of them."""
    return 1 if part_size is None else -(-count // part_size)


def mean_over_parts(
    part_size: int | None, compute: Compute, carry: PyTree, *arrays: jax.Array
) -> tuple[PyTree, PyTree]:
    """What `compute` makes of a batch, from as few parts of it as have no more than `part_size` examples each.

    Parts differ by one example at most. Every part takes each so-many-th example, so that a batch which is spread over
    devices stays so. On the CPU parts are written out one after another, because a loop's body is slow there
    (jax-ml/jax#12868); elsewhere those of one size are a loop.

    Args:
        part_size: examples, at least 1; None is all of them.
        compute: from a carry and a part of every array to the next carry, of the same shapes and dtypes, and means
            over the part's examples.
        carry: of the first part.
        arrays: examples along the first axis, as many in each.

    Returns:
        The last carry, and the means over all examples, in the dtypes that `compute` gives them.
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
        # No part begins before the one ahead of it is done with: they would all be in memory at once.
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
    """Where sums begin: in float32 at least."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), means)


def _add(total: PyTree, values: PyTree, share: float) -> PyTree:
    return jax.tree.map(lambda old, value: old + share * value, total, widen(values))
