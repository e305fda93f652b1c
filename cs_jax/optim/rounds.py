"""Rounds of a search by the optax transformation: their end, the ticket, its freezing and its rewind."""

import warnings

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import PyTree

from cs_jax.core import masks, target_density, trees
from cs_jax.optim.state import SparsificationState, change_state, copied, find_state, is_ticket, unwrapped, wrapped_like


def ticket_masks(opt_state: PyTree) -> PyTree:
    """Hard masks: the ticket's, or those that the search would end with now.

    Of the density that was asked for, exactly; without a target, scores above 0 are kept. Right after `next_round` no
    score is, so ask before.

    Returns:
        Nested dictionaries along the paths of the masked weights, of their shapes; 0 or `1 / sigmoid(init_value)`.

    Raises:
        TypeError: the state is traced.
        ValueError: as `masked_params`, or nothing at all is kept.

    Warns:
        CollapsedLayerWarning: an array has lost all its weights, or would have if its best were not reserved.
        DensityWarning: groups are too coarse for the target.
        UnfinishedSearchWarning: the temperature has not reached its end.
    """
    state = find_state(opt_state)
    if is_ticket(state):
        return copied(state.masks)
    _warn_unfinished(state)
    ticket = target_density.ticket_masks(state.selection, state.scores, init_value=state.init_value)
    if masks.density(ticket) == 0:
        raise ValueError("the ticket keeps no weight: no score is above 0, as at the start and right after next_round")
    return ticket


def next_round(opt_state: PyTree, *, reset: str = "paper") -> PyTree:
    """State for the next round of the search: scores reset, temperature and step at their start, all else as it is.

    Args:
        opt_state: the optimizer's state at the end of a round.
        reset: "paper" keeps pruned weights pruned; "released" lets them come back, as the authors' script does.

    Raises:
        ValueError: as `masked_params`, `reset` is none of these, or the state is a ticket's.
    """
    if reset not in ("paper", "released"):
        raise ValueError(f"reset: got {reset!r}, wanted 'paper' or 'released'")

    def start(state: SparsificationState) -> SparsificationState:
        if is_ticket(state):
            raise ValueError("the masks are a ticket's and fixed: there is no next round")
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
    """State with a ticket's masks fixed and the scores gone; weights and their optimizer go on as they are.

    The next `update` compiles anew. To go back to early weights, see `rewind`. With masks, it needs no search: this
    makes the state that a ticket's checkpoint is restored into,
    `jax.eval_shape(lambda: freeze_ticket(tx.init(params), masks=current_masks(tx.init(params))))`.

    Args:
        opt_state: the optimizer's state.
        masks: nested dictionaries along the paths of the masked weights, of their shapes; None is `ticket_masks`.

    Raises:
        TypeError, ValueError: as `ticket_masks`, or masks do not fit the weights.
    """
    return _freeze(opt_state, ticket_masks(opt_state) if masks is None else masks)


def rewind(tx: optax.GradientTransformation, opt_state: PyTree, snapshot: PyTree) -> tuple[PyTree, PyTree]:
    """Early weights under the ticket's masks, and a new optimizer state to retrain them with.

    Args:
        tx: the whole optimizer; its state is made anew.
        opt_state: its state at the end of the search.
        snapshot: weights kept early in round 0, as `jax.tree.map(jnp.copy, params)` keeps them.

    Returns:
        A copy of the weights, and the state with fixed masks.

    Raises:
        TypeError, ValueError: as `ticket_masks`.
    """
    ticket = ticket_masks(opt_state)
    params = jax.tree.map(lambda leaf: jnp.copy(leaf) if hasattr(leaf, "dtype") else leaf, unwrapped(snapshot))
    trees.apply_masks(params, ticket)  # raises where the snapshot is of other weights
    return params, wrapped_like(opt_state, _freeze(tx.init(params), ticket))


def _freeze(opt_state: PyTree, ticket: PyTree) -> PyTree:
    def fix(state: SparsificationState) -> SparsificationState:
        state.selection.check_masks(ticket)
        return state._replace(scores={}, masks=ticket, score_state=())

    return change_state(opt_state, fix)


def _warn_unfinished(state: SparsificationState) -> None:
    """Warns if the masks of a search that is ended are not hard yet."""
    if isinstance(state.temperature, Tracer):
        return
    temperature, final = float(jnp.min(state.temperature)), float(jnp.max(state.final_temperature))
    if temperature < 0.999 * final:
        warnings.warn(
            f"the search is at temperature {temperature:.3g} of {final:.3g}, after {int(jnp.min(state.step))} updates: "
            "its masks are still soft, and the ticket is another network; epochs * steps_per_epoch counts updates of "
            "this transformation",
            target_density.UnfinishedSearchWarning,
            stacklevel=3,
        )
        return
    target_density.warn_if_soft(state.selection, state.scores, state.temperature)
