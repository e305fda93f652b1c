"""Iterative Stochastic Sparsification."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import PyTree

from cs_jax.core import target_density, trees
from cs_jax.methods.base import Method, first_scores, keep_highest, round_density
from cs_jax.training.problem import Problem, Snapshot
from cs_jax.training.step import Hyperparams, Recipe, TrainState

PRUNED = -1e4
"""Score of a weight that is gone: its probability and the gradient of that are 0 in every float type."""


class IterativeStochasticSparsification(Method):
    """Masks are drawn anew in every step, 1 with the probability `sigmoid(score)`; weights and scores learn together.

    The gradient passes straight through the draw to the probability. A round ends by pruning, for good, the weights
    with the lowest scores, as many as the target density asks for; without one, those whose score has fallen below
    its initial value. The scores of the others start again in the next round; weights and momentum carry over.

    References:
        Savarese, Silva and Maire, NeurIPS 2020, arXiv:1912.04427, section 5, the stochastic counterpart of Continuous
        Sparsification; Bengio, Leonard and Courville, 2013, arXiv:1308.3432, for the straight-through gradient.
    """

    learns_masks = True
    remark_on_rounds = (
        "Soft masks are the means of those that steps draw, sigmoid(score). Hard masks keep what has not been "
        "pruned, whole, which no step has trained with: their accuracy may be that of guessing."
    )
    remark_on_scores = (
        "In each step a weight is kept with the probability sigmoid(score). At the end of a round those with the "
        "lowest scores are pruned for good: they are at the left edge."
    )
    cuts_at_zero = False

    def density(self, round: int) -> float | None:
        return round_density(self.config, round)

    def recipe(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(recipe, step_masks=draw_masks)

    def begin(self, problem: Problem, variables: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        return first_scores(self.config, variables["masks"], None), {}

    def end_epoch(self, state: TrainState, round: int, epoch: int) -> TrainState:
        if epoch < self.config.epochs - 1:
            return state
        density = self.density(round)
        if density is None:
            kept = jax.tree.map(lambda score: score >= self.config.mask_initial_value, state.scores)
        else:
            kept = keep_highest(self.config, state.scores, density)
        left = jax.tree.map(lambda score, keep: (keep != 0) & _is_left(score), state.scores, kept)
        scores = jax.tree.map(lambda score, keep: jnp.where(keep, score, PRUNED), state.scores, left)
        momentum = cast(optax.TraceState, state.score_momentum)
        trace = jax.tree.map(lambda value, keep: jnp.where(keep, value, 0), momentum.trace, left)
        return state.replace(scores=scores, score_momentum=momentum._replace(trace=trace))

    def begin_round(self, problem: Problem, state: TrainState, snapshot: Snapshot | None) -> TrainState:
        scores = jax.tree.map(
            lambda score: jnp.where(_is_left(score), jnp.asarray(self.config.mask_initial_value, score.dtype), score),
            state.scores,
        )
        return state.replace(scores=scores)

    @staticmethod
    def soft_masks(state: TrainState, hyper: Hyperparams) -> PyTree | None:
        """The masks' means."""
        return jax.tree.map(jax.nn.sigmoid, state.wide_scores)

    @staticmethod
    def hard_masks(state: TrainState, hyper: Hyperparams) -> PyTree:
        del hyper
        return _left(state.scores)

    def ticket_masks(self, state: TrainState) -> PyTree:
        """Masks of the weights that are left.

        Warns:
            CollapsedLayerWarning: a layer has none, which a target density has told of before.
        """
        ticket = _left(state.scores)
        if self.config.target_density is None:
            target_density.warn_if_empty(ticket)
        return ticket


def draw_masks(scores: PyTree, hyper: Hyperparams, key: jax.Array) -> PyTree:
    """Masks of 0 and 1, 1 with the probability `sigmoid(score)`, whose gradient is that of the probability."""
    del hyper

    def draw(key: jax.Array, score: jax.Array) -> jax.Array:
        probability = jax.nn.sigmoid(score)
        drawn = jax.random.bernoulli(key, probability).astype(score.dtype)
        return drawn + (probability - lax.stop_gradient(probability))  # exactly what was drawn

    return trees.map_with_keys(draw, key, scores)


def _left(scores: PyTree) -> PyTree:
    """Masks of the weights that are left."""
    return jax.tree.map(lambda score: _is_left(score).astype(jnp.promote_types(score.dtype, jnp.float32)), scores)


def _is_left(score: jax.Array) -> jax.Array:
    return score > jnp.asarray(PRUNED, score.dtype)  # as it was stored: bfloat16 rounds it
