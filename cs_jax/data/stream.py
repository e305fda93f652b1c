"""Images that are streamed: read, decoded and cut to size on the host, batch by batch, ahead of the steps.

Nothing here touches a device but `ImageStream.on_device` and `take`. Workers are threads, because Pillow decodes and
resizes without Python's lock: they start at once, share open files, and need no fork or second interpreter beside JAX.
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
from cs_jax.data.images import RESIZED_CROP, ImageSet
from cs_jax.data.records import Records, reason_of

BATCHES_AHEAD = 2
"""That are read and decoded before they are asked for."""


class Batch(NamedTuple):
    """Examples on the host."""

    ids: np.ndarray  # (n,) int64, indices into the split
    images: np.ndarray  # (n, height, width, channels) uint8
    labels: np.ndarray  # (n,) int32


@dataclass(frozen=True, eq=False)
class ImageStream:
    """Labelled images that are read when they are wanted, with the constants that normalise them.

    Attributes:
        records: of a whole split.
        indices: (n,) int64, the split's examples that this has, in its own order.
        image_shape: (height, width, channels) of every image that comes out.
        image_size: side of the square that images are cut to; None where they have `image_shape` as they are.
        mean: (channels,) float, in units of a pixel (0 to 255).
        std: (channels,) float, in the same units.
        threads: that read and decode.
    """

    records: Records
    indices: np.ndarray
    image_shape: tuple[int, int, int]
    image_size: int | None
    mean: np.ndarray
    std: np.ndarray
    threads: int = 1
    _labels: np.ndarray = field(init=False, repr=False)  # (n,) int32; -1 for those of examples not read yet

    def __post_init__(self) -> None:
        object.__setattr__(self, "_labels", np.full(len(self.indices), -1, np.int32))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """(n,) int32. Those of images that have been read are known; only the others are read for it.

        Raises:
            ConfigError: as `batches`.
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
        seed: int = 0,
        augment: str = "none",
        first_step: int = 0,
        part: int = 0,
        parts: int = 1,
    ) -> Generator[Batch, None, None]:
        """Batches of one pass over `order`, or the share of one of several hosts: a pure function of its arguments.

        Batch k of all hosts together is `order[k * batch_size : (k + 1) * batch_size]`; each host has a run of it, in
        order, and their sizes differ by one at most. What is random about an example follows from `seed` and its place
        in `order` alone, not from threads, parts or where one begins. To close the generator ends its threads.

        Args:
            order: (examples,) integers, indices into this stream.
            batch_size: examples of a batch, over all parts; the last batch may be smaller.
            seed: of the augmentation, 0 to 2**64 - 1: another one for every pass.
            augment: `RESIZED_CROP`, or any other name for the middle of each image.
            first_step: batches to leave out.
            part: of this host, from 0.
            parts: hosts.

        Raises:
            ConfigError: a file or an example in it is damaged or gone; says which.
        """
        rows = np.asarray(order)
        shares = [
            range(start + size * part // parts, start + size * (part + 1) // parts)
            for start in range(first_step * batch_size, len(rows), batch_size)
            for size in [min(batch_size, len(rows) - start)]
        ]
        most = max(map(len, shares), default=0)
        places = np.concatenate([np.arange(0), *shares]).astype(np.int64)
        read = functools.partial(self._example, rows, seed, augment)
        with _prefetched(places, read, threads=self.threads, ahead=BATCHES_AHEAD * most) as examples:
            for share in shares:
                yield self._batch(rows[share.start : share.stop], examples)

    def _batch(self, rows: np.ndarray, examples: Iterator[tuple[np.ndarray, int]]) -> Batch:
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        labels = np.empty(len(rows), np.int32)
        for place in range(len(rows)):
            images[place], labels[place] = next(examples)
        return Batch(self.indices[rows], images, labels)

    def _example(self, rows: np.ndarray, seed: int, augment: str, place: int) -> tuple[np.ndarray, int]:
        """The image of what is at a place in the order, decoded, cut and augmented, and its label."""
        row = int(rows[place])
        index = int(self.indices[row])
        encoded, label = self.records.read(index)
        self._labels[row] = label
        key = np.array([seed, place], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key)) if augment == RESIZED_CROP else None
        try:
            image = decode(encoded, self.image_shape, self.image_size, random)
        except Exception as error:
            raise self.records.unreadable(index, reason_of(error)) from error
        return image, label

    def on_device(self, batch: Batch) -> ImageSet:
        """A batch as the steps take it."""
        images, labels = jax.device_put((batch.images, batch.labels))
        return ImageSet(images, labels, mean=jnp.asarray(self.mean, float), std=jnp.asarray(self.std, float))

    def take(self, indices: ArrayLike) -> ImageSet:
        """The examples `indices`, (n,) integers, in their order and without augmentation, on the device."""
        rows = np.asarray(indices, np.int64)
        with contextlib.closing(self.batches(rows, batch_size=max(1, len(rows)))) as batches:
            return self.on_device(next(batches, None) or self._batch(rows, iter(())))

    def identity(self) -> dict[str, Any]:
        """What tells this stream from others, as JSON values: its files' names and sizes, not what is in them."""
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
"""Examples, wherever they are."""


@contextlib.contextmanager
def _prefetched(places: np.ndarray, read: Any, *, threads: int, ahead: int) -> Iterator[Iterator[Any]]:
    """What `read` makes of each place, in order, read ahead by threads that end with the context."""
    if not len(places):
        yield iter(())
        return
    import grain  # loads for a while, and only streams want it

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, 2 * threads))
    source: Any = places
    examples = iter(grain.MapDataset.source(source).map(read).to_iter_dataset(options))
    try:
        yield examples
    finally:
        examples.close()


def default_threads() -> int:
    """A thread for every core that this process may use, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)
