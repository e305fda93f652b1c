"""What drives the devices: epochs of steps, and evaluations, as compiled calls."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Int, PyTree

from cs_jax.data.images import ImageSet
from cs_jax.data.stream import Images, ImageStream
from cs_jax.training import compiled
from cs_jax.training.mesh import MeshLayout
from cs_jax.training.step import ROUNDING_DRAWS, Hyperparams, Recipe, StepMetrics, TrainState, init_variables

STEPS_PER_CALL = 100
"""Steps that an accelerator takes in one call: many, to leave it alone, and few enough to hear a signal between."""

HOST_DRAWS = ROUNDING_DRAWS - 1
"""Folded into a phase's key for what the host draws: a number that nothing within steps has."""


@dataclass(eq=False)
class Executor:
    """Takes steps and evaluates. Every compiled call is a method of its own, which another executor may make otherwise.

    Attributes:
        layout: where arrays are on several devices; None is the default device.
    """

    layout: MeshLayout | None = None

    def place(self, tree: PyTree) -> PyTree:
        """Weights, and what has their shapes, where steps want them."""
        return tree if self.layout is None else self.layout.place(tree, self.layout.state(tree))

    def copy(self, tree: PyTree) -> PyTree:
        """Copies of them there, which a step may be given for good."""
        return jax.tree.map(jnp.copy, self.place(tree))

    def place_everywhere(self, tree: PyTree) -> PyTree:
        """Arrays of which every device has all: the data. Those of a stream are placed as they are read."""
        if self.layout is None or isinstance(tree, ImageStream):
            return tree
        return self.layout.place(tree, self.layout.whole)

    def shardings(self, tree: PyTree) -> PyTree:
        """Where `place` would put arrays of these shapes."""
        if self.layout is not None:
            return self.layout.state(tree)
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), tree)

    def init_variables(self, recipe: Recipe, key: Array, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
        """`training.init_variables`, where steps want them from the start: no device needs room for all."""
        return init_variables(recipe, key, image_shape, place=self.layout and self.layout.state)

    def train_epoch(
        self,
        recipe: Recipe,
        state: TrainState,
        data: Images,
        order: Int[Array, " examples"] | np.ndarray,
        key: Array,
        hyper: Hyperparams,
        *,
        batch_size: int,
        first_step: int = 0,
    ) -> Generator[tuple[int, TrainState, StepMetrics], None, None]:
        """The steps of one pass over `order`, each example once, a compiled call at a time.

        On an accelerator a call takes `STEPS_PER_CALL` steps. On the CPU it takes one, because XLA computes the weight
        gradient of a convolution 10 to 100 times slower inside a loop there (jax-ml/jax#12868). Of images that are
        streamed it takes one everywhere. No more than two calls are under way at a time, so a signal is heard between
        them.

        Args:
            recipe: what the step is built from.
            state: donated, not to be used again.
            data: training images. To close the generator ends the threads that read a stream.
            order: indices into `data`, on the device or the host; the last batch is smaller where the batch size does
                not divide their number.
            key: PRNG key of the phase.
            hyper: scalars, constant through the epoch.
            batch_size: examples per step.
            first_step: steps of this epoch that the state has done already.

        Yields:
            After every call: the steps done in this epoch, the state, which is donated to the next call (copy what is
            to be kept), and the figures of the call's steps, which may not have been computed yet; those of the call
            before have.

        Raises:
            ConfigError: an example that is streamed cannot be read.
        """
        if isinstance(data, ImageStream):
            yield from self._train_streamed(recipe, state, data, order, key, hyper, batch_size, first_step)
            return
        host_order = np.asarray(order)
        num_steps = -(-order.size // batch_size)
        full = order.size // batch_size if jax.default_backend() != "cpu" else 0
        batches = (
            self._batches(host_order[: full * batch_size].reshape(full, batch_size)) if first_step < full else None
        )
        metrics = None
        for done in _call_ends(first_step, full, num_steps):
            before = metrics
            if done <= full:
                assert batches is not None
                state, metrics = self.take_steps(recipe, state, data, batches, first_step, done, key, hyper)
            else:
                indices = host_order[first_step * batch_size : done * batch_size]
                state, metrics = self.take_step(recipe, state, data, indices, first_step, key, hyper)
            jax.block_until_ready(before)
            yield done, state, metrics
            first_step = done

    def take_steps(
        self,
        recipe: Recipe,
        state: TrainState,
        data: ImageSet,
        batches: Int[Array, "steps batch"],
        first: int,
        stop: int,
        key: Array,
        hyper: Hyperparams,
    ) -> tuple[TrainState, StepMetrics]:
        """The state, which is donated, after the steps from `first` to before `stop` of an epoch, and their figures."""
        _, steps = compiled.compiled(recipe, self.layout, state)
        state, metrics = steps(recipe, state, data, batches, first, stop, key, hyper)
        return state, jax.tree.map(lambda figure: figure[first:stop], metrics)

    def take_step(
        self,
        recipe: Recipe,
        state: TrainState,
        data: ImageSet,
        indices: Int[np.ndarray, " batch"],
        step: int,
        key: Array,
        hyper: Hyperparams,
    ) -> tuple[TrainState, StepMetrics]:
        """The state, which is donated, after an epoch's step of this number, and its figures."""
        del step
        one, _ = compiled.compiled(recipe, self.layout, state)
        return one(recipe, state, data, self._batch(indices), key, hyper)

    def predict(
        self,
        model: nn.Module,
        variables: PyTree,
        data: Images,
        *,
        batch_size: int,
        on_batch: Callable[[], None] = lambda: None,
    ) -> Float[Array, "examples classes"]:
        """Logits of every example of `data`, in order, in evaluation mode.

        Args:
            model: Linen module, called with `train=False`.
            variables: "params", "batch_stats" and "masks".
            data: images to classify.
            batch_size: examples per call; the last batch is filled up with copies of an example, which are dropped.
            on_batch: called before every compiled call; may raise to leave.

        Raises:
            ConfigError: an example that is streamed cannot be read.
        """
        n = len(data)
        batch_size = min(batch_size, n)
        indices = np.minimum(np.arange(-(-n // batch_size) * batch_size), n - 1)
        if isinstance(data, ImageStream):
            return self._predict_streamed(model, variables, data, indices, batch_size, on_batch)
        indices = indices.reshape(-1, batch_size)
        if jax.default_backend() == "cpu":
            logits = []
            for batch in indices:
                on_batch()
                logits.append(self.classify(model, variables, data, batch))
            return self.place_everywhere(jnp.concatenate(logits)[:n])
        on_batch()
        logits = self.classify_all(model, variables, data, indices)
        return self.place_everywhere(logits.reshape(-1, logits.shape[-1])[:n])

    def classify(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batch: Int[np.ndarray, " batch"]
    ) -> Float[Array, "batch classes"]:
        """Logits of one batch, in evaluation mode."""
        return compiled.forward(model, variables, data.images[self._batch(batch)], data.mean, data.std)

    def classify_all(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batches: Int[np.ndarray, "steps batch"]
    ) -> Float[Array, "steps batch classes"]:
        """Logits of all batches, in evaluation mode."""
        return compiled.forward_all(model, variables, data, self._batches(batches))

    def estimate_statistics(
        self, model: nn.Module, params: PyTree, batch_stats: PyTree, masks: PyTree, data: Images, *, batch_size: int
    ) -> PyTree:
        """BatchNorm statistics after one pass over `data` in training mode, with weights that stay as they are.

        In one random order that is always the same, because running averages count the last batches most and stored
        data may be sorted; without augmentation, and in whole batches. After k batches, momentum**k of the start is
        left.

        Args:
            model: Linen module, called with images and `train`.
            params: weights.
            batch_stats: to start from; {} is returned as it is.
            masks: of the weights.
            data: images, in general those that the weights were trained on.
            batch_size: images per call.

        Raises:
            ConfigError: an example that is streamed cannot be read.
        """
        if not jax.tree.leaves(batch_stats):
            return batch_stats
        batch_size = min(batch_size, len(data))
        order = np.random.default_rng(0).permutation(len(data))[: len(data) // batch_size * batch_size]
        if isinstance(data, ImageStream):
            return self._estimate_streamed(model, params, batch_stats, masks, data, order, batch_size)
        for batch in order.reshape(-1, batch_size):
            batch_stats = compiled.see_batch(model, params, batch_stats, masks, data, self._batch(batch))
        return batch_stats

    def _batch(self, indices: np.ndarray) -> Any:
        return indices if self.layout is None else self.layout.place(indices, self.layout.batch(indices.size))

    def _batches(self, indices: np.ndarray) -> jax.Array:
        if self.layout is None:
            return jnp.asarray(indices)
        return self.layout.place(indices, self.layout.batches(indices.shape[1]))

    def _train_streamed(
        self,
        recipe: Recipe,
        state: TrainState,
        stream: ImageStream,
        order: Int[Array, " examples"] | np.ndarray,
        key: Array,
        hyper: Hyperparams,
        batch_size: int,
        first_step: int,
    ) -> Iterator[tuple[int, TrainState, StepMetrics]]:
        """`train_epoch` of streamed images: a call a step, to which its batch is all the data there are.

        While a step runs, the batch of the next one is read and put on the device.
        """
        seed = _host_seed(key, int(state.step) - first_step)
        step, _ = compiled.compiled(recipe, self.layout, state)
        metrics = None
        reading = self._read(stream, order, batch_size, seed=seed, augment=recipe.augment, first_step=first_step)
        with contextlib.closing(reading) as batches:
            for done, data in enumerate(batches, first_step + 1):
                before = metrics
                state, metrics = step(recipe, state, data, self._batch(np.arange(len(data))), key, hyper)
                jax.block_until_ready(before)
                yield done, state, metrics

    def _predict_streamed(
        self,
        model: nn.Module,
        variables: PyTree,
        stream: ImageStream,
        order: np.ndarray,
        batch_size: int,
        on_batch: Callable[[], None],
    ) -> Float[Array, "examples classes"]:
        """`predict` of streamed images, in an order of whole batches."""
        logits = []
        with contextlib.closing(self._read(stream, order, batch_size)) as batches:
            for data in batches:
                on_batch()
                jax.block_until_ready(logits[-1:])
                logits.append(compiled.forward(model, variables, data.images, data.mean, data.std))
        return self.place_everywhere(jnp.concatenate(logits)[: len(stream)])

    def _estimate_streamed(
        self,
        model: nn.Module,
        params: PyTree,
        batch_stats: PyTree,
        masks: PyTree,
        stream: ImageStream,
        order: np.ndarray,
        batch_size: int,
    ) -> PyTree:
        """`estimate_statistics` of streamed images, in an order of whole batches."""
        with contextlib.closing(self._read(stream, order, batch_size)) as batches:
            for data in batches:
                jax.block_until_ready(batch_stats)
                indices = self._batch(np.arange(batch_size))
                batch_stats = compiled.see_batch(model, params, batch_stats, masks, data, indices)
        return batch_stats

    def _read(
        self, stream: ImageStream, order: Any, batch_size: int, *, first_step: int = 0, **options: Any
    ) -> Generator[ImageSet, None, None]:
        """Batches of a stream where steps want them; each process reads its share."""
        if self.layout is not None:
            options |= {"part": jax.process_index(), "parts": jax.process_count()}
        batches = stream.batches(order, batch_size=batch_size, first_step=first_step, **options)
        with contextlib.closing(batches):
            if self.layout is None:
                yield from map(stream.on_device, batches)
                return
            for number, batch in enumerate(batches, first_step):
                size = min(batch_size, len(order) - number * batch_size)
                images, labels = (self.layout.join(part, size) for part in (batch.images, batch.labels))
                constants = (jnp.asarray(constant, float) for constant in (stream.mean, stream.std))
                yield ImageSet(images, labels, *constants)


def share_right(logits: Float[Array, "examples classes"], data: Images) -> float:
    """Share of `data` that logits classify right, in [0, 1], counted exactly."""
    return int(compiled.count_right(logits, data.labels)) / len(data)


def _host_seed(key: Array, first: int) -> int:
    """Seed of what the host draws in the pass that follows `first` steps of a phase."""
    bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, HOST_DRAWS), first), (2,), jnp.uint32)
    high, low = map(int, bits)
    return high << 32 | low


def _call_ends(first_step: int, full: int, num_steps: int) -> Iterator[int]:
    """Steps done after each call: several a call up to `full`, where batches are whole, then one a call."""
    step = first_step
    while step < num_steps:
        step = min(step - step % STEPS_PER_CALL + STEPS_PER_CALL, full) if step < full else step + 1
        yield step
