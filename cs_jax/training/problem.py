"""A training problem: model, data and random numbers; and a sparse network before it is retrained."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from cs_jax.data.stream import Images
from cs_jax.training.executor import Executor
from cs_jax.training.step import Recipe


class Snapshot(NamedTuple):
    """What a rewind puts back: weights, masked or not, and BatchNorm state."""

    params: PyTree
    batch_stats: PyTree


class Ticket(NamedTuple):
    """A sparse network before it is retrained: the weights that this begins with, and hard masks."""

    start: Snapshot
    masks: PyTree


PURPOSES = ("init", "order", "augment", "masks", "reinit", "random", "shuffled")
"""What a run draws random numbers for; a method or control of somebody's own may name others."""


@dataclass(frozen=True)
class Problem:
    """What a run works on."""

    recipe: Recipe
    train: Images
    validation: Images | None  # None where no example was set aside
    key: jax.Array  # PRNG key of the run
    order: Callable[[int, int], Any] | None = None  # indices into `train` of a phase's epoch; None is a shuffle
    executor: Executor = Executor()  # takes the steps

    def epoch_order(self, phase: int, epoch: int) -> Any:
        """Indices into `train`, in the order of an epoch. Phases are the rounds from 0, then the retraining."""
        if self.order is not None:
            return self.order(phase, epoch)
        return jax.random.permutation(self.key_for("order", phase, epoch), len(self.train))

    def init_variables(self, purpose: str = "init") -> dict[str, PyTree]:
        """A fresh network: "params", "batch_stats" and "masks" of ones."""
        return self.executor.init_variables(self.recipe, self.key_for(purpose), self.train.image_shape)

    def init_ticket(self, purpose: str = "init") -> Ticket:
        """A fresh network as a ticket that keeps every weight, unscaled."""
        variables = self.init_variables(purpose)
        return Ticket(Snapshot(variables["params"], variables["batch_stats"]), variables["masks"])

    def key_for(self, purpose: str, *numbers: int) -> jax.Array:
        """The PRNG key of a purpose, so that no two draws of a run share one."""
        key = self.key
        first = PURPOSES.index(purpose) if purpose in PURPOSES else zlib.crc32(purpose.encode())
        for number in (first, *numbers):
            key = jax.random.fold_in(key, number)
        return key
