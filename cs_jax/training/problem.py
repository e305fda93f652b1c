"""Training problem of a run: model, data and PRNG keys; and the ticket, a sparse network before its retraining."""

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
    """State that a rewind restores: all weights, including weights without a mask, and the BatchNorm state."""

    params: PyTree
    batch_stats: PyTree


class Ticket(NamedTuple):
    """A sparse network before retraining: initial weights of the retraining, and hard masks."""

    start: Snapshot
    masks: PyTree


PURPOSES = ("init", "order", "augment", "masks", "reinit", "random", "shuffled")
"""Purposes of random numbers in a run; each has separate PRNG keys. Custom methods and controls may add purposes."""


@dataclass(frozen=True)
class Problem:
    """Model, data, PRNG key and executor of a run."""

    recipe: Recipe
    train: Images
    validation: Images | None  # None without validation examples
    key: jax.Array  # PRNG key of the run
    order: Callable[[int, int], Any] | None = None  # (phase, epoch) -> indices into `train`; None shuffles
    executor: Executor = Executor()  # runs steps and evaluations

    def epoch_order(self, phase: int, epoch: int) -> Any:
        """Indices into `train`, in the order of one epoch.

        Args:
            phase: number of the search round, from 0; the retraining has the next number after the last round.
            epoch: number of the epoch in the phase, from 0.
        """
        if self.order is not None:
            return self.order(phase, epoch)
        return jax.random.permutation(self.key_for("order", phase, epoch), len(self.train))

    def init_variables(self, purpose: str = "init") -> dict[str, PyTree]:
        """Newly initialized network: "params", "batch_stats" and "masks" of ones."""
        return self.executor.init_variables(self.recipe, self.key_for(purpose), self.train.image_shape)

    def init_ticket(self, purpose: str = "init") -> Ticket:
        """Newly initialized network as a ticket: masks of ones keep every weight."""
        variables = self.init_variables(purpose)
        return Ticket(Snapshot(variables["params"], variables["batch_stats"]), variables["masks"])

    def key_for(self, purpose: str, *numbers: int) -> jax.Array:
        """PRNG key for a purpose and numbers (such as phase and epoch); different arguments give different keys."""
        key = self.key
        first = PURPOSES.index(purpose) if purpose in PURPOSES else zlib.crc32(purpose.encode())
        for number in (first, *numbers):
            key = jax.random.fold_in(key, number)
        return key
