"""Order of examples in evaluation passes, and accuracy from logits."""

import numpy as np
from jaxtyping import Array, Float, Int

from cs_jax.data.stream import Images
from cs_jax.training import compiled


def all_in_order(count: int, batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """Indices of all examples in order, in full batches; the last index is repeated to fill the last batch.

    >>> all_in_order(5, 2)
    array([[0, 1],
           [2, 3],
           [4, 4]])
    """
    batch_size = min(batch_size, count)
    return np.minimum(np.arange(-(-count // batch_size) * batch_size), count - 1).reshape(-1, batch_size)


def shuffled(count: int, batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """Indices of examples in an order that is shuffled but always the same, in full batches; the rest is left out.

    >>> shuffled(5, 2)
    array([[4, 2],
           [3, 1]])
    """
    batch_size = min(batch_size, count)
    order = np.random.default_rng(0).permutation(count)[: count // batch_size * batch_size]
    return order.reshape(-1, batch_size)


def share_right(logits: Float[Array, "examples classes"], data: Images) -> float:
    """Share of the examples of `data` that the logits classify correctly, in [0, 1], from an exact count."""
    return int(compiled.count_right(logits, data.labels)) / len(data)
