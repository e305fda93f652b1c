"""Pruning methods: one file per method, each a subclass of `base.Method`."""

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

METHODS: dict[str, type[Method]] = {
    "cs": ContinuousSparsification,
    "imp": IterativeMagnitudePruning,
    "imp-c": ContinuedMagnitudePruning,
    "iss": IterativeStochasticSparsification,
    "gmp": GradualMagnitudePruning,
    "magnitude": OneShotMagnitudePruning,
    "random": RandomPruning,
    "snip": Snip,
    "supermask": Supermask,
    "supermask-iss": StochasticSupermask,
    "dense": Dense,
}
"""Methods by their name after `--method`; an instance is built from the config of a run."""


__all__ = ["RETRAININGS", "FINETUNE", "LR_REWIND", "METHODS", "NONE", "REWIND", "Method"]
