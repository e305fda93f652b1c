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
"""Score of a pruned weight: its probability and the gradient of the probability are 0 in every float type."""


class IterativeStochasticSparsification(Method):
    """Iterative Stochastic Sparsification: each step draws masks, 1 with probability `sigmoid(score)`, else 0.

    Weights and scores are trained together, with the straight-through gradient of the probability. At the end of a
    round the weights with the lowest scores are pruned permanently, down to the target density of the round. Without a
    target, weights with a score below the initial value are pruned. The scores of the remaining weights are reset
    between rounds; weights and momentum carry over.

    References:
        Savarese, Silva and Maire, NeurIPS 2020, arXiv:1912.04427, section 5, the stochastic counterpart of Continuous
        Sparsification; Bengio, Leonard and Courville, 2013, arXiv:1308.3432, for the straight-through gradient.
    """

    learns_masks = True
    remark_on_rounds = (
        "Soft masks are sigmoid(score), the mean of the masks that steps draw. Hard masks keep all unpruned weights. "
        "No step trains with these masks, so their accuracy may be as low as guessing."
    )
    remark_on_scores = (
        "In each step a weight is kept with probability sigmoid(score). Weights with the lowest scores are pruned "
        "permanently at the end of a round; they are at the left edge."
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
        """Means of the random masks."""
        return jax.tree.map(jax.nn.sigmoid, state.wide_scores)

    @staticmethod
    def hard_masks(state: TrainState, hyper: Hyperparams) -> PyTree:
        del hyper
        return _left(state.scores)

    def ticket_masks(self, state: TrainState) -> PyTree:
        """Masks of the remaining weights.

        Warns:
            CollapsedLayerWarning: a layer keeps no weight. With a target density, `end_epoch` warns instead.
        """
        ticket = _left(state.scores)
        if self.config.target_density is None:
            target_density.warn_if_empty(ticket)
        return ticket


def draw_masks(scores: PyTree, hyper: Hyperparams, key: jax.Array) -> PyTree:
    """Random masks, 1 with probability `sigmoid(score)`, else 0; their gradient is the gradient of the probability."""
    del hyper

    def draw(key: jax.Array, score: jax.Array) -> jax.Array:
        probability = jax.nn.sigmoid(score)
        drawn = jax.random.bernoulli(key, probability).astype(score.dtype)
        return drawn + (probability - lax.stop_gradient(probability))  # the value is exactly `drawn`

    return trees.map_with_keys(draw, key, scores)


def _left(scores: PyTree) -> PyTree:
    """Masks of the remaining weights."""
    return jax.tree.map(lambda score: _is_left(score).astype(jnp.promote_types(score.dtype, jnp.float32)), scores)


def _is_left(score: jax.Array) -> jax.Array:
    return score > jnp.asarray(PRUNED, score.dtype)  # rounded like a stored score, which may be bfloat16
