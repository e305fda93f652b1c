"""Supermasks: masks learned over weights that never move."""

import dataclasses

from cs_jax.methods.base import NONE
from cs_jax.methods.continuous import ContinuousSparsification
from cs_jax.methods.stochastic import IterativeStochasticSparsification
from cs_jax.training.step import Recipe


class Supermask(ContinuousSparsification):
    """Continuous Sparsification of a network whose weights stay at their initial values.

    All weights do, masked or not; BatchNorm keeps its running statistics. The masked network is the result.

    References:
        Zhou, Lan, Liu and Yosinski, "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask", NeurIPS 2019,
        arXiv:1905.01067; Savarese, Silva and Maire, NeurIPS 2020, arXiv:1912.04427, section 5, for their comparison.
    """

    retrainings = (NONE,)
    why_these_retrainings = "its weights are frozen"
    takes_channels = False

    def recipe(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(super().recipe(recipe), moves_weights=False)


class StochasticSupermask(IterativeStochasticSparsification):
    """Iterative Stochastic Sparsification of a network whose weights stay at their initial values.

    References:
        Zhou, Lan, Liu and Yosinski, NeurIPS 2019, arXiv:1905.01067, section 5, where masks are drawn as here.
    """

    retrainings = (NONE,)
    why_these_retrainings = "its weights are frozen"

    def recipe(self, recipe: Recipe) -> Recipe:
        return dataclasses.replace(super().recipe(recipe), moves_weights=False)
