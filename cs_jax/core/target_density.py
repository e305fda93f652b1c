"""The density that was asked for: scores held at it while they are trained, and a ticket that has it exactly.

A search left to itself ends at the density that initial score, penalty and learning rates happen to give. Under a
budget, scores are shifted at every epoch's end, all by the same amount, so that just the highest ones are above 0:
the threshold of the masks moves instead of a penalty's weight. The budget shrinks by the same factor in every round.

Constrained optimization, where the penalty's weight follows the constraint, is the alternative (Gallego-Posada et al.,
"Controlled sparsity via constrained optimization", NeurIPS 2022, arXiv:2208.04425). It hardly moves scores that the
temperature has decided already, and has a learning rate to be found; `benchmarks/density_control.py` compares the two.
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
    """Masked arrays are left without weights, or would be if their highest score had not been kept all the same."""

    def __init__(self, message: str, layers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.layers = layers


class DensityWarning(CsJaxWarning):
    """Groups are too coarse for the density that was asked for: the ticket's is off by more than 1%."""


class UnfinishedSearchWarning(CsJaxWarning):
    """A search ended with soft masks: before the final temperature, or with scores that have hardly moved."""


def round_density(target: float, round: Any, rounds: Any) -> Any:
    """Density at which scores are held in a round, `target ** ((round + 1) / rounds)`: the target in the last.

    Args:
        target: density of the ticket, in (0, 1].
        round: from 0, may be traced; every round after the last has the target.
        rounds: rounds of the search.

    >>> [round_density(0.01, round, 2) for round in range(2)]
    [0.1, 0.01]
    """
    share = (round + 1) / rounds
    return target ** (jnp.minimum(share, 1) if isinstance(share, jax.Array) else min(share, 1))


@functools.partial(jax.jit, static_argnames="selection")
def track_density(selection: Selection, scores: PyTree, round: Any, rounds: Any) -> PyTree:
    """Scores shifted so that those above 0 are as many weights as each budget has in this round.

    All scores of a budget are shifted by the same amount, so their order stays. Where the last ones are equal, fewer
    are above 0; scores that are all equal, as at the start, are none of them.

    Args:
        selection: with budgets; arrays in none are returned as they are.
        scores: as `selection.init_scores` makes them.
        round: from 0, may be traced.
        rounds: rounds of the search, may be traced.

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
    """The lowest score above which no more than `keep` weights lie; just below the lowest of all where all may.

    It is found without sorting. Floats are compared as the integers that order them, so halving the range 32 times
    (64 in double precision) finds the very entry, however far scores are apart.
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
    """Integers in the order of the floats that they are the bits of, and back."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def warn_if_soft(selection: Selection, scores: PyTree, temperature: ArrayLike) -> None:
    """Warns if most masks are still soft at a search's end: a ticket cut out of them is another network.

    Soft are those whose `temperature * score` lies within 1 of 0, which are 0.27 to 0.73 of their scale. N:M patterns
    are left out.

    Args:
        selection: what is masked.
        scores: as `selection.init_scores` makes them, not traced.
        temperature: that the search ended with.
    """
    soft = 0
    for leaf, score in zip(selection.masked, selection.score_leaves(scores), strict=True):
        if leaf.pattern is None:
            soft += leaf.group_size * int(jnp.sum(jnp.abs(temperature * at_least_float32(score)) < 1))
    if soft > 0.5 * selection.size:
        warnings.warn(
            f"{soft / selection.size:.0%} of the masks are still soft at the end of the search, and the ticket is "
            "another network: wanted a higher learning rate of the scores, more epochs or a higher final temperature",
            UnfinishedSearchWarning,
            stacklevel=4,
        )


def ticket_masks(selection: Selection, scores: PyTree, *, init_value: ArrayLike) -> PyTree:
    """Hard masks of a ticket: just as many weights as the budgets have, those with the highest scores.

    Of equal scores the first ones are kept, in the order of the arrays and of their entries. Each array keeps its
    highest score at least, unless the selection allows empty layers. Groups are kept whole: with groups of several
    weights the count may be off by less than the largest group. Where there is no budget, scores above 0 are kept, or
    n of m.

    Args:
        selection: which weights are masked, and how many of them may be kept.
        scores: as `selection.init_scores` makes them, not traced.
        init_value: the scores' initial value, which fixes the masks' scale.

    Returns:
        Masks of the weights' shapes, in the scores' dtypes: 0 or `1 / sigmoid(init_value)`.

    Raises:
        TypeError: scores are traced.
        ValueError: a score is not finite.

    Warns:
        CollapsedLayerWarning: an array keeps nothing, or its one reserved group alone.
        DensityWarning: the count is off by more than 1%, because groups are large.
    """
    leaves = selection.score_leaves(scores)
    if any(isinstance(score, Tracer) for score in leaves):
        raise TypeError("scores are traced: a ticket is counted outside of jit, grad and vmap")
    for leaf, score in zip(selection.masked, leaves, strict=True):
        if not np.isfinite(on_host(score).astype(np.float64)).all():
            raise ValueError(f"scores {leaf.name!r} are not finite, wanted finite numbers")
    chosen = list(leaves)
    for budget in selection.budgets:
        _keep_highest(selection, budget, chosen)
    ticket = selection.hard_mask(selection.nest(chosen), init_value=init_value)
    warn_if_empty(ticket)
    return ticket


def warn_if_empty(ticket: PyTree) -> None:
    """Warns of each array of a ticket's masks that keeps no weight."""
    for path, mask in trees.leaves_by_path(ticket).items():
        if not np.any(on_host(mask)):
            warn_collapsed(trees.name(path), "keeps no weight")


