"""Iterative magnitude pruning, with and without rewinding between rounds."""

from cs_jax.methods.base import Method, keep_highest, round_density
from cs_jax.methods.magnitude import magnitudes
from cs_jax.training import step
from cs_jax.training.problem import Problem, Snapshot
from cs_jax.training.step import TrainState

DEFAULT_RATE = 0.2
"""Prune rate of the paper for fully connected and residual networks."""


class IterativeMagnitudePruning(Method):
    """Iterative magnitude pruning: each round trains, prunes the smallest remaining weights, and rewinds the others.

    Each round prunes the same share of the remaining weights: the config's prune rate, or the share that reaches the
    target in the last round. Weights are rewound to the snapshot. A snapshot at epoch 0 contains the initial weights.
    The learning rate schedule restarts at epoch 0 in every round, as for every method in this package.

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv:1803.03635; Frankle et al., "Linear Mode
        Connectivity and the Lottery Ticket Hypothesis", ICML 2020, arXiv:1912.05671, for rewinding
        to an early epoch.
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
        early = problem.executor.copy(snapshot)  # the state is donated, and later rounds need the snapshot again
        return step.init_state(problem.recipe, *early, scores={}, masks=state.masks)


class ContinuedMagnitudePruning(IterativeMagnitudePruning):
    """Iterative magnitude pruning without rewinding: weights, BatchNorm state and momentum carry over between rounds.

    References:
        Savarese, Silva and Maire, NeurIPS 2020, arXiv:1912.04427, section 5, where the method is called IMP-C.
    """

    def begin_round(self, problem: Problem, state: TrainState, snapshot: Snapshot | None) -> TrainState:
        return state
