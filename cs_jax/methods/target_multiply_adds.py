"""The share of multiply-adds that was asked for: scores of channels held at it, and a ticket that has no more.

As `cs_jax.budget` does for the density, with what the smaller network computes in place of the weights that are kept.
It is not a sum over channels: what one costs depends on how many there are before and behind it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cs_jax.core.arrays import at_least_float32, on_host
from cs_jax.core.target_density import warn_collapsed
from cs_jax.models.channels import Channels


def check_share(channels: Channels, share: float, multiple: int = 1) -> None:
    """Raises a ValueError unless the network can have this share of its multiply-adds; see `keep_highest`."""
    fewest = [int(counts[0]) for counts in _possible_counts(channels, multiple)]
    least = channels.multiply_adds(fewest) / _dense(channels)
    if share < least:
        least = math.ceil(1000 * least) / 1000
        if multiple == 1:
            raise ValueError(f"wanted at least {least}, what the network has with one channel left in each layer")
        raise ValueError(
            f"wanted at least {least}, what the network has with the fewest channels left in each layer that are a "
            f"multiple of {multiple}, or a smaller --channel-multiple"
        )


def track_target(channels: Channels, scores: PyTree, share: float) -> PyTree:
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
    flat = _flat(leaves)
    values, owners = np.concatenate(flat), np.repeat(np.arange(len(flat)), channels.sizes)
    order = np.argsort(-values, kind="stable")
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        counts = np.bincount(owners[order[:middle]], minlength=len(leaves))
        low, high = (middle, high) if _fits(channels, counts.tolist(), share) else (low, middle - 1)
    if low < len(order):
        threshold = values[order[low]]
    else:
        threshold = values.min() - 1e-6 * max(abs(values.min()), 1)
    wide = map(at_least_float32, leaves)
    shifted = [(array - jnp.asarray(threshold, array.dtype)) for array in wide]
    return channels.selection.nest(new.astype(old.dtype) for new, old in zip(shifted, leaves, strict=True))


def keep_highest(
    channels: Channels, scores: PyTree, share: float | None, multiple: int = 1, *, least: float = -math.inf
) -> PyTree:
    """1 for the channels that a ticket keeps and -1 for the others, in place of their scores.

    With a share, layers are filled with their highest channels, so many at once that what is computed stays a multiple:
    first the fewest of each layer, then those with the highest mean, over all layers, which still fit. Without one,
    what is above 0 is kept, and the highest of each layer. Of equal scores the first ones are kept, in the order of the
    arrays and of their entries.

    Args:
        channels: of the network.
        scores: as `channels.selection.init_scores` makes them, not traced.
        share: of the whole network's multiply-adds, in (0, 1]; None leaves it to the scores.
        multiple: what the channels are a multiple of that a layer computes with, where the whole layer's are.
        least: with a share, channels whose scores are below it are kept by reservation alone.

    Warns:
        CollapsedLayerWarning: a layer has only the fewest channels it can have, by reservation.
    """
    leaves = channels.selection.score_leaves(scores)
    flat = _flat(leaves)
    if share is None:
        counts = [max(int((values > 0).sum()), 1) for values in flat]
        reserved = [values.max() <= 0 for values in flat]
    else:
        counts, reserved = _fill(channels, flat, share, _possible_counts(channels, multiple), least)
    for leaf, size, count, only in zip(channels.scored, channels.sizes, counts, reserved, strict=True):
        if only and count < size:
            some = "its highest score" if count == 1 else f"its {count} highest scores"
            warn_collapsed(leaf.name, f"has only {some} kept, by reservation")
    signs = []
    for values, count, leaf in zip(flat, counts, leaves, strict=True):
        kept = np.full(len(values), -1.0)
        kept[np.argsort(-values, kind="stable")[:count]] = 1.0
        signs.append(jnp.asarray(kept.reshape(leaf.shape), leaf.dtype))
    return channels.selection.nest(signs)


def _fill(
    channels: Channels, scores: list[np.ndarray], share: float, possible: list[np.ndarray], least: float
) -> tuple[list[int], list[bool]]:
    """How many of the highest scores each layer keeps, and whether these are all below what others could not keep."""
    means, lowest, owners = [], [], []
    for owner, (values, counts) in enumerate(zip(scores, possible, strict=True)):
        parts = np.split(-np.sort(-values), counts[:-1])
        means += [part.mean() for part in parts]
        lowest += [part[-1] for part in parts]
        owners += [owner] * len(parts)
    first = [owners.index(owner) for owner in range(len(scores))]
    kept = [int(counts[0]) for counts in possible]
    places, last = [0] * len(scores), np.inf
    for part in np.argsort(-np.asarray(means), kind="stable"):
        owner = owners[part]
        if part in first or lowest[part] < least:
            continue
        more = [*kept]
        more[owner] = int(possible[owner][places[owner] + 1])
        if _fits(channels, more, share):
            kept, last = more, means[part]
            places[owner] += 1
    return kept, [place == 0 and means[part] <= last for place, part in zip(places, first, strict=True)]


def _possible_counts(channels: Channels, multiple: int) -> list[np.ndarray]:
    """The numbers of channels that each layer may keep, increasing."""
    found = []
    for size, width, stays in zip(channels.sizes, channels.widths, channels.stays, strict=True):
        step = multiple // math.gcd(multiple, width)
        step = step if size % step == 0 else 1
        counts = np.append(np.arange(step - stays, size, step), size)
        found.append(counts[counts > 0])
    return found


def _flat(leaves: list[Any]) -> list[np.ndarray]:
    """The scores of each array, on the host."""
    return [on_host(leaf).astype(np.float64).ravel() for leaf in leaves]


def _fits(channels: Channels, counts: Sequence[int], share: float) -> bool:
    limit = share * _dense(channels) * (1 + 1e-12)  # a share that was computed from a count is rounded
    return channels.multiply_adds(counts) <= limit


def _dense(channels: Channels) -> int:
    return channels.multiply_adds(channels.sizes)
