"""The share of multiply-adds that was asked for: scores of channels held at it, and a ticket that has no more.

As `cs_jax.budget` does for the density, with what the smaller network computes in place of the weights that are kept.
It is not a sum over channels: what one costs depends on how many there are before and behind it.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from cs_jax import masks
from cs_jax.budget import warn_collapsed
from cs_jax.channels import Channels
from cs_jax.sharding import on_host

PyTree = Any


def check_share(channels: Channels, share: float) -> None:
    """Raises a ValueError unless the network can have this share of its multiply-adds."""
    least = channels.multiply_adds([1] * len(channels.scored)) / _dense(channels)
    if share < least:
        raise ValueError(f"wanted at least {least:.3g}, what the network has with one channel left in each layer")


def hold(channels: Channels, scores: PyTree, share: float) -> PyTree:
    """Scores shifted, all by the same amount, so that the channels above 0 have no more than a share of multiply-adds.

    The order of the scores stays. Where the last ones are equal, none of them is above 0.

    Args:
        channels: of the network.
        scores: as `channels.selection.init_scores` makes them, not traced.
        share: of the whole network's multiply-adds, in (0, 1].

    Returns:
        Tree like `scores` (structure, shapes, dtypes).
    """
    leaves = channels.selection.score_leaves(scores)
    values, owners = _flat(leaves)
    order = np.argsort(-values, kind="stable")
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        counts = np.bincount(owners[order[:middle]], minlength=len(leaves))
        low, high = (middle, high) if _fits(channels, counts, share) else (low, middle - 1)
    if low < len(order):
        threshold = values[order[low]]
    else:
        threshold = values.min() - 1e-6 * max(abs(values.min()), 1)
    wide = map(masks.at_least_float32, leaves)
    shifted = [(array - jnp.asarray(threshold, array.dtype)) for array in wide]
    return channels.selection.nest(new.astype(old.dtype) for new, old in zip(shifted, leaves, strict=True))


def keep_highest(channels: Channels, scores: PyTree, share: float | None) -> PyTree:
    """1 for the channels that a ticket keeps and -1 for the others, in place of their scores.

    The highest of each layer, then in the order of the scores whichever still fits. Of equal scores the first ones are
    kept, in the order of the arrays and of their entries.

    Args:
        channels: of the network.
        scores: as `channels.selection.init_scores` makes them, not traced.
        share: of the whole network's multiply-adds, in (0, 1]; None keeps what is above 0, and the highest of each
            layer.

    Warns:
        CollapsedLayerWarning: a layer has only its highest score, by reservation.
    """
    leaves = channels.selection.score_leaves(scores)
    values, owners = _flat(leaves)
    order = np.argsort(-values, kind="stable")
    best = [order[owners[order] == owner][0] for owner in range(len(leaves))]
    kept, counts = np.zeros(len(values), bool), np.ones(len(leaves), int)
    kept[best] = True
    freely = values > 0
    for index in order[~kept[order]]:
        counts[owners[index]] += 1
        kept[index] = freely[index] if share is None else _fits(channels, counts, share)
        counts[owners[index]] -= not kept[index]
    last = values[order[kept[order]][-1]] if share is not None else 0.0
    starts = np.cumsum([0, *channels.sizes])
    for number, leaf in enumerate(channels.scored):
        if counts[number] == 1 < channels.sizes[number] and values[best[number]] <= last:
            warn_collapsed(leaf.name, "has only its highest score kept, by reservation")
    signs = np.where(kept, 1.0, -1.0)
    parts = (signs[start:end] for start, end in zip(starts, starts[1:], strict=False))
    shaped = zip(parts, leaves, strict=True)
    return channels.selection.nest(jnp.asarray(part.reshape(leaf.shape), leaf.dtype) for part, leaf in shaped)


def _flat(leaves: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """All scores, and which of the arrays each is of."""
    flat = [on_host(leaf).astype(np.float64).ravel() for leaf in leaves]
    return np.concatenate(flat), np.repeat(np.arange(len(flat)), [len(part) for part in flat])


def _fits(channels: Channels, counts: np.ndarray, share: float) -> bool:
    limit = share * _dense(channels) * (1 + 1e-12)  # a share that was computed from a count is rounded
    return channels.multiply_adds(counts.tolist()) <= limit


def _dense(channels: Channels) -> int:
    return channels.multiply_adds(channels.sizes)
