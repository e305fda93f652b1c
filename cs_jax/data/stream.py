"""Streamed images: read, decoded and resized on the host, batch by batch, ahead of the training steps.

Only `ImageStream.on_device` and `ImageStream.take` use a device. Workers are threads, because Pillow decodes and
resizes without holding Python's global interpreter lock. Threads start fast, share open files, and avoid forking a
process with JAX.
"""

import contextlib
import functools
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cs_jax.data.decode import decode
from cs_jax.data.images import ImageSet
from cs_jax.data.records import Records, reason_of

BATCHES_AHEAD = 2
"""Number of batches that are read and decoded in advance."""


class Batch(NamedTuple):
    """Examples on the host."""

    ids: np.ndarray  # (n,) int64, indices into the split
    images: np.ndarray  # (n, height, width, channels) uint8
    labels: np.ndarray  # (n,) int32


class Share(NamedTuple):
    """Part of every batch that one host reads."""

    part: int  # index of the host, from 0
    parts: int  # number of hosts


WHOLE = Share(0, 1)
"""Share of a single host."""


@dataclass(frozen=True, eq=False)
class ImageStream:
    """Labelled images that are read from files when needed, with the constants that normalise them.

    Attributes:
        records: encoded examples of a whole split.
        indices: (n,) int64, indices into the split: the examples of this stream, in order.
        image_shape: (height, width, channels) of every decoded image.
        image_size: side of the square, in pixels, that images are resized to; None keeps images that all have
            `image_shape`.
        mean: (channels,) float, in units of a pixel (0 to 255).
        std: (channels,) float, in units of a pixel (0 to 255).
        threads: number of threads that read and decode.
    """

    records: Records
    indices: np.ndarray
    image_shape: tuple[int, int, int]
    image_size: int | None
    mean: np.ndarray
    std: np.ndarray
    threads: int = 1
    _labels: np.ndarray = field(init=False, repr=False)  # (n,) int32; -1 for examples that were not read yet

    def __post_init__(self) -> None:
        object.__setattr__(self, "_labels", np.full(len(self.indices), -1, np.int32))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """(n,) int32. Labels of images that were read before are stored; only the remaining examples are read.

        Raises:
            ConfigError: a file or an example is damaged or missing.
        """

        def read(row: int) -> None:
            self._labels[row] = self.records.read(int(self.indices[row]))[1]

        with ThreadPoolExecutor(self.threads) as readers:
            list(readers.map(read, np.flatnonzero(self._labels < 0)))
        return self._labels

    def batches(
        self,
        order: ArrayLike,
        *,
        batch_size: int,
        crop_seed: int | None = None,
        first_step: int = 0,
        share: Share = WHOLE,
    ) -> Generator[Batch, None, None]:
        """Batches of one pass over `order`, or one host's share of each batch: a pure function of the arguments.

        Batch k of all hosts together is `order[k * batch_size : (k + 1) * batch_size]`. Each host gets a contiguous
        part of the batch; the sizes of the parts differ by at most one. Random crops depend only on `crop_seed` and an
        example's position in `order`, not on threads, hosts or `first_step`. Closing the generator ends its threads.

        Args:
            order: (examples,) integers, indices into this stream.
            batch_size: examples of a batch, over all hosts; the last batch may be smaller.
            crop_seed: 0 to 2**64 - 1, seed of the random crops and flips; must differ between passes. None uses the
                middle of each image, or the whole image if `image_size` is None.
            first_step: number of batches to skip.
            share: part of each batch that this host reads.

        Raises:
            ConfigError: a file or an example is damaged or missing; the message names both.
        """
        part, parts = share
        rows = np.asarray(order)
        spans = [
            range(start + size * part // parts, start + size * (part + 1) // parts)
            for start in range(first_step * batch_size, len(rows), batch_size)
            for size in [min(batch_size, len(rows) - start)]
        ]
        most = max(map(len, spans), default=0)
        places = np.concatenate([np.arange(0), *spans]).astype(np.int64)
        read = functools.partial(self._example, rows, crop_seed)
        with _prefetched(places, read, threads=self.threads, ahead=BATCHES_AHEAD * most) as examples:
            for span in spans:
                yield self._batch(rows[span.start : span.stop], examples)

    def _batch(self, rows: np.ndarray, examples: Iterator[tuple[np.ndarray, int]]) -> Batch:
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        labels = np.empty(len(rows), np.int32)
        for place in range(len(rows)):
            images[place], labels[place] = next(examples)
        return Batch(self.indices[rows], images, labels)

    def _example(self, rows: np.ndarray, crop_seed: int | None, place: int) -> tuple[np.ndarray, int]:
        """Decoded, resized and augmented image at a position of the order, and its label."""
        row = int(rows[place])
        index = int(self.indices[row])
        encoded, label = self.records.read(index)
        self._labels[row] = label
        random = None
        if crop_seed is not None:
            random = np.random.Generator(np.random.Philox(key=np.array([crop_seed, place], np.uint64)))
        try:
            image = decode(encoded, self.image_shape, self.image_size, random)
        except Exception as error:
            raise self.records.unreadable(index, reason_of(error)) from error
        return image, label

    def on_device(self, batch: Batch) -> ImageSet:
        """A batch on the default device, as training steps need it."""
        images, labels = jax.device_put((batch.images, batch.labels))
        return ImageSet(images, labels, mean=jnp.asarray(self.mean, float), std=jnp.asarray(self.std, float))

    def take(self, indices: ArrayLike) -> ImageSet:
        """Examples at `indices`, (n,) integers, in this order, without augmentation, on the default device."""
        rows = np.asarray(indices, np.int64)
        with contextlib.closing(self.batches(rows, batch_size=max(1, len(rows)))) as batches:
            return self.on_device(next(batches, None) or self._batch(rows, iter(())))

    def identity(self) -> dict[str, Any]:
        """JSON values that identify this stream: settings, and names and sizes of the files, but not their content."""
        return {
            "dataset": self.records.dataset,
            "split": self.records.split,
            "shards": [(path.name, path.stat().st_size, examples) for path, examples in self.records.shards],
            "indices": self.indices.tolist(),
            "image_shape": self.image_shape,
            "image_size": self.image_size,
            "normalization": [self.mean.tolist(), self.std.tolist()],
        }


Images: TypeAlias = ImageSet | ImageStream
"""Labelled images, in device memory or streamed."""


@contextlib.contextmanager
def _prefetched(places: np.ndarray, read: Any, *, threads: int, ahead: int) -> Iterator[Iterator[Any]]:
    """Iterator over `read(place)` of each place, in order. Threads read ahead; they end with the context."""
    if not len(places):
        yield iter(())
        return
    import grain  # slow to import, and only streams need it

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, 2 * threads))
    source: Any = places
    examples = iter(grain.MapDataset.source(source).map(read).to_iter_dataset(options))
    try:
        yield examples
    finally:
        examples.close()


def default_threads() -> int:
    """Number of CPU cores that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)
