"""State of the optax transformation, and its replacement inside the states of chains and other wrappers."""

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
    """State of `continuous_sparsification`, a pytree of arrays."""

    step: jax.Array  # int32 scalar: updates done in this round
    round: jax.Array  # int32 scalar: round of the search, from 0
    temperature: jax.Array  # scalar: of the current masks; after the last step of a round, of its last epoch
    first_temperature: jax.Array  # scalar: temperature at the start of every round
    final_temperature: jax.Array  # scalar: temperature at the end of every round
    init_value: jax.Array  # scalar: initial score, fixes the scale of the masks
    scores: PyTree  # nested dictionaries along the masked weights' paths; {} for a ticket
    masks: PyTree  # fixed masks of a ticket; {} while scores are trained
    weight_state: optax.OptState
    score_state: optax.OptState  # () for a ticket
    selection: Selection  # masked weights and their groups: static, without arrays


def find_state(opt_state: PyTree) -> SparsificationState:
    """State of `continuous_sparsification` inside an optimizer state.

    Args:
        opt_state: state of the transformation, or of a chain or another wrapper around it.

    Raises:
        ValueError: `opt_state` contains no state of the transformation, or more than one.
    """
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state of type {type(opt_state).__name__}: must contain one state of continuous_sparsification, not "
            f"{len(found)}; pass the state that init or update returned"
        )
    return without_variables(found[0])


def change_state(opt_state: PyTree, change: Callable[[SparsificationState], SparsificationState]) -> PyTree:
    """`opt_state` with `change` applied to its state of `continuous_sparsification`; the rest is unchanged."""
    find_state(opt_state)
    changed = jax.tree.map(
        lambda node: change(node) if _is_state(node) else node, without_variables(opt_state), is_leaf=_is_state
    )
    return with_variables_of(opt_state, changed)


def current_masks(opt_state: PyTree) -> PyTree:
    """Current masks: soft masks while scores are trained, the ticket's fixed masks afterwards.

    Args:
        opt_state: state of `continuous_sparsification`, or of a chain or another wrapper around it.

    Returns:
        Nested dictionaries along the paths of the masked weights, with arrays of the weights' shapes; for a Flax model,
        its "masks" collection.

    Raises:
        ValueError: `opt_state` does not contain exactly one state of `continuous_sparsification`.
    """
    state = find_state(opt_state)
    return copies(state.masks) if is_ticket(state) else soft_masks(state, state.scores)


def soft_masks(state: SparsificationState, scores: PyTree) -> PyTree:
    """Soft masks of `scores` at the state's temperature."""
    return state.selection.soft_mask(scores, state.temperature, init_value=state.init_value)


def copies(tree: PyTree) -> PyTree:
    """Copies of the arrays, so that a later step may donate the originals; traced arrays are returned unchanged."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Tracer) else jnp.copy(leaf), tree)


def is_ticket(state: SparsificationState) -> bool:
    """Whether the masks are fixed and there are no scores."""
    return not jax.tree.leaves(state.scores)


def _is_state(node: Any) -> bool:
    return isinstance(node, SparsificationState)


def without_variables(tree: PyTree) -> PyTree:
    """The tree with arrays in place of `nnx.Variable`s, in which `nnx.Optimizer` keeps its state."""

    def unwrap(node: Any) -> Any:
        return node.get_value() if trees.is_variable(node) else node

    return jax.tree.map(unwrap, tree, is_leaf=trees.is_variable)


def with_variables_of(opt_state: PyTree, tree: PyTree) -> PyTree:
    """The tree with its arrays in `nnx.Variable`s if `opt_state` has them; inverse of `without_variables`.

    If both trees have the same number of leaves, the variables are copies of the variables in `opt_state`, with their
    metadata. Otherwise the variables are new and of the same class.
    """
    olds = jax.tree.leaves(opt_state, is_leaf=trees.is_variable)
    if not any(map(trees.is_variable, olds)):
        return tree
    news, treedef = jax.tree.flatten(tree)
    if len(olds) == len(news):
        return treedef.unflatten([old.copy(new) for old, new in zip(olds, news, strict=True)])
    kind = type(next(filter(trees.is_variable, olds)))
    return treedef.unflatten(map(kind, news))
