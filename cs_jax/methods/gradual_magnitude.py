"""Gradual magnitude pruning."""

import math

from cs_jax.methods.base import Method, keep_highest
from cs_jax.methods.magnitude import magnitudes
from cs_jax.training.step import TrainState

PRUNING_SHARE = 0.75
"""Share of the search's epochs after which the target is reached; the network recovers in the remaining epochs."""


class GradualMagnitudePruning(Method):
    """Gradual magnitude pruning: removes the smallest weights after every epoch, many at first and few later.

    The density is `target + (1 - target) * (1 - t)**3` with t from 0 to 1 over the first three quarters of all epochs
    of the search. The learning rate schedule restarts in each round; `rounds=1` gives a single schedule.

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878, equation 1, pruning once an epoch.
    """

    wants_target = True
    takes_channels = True
    remark_on_rounds = (
        "Weights are pruned at the end of every epoch, until the target is reached after three quarters of the search. "
        "The accuracy of an epoch is measured right after pruning."
    )

    def density(self, round: int) -> float | None:
        return self._density((round + 1) * self.config.epochs)

    def end_epoch(self, state: TrainState, round: int, epoch: int) -> TrainState:
        density = self._density(round * self.config.epochs + epoch + 1)
        return state.replace(masks=keep_highest(self.config, magnitudes(state), density, state.channels))

    def _density(self, epochs_done: int) -> float:
        assert self.config.target is not None
        pruning_epochs = math.ceil(PRUNING_SHARE * self.config.rounds * self.config.epochs)
        return cubic_density(self.config.target, min(1.0, epochs_done / pruning_epochs))


def cubic_density(target: float, share: float) -> float:
    """Density after a share of the pruning, from 1 at share 0 to the target at share 1, fast at first.

    >>> [round(cubic_density(0.2, share), 3) for share in (0.0, 0.5, 1.0)]
    [1.0, 0.3, 0.2]
    """
    return target + (1 - target) * (1 - share) ** 3
