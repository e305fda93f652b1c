"""How tickets are found: one file per method, behind the interface of `method.Method`."""

from typing import TYPE_CHECKING

from cs_jax.methods.base import FINETUNE, LR_REWIND, NONE, RETRAININGS, REWIND, Method
from cs_jax.methods.continuous import ContinuousSparsification
from cs_jax.methods.dense import Dense
from cs_jax.methods.gradual_magnitude import GradualMagnitudePruning
from cs_jax.methods.iterative_magnitude import ContinuedMagnitudePruning, IterativeMagnitudePruning
from cs_jax.methods.magnitude import OneShotMagnitudePruning
from cs_jax.methods.random import RandomPruning
from cs_jax.methods.snip import Snip
from cs_jax.methods.stochastic import IterativeStochasticSparsification
from cs_jax.methods.supermask import StochasticSupermask, Supermask

if TYPE_CHECKING:
    from cs_jax.experiment.config import Config

METHODS: dict[str, Method] = {
    "cs": ContinuousSparsification(),
    "imp": IterativeMagnitudePruning(),
    "imp-c": ContinuedMagnitudePruning(),
    "iss": IterativeStochasticSparsification(),
    "gmp": GradualMagnitudePruning(),
    "magnitude": OneShotMagnitudePruning(),
    "random": RandomPruning(),
    "snip": Snip(),
    "supermask": Supermask(),
    "supermask-iss": StochasticSupermask(),
    "dense": Dense(),
}
"""What `--method` can name."""


def of(config: "Config") -> Method:
    """The method that a config names."""
    return METHODS[config.method]


__all__ = ["RETRAININGS", "FINETUNE", "LR_REWIND", "METHODS", "NONE", "REWIND", "Method", "of"]
