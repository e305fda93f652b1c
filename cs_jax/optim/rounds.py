"""Functions for the end of a round with the optax transformation: next round, ticket, frozen ticket, rewound ticket."""

import warnings

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import PyTree

from cs_jax.core import masks, target_density, trees
from cs_jax.optim.state import (
    SparsificationState,
    change_state,
    copies,
    find_state,
    is_ticket,
    with_variables_of,
    without_variables,
)


def ticket_masks(opt_state: PyTree) -> PyTree:
    """Hard masks of the ticket. During a search, these are the masks of a search that ends now.

    With a target density, the ticket keeps exactly this density. Without a target, it keeps scores above 0. Call this
    before `next_round`: right after it, no score is above 0.

    Args:
        opt_state: state of `continuous_sparsification`, or of a chain or another wrapper around it; not traced.

    Returns:
        Nested dictionaries along the paths of the masked weights, with arrays of the weights' shapes; entries are 0 or
        `1 / sigmoid(init_value)`.

    Raises:
        TypeError: the state is traced.
        ValueError: `opt_state` does not contain exactly one state of `continuous_sparsification`, a score is not
            finite, or no weight is kept.

    Warns:
        CollapsedLayerWarning: an array keeps no weight, or only its reserved highest score.
        DensityWarning: groups are too large for the target density.
        UnfinishedSearchWarning: the temperature is below its final value, or most masks are still soft.
    """
    state = find_state(opt_state)
    if is_ticket(state):
        return copies(state.masks)
    _warn_unfinished(state)
    ticket = target_density.ticket_masks(state.selection, state.scores, init_value=state.init_value)
    if masks.density(ticket) == 0:
        raise ValueError(
            "opt_state: every score is 0 or below, so the ticket keeps no weight; take the ticket at the end of a "
            "round, before next_round"
        )
    return ticket


def next_round(opt_state: PyTree, *, reset: str = "paper") -> PyTree:
    """State for the next round of the search: reset scores, initial temperature, step 0, next round number.

    The other fields are unchanged.

    Args:
        opt_state: optimizer state at the end of a round.
        reset: "paper" keeps pruned weights pruned; "released" lets pruned weights return, as the authors' script does.

    Returns:
        Tree like `opt_state`.

    Raises:
        ValueError: `reset` is another text, `opt_state` does not contain exactly one state of
            `continuous_sparsification`, or its masks are the fixed masks of a ticket.

    Warns:
        UnfinishedSearchWarning: the temperature is below its final value, or most masks are still soft.
    """
    if reset not in ("paper", "released"):
        raise ValueError(f"reset {reset!r}: must be 'paper' or 'released'")

    def start(state: SparsificationState) -> SparsificationState:
        if is_ticket(state):
            raise ValueError("opt_state: contains a ticket with fixed masks; pass the state of a search")
        _warn_unfinished(state)
        temperature = state.temperature if reset == "paper" else jnp.ones_like(state.temperature)
        return state._replace(
            step=jnp.zeros_like(state.step),
            round=state.round + 1,
            temperature=jnp.copy(state.first_temperature),
            scores=state.selection.prune_scores(state.scores, temperature, init_value=state.init_value),
        )

    return change_state(opt_state, start)


def freeze_ticket(opt_state: PyTree, masks: PyTree | None = None) -> PyTree:
    """State with fixed masks and without scores; the state of the weight optimizer is unchanged.

    The next `update` compiles again. To retrain early weights, use `rewind`. With `masks`, no search is needed. The
    abstract state for restoring the checkpoint of a ticket is
    `jax.eval_shape(lambda: freeze_ticket(tx.init(params), masks=current_masks(tx.init(params))))`.

    Args:
        opt_state: optimizer state.
        masks: nested dictionaries along the paths of the masked weights, with arrays of the weights' shapes; None
            means `ticket_masks(opt_state)`.

    Returns:
        Tree like `opt_state`, with `masks` in place of scores.

    Raises:
        TypeError: `masks` is None and the state is traced.
        ValueError: `masks` do not fit the weights; if `masks` is None, as for `ticket_masks`.
    """
    return _freeze(opt_state, ticket_masks(opt_state) if masks is None else masks)


def rewind(tx: optax.GradientTransformation, opt_state: PyTree, snapshot: PyTree) -> tuple[PyTree, PyTree]:
    """Early weights, and a new optimizer state with the ticket's masks for retraining them.

    Args:
        tx: the whole optimizer, including wrappers; initializes the new state.
        opt_state: state of `tx` at the end of the search.
        snapshot: weights of an early step in round 0, copied with `jax.tree.map(jnp.copy, params)`.

    Returns:
        A copy of `snapshot`, and the state with fixed masks.

    Raises:
        TypeError: the state is traced.
        ValueError: as for `ticket_masks`, or the snapshot does not fit the masks.
    """
    ticket = ticket_masks(opt_state)
    weights = without_variables(snapshot)
    params = jax.tree.map(lambda leaf: jnp.copy(leaf) if hasattr(leaf, "dtype") else leaf, weights)
    trees.apply_masks(params, ticket)  # raises if the snapshot has other weights
    return params, with_variables_of(opt_state, _freeze(tx.init(params), ticket))


def _freeze(opt_state: PyTree, ticket: PyTree) -> PyTree:
    def fix(state: SparsificationState) -> SparsificationState:
        state.selection.check_masks(ticket)
        return state._replace(scores={}, masks=ticket, score_state=())

    return change_state(opt_state, fix)


def _warn_unfinished(state: SparsificationState) -> None:
    """Warns if the masks at the end of a round or search are still soft."""
    if isinstance(state.temperature, Tracer):
        return
    temperature, final = float(jnp.min(state.temperature)), float(jnp.max(state.final_temperature))
    if temperature < 0.999 * final:
        warnings.warn(
            f"temperature {temperature:.3g} after {int(jnp.min(state.step))} updates: below the final {final:.3g}, so "
            "masks are still soft and the ticket differs from the trained network; call update "
            "epochs * steps_per_epoch times in a round",
            target_density.UnfinishedSearchWarning,
            stacklevel=3,
        )
        return
    target_density.warn_if_soft(state.selection, state.scores, state.temperature)
