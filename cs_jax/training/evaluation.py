"""Evaluates networks on devices: logits, accuracy and BatchNorm statistics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from cs_jax.data.images import ImageSet
from cs_jax.data.stream import Images, ImageStream
from cs_jax.training import compiled
from cs_jax.training.placement import Placement
from cs_jax.training.streamed import Streamed


class Evaluator(Placement):
    """Evaluates networks, one compiled call at a time."""

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
            batch_size: examples per batch. Copies of the last example fill the last batch; the logits of the copies are
                dropped.
            on_batch: called before every compiled call; may raise an exception to stop.

        Raises:
            ConfigError: a streamed example cannot be read.
        """
        batches = all_in_order(len(data), batch_size)
        if isinstance(data, ImageStream):
            logits = Streamed(self, data, batches.shape[1]).logits(model, variables, batches.ravel(), on_batch)
        elif jax.default_backend() == "cpu":
            logits = []
            for batch in batches:
                on_batch()
                logits.append(self.classify(model, variables, data, batch))
        else:
            on_batch()
            all_logits = self.classify_all(model, variables, data, batches)
            logits = [all_logits.reshape(-1, all_logits.shape[-1])]
        return self.place_everywhere(jnp.concatenate(logits)[: len(data)])

    def classify(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batch: Int[np.ndarray, " batch"]
    ) -> Float[Array, "batch classes"]:
        """Logits of one batch, in evaluation mode."""
        return compiled.forward(model, variables, data.images[self.place_batch(batch)], data.mean, data.std)

    def classify_all(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batches: Int[np.ndarray, "steps batch"]
    ) -> Float[Array, "steps batch classes"]:
        """Logits of several batches, in evaluation mode."""
        return compiled.forward_all(model, variables, data, self.place_batches(batches))

    def estimate_statistics(self, model: nn.Module, variables: PyTree, data: Images, *, batch_size: int) -> PyTree:
        """BatchNorm statistics of a network with its masks: the "batch_stats" after one pass over `data`.

        Examples are in a fixed random order, because running averages give the last batches the largest weight, and
        stored data may be sorted by class. Images are not augmented, and only full batches are used. After k batches,
        the initial statistics have the weight momentum**k. Weights do not change.

        Args:
            model: Linen module, called with `train=True`.
            variables: "params", "batch_stats" (the initial statistics; {} is returned unchanged) and "masks".
            data: images, usually the training images.
            batch_size: examples per call.

        Raises:
            ConfigError: a streamed example cannot be read.
        """
        if not jax.tree.leaves(variables["batch_stats"]):
            return variables["batch_stats"]
        batches = shuffled(len(data), batch_size)
        if isinstance(data, ImageStream):
            return Streamed(self, data, batches.shape[1]).estimate_statistics(model, variables, batches.ravel())
        for batch in batches:
            batch_stats = compiled.update_statistics(model, variables, data, self.place_batch(batch))
            variables = {**variables, "batch_stats": batch_stats}
        return variables["batch_stats"]


def all_in_order(count: int, batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """Indices of all examples in order, in full batches; the last index is repeated to fill the last batch.

    >>> all_in_order(5, 2)
    array([[0, 1],
           [2, 3],
           [4, 4]])
    """
    batch_size = min(batch_size, count)
    return np.minimum(np.arange(-(-count // batch_size) * batch_size), count - 1).reshape(-1, batch_size)


def shuffled(count: int, batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """Indices of examples in a fixed random order, in full batches; the remaining examples are left out.

    >>> shuffled(5, 2)
    array([[2, 4],
           [3, 0]])
    """
    batch_size = min(batch_size, count)
    order = np.random.default_rng(0).permutation(count)[: count // batch_size * batch_size]
    return order.reshape(-1, batch_size)


def share_right(logits: Float[Array, "examples classes"], data: Images) -> float:
    """Share of the examples of `data` that the logits classify correctly, in [0, 1], from an exact count."""
    return int(compiled.count_right(logits, data.labels)) / len(data)
