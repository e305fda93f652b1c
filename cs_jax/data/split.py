"""Examples on the host, the split into training and validation, and pixel statistics."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cs_jax.core.errors import ConfigError
from cs_jax.data.config import DataConfig
from cs_jax.data.images import AUGMENTATIONS, RESIZED_CROP

STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),  # the authors'
    "imagenet2012": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # torchvision's, times 255
}
"""Mean and deviation per channel, in units of a pixel, where they are not those of the examples trained on."""


@dataclass(frozen=True)
class Split:
    """Examples on the host: images (n, height, width, channels) uint8, labels (n,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> "Split":
        return Split(self.images[indices], self.labels[indices])


def split_validation(config: DataConfig, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of validation and of training examples, both in random order.

    Validation takes `config.val_set_size` in all, equally many of each class; a class that has fewer gives all it
    has, and the others make up for it.

    Args:
        config: its `val_set_size`.
        labels: (n,) classes of the training split.
        rng: draws the examples.

    Raises:
        ConfigError: no example would be left to train on.
    """
    check_validation_size(config, len(labels))
    order = rng.permutation(len(labels))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(labels), int)  # how many of its class precede an example in the drawn order
    for label, count in enumerate(counts):
        rank[order[classes[order] == label]] = np.arange(count)
    # Drawn first of every class, then second of every class, ...; within a rank in random order.
    by_rank = order[np.argsort(rank[order], kind="stable")]
    validation, train = by_rank[: config.val_set_size], by_rank[config.val_set_size :]
    return validation, rng.permutation(train)


def check_validation_size(config: DataConfig, examples: int) -> None:
    if config.val_set_size >= examples:
        raise ConfigError(
            f"--val-set-size: got {config.val_set_size}, wanted less than the {examples} training examples"
        )


def statistics(batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over all of some images, each (channels,) float64 in units of a pixel.

    A channel without variation has deviation 1, so that it stays finite.

    Args:
        batches: (n, height, width, channels) uint8 each; one at least.

    >>> statistics([np.array([[[[0, 7]]], [[[2, 7]]]], np.uint8)])
    (array([1., 7.]), array([1., 1.]))
    """
    levels = np.arange(256)
    counts = sum(
        np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(images, -1, 0)])
        for images in batches
    )
    assert isinstance(counts, np.ndarray)
    mean = counts @ levels / counts.sum(axis=1)
    std = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1))
    return mean, np.where(std > 0, std, 1.0)


def check_resident(config: DataConfig, reason: str) -> None:
    """Refuses settings of streams for what is held in memory; `reason` says why it is."""
    if config.image_size is not None:
        raise ConfigError(f"--image-size: got {config.image_size}, wanted none: {reason}")
    if config.loader_threads is not None:
        raise ConfigError(f"--loader-threads: got {config.loader_threads}, wanted none: {reason}")
    if config.augment == RESIZED_CROP:
        others = ", ".join(name for name in AUGMENTATIONS if name != RESIZED_CROP)
        raise ConfigError(f"--augment: got {RESIZED_CROP}, wanted {others}: {reason}")
