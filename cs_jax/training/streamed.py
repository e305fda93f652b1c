"""Training and evaluation on streamed images: each batch is read while the previous one is computed."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Int, PyTree

from cs_jax.data.images import RESIZED_CROP, ImageSet
from cs_jax.data.stream import WHOLE, ImageStream, Share
from cs_jax.training import compiled
from cs_jax.training.epoch import Epoch
from cs_jax.training.placement import Placement
from cs_jax.training.step import Recipe, StepMetrics, TrainState


@dataclass(frozen=True)
class Streamed:
    """A stream whose batches are placed on devices. The data set of every compiled call is one batch.

    Closing a generator ends the threads that read the stream.

    Attributes:
        placement: places batches on devices.
        stream: images in files.
        batch_size: examples of a batch, in all processes together.
    """

    placement: Placement
    stream: ImageStream
    batch_size: int

    def train(self, recipe: Recipe, state: TrainState, epoch: Epoch) -> Iterator[tuple[int, TrainState, StepMetrics]]:
        """`Executor.train_epoch` for a stream: one step in each call."""
        seed = epoch.host_seed(int(state.step) - epoch.first_step) if recipe.augment == RESIZED_CROP else None
        step, _ = compiled.compiled(recipe, self.placement.mesh_layout, state)
        metrics = None
        with contextlib.closing(self._read(epoch.order, crop_seed=seed, first_step=epoch.first_step)) as batches:
            for done, data in enumerate(batches, epoch.first_step + 1):
                before = metrics
                state, metrics = step(recipe, state, epoch.inputs(data, self._all_of(data)))
                jax.block_until_ready(before)
                yield done, state, metrics

    def logits(
        self, model: nn.Module, variables: PyTree, order: Int[np.ndarray, " examples"], on_batch: Callable[[], None]
    ) -> list[Array]:
        """Logits of each batch of an order, in evaluation mode; calls `on_batch` before each compiled call."""
        logits = []
        with contextlib.closing(self._read(order)) as batches:
            for data in batches:
                on_batch()
                jax.block_until_ready(logits[-1:])
                logits.append(compiled.forward(model, variables, data.images, data.mean, data.std))
        return logits

    def estimate_statistics(self, model: nn.Module, variables: PyTree, order: Int[np.ndarray, " examples"]) -> PyTree:
        """The "batch_stats" of `variables` after the batches of an order, in training mode."""
        with contextlib.closing(self._read(order)) as batches:
            for data in batches:
                jax.block_until_ready(variables["batch_stats"])
                batch_stats = compiled.update_statistics(model, variables, data, self._all_of(data))
                variables = {**variables, "batch_stats": batch_stats}
        return variables["batch_stats"]

    def _all_of(self, data: ImageSet) -> np.ndarray | jax.Array:
        return self.placement.place_batch(np.arange(len(data)))

    def _read(
        self, order: Any, *, crop_seed: int | None = None, first_step: int = 0
    ) -> Generator[ImageSet, None, None]:
        """Batches of an order, placed on devices; each process reads its share of every batch."""
        layout, size = self.placement.mesh_layout, self.batch_size
        share = WHOLE if layout is None else Share(jax.process_index(), jax.process_count())
        batches = self.stream.batches(order, batch_size=size, crop_seed=crop_seed, first_step=first_step, share=share)
        with contextlib.closing(batches):
            if layout is None:
                yield from map(self.stream.on_device, batches)
                return
            for number, batch in enumerate(batches, first_step):
                count = min(size, len(order) - number * size)
                images, labels = (layout.join(part, count) for part in (batch.images, batch.labels))
                constants = (jnp.asarray(constant, float) for constant in (self.stream.mean, self.stream.std))
                yield ImageSet(images, labels, *constants)
