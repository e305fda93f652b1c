"""Random masks."""

import jax
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.methods.base import AtInitialization, keep_highest
from cs_jax.training.problem import Problem


class RandomPruning(AtInitialization):
    """Keeps weights drawn at random before any training: what every other method has to beat.

    The ticket's weights are the initial ones. Over all layers, each has the target density but for chance; with the
    layer as scope, exactly.
    """

    wants_target = True
    takes_channels = True

    def begin(self, problem: Problem, variables: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        assert self.config.target is not None
        found, channels = variables["masks"], problem.recipe.channels
        ranks = random_ranks(problem.key_for("masks"), found if channels is None else channels.first_entries(found))
        return {}, keep_highest(self.config, ranks, self.config.target, channels)


def random_ranks(key: jax.Array, masks: PyTree) -> PyTree:
    """Independent uniform numbers in [0, 1) in place of every entry."""
    return trees.map_with_keys(lambda key, mask: jax.random.uniform(key, mask.shape), key, masks)
