"""Runs epochs on devices, as compiled calls; evaluations are in `evaluation`."""

from collections.abc import Generator

import jax
import numpy as np
from jaxtyping import Array, PyTree

from cs_jax.data.stream import ImageStream
from cs_jax.training import compiled
from cs_jax.training.epoch import Epoch
from cs_jax.training.evaluation import Evaluator
from cs_jax.training.step import Recipe, StepInputs, StepMetrics, TrainState, init_variables
from cs_jax.training.streamed import Streamed

STEPS_PER_CALL = 100
"""Steps of one compiled call on an accelerator: few dispatches, but a signal is still handled soon."""


class Executor(Evaluator):
    """Runs epochs and evaluations.

    Compiled calls on images in device memory are in four methods, which subclasses can override: `take_steps`,
    `take_step`, `classify` and `classify_all`.
    """

    def init_variables(self, recipe: Recipe, key: Array, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
        """Result of `step.init_variables`, created with its final shardings, so no device has to hold whole arrays."""
        return init_variables(recipe, key, image_shape, place=self.mesh_layout and self.mesh_layout.state)

    def train_epoch(
        self, recipe: Recipe, state: TrainState, epoch: Epoch
    ) -> Generator[tuple[int, TrainState, StepMetrics], None, None]:
        """Take the steps of one epoch, each example once, one compiled call at a time.

        A call takes `STEPS_PER_CALL` steps on an accelerator. A call takes one step on a CPU, because XLA computes the
        weight gradient of a convolution 10 to 100 times slower inside a loop there (jax-ml/jax#12868). On streamed
        images, a call takes one step on all devices. At most two calls are in progress at a time, so that signals are
        handled soon.

        Args:
            recipe: static part of the step.
            state: donated; must not be used again.
            epoch: data, order and hyperparameters. Closing the generator ends the threads that read a stream.

        Yields:
            After every call: number of steps done in this epoch, state, and loss terms of the call's steps. The state
            is donated to the next call: copy arrays that are needed later. The device may still be computing the loss
            terms; the loss terms of the previous call are ready.

        Raises:
            ConfigError: a streamed example cannot be read.
        """
        data, size, done = epoch.data, epoch.batch_size, epoch.first_step
        if isinstance(data, ImageStream):
            yield from Streamed(self, data, size).train(recipe, state, epoch)
            return
        order = np.asarray(epoch.order)
        full = order.size // size if jax.default_backend() != "cpu" else 0
        batches = self.place_batches(order[: full * size].reshape(full, size)) if done < full else None
        metrics = None
        for end in epoch.call_ends(full, STEPS_PER_CALL):
            before = metrics
            if end <= full:
                assert batches is not None
                state, metrics = self.take_steps(recipe, state, epoch.inputs(data, batches), range(done, end))
            else:
                inputs = epoch.inputs(data, order[done * size : end * size])
                state, metrics = self.take_step(recipe, state, inputs, done)
            jax.block_until_ready(before)
            yield end, state, metrics
            done = end

    def take_steps(
        self, recipe: Recipe, state: TrainState, inputs: StepInputs, steps: range
    ) -> tuple[TrainState, StepMetrics]:
        """State after several steps of an epoch in one call, and their loss terms.

        Args:
            recipe: static part of the step.
            state: donated.
            inputs: `indices` is (steps, batch), one row for each step of the epoch.
            steps: numbers of the steps to take, consecutive.
        """
        _, several = compiled.compiled(recipe, self.mesh_layout, state)
        state, metrics = several(recipe, state, inputs, (steps.start, steps.stop))
        return state, jax.tree.map(lambda figure: figure[steps.start : steps.stop], metrics)

    def take_step(
        self, recipe: Recipe, state: TrainState, inputs: StepInputs, step: int
    ) -> tuple[TrainState, StepMetrics]:
        """State after one step of an epoch, and its loss terms.

        Args:
            recipe: static part of the step.
            state: donated.
            inputs: `indices` is (batch,), on the host.
            step: number of the step in its epoch; used by subclasses.
        """
        del step
        one, _ = compiled.compiled(recipe, self.mesh_layout, state)
        return one(recipe, state, inputs._replace(indices=self.place_batch(np.asarray(inputs.indices))))
