"""Examples on the host, the split into training and validation, and pixel statistics."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cs_jax.core.errors import ConfigError
from cs_jax.data.config import DataConfig
from cs_jax.data.images import AUGMENTATIONS, RESIZED_CROP

STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),  # from the authors' code
    "imagenet2012": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # from torchvision, times 255
}
"""Fixed mean and standard deviation per channel, in units of a pixel, by name of the data set.

Other data sets use the statistics of their training examples.
"""


def base_name(config: DataConfig) -> str:
    """Name of the data set, without variant or version."""
    return re.split("[/:]", config.dataset)[0]


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

    `config.val_set_size` examples go to validation, the same number of each class. A class with too few examples gives
    all of its examples; the other classes give more instead.

    Args:
        config: gives `val_set_size`.
        labels: (n,) classes of the training split.
        rng: draws the examples.

    Raises:
        ConfigError: no training example would be left.
    """
    check_validation_size(config, len(labels))
    order = rng.permutation(len(labels))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(labels), int)  # number of earlier examples of the same class in the drawn order
    for label, count in enumerate(counts):
        rank[order[classes[order] == label]] = np.arange(count)
    # First the examples of rank 0 of all classes, then rank 1, and so on; in random order within a rank.
    by_rank = order[np.argsort(rank[order], kind="stable")]
    validation, train = by_rank[: config.val_set_size], by_rank[config.val_set_size :]
    return validation, rng.permutation(train)


def check_validation_size(config: DataConfig, examples: int) -> None:
    if config.val_set_size >= examples:
        raise ConfigError(
            f"--val-set-size {config.val_set_size}: must be less than {examples}, the number of training examples"
        )


def statistics(batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over batches of images, each (channels,) float64 in units of a pixel.

    A constant channel has standard deviation 1, so that normalised pixels are finite.

    Args:
        batches: at least one array, (n, height, width, channels) uint8.

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


def check_resident(config: DataConfig, rule: str) -> None:
    """Raises if the config has settings for streaming, for images in memory. `rule` is the reason in the message."""
    if config.image_size is not None:
        raise ConfigError(f"--image-size {config.image_size}: {rule}; omit --image-size")
    if config.loader_threads is not None:
        raise ConfigError(f"--loader-threads {config.loader_threads}: {rule}; omit --loader-threads")
    if config.augment == RESIZED_CROP:
        others = " or ".join(name for name in AUGMENTATIONS if name != RESIZED_CROP)
        raise ConfigError(f"--augment {RESIZED_CROP}: {rule}; choose {others}")
