"""Magnitude pruning in one shot, and what all pruning by magnitude ranks."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.methods.base import Method, keep_highest
from cs_jax.training.step import TrainState


class OneShotMagnitudePruning(Method):
    """Trains the dense network over all rounds, and keeps its largest weights at the end.

    References:
        Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
        arXiv:1506.02626, with one threshold for all layers unless the scope is the layer.
    """

    wants_target = True
    takes_channels = True

    def end_epoch(self, state: TrainState, round: int, epoch: int) -> TrainState:
        if (round, epoch) != (self.config.rounds - 1, self.config.epochs - 1):
            return state
        assert self.config.target is not None
        return state.replace(masks=keep_highest(self.config, magnitudes(state), self.config.target, state.channels))


def magnitudes(state: TrainState) -> PyTree:
    """Absolute values of the masked weights that are left, by the structure of the masks; -1 for those pruned.

    Where scores stand for channels, the mean over each channel, over that of the layer's channels that are left: layers
    have weights of other sizes, and the one with the smallest would lose all of them first.

    References:
        Molchanov et al., 2016, arXiv:1611.06440, section 2.2, who normalise within layers by another norm.
    """
    weights = trees.leaves_by_path(state.params)

    def rank(path: trees.Path, mask: jax.Array) -> jax.Array:
        return jnp.where(mask != 0, jnp.abs(weights[path]), -1)

    ranks = trees.nest({path: rank(path, mask) for path, mask in trees.leaves_by_path(state.masks).items()})
    if state.channels is None:
        return ranks
    return jax.tree.map(lambda mean: mean / jnp.mean(mean, where=mean >= 0), state.channels.means(ranks))
