"""Target density: shifts scores to track it; selects a ticket that meets it exactly.

Without a target, a search ends at a density that depends on initial score, penalty and learning rates. With a target,
all scores are shifted by the same amount at the end of every epoch, so that only the highest scores are above 0. The
weight of the penalty does not change. The density falls by the same factor in every round.

The alternative is constrained optimization, which adapts the weight of the penalty until the constraint is met
(Gallego-Posada et al., "Controlled sparsity via constrained optimization", NeurIPS 2022, arXiv:2208.04425). Constrained
optimization hardly moves scores whose masks are already hard, and needs one more learning rate.
`benchmarks/density_control.py` compares both.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.arrays import at_least_float32, on_host
from cs_jax.core.errors import CsJaxWarning
from cs_jax.core.selection import Budget, Selection


class CollapsedLayerWarning(CsJaxWarning):
    """Masked arrays keep no weight, or only the weights of the highest score, which is reserved.

    Args:
        message: text of the warning.
        layers: names of the arrays.
    """

    def __init__(self, message: str, layers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.layers = layers


class DensityWarning(CsJaxWarning):
    """Groups are too large for the target density: the number of kept weights is more than 1% off."""


class UnfinishedSearchWarning(CsJaxWarning):
    """A search ended with soft masks: below the final temperature, or with scores that have hardly moved."""


def round_density(target: float, round: Any, rounds: Any) -> Any:
    """Density that scores track in a round, `target ** ((round + 1) / rounds)`: the target in the last round.

    Args:
        target: density of the ticket, in (0, 1].
        round: round of the search, from 0, may be traced; rounds after the planned ones have the target.
        rounds: planned rounds of the search, at least 1; may be traced.

    Returns:
        A Python float; a scalar array if `round` or `rounds` is an array.

    >>> [round_density(0.01, round, 2) for round in range(2)]
    [0.1, 0.01]
    """
    share = (round + 1) / rounds
    return target ** (jnp.minimum(share, 1) if isinstance(share, jax.Array) else min(share, 1))


@functools.partial(jax.jit, static_argnames="selection")
def track_density(selection: Selection, scores: PyTree, round: Any, rounds: Any) -> PyTree:
    """Scores, shifted so that in every budget, the number of weights with scores above 0 is the target of the round.

    All scores of a budget are shifted by the same amount, so their order does not change. If several scores equal the
    threshold, fewer weights have scores above 0. If all scores are equal, as at the start, no score is above 0, except
    at density 1.

    Args:
        selection: selection with budgets; arrays without a budget are returned unchanged.
        scores: nested dictionaries as from `selection.init_scores`.
        round: round of the search, from 0; may be traced.
        rounds: planned rounds of the search, at least 1; may be traced.

    Returns:
        Tree like `scores` (structure, shapes, dtypes).
    """
    leaves = selection.score_leaves(scores)
    for budget in selection.budgets:
        members = [leaves[index] for index in budget.members]
        sizes = [selection.masked[index].group_size for index in budget.members]
        keep = budget.size * round_density(budget.density, round, rounds) if budget.keep else 0.0
        shift = _threshold(members, sizes, keep)
        for index in budget.members:
            wide = at_least_float32(leaves[index])
            leaves[index] = (wide - shift.astype(wide.dtype)).astype(leaves[index].dtype)
    return selection.nest(leaves)


def _threshold(scores: Sequence[jax.Array], sizes: Sequence[int], keep: ArrayLike) -> jax.Array:
    """Lowest score with at most `keep` weights above it; just below the lowest score if all weights may be kept.

    Bisection instead of sorting: floats are compared as integers with the same order. Halving the range of the integers
    32 times, or 64 times in double precision, finds the exact entry for any range of scores.

    Args:
        scores: score arrays, any shapes.
        sizes: number of weights per score of each array.
        keep: number of weights to keep, may be fractional.
    """
    dtype = jnp.result_type(jnp.float32, *scores)
    keys = [_ordered_bits(score.astype(dtype)) for score in scores]
    lowest = functools.reduce(jnp.minimum, [jnp.min(score) for score in scores]).astype(dtype)
    just_below = jnp.maximum(lowest - 1e-6 * jnp.maximum(jnp.abs(lowest), 1), jnp.finfo(dtype).min)
    highest = functools.reduce(jnp.maximum, [jnp.max(key) for key in keys])

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)
        above = sum(size * jnp.sum(key > middle).astype(jnp.float32) for key, size in zip(keys, sizes, strict=True))
        enough = above <= jnp.round(jnp.asarray(keep, jnp.float32))
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    _, bits = lax.fori_loop(0, jnp.iinfo(highest.dtype).bits, halve, (_ordered_bits(just_below), highest))
    return lax.bitcast_convert_type(_flip_negative(bits), dtype)


def _ordered_bits(array: jax.Array) -> jax.Array:
    integer = jnp.int64 if array.dtype == jnp.float64 else jnp.int32
    return _flip_negative(lax.bitcast_convert_type(array, integer))


def _flip_negative(bits: jax.Array) -> jax.Array:
    """Bits of floats as integers in the order of the floats; its own inverse."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def warn_if_soft(selection: Selection, scores: PyTree, temperature: ArrayLike) -> None:
    """Warns if most masks are still soft at the end of a search: the ticket then differs from the trained network.

    A mask is soft if `temperature * score` is between -1 and 1, which gives a mask of 0.27 to 0.73 of its scale. Arrays
    with an N:M pattern do not count as soft.

    Args:
        selection: masked weights.
        scores: nested dictionaries as from `selection.init_scores`, not traced.
        temperature: temperature at the end of the search, scalar.

    Warns:
        UnfinishedSearchWarning: more than half of the masked weights have soft masks.
    """
    soft = 0
    for leaf, score in zip(selection.masked, selection.score_leaves(scores), strict=True):
        if leaf.pattern is None:
            soft += leaf.group_size * int(jnp.sum(jnp.abs(temperature * at_least_float32(score)) < 1))
    if soft > 0.5 * selection.size:
        warnings.warn(
            f"{soft / selection.size:.0%} of the masks are still soft at the end of the search, so the ticket differs "
            "from the trained network; use a higher learning rate of the scores, more epochs or a higher final "
            "temperature",
            UnfinishedSearchWarning,
            stacklevel=4,
        )


