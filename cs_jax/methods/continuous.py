"""Continuous Sparsification."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import PyTree

from cs_jax.core import masks, schedules, target_density
from cs_jax.methods.base import Method, first_scores, round_density, selection, ticket_of, track_target
from cs_jax.training.problem import Snapshot
from cs_jax.training.step import Hyperparams, TrainState, expand

if TYPE_CHECKING:
    from cs_jax.experiment.config import Config
    from cs_jax.training.problem import Problem


class ContinuousSparsification(Method):
    """Masks are sigmoids of scores times a temperature that rises in each round; weights and scores learn together.

    Between rounds scores are reset, and weights and momentum carry over. With a target density, scores are held at it
    from epoch to epoch, and the ticket has it exactly; otherwise it keeps the scores above 0. So it is with a target of
    multiply-adds, where scores stand for channels.

    References:
        Savarese, Silva and Maire, "Winning the Lottery with Continuous Sparsification", NeurIPS 2020,
        arXiv:1912.04427, algorithm 2.
    """

    learns_masks = True
    says_of_rounds = (
        "Soft masks are those of the round's temperature; hard masks keep a weight or not, as the ticket does."
    )
    anneals = True
    takes_channels = True

    def density(self, config: "Config", round: int) -> float | None:
        return round_density(config, round)

    def begin(self, config: "Config", problem: "Problem", variables: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        return first_scores(config, variables["masks"], problem.recipe.channels), {}

    def end_epoch(self, config: "Config", state: TrainState, round: int, epoch: int) -> TrainState:
        return state.replace(scores=track_target(config, state, round))

    def begin_round(
        self, config: "Config", problem: "Problem", state: TrainState, snapshot: Snapshot | None
    ) -> TrainState:
        """Scores reset, all else as it is.

        `paper` resets with the temperature that the round ended on. `released` resets with temperature 1, as the
        authors' script does, because it has set it back before: there pruned entries can come back.
        """
        last = schedules.temperature(config.epochs - 1, config.epochs, config.final_temp)
        temperature = last if config.reset == "paper" else 1.0
        return state.replace(scores=masks.prune_scores(state.scores, temperature, init_value=config.mask_initial_value))

    def soft_masks(self, state: TrainState, hyper: Hyperparams) -> PyTree | None:
        soft = masks.soft_mask(state.wide_scores, hyper.temperature, init_value=hyper.init_value)
        return expand(state.channels, soft)

    def hard_masks(self, state: TrainState, hyper: Hyperparams) -> PyTree:
        return expand(state.channels, masks.hard_mask(state.wide_scores, init_value=hyper.init_value))

    def ticket_masks(self, config: "Config", state: TrainState) -> PyTree:
        """Hard masks of the target density, or of the scores above 0.

        Warns:
            CollapsedLayerWarning: the ticket leaves a layer without weights.
            UnfinishedSearchWarning: a target density cuts through masks that are still soft.
        """
        if config.target is not None:
            target_density.warn_if_soft(
                selection(config, state.scores, None, state.channels), state.scores, config.final_temp
            )
        scores, init_value = state.wide_scores, config.mask_initial_value
        return ticket_of(config, scores, config.target, state.channels, init_value=init_value)

    def mask_scale(self, config: "Config") -> float:
        return float(masks.hard_mask(jnp.ones(()), init_value=config.mask_initial_value))
