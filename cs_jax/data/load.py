"""Loads the data of a config: training, validation and test examples, normalised, on the device or streamed."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax.core.errors import ConfigError
from cs_jax.data.config import DataConfig
from cs_jax.data.images import ImageSet
from cs_jax.data.records import Records
from cs_jax.data.registry import source_of
from cs_jax.data.source import Source
from cs_jax.data.split import (
    STATISTICS,
    Split,
    base_name,
    check_resident,
    check_validation_size,
    split_validation,
    statistics,
)
from cs_jax.data.stream import Images, ImageStream, default_threads

MAX_SAMPLE = 1000
"""Maximum number of streamed images from which statistics are computed."""


@dataclass(frozen=True)
class Data:
    """Training, validation and test examples, on the device or streamed, and names of the classes."""

    train: Images
    validation: Images | None  # None without a validation set
    test: Images
    classes: tuple[str, ...]


class _Constants(NamedTuple):
    """Constants per channel that normalise images, in units of a pixel (0 to 255)."""

    mean: Sequence[float] | np.ndarray
    std: Sequence[float] | np.ndarray


def load_data(config: DataConfig) -> Data:
    """Data of a config, split into training, validation and test examples, and normalised.

    Raises:
        ConfigError: the data set is unknown, missing, damaged, not suitable, or too small for the config.
    """
    source = source_of(config.dataset)
    _check_stream_settings(config, source)
    with source.opened(config, "train", "test") as examples:
        train, test = examples.splits
        if isinstance(train, Records) and isinstance(test, Records):
            return _streamed(config, train, test, examples.classes)
    assert isinstance(train, Split) and isinstance(test, Split)
    return _resident(config, train, test, examples.classes)


def load_test(config: DataConfig, mean: Sequence[float], std: Sequence[float]) -> tuple[Images, tuple[str, ...]]:
    """Test examples of a config's data set, normalised by constants per channel, and the names of the classes.

    Raises:
        ConfigError: the data set is unknown, missing, damaged or not suitable.
    """
    source, constants = source_of(config.dataset), _Constants(mean, std)
    _check_stream_settings(config, source)
    with source.opened(config, "test") as examples:
        (test,) = examples.splits
        if isinstance(test, Records):
            return _make_stream(config, test, np.arange(len(test)), constants), examples.classes
    return _make_set(test, constants), examples.classes


def _check_stream_settings(config: DataConfig, source: Source) -> None:
    """Raises if the config has settings for streaming, but the source cannot stream."""
    if source.can_stream:
        return
    if config.stream:
        raise ConfigError(
            f"--stream with --dataset {config.dataset}: requires a data set of TensorFlow Datasets; omit --stream"
        )
    check_resident(config, f"requires streamed images, which --dataset {config.dataset} does not support")


def _resident(config: DataConfig, train: Split, test: Split, classes: tuple[str, ...]) -> Data:
    """Data in device memory."""
    for split, labels in (("training", train.labels), ("test", test.labels)):
        if len(labels) == 0:
            raise ConfigError(f"--dataset {config.dataset}: the {split} split is empty")
        if labels.min() < 0 or labels.max() >= len(classes):
            outside = labels[(labels < 0) | (labels >= len(classes))][0]
            raise ConfigError(
                f"--dataset {config.dataset}: labels must be 0 to {len(classes) - 1}, "
                f"but the {split} split has label {outside}"
            )
    rng = np.random.default_rng(config.seed)
    validation_indices, train_indices = split_validation(config, train.labels, rng)
    if config.max_train_examples is not None:
        train_indices = train_indices[: config.max_train_examples]
    validation, train = train[validation_indices], train[train_indices]
    constants = _Constants(*(STATISTICS.get(base_name(config)) or statistics([train.images])))
    return Data(
        _make_set(train, constants),
        _make_set(validation, constants) if len(validation) else None,
        _make_set(test, constants),
        classes,
    )


def _make_set(split: Split, constants: _Constants) -> ImageSet:
    mean, std = (jnp.asarray(constant, float) for constant in constants)
    return ImageSet(jnp.asarray(split.images), jnp.asarray(split.labels), mean, std)


def _streamed(config: DataConfig, train: Records, test: Records, classes: tuple[str, ...]) -> Data:
    """Streamed data. Validation examples are drawn at random, because labels are not read before training."""
    check_validation_size(config, len(train))
    order = np.random.default_rng(config.seed).permutation(len(train))
    validation_indices, train_indices = np.split(order, [config.val_set_size])
    train_indices = train_indices[: config.max_train_examples]
    constants = _Constants(*(STATISTICS.get(base_name(config)) or _sample_statistics(config, train)))
    return Data(
        _make_stream(config, train, train_indices, constants),
        _make_stream(config, train, validation_indices, constants) if len(validation_indices) else None,
        _make_stream(config, test, np.arange(len(test)), constants),
        classes,
    )


def _make_stream(config: DataConfig, records: Records, indices: np.ndarray, constants: _Constants) -> ImageStream:
    height, width, channels = records.image_shape
    shape = (config.image_size or height, config.image_size or width, channels)
    assert shape[0] is not None and shape[1] is not None  # sources require an image size for images of varying shape
    return ImageStream(
        records=records,
        indices=indices,
        image_shape=(shape[0], shape[1], channels),
        image_size=config.image_size,
        mean=np.asarray(constants.mean),
        std=np.asarray(constants.std),
        threads=config.loader_threads or default_threads(),
    )


def _sample_statistics(config: DataConfig, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """`statistics` of a sample of images, preprocessed as for evaluation; the same sample for every seed."""
    indices = np.random.default_rng(0).permutation(len(records))[:MAX_SAMPLE]
    channels = records.image_shape[-1]
    sample = _make_stream(config, records, indices, _Constants(np.zeros(channels), np.ones(channels)))
    with contextlib.closing(sample.batches(np.arange(len(indices)), batch_size=100)) as batches:
        return statistics(batch.images for batch in batches)


def fingerprint(data: Data) -> str:
    """Hexadecimal hash of every example and of the constants that normalise them: equal data have equal hashes.

    For streamed data, file names, file sizes, numbers of examples and settings are hashed instead of the examples.
    """
    found = hashlib.sha256()
    for images in (data.train, data.validation, data.test):
        if isinstance(images, ImageStream):
            found.update(json.dumps(images.identity()).encode())
            continue
        for array in jax.tree.leaves(images):
            found.update(f"{array.dtype}{array.shape}".encode() + np.asarray(array).tobytes())
    return found.hexdigest()