def ticket_masks(selection: Selection, scores: PyTree, *, init_value: ArrayLike) -> PyTree:
    """Hard masks of a ticket: in each budget, the highest scores are kept, with exactly the number of weights to keep.

    Among equal scores the first are kept, in the order of the arrays and their entries. Each array keeps at least its
    highest score, unless the selection allows empty layers. Groups are never split: with groups of several weights, the
    number of kept weights may differ from the budget by less than the largest group. Arrays without a budget keep
    scores above 0, or n of m scores with an N:M pattern.

    Args:
        selection: masked weights and budgets.
        scores: nested dictionaries as from `selection.init_scores`, finite, not traced.
        init_value: initial value of the scores, at least -80; fixes the scale of the masks.

    Returns:
        Nested dictionaries with arrays of the weights' shapes, in the dtypes of the scores; entries are 0 or
        `1 / sigmoid(init_value)`.

    Raises:
        TypeError: scores are traced.
        ValueError: scores are not finite, or do not fit the selection, or `init_value` is out of range.

    Warns:
        CollapsedLayerWarning: an array keeps no weight, or only its reserved highest score.
        DensityWarning: the number of kept weights differs from a budget by more than 1%, because groups are large.
    """
    leaves = selection.score_leaves(scores)
    if any(isinstance(score, Tracer) for score in leaves):
        raise TypeError("scores: must not be traced; make a ticket outside of jit, grad and vmap")
    for leaf, score in zip(selection.masked, leaves, strict=True):
        if not np.isfinite(on_host(score).astype(np.float64)).all():
            raise ValueError(f"scores {leaf.name!r}: must be finite numbers")
    chosen = list(leaves)
    for budget in selection.budgets:
        _keep_highest(selection, budget, chosen)
    ticket = selection.hard_mask(selection.nest(chosen), init_value=init_value)
    warn_if_empty(ticket)
    return ticket


