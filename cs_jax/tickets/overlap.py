"""What masks have in common: how far they overlap, beside what chance would give, and how far they have changed.

Masks are counted on the host, in exact integers; an entry that is not 0 is kept.
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
    """How far two masks A and B agree on what to keep, and how far they would by chance.

    By chance means: each layer's kept weights are drawn at random, independently for A and B, as many as each keeps
    there. The size of what both keep is then a sum of hypergeometric numbers, of mean `a * b / n` and variance
    `a * b * (n - a) * (n - b) / (n**2 * (n - 1))` for a layer of n weights where A keeps a and B keeps b.
    """

    kept: int  # weights that both keep, |A and B|
    of: tuple[int, int]  # weights that A keeps, and B
    iou: float  # Jaccard index |A and B| / |A or B|, in [0, 1]; 1 where both are empty
    shared: float  # |A and B| / min(|A|, |B|), in [0, 1]; 1 where one is empty
    chance: float  # mean of `shared` by chance, in [0, 1]; 1 where one is empty
    z: float | None  # standard deviations that `kept` is above its mean by chance; None where chance leaves no choice


class NamedOverlap(NamedTuple):
    """A line of `overlap_table`."""

    name: str
    other: str
    overlap: Overlap


class _Counts(NamedTuple):
    """Weights of a layer."""

    both: int  # kept by both masks
    one: int
    other: int
    size: int


def overlap(masks: PyTree, others: PyTree) -> Overlap:
    """How far two tickets keep the same weights, over all layers together.

    Chance keeps to each layer's own counts: tickets that are dense in the same layers overlap, and have a `z` near 0
    unless they also agree inside the layers.

    Args:
        masks: hard masks, arrays of any dtype and shape; an entry that is not 0 is kept.
        others: masks under the same paths, of the same shapes. Scales and dtypes may differ.

    Raises:
        ConfigError: an array is in one of the trees alone, or has two shapes.

    >>> overlap({"a": np.array([2.0, 2.0, 0.0, 0.0])}, {"a": np.array([2.0, 0.0, 0.0, 0.0])})
    Overlap(kept=1, of=(2, 1), iou=0.5, shared=1.0, chance=0.5, z=1.0)
    """
    return _overlap(_compare(masks, others).values())


def layer_overlap(masks: PyTree, others: PyTree) -> dict[str, Overlap]:
    """`overlap` of each masked array alone, by its name; arguments and errors are those of `overlap`."""
    return {trees.name(path): _overlap([count]) for path, count in _compare(masks, others).items()}


def overlap_table(named: Mapping[str, PyTree]) -> list[NamedOverlap]:
    """`overlap` of every two of several tickets, each pair once, in the order of `named`.

    Args:
        named: masks as `overlap` takes them, by a name for each ticket.

    Raises:
        ConfigError: an array is not in all trees, or has not one shape; says in which ticket.
    """
    kept = {name: _kept(masks, name) for name, masks in named.items()}
    for name, masks in kept.items():
        check_alike(next(iter(kept.values())), masks, name)
    return [
        NamedOverlap(name, other, _overlap(_counts(kept[name], kept[other]).values()))
        for name, other in itertools.combinations(kept, 2)
    ]


def flipped(masks: PyTree, before: PyTree) -> float:
    """Share of maskable weights that one mask keeps and the other removes, in [0, 1].

    Args:
        masks: hard masks, as `overlap` takes them; not all empty arrays.
        before: the same at an earlier moment, say the round before.

    Raises:
        ConfigError: an array is in one of the trees alone, or has two shapes; or there is no entry to count.

    >>> flipped({"a": np.array([2.0, 2.0, 0.0, 0.0])}, {"a": np.array([1.0, 0.0, 0.0, 0.0])})
    0.25
    """
    counts = _compare(masks, before, "before").values()
    size = sum(count.size for count in counts)
    if size == 0:
        raise ConfigError("masks: got no entry, wanted at least one")
    return sum(count.one + count.other - 2 * count.both for count in counts) / size


def _kept(masks: PyTree, what: str) -> dict[Path, np.ndarray]:
    """Which entries are kept, on the host, by path."""
    leaves = trees.leaves_by_path(masks)
    for path, mask in leaves.items():
        if not hasattr(mask, "dtype"):
            raise ConfigError(f"{what} {trees.name(path)!r}: got {mask!r}, wanted an array")
    return {path: np.asarray(mask) != 0 for path, mask in leaves.items()}


def _compare(masks: PyTree, others: PyTree, what: str = "others") -> dict[Path, _Counts]:
    """Counts of each layer, by path; `what` the others are called where they are refused."""
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
    """The overlap of some layers; rounded once, at the end."""
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
    """Of the number that both keep, by chance."""
    _, one, other, size = count
    ways = one * other * (size - one) * (size - other)
    return Fraction(ways, size**2 * (size - 1)) if ways else Fraction(0)  # size 1 leaves no choice


def check_alike(leaves: Mapping[Path, Any], others: Mapping[Path, Any], what: str) -> None:
    """Refuses others under other paths, or of other shapes, than `leaves`."""
    for path in {**leaves, **others}:
        wanted, got = (f"shape {np.shape(tree[path])}" if path in tree else "nothing" for tree in (leaves, others))
        if got != wanted:
            raise ConfigError(f"{what} {trees.name(path)!r}: got {got}, wanted {wanted}")
