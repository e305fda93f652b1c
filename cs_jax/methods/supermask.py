"""Supermasks: masks that are trained over frozen weights."""

import dataclasses

from cs_jax.methods.base import NONE
from cs_jax.methods.continuous import ContinuousSparsification
from cs_jax.methods.stochastic import IterativeStochasticSparsification
from cs_jax.training.step import Recipe


class Supermask(ContinuousSparsification):
    """Continuous Sparsification with frozen weights: only scores are trained.

    All weights, kept or pruned, have their initial values; BatchNorm updates its running statistics. The result is the
    masked network, without retraining.

    References:
        Zhou, Lan, Liu and Yosinski, "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask", NeurIPS 2019,
        arXiv:1905.01067; Savarese, Silva and Maire, NeurIPS 2020, arXiv:1912.04427, section 5, for a comparison.
    """

    retrainings = (NONE,)
    why_these_retrainings = "its weights are frozen"
    takes_channels = False

    def recipe(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(super().recipe(recipe), moves_weights=False)


class StochasticSupermask(IterativeStochasticSparsification):
    """Iterative Stochastic Sparsification with frozen weights: only scores are trained.

    References:
        Zhou, Lan, Liu and Yosinski, NeurIPS 2019, arXiv:1905.01067, section 5, which draws masks in the same way.
    """

    retrainings = (NONE,)
    why_these_retrainings = "its weights are frozen"

    def recipe(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(super().recipe(recipe), moves_weights=False)
