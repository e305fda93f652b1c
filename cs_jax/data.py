"""Where data comes in: embedded digits, prepared TensorFlow Datasets, and the split into training and validation."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax import prepared
from cs_jax.config import Config
from cs_jax.errors import ConfigError
from cs_jax.images import AUGMENTATIONS, RESIZED_CROP, ImageSet
from cs_jax.shards import Records
from cs_jax.streaming import Images, ImageStream, default_threads

STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),  # the authors'
    "imagenet2012": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # torchvision's, times 255
}
"""Mean and deviation per channel, in units of a pixel, where they are not those of the examples trained on."""

MAX_SAMPLE = 1000
"""Streamed images that statistics are taken of, at most."""


@dataclass(frozen=True)
class Split:
    """Examples on the host: images (n, height, width, channels) uint8, labels (n,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> "Split":
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Data:
    """Training, validation (None without) and test examples, on the device or streamed, and the classes' names."""

    train: Images
    validation: Images | None
    test: Images
    classes: tuple[str, ...]


def load(config: Config) -> Data:
    """The data that a config asks for, split, cut and normalised as it says.

    Raises:
        ConfigError: the data set is unknown, out of reach, damaged or unsuitable, or too small for the config.
    """
    if config.dataset == "digits":
        return _on_device(config, *_load_digits(config))
    with prepared.opened(config) as builder:
        if _is_streamed(config, builder):
            return _stream(config, builder)
        test = prepared.test_split(config, builder)
        train, test, classes = _read(builder, "train"), _read(builder, test), prepared.classes(builder)
    return _on_device(config, train, test, classes)


def _on_device(config: Config, train: Split, test: Split, classes: tuple[str, ...]) -> Data:
    """Data that fit into the device's memory."""
    for split, labels in (("training", train.labels), ("test", test.labels)):
        if len(labels) == 0:
            raise ConfigError(f"--dataset: got {config.dataset}, whose {split} split is empty")
        if labels.min() < 0 or labels.max() >= len(classes):
            outside = labels[(labels < 0) | (labels >= len(classes))][0]
            raise ConfigError(
                f"--dataset: got {config.dataset}, whose {split} split has label {outside}, "
                f"wanted labels 0 to {len(classes) - 1}"
            )
    rng = np.random.default_rng(config.seed)
    validation_indices, train_indices = split_validation(config, train.labels, rng)
    if config.max_train_examples is not None:
        train_indices = train_indices[: config.max_train_examples]
    _check_batch_size(config, train_indices)
    validation, train = train[validation_indices], train[train_indices]
    mean, std = STATISTICS.get(prepared.base_name(config)) or statistics([train.images])

    def place(split: Split) -> ImageSet:
        constants = {"mean": jnp.asarray(mean, float), "std": jnp.asarray(std, float)}
        return ImageSet(images=jnp.asarray(split.images), labels=jnp.asarray(split.labels), **constants)

    return Data(place(train), place(validation) if len(validation) else None, place(test), classes)


def split_validation(config: Config, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
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
    _check_validation_size(config, len(labels))
    order = rng.permutation(len(labels))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(labels), int)  # how many of its class precede an example in the drawn order
    for label, count in enumerate(counts):
        rank[order[classes[order] == label]] = np.arange(count)
    # Drawn first of every class, then second of every class, ...; within a rank in random order.
    by_rank = order[np.argsort(rank[order], kind="stable")]
    validation, train = by_rank[: config.val_set_size], by_rank[config.val_set_size :]
    return validation, rng.permutation(train)


def _check_validation_size(config: Config, examples: int) -> None:
    if config.val_set_size >= examples:
        raise ConfigError(
            f"--val-set-size: got {config.val_set_size}, wanted less than the {examples} training examples"
        )


def _check_batch_size(config: Config, train_indices: np.ndarray) -> None:
    if config.batch_size > len(train_indices):
        raise ConfigError(
            f"--batch-size: got {config.batch_size}, wanted at most {len(train_indices)}, the training examples"
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


def _load_digits(config: Config) -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, 16 grey levels spread over 0 to 255; a fifth, always the same, is the test set."""
    if config.stream:
        raise ConfigError("--stream: got digits, wanted a set of TensorFlow Datasets: digits are in no file to read")
    _check_resident(config, "digits are kept as they are")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    everything = Split(images, labels.astype(np.int32))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return everything[np.asarray(train)], everything[np.asarray(test)], tuple("0123456789")


def fingerprint(data: Data) -> str:
    """Hash of every example and of what they are normalised by, in hexadecimal: equal data have equal ones.

    Of what is streamed: of names, numbers and the sizes of files, not of what is in them.
    """
    found = hashlib.sha256()
    for images in (data.train, data.validation, data.test):
        if isinstance(images, ImageStream):
            found.update(json.dumps(images.identity()).encode())
            continue
        for array in jax.tree.leaves(images):
            found.update(f"{array.dtype}{array.shape}".encode() + np.asarray(array).tobytes())
    return found.hexdigest()


def load_test(config: Config, mean: Sequence[float], std: Sequence[float]) -> tuple[Images, tuple[str, ...]]:
    """The test examples of a config's data set, normalised by constants per channel, and the names of the classes.

    Raises:
        ConfigError: the data set is unknown, out of reach, damaged or unsuitable.
    """
    if config.dataset == "digits":
        _, test, classes = _load_digits(config)
    else:
        with prepared.opened(config) as builder:
            name, classes = prepared.test_split(config, builder), prepared.classes(builder)
            if _is_streamed(config, builder):
                (records,) = prepared.open_records(builder, name)
                return _make_stream(config, builder, records, np.arange(len(records)), mean, std), classes
            test = _read(builder, name)
    constants = (jnp.asarray(mean, float), jnp.asarray(std, float))
    return ImageSet(jnp.asarray(test.images), jnp.asarray(test.labels), *constants), classes


def _is_streamed(config: Config, builder: Any) -> bool:
    """Whether images are streamed: those of no fixed shape always are, others if the config asks for it.

    Raises:
        ConfigError: the size of what is streamed is missing, or other settings want a stream where there is none.
    """
    shape = builder.info.features["image"].shape
    if None in shape and config.image_size is None:
        raise ConfigError(
            f"--dataset: got {config.dataset}, whose images have shape {shape}, wanted --image-size beside it, the "
            "side of the square that they are cut to"
        )
    if None in shape or config.stream:
        return True
    _check_resident(config, f"images of {config.dataset} all have shape {shape}, kept as they are without --stream")
    return False


def _check_resident(config: Config, reason: str) -> None:
    """Refuses settings of streams for what is held in memory; `reason` says why it is."""
    if config.image_size is not None:
        raise ConfigError(f"--image-size: got {config.image_size}, wanted none: {reason}")
    if config.loader_threads is not None:
        raise ConfigError(f"--loader-threads: got {config.loader_threads}, wanted none: {reason}")
    if config.augment == RESIZED_CROP:
        others = ", ".join(name for name in AUGMENTATIONS if name != RESIZED_CROP)
        raise ConfigError(f"--augment: got {RESIZED_CROP}, wanted {others}: {reason}")


def _stream(config: Config, builder: Any) -> Data:
    """Data that stay in their files until they are wanted. Validation is drawn at random: no label is read for it."""
    train, test = prepared.open_records(builder, "train", prepared.test_split(config, builder))
    _check_validation_size(config, len(train))
    order = np.random.default_rng(config.seed).permutation(len(train))
    validation_indices, train_indices = np.split(order, [config.val_set_size])
    train_indices = train_indices[: config.max_train_examples]
    _check_batch_size(config, train_indices)
    mean, std = STATISTICS.get(prepared.base_name(config)) or _sample_statistics(config, builder, train)

    def make(records: Records, indices: np.ndarray) -> ImageStream:
        return _make_stream(config, builder, records, indices, mean, std)

    validation = make(train, validation_indices) if len(validation_indices) else None
    return Data(make(train, train_indices), validation, make(test, np.arange(len(test))), prepared.classes(builder))


def _make_stream(
    config: Config,
    builder: Any,
    records: Records,
    indices: np.ndarray,
    mean: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray,
) -> ImageStream:
    height, width, channels = builder.info.features["image"].shape
    size = config.image_size
    return ImageStream(
        records=records,
        indices=indices,
        image_shape=(size or height, size or width, channels),
        image_size=size,
        mean=np.asarray(mean),
        std=np.asarray(std),
        threads=config.loader_threads or default_threads(),
    )


def _sample_statistics(config: Config, builder: Any, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """`statistics` of some images, always the same ones whatever the seed, as they are evaluated."""
    indices = np.random.default_rng(0).permutation(len(records))[:MAX_SAMPLE]
    channels = builder.info.features["image"].shape[-1]
    sample = _make_stream(config, builder, records, indices, np.zeros(channels), np.ones(channels))
    with contextlib.closing(sample.batches(np.arange(len(indices)), batch_size=100)) as batches:
        return statistics(batch.images for batch in batches)


def _read(builder: Any, name: str) -> Split:
    source = builder.as_data_source(split=name)
    examples = source.__getitems__(range(len(source)))
    images = np.stack([example["image"] for example in examples])
    return Split(images, np.array([example["label"] for example in examples], np.int32))