def warn_if_empty(ticket: PyTree) -> None:
    """Warns for each array of a ticket's masks that keeps no weight."""
    for path, mask in trees.leaves_by_path(ticket).items():
        if not np.any(on_host(mask)):
            warn_collapsed(trees.name(path), "keeps no weight")


def _keep_highest(selection: Selection, budget: Budget, leaves: list[Any]) -> None:
    """Replaces the budget's members of `leaves`: 1 for scores that the budget keeps, -1 for other scores."""
    flat = [on_host(leaves[index]).astype(np.float64).ravel() for index in budget.members]
    group_sizes = [selection.masked[index].group_size for index in budget.members]
    sizes = np.repeat(group_sizes, [len(score) for score in flat])
    starts = np.cumsum([0, *map(len, flat)]).tolist()
    best = [int(start + np.argmax(score)) for start, score in zip(starts, flat, strict=False)]
    order = np.argsort(-np.concatenate(flat), kind="stable")
    kept = _choose(order, sizes, budget.keep, [] if selection.allow_empty_layers else best)
    unreserved = _choose(order, sizes, budget.keep, [])
    for number, index in enumerate(budget.members):
        part = slice(starts[number], starts[number + 1])
        if kept[part].any() and not unreserved[part].any():
            warn_collapsed(selection.masked[index].name, "keeps only its highest score, which is reserved")
        signs = np.where(kept[part], 1.0, -1.0).reshape(leaves[index].shape)
        leaves[index] = jnp.asarray(signs, leaves[index].dtype)
    count = int(sizes[kept].sum())
    if abs(count - budget.keep) > 0.01 * budget.keep:
        warnings.warn(
            f"ticket keeps {count} of {budget.size} weights, and the target is {budget.keep}: groups of "
            f"{', '.join(map(str, sorted(set(group_sizes))))} weights cannot be split; use smaller groups, or "
            "another target",
            DensityWarning,
            stacklevel=3,
        )


def _choose(order: np.ndarray, sizes: np.ndarray, budget: int, reserved: Sequence[int]) -> np.ndarray:
    """Boolean array of the groups to keep, with `budget` weights in total, or the nearest number that one swap gives.

    The first candidate contains the reserved groups, and then in `order` every group that still fits. The second
    candidate replaces the last groups of the first candidate by the best group that did not fit. The result is the
    candidate nearer to the budget, or the first candidate if both are equally near.

    Args:
        order: indices of the groups, from the highest score to the lowest.
        sizes: number of weights in each group.
        budget: number of weights to keep.
        reserved: indices of groups to keep in any case.
    """
    under = np.zeros(len(sizes), bool)
    under[list(reserved)] = True
    left = budget - int(sizes[under].sum())
    rest = order[~under[order]]
    while len(rest) and left >= sizes[rest].min():
        fits = int(np.searchsorted(np.cumsum(sizes[rest]), left, side="right"))
        under[rest[:fits]] = True
        left -= int(sizes[rest[:fits]].sum())
        rest = rest[fits:]
        rest = rest[sizes[rest] <= left]
    out = order[~under[order]]
    if left <= 0 or not len(out):
        return under
    over, excess = under.copy(), int(sizes[out[0]]) - left
    over[out[0]] = True
    fixed = {int(out[0]), *reserved}
    for group in order[under[order]][::-1]:
        if sizes[group] <= excess and int(group) not in fixed:
            over[group] = False
            excess -= int(sizes[group])
    return over if excess < left else under


def warn_collapsed(name: str, what: str) -> None:
    """Warns that a masked array has collapsed.

    Args:
        name: name of the array.
        what: rest of the message, a verb phrase such as "keeps no weight".
    """
    warnings.warn(CollapsedLayerWarning(f"layer {name!r} has collapsed: it {what}", (name,)), stacklevel=4)
