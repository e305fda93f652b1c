"""What tickets have in common: how far their masks overlap, and what lies on the line between their weights.

Masks are counted on the host, in exact integers; an entry that is not 0 is kept.

References:
    Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020,
    arXiv:1912.05671.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from cs_jax import training, trees
from cs_jax.errors import ConfigError
from cs_jax.images import ImageSet
from cs_jax.masks import at_least_float32
from cs_jax.progress import Snapshot
from cs_jax.trees import Path

PyTree = Any


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


class PathPoint(NamedTuple):
    """A network on the line between two others."""

    share: float  # of the second network in the weights: 0 at the first, 1 at the second
    error: float  # share of validation images that are classified wrong, counted exactly
    loss: float  # mean cross-entropy over the validation images


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

    >>> overlap({"a": jnp.array([2.0, 2.0, 0.0, 0.0])}, {"a": jnp.array([2.0, 0.0, 0.0, 0.0])})
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
        _check_alike(next(iter(kept.values())), masks, name)
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

    >>> flipped({"a": jnp.array([2.0, 2.0, 0.0, 0.0])}, {"a": jnp.array([1.0, 0.0, 0.0, 0.0])})
    0.25
    """
    counts = _compare(masks, before, "before").values()
    size = sum(count.size for count in counts)
    if size == 0:
        raise ConfigError("masks: got no entry, wanted at least one")
    return sum(count.one + count.other - 2 * count.both for count in counts) / size


def interpolate(params: PyTree, others: PyTree, share: float) -> PyTree:
    """The tree at `share` of the straight line from `params` to `others`: `params + share * (others - params)`.

    The ends are exact: their own arrays. So is an entry that is the same at both ends.

    Args:
        params: float arrays, any shapes: weights, or BatchNorm statistics.
        others: arrays under the same paths, of the same shapes and dtypes.
        share: of `others` in the result, in [0, 1].

    Returns:
        Tree like `params` (structure, shapes, dtypes), computed in at least float32.

    Raises:
        ConfigError: an array is in one of the trees alone, or has two shapes or dtypes; or the share is out of range.
        ValueError: a leaf is no float array.

    >>> interpolate({"kernel": jnp.array([0.0, 2.0])}, {"kernel": jnp.array([4.0, 2.0])}, 0.25)
    {'kernel': Array([1., 2.], dtype=float32)}
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share: got {share:g}, wanted a number from 0 to 1")
    starts, ends = trees.leaves_by_path(params), trees.leaves_by_path(others)
    _check_alike(starts, ends, "others")
    for path, start in starts.items():
        trees.check_float(start, path)
        trees.check_float(ends[path], path)
        if start.dtype != ends[path].dtype:
            raise ConfigError(f"others {trees.name(path)!r}: got dtype {ends[path].dtype}, wanted {start.dtype}")
    return trees.replace_leaves(params, {path: _between(start, ends[path], share) for path, start in starts.items()})


def error_barrier(errors: Sequence[float]) -> float:
    """How much worse the worst network on a line is than the mean of its two ends; at least 0.

    This is the instability of Frankle et al. (2020), who call networks stable to noise where it is next to nothing.

    Args:
        errors: along the line, both ends included; losses will do as well. Not NaN.

    Raises:
        ConfigError: there are less than two errors, or one is NaN.

    >>> error_barrier([0.125, 0.5, 0.375])
    0.25
    """
    if len(errors) < 2:
        raise ConfigError(f"errors: got {len(errors)}, wanted at least 2, one for each end")
    if any(map(math.isnan, errors)):
        raise ConfigError("errors: got nan, wanted numbers")
    return max(errors) - (errors[0] + errors[-1]) / 2


def connect(
    model: nn.Module,
    ends: tuple[Snapshot, Snapshot],
    masks: PyTree,
    data: ImageSet,
    validation: ImageSet,
    *,
    points: int = 11,
    batch_size: int,
) -> list[PathPoint]:
    """Error and loss at evenly spaced points of the straight line between two networks under the same masks.

    Averaged weights need BatchNorm statistics of their own. So at every point they start from the interpolated ones
    and see one pass over `data` in training mode: without augmentation, in one random order that is always the same,
    in whole batches (the images that are left over are not seen). After k batches, momentum**k of the start is left.
    The ends are treated as all other points are, so their errors may differ from those that their training reported.
    A model without statistics is evaluated as it is.

    Args:
        model: Linen module, called with images and `train`.
        ends: the two networks; their arrays stay as they are.
        masks: of both, as the model takes them; {} where it has none.
        data: images for the BatchNorm statistics, in general those that the ends were trained on.
        validation: images that error and loss are measured on.
        points: on the line, both ends included; at least 2.
        batch_size: images per call, for statistics and evaluation.

    Returns:
        The points, from the first end to the second; `error_barrier` takes their errors.

    Raises:
        ConfigError: the ends do not fit each other, there are no images, or a number is out of range.
        ValueError: the masks do not fit the model.

    References:
        Frankle et al., 2020, arXiv:1912.05671; Izmailov et al., 2018, arXiv:1803.05407, for the statistics of
        averaged weights.
    """
    _check_at_least(2, "points", points)
    _check_at_least(1, "batch_size", batch_size)
    _check_at_least(1, "images of data", len(data))
    _check_at_least(1, "images of validation", len(validation))
    path = []
    for share in (point / (points - 1) for point in range(points)):
        params, batch_stats = (interpolate(one, other, share) for one, other in zip(*ends, strict=True))
        batch_stats = training.estimate_statistics(model, params, batch_stats, masks, data, batch_size=batch_size)
        variables = {"params": params, "batch_stats": batch_stats, "masks": masks}
        logits = training.predict(model, variables, validation, batch_size=batch_size)
        wrong = int(jnp.sum(jnp.argmax(logits, axis=-1) != validation.labels))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, validation.labels)
        path.append(PathPoint(share, wrong / len(validation), float(losses.mean())))
    return path


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
    _check_alike(kept, kept_too, what)
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


def _check_alike(leaves: Mapping[Path, Any], others: Mapping[Path, Any], what: str) -> None:
    """Refuses others under other paths, or of other shapes, than `leaves`."""
    for path in {**leaves, **others}:
        wanted, got = (f"shape {np.shape(tree[path])}" if path in tree else "nothing" for tree in (leaves, others))
        if got != wanted:
            raise ConfigError(f"{what} {trees.name(path)!r}: got {got}, wanted {wanted}")


def _check_at_least(least: int, name: str, number: int) -> None:
    if number < least:
        raise ConfigError(f"{name}: got {number}, wanted at least {least}")


def _between(start: Any, end: Any, share: float) -> Any:
    if share in (0, 1):
        return end if share else start
    wide = at_least_float32(start)
    return (wide + share * (at_least_float32(end) - wide)).astype(start.dtype)
