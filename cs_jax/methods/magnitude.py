"""One-shot magnitude pruning, and the ranks that all magnitude pruning uses."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.methods.base import Method, keep_highest
from cs_jax.training.step import TrainState


class OneShotMagnitudePruning(Method):
    """One-shot magnitude pruning: trains the dense network in all rounds, and keeps the largest weights at the end.

    References:
        Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
        arXiv:1506.02626, with one threshold for all layers unless `scope` is "layer".
    """

    wants_target = True
    takes_channels = True

    def end_epoch(self, state: TrainState, round: int, epoch: int) -> TrainState:
        if (round, epoch) != (self.config.rounds - 1, self.config.epochs - 1):
            return state
        assert self.config.target is not None
        return state.replace(masks=keep_highest(self.config, magnitudes(state), self.config.target, state.channels))


def magnitudes(state: TrainState) -> PyTree:
    """Absolute values of the remaining masked weights, in a tree like the masks; -1 for pruned weights.

    With one score per channel: mean absolute value of each channel, divided by the mean over the layer's remaining
    channels. Without this division, the layer with the smallest weights would lose all its channels first.

    References:
        Molchanov et al., 2016, arXiv:1611.06440, section 2.2, who normalise within layers by the L2 norm.
    """
    weights = trees.leaves_by_path(state.params)

    def rank(path: trees.Path, mask: jax.Array) -> jax.Array:
        return jnp.where(mask != 0, jnp.abs(weights[path]), -1)

    ranks = trees.nest({path: rank(path, mask) for path, mask in trees.leaves_by_path(state.masks).items()})
    if state.channels is None:
        return ranks
    return jax.tree.map(lambda mean: mean / jnp.mean(mean, where=mean >= 0), state.channels.means(ranks))
