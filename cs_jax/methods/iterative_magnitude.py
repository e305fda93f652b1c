"""Iterative magnitude pruning, with and without rewinding between rounds."""

from cs_jax.methods.base import Method, keep_highest, round_density
from cs_jax.methods.magnitude import magnitudes
from cs_jax.training import step
from cs_jax.training.problem import Problem, Snapshot
from cs_jax.training.step import TrainState

DEFAULT_RATE = 0.2
"""Of the paper, for fully connected and residual networks."""


class IterativeMagnitudePruning(Method):
    """A round trains, prunes the smallest of the weights that are left, and puts the others back to early values.

    The rate is the same in each round: the config's prune rate, or the rate that reaches the target in the last round.
    The early values are those of the snapshot: initialisation where that is taken at epoch 0. The learning rate starts
    again with every round, from epoch 0 also where the values are later ones, as it does for every method here.

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv:1803.03635; Frankle et al., "Linear Mode
        Connectivity and the Lottery Ticket Hypothesis", ICML 2020, arXiv:1912.05671, for early values that are not
        the initial ones.
    """

    takes_rate = True
    takes_channels = True

    def density(self, round: int) -> float | None:
        if self.config.target is not None:
            return round_density(self.config, round)
        rate = DEFAULT_RATE if self.config.prune_rate is None else self.config.prune_rate
        return (1 - rate) ** (round + 1)

    def end_epoch(self, state: TrainState, round: int, epoch: int) -> TrainState:
        if epoch < self.config.epochs - 1:
            return state
        density = self.density(round)
        assert density is not None
        return state.replace(masks=keep_highest(self.config, magnitudes(state), density, state.channels))

    def begin_round(self, problem: Problem, state: TrainState, snapshot: Snapshot | None) -> TrainState:
        assert snapshot is not None
        early = problem.executor.copy(snapshot)  # the state is donated, and the snapshot is wanted again
        return step.init_state(problem.recipe, *early, scores={}, masks=state.masks)


class ContinuedMagnitudePruning(IterativeMagnitudePruning):
    """Iterative magnitude pruning whose weights, BatchNorm state and momentum carry over from round to round.

    References:
        Savarese, Silva and Maire, NeurIPS 2020, arXiv:1912.04427, section 5, where it is IMP-C.
    """

    def begin_round(self, problem: Problem, state: TrainState, snapshot: Snapshot | None) -> TrainState:
        return state
