"""Target share of multiply-adds: shifts channel scores to track it; selects a ticket that does not exceed it.

The counterpart of `cs_jax.core.target_density`, with multiply-adds of the shrunk network instead of kept weights.
Multiply-adds are not a sum over channels: the cost of a channel depends on the number of channels in adjacent layers.
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
    """Raises a ValueError if even the smallest numbers of channels exceed a share of the multiply-adds.

    Args:
        channels: prunable channels of the network.
        share: share of the whole network's multiply-adds, in (0, 1].
        multiple: as for `keep_highest`.
    """
    fewest = [int(counts[0]) for counts in _possible_counts(channels, multiple)]
    least = channels.multiply_adds(fewest) / _dense_multiply_adds(channels)
    if share < least:
        least = math.ceil(1000 * least) / 1000
        if multiple == 1:
            raise ValueError(f"must be at least {least}, the share of the network with one channel in each layer")
        raise ValueError(
            f"must be at least {least}, the share of the network with the fewest channels that --channel-multiple "
            f"{multiple} allows; or reduce --channel-multiple"
        )


def track_target(channels: Channels, scores: PyTree, share: float) -> PyTree:
    """Shifts all scores by one amount, so that the channels with scores above 0 have at most a share of multiply-adds.

    The order of the scores does not change. Scores that are equal to the threshold do not end above 0.

    Args:
        channels: prunable channels of the network.
        scores: one score per channel, in the structure of `channels.selection.init_scores`; not traced.
        share: share of the whole network's multiply-adds, in (0, 1].

    Returns:
        Tree like `scores` (structure, shapes, dtypes).
    """
    leaves = channels.selection.score_leaves(scores)
    flat = _flat_scores(leaves)
    values, layers = np.concatenate(flat), np.repeat(np.arange(len(flat)), channels.sizes)
    order = np.argsort(-values, kind="stable")
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        counts = np.bincount(layers[order[:middle]], minlength=len(leaves))
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
    """Selects the channels of a ticket by score: 1 for kept channels, -1 for other channels.

    With a share, the smallest possible number of channels is reserved in each layer. Then groups of channels of all
    layers are tried in the order of their mean scores. A group is added if the network stays within the share. The
    sizes of the groups keep the number of computed channels of a layer a multiple of `multiple`. Without a share,
    channels with scores above 0 are kept, and the highest score of each layer. Among equal scores the first are kept,
    in the order of arrays and entries.

    Args:
        channels: prunable channels of the network.
        scores: one score per channel, in the structure of `channels.selection.init_scores`; not traced.
        share: share of the whole network's multiply-adds, in (0, 1]; None keeps scores above 0.
        multiple: computed channels of a layer are a multiple of this number, in layers whose full size is a multiple.
        least: with a share, channels with scores below this value are kept only where they are reserved.

    Returns:
        Tree like `scores` (structure, shapes, dtypes), with entries 1 and -1.

    Warns:
        CollapsedLayerWarning: a layer keeps only its reserved channels.
    """
    leaves = channels.selection.score_leaves(scores)
    flat = _flat_scores(leaves)
    if share is None:
        counts = [max(int((values > 0).sum()), 1) for values in flat]
        only_reserved = [values.max() <= 0 for values in flat]
    else:
        counts, only_reserved = _kept_counts(channels, flat, share, _possible_counts(channels, multiple), least)
    for leaf, size, count, only in zip(channels.scored, channels.sizes, counts, only_reserved, strict=True):
        if only and count < size:
            reserved = "highest score, which is" if count == 1 else f"{count} highest scores, which are"
            warn_collapsed(leaf.name, f"keeps only its {reserved} reserved")
    signs = []
    for values, count, leaf in zip(flat, counts, leaves, strict=True):
        kept = np.full(len(values), -1.0)
        kept[np.argsort(-values, kind="stable")[:count]] = 1.0
        signs.append(jnp.asarray(kept.reshape(leaf.shape), leaf.dtype))
    return channels.selection.nest(signs)


def _kept_counts(
    channels: Channels, scores: list[np.ndarray], share: float, possible: list[np.ndarray], least: float
) -> tuple[list[int], list[bool]]:
    """Selects groups of channels as in `keep_highest`.

    Args:
        channels: prunable channels of the network.
        scores: scores of each layer.
        share: share of the whole network's multiply-adds.
        possible: numbers of channels that each layer may keep, increasing.
        least: groups with a score below this value are not added.

    Returns:
        For each layer, the number of kept channels, and whether the layer keeps its channels only because they are
        reserved: no group was added to it, and no added group has a lower mean score than its reserved channels.
    """
    means, lowest, layers = [], [], []
    for layer, (values, counts) in enumerate(zip(scores, possible, strict=True)):
        groups = np.split(-np.sort(-values), counts[:-1])
        means += [group.mean() for group in groups]
        lowest += [group[-1] for group in groups]
        layers += [layer] * len(groups)
    reserved = [layers.index(layer) for layer in range(len(scores))]
    kept = [int(counts[0]) for counts in possible]
    num_added, last_mean = [0] * len(scores), np.inf
    for group in np.argsort(-np.asarray(means), kind="stable"):
        layer = layers[group]
        if group in reserved or lowest[group] < least:
            continue
        more = [*kept]
        more[layer] = int(possible[layer][num_added[layer] + 1])
        if _fits(channels, more, share):
            kept, last_mean = more, means[group]
            num_added[layer] += 1
    return kept, [added == 0 and means[group] <= last_mean for added, group in zip(num_added, reserved, strict=True)]


def _possible_counts(channels: Channels, multiple: int) -> list[np.ndarray]:
    """Numbers of channels that each layer may keep, increasing; the last is the full size of the layer."""
    possible = []
    layers = zip(channels.sizes, channels.features_per_channel, channels.needs_constant, strict=True)
    for size, features, needs_constant in layers:
        step = multiple // math.gcd(multiple, features)
        step = step if size % step == 0 else 1
        counts = np.append(np.arange(step - needs_constant, size, step), size)
        possible.append(counts[counts > 0])
    return possible


def _flat_scores(leaves: list[Any]) -> list[np.ndarray]:
    """The scores of each array, flat, in float64 on the host."""
    return [on_host(leaf).astype(np.float64).ravel() for leaf in leaves]


def _fits(channels: Channels, counts: Sequence[int], share: float) -> bool:
    limit = share * _dense_multiply_adds(channels) * (1 + 1e-12)  # a share computed from a count has a rounding error
    return channels.multiply_adds(counts) <= limit


def _dense_multiply_adds(channels: Channels) -> int:
    return channels.multiply_adds(channels.sizes)
