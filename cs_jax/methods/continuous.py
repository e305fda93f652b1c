"""Continuous Sparsification."""

import jax.numpy as jnp
from jaxtyping import PyTree

from cs_jax.core import masks, schedules, target_density
from cs_jax.methods.base import Method, first_scores, round_density, selection, ticket_of, track_target
from cs_jax.training.problem import Problem, Snapshot
from cs_jax.training.step import Hyperparams, TrainState, expand


class ContinuousSparsification(Method):
    """Continuous Sparsification: a mask is the sigmoid of a score times a temperature that rises during each round.

    Weights and scores are trained together. Between rounds scores are reset; weights and momentum carry over. With a
    target density, scores are shifted after every epoch to track the target, and the ticket meets the target exactly.
    Without a target, the ticket keeps the scores above 0. A target of multiply-adds works the same way, with one score
    per channel.

    References:
        Savarese, Silva and Maire, "Winning the Lottery with Continuous Sparsification", NeurIPS 2020,
        arXiv:1912.04427, algorithm 2.
    """

    learns_masks = True
    remark_on_rounds = (
        "Soft masks are computed at the round's final temperature; hard masks are 0 or their scale, as in the ticket."
    )
    anneals = True
    takes_channels = True

    def density(self, round: int) -> float | None:
        return round_density(self.config, round)

    def begin(self, problem: Problem, variables: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        return first_scores(self.config, variables["masks"], problem.recipe.channels), {}

    def end_epoch(self, state: TrainState, round: int, epoch: int) -> TrainState:
        return state.replace(scores=track_target(self.config, state, round))

    def begin_round(self, problem: Problem, state: TrainState, snapshot: Snapshot | None) -> TrainState:
        """State with reset scores.

        `paper` resets with the last temperature of the round. `released` resets with temperature 1, because the
        authors' script sets the temperature back to 1 before the reset; pruned entries can then return.
        """
        last = schedules.temperature(self.config.epochs - 1, self.config.epochs, self.config.final_temp)
        temperature = last if self.config.reset == "paper" else 1.0
        return state.replace(
            scores=masks.prune_scores(state.scores, temperature, init_value=self.config.mask_initial_value)
        )

    @staticmethod
    def soft_masks(state: TrainState, hyper: Hyperparams) -> PyTree | None:
        soft = masks.soft_mask(state.wide_scores, hyper.temperature, init_value=hyper.init_value)
        return expand(state.channels, soft)

    @staticmethod
    def hard_masks(state: TrainState, hyper: Hyperparams) -> PyTree:
        return expand(state.channels, masks.hard_mask(state.wide_scores, init_value=hyper.init_value))

    def ticket_masks(self, state: TrainState) -> PyTree:
        """Hard masks that meet the target, or hard masks of the scores above 0 without a target.

        Warns:
            CollapsedLayerWarning: a layer keeps no weight, or only reserved weights.
            UnfinishedSearchWarning: the masks at the target density are still soft.
        """
        if self.config.target is not None:
            target_density.warn_if_soft(
                selection(self.config, state.scores, None, state.channels), state.scores, self.config.final_temp
            )
        scores, init_value = state.wide_scores, self.config.mask_initial_value
        return ticket_of(self.config, scores, self.config.target, state.channels, init_value=init_value)

    def mask_scale(self) -> float:
        return float(masks.hard_mask(jnp.ones(()), init_value=self.config.mask_initial_value))
