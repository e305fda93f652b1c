"""State of the optax transformation, found and changed inside the state of whatever wraps it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.selection import Selection


class SparsificationState(NamedTuple):
    """State of `continuous_sparsification`, an ordinary pytree of arrays."""

    step: jax.Array  # updates done in this round
    round: jax.Array  # of the search, from 0
    temperature: jax.Array  # of the masks now; that of the round's last epoch when its steps are done
    first_temperature: jax.Array  # that every round starts with
    final_temperature: jax.Array  # that every round ends with
    init_value: jax.Array  # the scores' initial value, which fixes the masks' scale
    scores: PyTree  # nested dictionaries along the masked weights' paths; {} for a ticket
    masks: PyTree  # a ticket's fixed masks; {} while scores are trained
    weight_state: optax.OptState
    score_state: optax.OptState  # () for a ticket
    selection: Selection  # which weights are masked, and how: static, without arrays


def find_state(opt_state: PyTree) -> SparsificationState:
    """The state of `continuous_sparsification` inside the state of whatever wraps it.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of continuous_sparsification, wanted one: "
            f"got {type(opt_state).__name__}, wanted what its init or update returned"
        )
    return unwrapped(found[0])


def change_state(opt_state: PyTree, change: Callable[[SparsificationState], SparsificationState]) -> PyTree:
    """`opt_state` with its state of `continuous_sparsification` changed, and all else as it is."""
    find_state(opt_state)
    changed = jax.tree.map(
        lambda node: change(node) if _is_state(node) else node, unwrapped(opt_state), is_leaf=_is_state
    )
    return wrapped_like(opt_state, changed)


def current_masks(opt_state: PyTree) -> PyTree:
    """Masks of now: soft ones while scores are trained, a ticket's fixed ones afterwards.

    Returns:
        Nested dictionaries along the paths of the masked weights, of their shapes; for a Flax model its "masks".

    Raises:
        ValueError: as `masked_params`.
    """
    state = find_state(opt_state)
    return copied(state.masks) if is_ticket(state) else soft_masks(state, state.scores)


def soft_masks(state: SparsificationState, scores: PyTree) -> PyTree:
    """Masks of `scores` at the state's temperature."""
    return state.selection.soft_mask(scores, state.temperature, init_value=state.init_value)


def copied(tree: PyTree) -> PyTree:
    """Copies of arrays that a later step may be given for good; of traced ones there is no need."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Tracer) else jnp.copy(leaf), tree)


def is_ticket(state: SparsificationState) -> bool:
    """Whether masks are fixed and scores gone."""
    return not jax.tree.leaves(state.scores)


def _is_state(node: Any) -> bool:
    return isinstance(node, SparsificationState)


def unwrapped(tree: PyTree) -> PyTree:
    """Arrays in place of the variables in which `nnx.Optimizer` keeps its state."""

    def unwrap(node: Any) -> Any:
        return node.get_value() if trees.is_variable(node) else node

    return jax.tree.map(unwrap, tree, is_leaf=trees.is_variable)


def wrapped_like(opt_state: PyTree, tree: PyTree) -> PyTree:
    """Arrays in variables, if `opt_state` has them: in copies of its own where there are as many."""
    olds = jax.tree.leaves(opt_state, is_leaf=trees.is_variable)
    if not any(map(trees.is_variable, olds)):
        return tree
    news, treedef = jax.tree.flatten(tree)
    if len(olds) == len(news):
        return treedef.unflatten([old.copy(new) for old, new in zip(olds, news, strict=True)])
    kind = type(next(filter(trees.is_variable, olds)))
    return treedef.unflatten(map(kind, news))
