"""Random masks."""

import jax
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.methods.base import AtInitialization, keep_highest
from cs_jax.training.problem import Problem


class RandomPruning(AtInitialization):
    """Random pruning at initialisation, the baseline for every other method.

    The ticket has the initial weights. With the global scope, the density of a layer varies at random around the
    target density. With the layer scope, each layer has exactly the target density.
    """

    wants_target = True
    takes_channels = True

    def begin(self, problem: Problem, variables: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        assert self.config.target is not None
        found, channels = variables["masks"], problem.recipe.channels
        ranks = random_ranks(problem.key_for("masks"), found if channels is None else channels.first_entries(found))
        return {}, keep_highest(self.config, ranks, self.config.target, channels)


def random_ranks(key: jax.Array, masks: PyTree) -> PyTree:
    """Independent uniform numbers in [0, 1), in arrays with the shapes of the masks."""
    return trees.map_with_keys(lambda key, mask: jax.random.uniform(key, mask.shape), key, masks)
