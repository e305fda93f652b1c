"""One pass over the training images, cut into batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Int

from cs_jax.data.images import ImageSet
from cs_jax.data.stream import Images
from cs_jax.training.step import ROUNDING_DRAWS, Hyperparams, StepInputs

HOST_DRAWS = ROUNDING_DRAWS - 1
"""Number folded into a phase's key for random draws on the host; larger than any step number, not used by steps."""


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over training images: inputs of an executor, in addition to recipe and state.

    Attributes:
        data: training images, in device memory or streamed.
        order: (examples,) integers, indices into `data`, on the device or the host. Each example is used once. The last
            batch is smaller if the batch size does not divide the number of examples.
        key: PRNG key of the phase.
        hyper: scalars, constant within the epoch.
        batch_size: examples per step, at least 1.
        first_step: number of steps of this epoch that the state has already done.
    """

    data: Images
    order: Int[Array, " examples"] | np.ndarray
    key: Array
    hyper: Hyperparams
    batch_size: int
    first_step: int = 0

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole epoch, including a smaller last batch."""
        return -(-len(self.order) // self.batch_size)

    def inputs(self, data: ImageSet, indices: Int[Array, "..."] | np.ndarray) -> StepInputs:
        """Inputs of a compiled call, with the key and hyperparameters of this epoch."""
        return StepInputs(data, indices, self.key, self.hyper)

    def call_ends(self, full: int, steps_per_call: int) -> Iterator[int]:
        """Number of done steps of the epoch after each compiled call.

        A call ends at every multiple of `steps_per_call` up to `full`. After that, each call does one step.

        Args:
            full: number of steps that may share a call; all of them have full batches.
            steps_per_call: maximum number of steps in a call.
        """
        done = self.first_step
        while done < self.num_steps:
            done = min(done - done % steps_per_call + steps_per_call, full) if done < full else done + 1
            yield done

    def host_seed(self, steps_of_phase: int) -> int:
        """Seed of 64 bits for random draws on the host in this epoch.

        Args:
            steps_of_phase: steps of the phase that were done before this epoch.
        """
        key = jax.random.fold_in(jax.random.fold_in(self.key, HOST_DRAWS), steps_of_phase)
        high, low = map(int, jax.random.bits(key, (2,), np.uint32))
        return high << 32 | low
