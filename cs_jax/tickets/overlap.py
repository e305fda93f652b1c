"""Mask overlap compared with chance, and the flip rate of masks.

Kept entries are counted on the host in exact integers. An entry that is not 0 is kept.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.errors import ConfigError
from cs_jax.core.trees import Path


class Overlap(NamedTuple):
    """Overlap of two masks A and B, and its expectation for random masks.

    In each layer, the random masks keep the same numbers of weights as A and B, drawn uniformly and independently. The
    number of weights that both random masks keep is then a sum of hypergeometric variables. A layer of n weights, of
    which A keeps a and B keeps b, contributes mean `a * b / n` and variance
    `a * b * (n - a) * (n - b) / (n**2 * (n - 1))`.
    """

    kept: int  # weights that both keep, |A and B|
    of: tuple[int, int]  # weights that A keeps and weights that B keeps
    iou: float  # Jaccard index |A and B| / |A or B|, in [0, 1]; 1 if neither keeps a weight
    shared: float  # |A and B| / min(|A|, |B|), in [0, 1]; 1 if A or B keeps no weight
    chance: float  # mean of `shared` for random masks, in [0, 1]; 1 if A or B keeps no weight
    z: float | None  # (kept - mean) / standard deviation for random masks; None if the deviation is 0


class NamedOverlap(NamedTuple):
    """Row of `overlap_table`."""

    name: str
    other: str
    overlap: Overlap


class _Counts(NamedTuple):
    """Numbers of weights in a layer."""

    both: int  # kept by both masks
    one: int  # kept by the first mask
    other: int  # kept by the second mask
    size: int


def overlap(masks: PyTree, others: PyTree) -> Overlap:
    """Overlap of the masks of two tickets over all layers.

    The expectation uses the counts of each layer. If two tickets agree only in the densities of their layers, their
    masks overlap, but `z` is near 0.

    Args:
        masks: hard masks, arrays of any dtype and shape; an entry that is not 0 is kept.
        others: masks with the same paths and shapes; scales and dtypes may differ.

    Raises:
        ConfigError: an array is in only one of the trees, or has different shapes in them, or a leaf is not an array.

    >>> overlap({"a": np.array([2.0, 2.0, 0.0, 0.0])}, {"a": np.array([2.0, 0.0, 0.0, 0.0])})
    Overlap(kept=1, of=(2, 1), iou=0.5, shared=1.0, chance=0.5, z=1.0)
    """
    return _overlap(_compare(masks, others).values())


def layer_overlap(masks: PyTree, others: PyTree) -> dict[str, Overlap]:
    """`overlap` of each masked array, by name; arguments and errors as for `overlap`."""
    return {trees.name(path): _overlap([count]) for path, count in _compare(masks, others).items()}


def overlap_table(named: Mapping[str, PyTree]) -> list[NamedOverlap]:
    """`overlap` of each pair of tickets, in the order of `named`.

    Args:
        named: masks of each ticket, by the ticket's name; see `overlap`.

    Raises:
        ConfigError: a ticket has other arrays or shapes than the first ticket; the message names the ticket.
    """
    kept = {name: _kept(masks, name) for name, masks in named.items()}
    for name, masks in kept.items():
        check_alike(next(iter(kept.values())), masks, name)
    return [
        NamedOverlap(name, other, _overlap(_counts(kept[name], kept[other]).values()))
        for name, other in itertools.combinations(kept, 2)
    ]


def flipped(masks: PyTree, before: PyTree) -> float:
    """Flip rate: share of maskable weights that only one of two masks keeps, in [0, 1].

    Args:
        masks: hard masks, see `overlap`; at least one entry in total.
        before: earlier masks with the same paths and shapes, for example of the previous round.

    Raises:
        ConfigError: an array is in only one of the trees, or has different shapes in them; a leaf is not an array; or
            there is no entry.

    >>> flipped({"a": np.array([2.0, 2.0, 0.0, 0.0])}, {"a": np.array([1.0, 0.0, 0.0, 0.0])})
    0.25
    """
    counts = _compare(masks, before, "before").values()
    size = sum(count.size for count in counts)
    if size == 0:
        raise ConfigError("masks: empty; must have at least one entry")
    return sum(count.one + count.other - 2 * count.both for count in counts) / size


def _kept(masks: PyTree, what: str) -> dict[Path, np.ndarray]:
    """Boolean masks of the kept entries, on the host, by path."""
    leaves = trees.leaves_by_path(masks)
    for path, mask in leaves.items():
        if not hasattr(mask, "dtype"):
            raise ConfigError(f"{what} {trees.name(path)!r} {mask!r}: must be an array")
    return {path: np.asarray(mask) != 0 for path, mask in leaves.items()}


def _compare(masks: PyTree, others: PyTree, what: str = "others") -> dict[Path, _Counts]:
    """Counts of each layer, by path; `what` names `others` in error messages."""
    kept, kept_too = _kept(masks, "masks"), _kept(others, what)
    check_alike(kept, kept_too, what)
    return _counts(kept, kept_too)


def _counts(kept: Mapping[Path, np.ndarray], others: Mapping[Path, np.ndarray]) -> dict[Path, _Counts]:
    counts = {}
    for path, one in kept.items():
        other = others[path]
        both, *each = (int(np.count_nonzero(chosen)) for chosen in (one & other, one, other))
        counts[path] = _Counts(both, *each, size=one.size)
    return counts


def _overlap(counts: Iterable[_Counts]) -> Overlap:
    """Overlap over all layers, from exact sums that are rounded once."""
    counts = [count for count in counts if count.size > 0]
    both, one, other = (sum(count[index] for count in counts) for index in range(3))
    mean = sum((Fraction(count.one * count.other, count.size) for count in counts), Fraction(0))
    variance = sum(map(_variance, counts), Fraction(0))
    union, least = one + other - both, min(one, other)
    return Overlap(
        kept=both,
        of=(one, other),
        iou=both / union if union else 1.0,
        shared=both / least if least else 1.0,
        chance=float(mean / least) if least else 1.0,
        z=float(both - mean) / math.sqrt(variance) if variance else None,
    )


def _variance(count: _Counts) -> Fraction:
    """Variance of the number of weights in a layer that two random masks both keep."""
    _, one, other, size = count
    ways = one * other * (size - one) * (size - other)
    return Fraction(ways, size**2 * (size - 1)) if ways else Fraction(0)  # 0 for size 1


def check_alike(leaves: Mapping[Path, Any], others: Mapping[Path, Any], what: str) -> None:
    """Raises a ConfigError unless `others` has the paths and shapes of `leaves`; `what` names `others` in the error."""
    for path in {**leaves, **others}:
        if path not in others:
            raise ConfigError(f"{what} {trees.name(path)!r}: missing; must have shape {np.shape(leaves[path])}")
        if path not in leaves:
            raise ConfigError(f"{what} {trees.name(path)!r}: unknown; the other masks have no such array")
        wanted, got = np.shape(leaves[path]), np.shape(others[path])
        if got != wanted:
            raise ConfigError(f"{what} {trees.name(path)!r} of shape {got}: must have shape {wanted}")