def _keep_highest(selection: Selection, budget: Budget, leaves: list[Any]) -> None:
    """Puts 1 for the scores that a budget keeps and -1 for the others, in place of its members of `leaves`."""
    flat = [on_host(leaves[index]).astype(np.float64).ravel() for index in budget.members]
    group_sizes = [selection.masked[index].group_size for index in budget.members]
    sizes = np.repeat(group_sizes, [len(score) for score in flat])
    starts = np.cumsum([0, *map(len, flat)]).tolist()
    best = [int(start + np.argmax(score)) for start, score in zip(starts, flat, strict=False)]
    order = np.argsort(-np.concatenate(flat), kind="stable")
    kept = _choose(order, sizes, budget.keep, [] if selection.allow_empty_layers else best)
    freely = _choose(order, sizes, budget.keep, [])
    for number, index in enumerate(budget.members):
        part = slice(starts[number], starts[number + 1])
        if kept[part].any() and not freely[part].any():
            warn_collapsed(selection.masked[index].name, "has only its highest score kept, by reservation")
        signs = np.where(kept[part], 1.0, -1.0).reshape(leaves[index].shape)
        leaves[index] = jnp.asarray(signs, leaves[index].dtype)
    count = int(sizes[kept].sum())
    if abs(count - budget.keep) > 0.01 * budget.keep:
        warnings.warn(
            f"{count} of {budget.size} weights are kept where {budget.keep} were asked for: scores stand for whole "
            f"groups of {', '.join(map(str, sorted(set(group_sizes))))} weights",
            DensityWarning,
            stacklevel=3,
        )


def _choose(order: np.ndarray, sizes: np.ndarray, budget: int, reserved: Sequence[int]) -> np.ndarray:
    """Which groups are kept, of `sizes` weights, so that they are `budget` weights or as near as a swap can get.

    The reserved ones, then in `order` whichever still fits; or, where that is nearer, the best that did not fit in
    the place of the last ones that did.
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
    """Warns that a masked array has collapsed, and says what it keeps."""
    warnings.warn(CollapsedLayerWarning(f"layer {name!r} has collapsed: it {what}", (name,)), stacklevel=4)
