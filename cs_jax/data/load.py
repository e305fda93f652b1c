"""Where data comes in: embedded digits, prepared TensorFlow Datasets, and the split into training and validation."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax.core.errors import ConfigError
from cs_jax.data import tfds
from cs_jax.data.config import DataConfig
from cs_jax.data.digits import load_digits
from cs_jax.data.images import ImageSet
from cs_jax.data.records import Records
from cs_jax.data.split import STATISTICS, Split, check_resident, check_validation_size, split_validation, statistics
from cs_jax.data.stream import Images, ImageStream, default_threads

MAX_SAMPLE = 1000
"""Streamed images that statistics are taken of, at most."""


@dataclass(frozen=True)
class Data:
    """Training, validation (None without) and test examples, on the device or streamed, and the classes' names."""

    train: Images
    validation: Images | None
    test: Images
    classes: tuple[str, ...]


def load_data(config: DataConfig) -> Data:
    """The data that a config asks for, split, cut and normalised as it says.

    Raises:
        ConfigError: the data set is unknown, out of reach, damaged or unsuitable, or too small for the config.
    """
    if config.dataset == "digits":
        return _on_device(config, *load_digits(config))
    with tfds.opened(config) as builder:
        if _is_streamed(config, builder):
            return _stream(config, builder)
        test = tfds.test_split(config, builder)
        train, test, classes = _read(builder, "train"), _read(builder, test), tfds.classes(builder)
    return _on_device(config, train, test, classes)


def _on_device(config: DataConfig, train: Split, test: Split, classes: tuple[str, ...]) -> Data:
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
    validation, train = train[validation_indices], train[train_indices]
    mean, std = STATISTICS.get(tfds.base_name(config)) or statistics([train.images])

    def place(split: Split) -> ImageSet:
        constants = {"mean": jnp.asarray(mean, float), "std": jnp.asarray(std, float)}
        return ImageSet(images=jnp.asarray(split.images), labels=jnp.asarray(split.labels), **constants)

    return Data(place(train), place(validation) if len(validation) else None, place(test), classes)


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


def load_test(config: DataConfig, mean: Sequence[float], std: Sequence[float]) -> tuple[Images, tuple[str, ...]]:
    """The test examples of a config's data set, normalised by constants per channel, and the names of the classes.

    Raises:
        ConfigError: the data set is unknown, out of reach, damaged or unsuitable.
    """
    if config.dataset == "digits":
        _, test, classes = load_digits(config)
    else:
        with tfds.opened(config) as builder:
            name, classes = tfds.test_split(config, builder), tfds.classes(builder)
            if _is_streamed(config, builder):
                (records,) = tfds.open_records(builder, name)
                return _make_stream(config, builder, records, np.arange(len(records)), mean, std), classes
            test = _read(builder, name)
    constants = (jnp.asarray(mean, float), jnp.asarray(std, float))
    return ImageSet(jnp.asarray(test.images), jnp.asarray(test.labels), *constants), classes


def _is_streamed(config: DataConfig, builder: Any) -> bool:
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
    check_resident(config, f"images of {config.dataset} all have shape {shape}, kept as they are without --stream")
    return False


def _stream(config: DataConfig, builder: Any) -> Data:
    """Data that stay in their files until they are wanted. Validation is drawn at random: no label is read for it."""
    train, test = tfds.open_records(builder, "train", tfds.test_split(config, builder))
    check_validation_size(config, len(train))
    order = np.random.default_rng(config.seed).permutation(len(train))
    validation_indices, train_indices = np.split(order, [config.val_set_size])
    train_indices = train_indices[: config.max_train_examples]
    mean, std = STATISTICS.get(tfds.base_name(config)) or _sample_statistics(config, builder, train)

    def make(records: Records, indices: np.ndarray) -> ImageStream:
        return _make_stream(config, builder, records, indices, mean, std)

    validation = make(train, validation_indices) if len(validation_indices) else None
    return Data(make(train, train_indices), validation, make(test, np.arange(len(test))), tfds.classes(builder))


def _make_stream(
    config: DataConfig,
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


def _sample_statistics(config: DataConfig, builder: Any, records: Records) -> tuple[np.ndarray, np.ndarray]:
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
