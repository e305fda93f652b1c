"""Where data comes in: embedded digits, prepared TensorFlow Datasets, and the split into training and validation."""

import contextlib
import hashlib
import importlib.util
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax.config import Config
from cs_jax.errors import ConfigError, closest
from cs_jax.images import ImageSet

CONNECT_SECONDS = 6
"""How long a data set's server may take to answer before it counts as out of reach."""

AUTHORS_STATISTICS = {"cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))}
"""Mean and deviation per channel, in units of a pixel, that the authors normalise by."""


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
    """Training, validation (None without) and test examples on the device, and the names of the classes."""

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    classes: tuple[str, ...]


def load(config: Config) -> Data:
    """The data that a config asks for, split, cut and normalised as it says.

    Raises:
        ConfigError: the data set is unknown, out of reach, damaged or unsuitable, or too small for the config.
    """
    train, test, classes = _load_digits() if config.dataset == "digits" else _load_tfds(config)
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
    if config.batch_size > len(train_indices):
        raise ConfigError(
            f"--batch-size: got {config.batch_size}, wanted at most {len(train_indices)}, the training examples"
        )
    validation, train = train[validation_indices], train[train_indices]
    mean, std = AUTHORS_STATISTICS.get(config.dataset) or statistics(train.images)

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
    if config.val_set_size >= len(labels):
        raise ConfigError(
            f"--val-set-size: got {config.val_set_size}, wanted less than the {len(labels)} training examples"
        )
    order = rng.permutation(len(labels))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(labels), int)  # how many of its class precede an example in the drawn order
    for label, count in enumerate(counts):
        rank[order[classes[order] == label]] = np.arange(count)
    # Drawn first of every class, then second of every class, ...; within a rank in random order.
    by_rank = order[np.argsort(rank[order], kind="stable")]
    validation, train = by_rank[: config.val_set_size], by_rank[config.val_set_size :]
    return validation, rng.permutation(train)


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel, each (channels,) float64 in units of a pixel.

    A channel without variation has deviation 1, so that it stays finite.

    >>> statistics(np.array([[[[0, 7]]], [[[2, 7]]]], np.uint8))
    (array([1., 7.]), array([1., 1.]))
    """
    levels = np.arange(256)
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(images, -1, 0)])
    mean = counts @ levels / counts.sum(axis=1)
    std = np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1))
    return mean, np.where(std > 0, std, 1.0)


def _load_digits() -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, 16 grey levels spread over 0 to 255; a fifth, always the same, is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    everything = Split(images, labels.astype(np.int32))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return everything[np.asarray(train)], everything[np.asarray(test)], tuple("0123456789")


def fingerprint(data: Data) -> str:
    """Hash of every example and of what they are normalised by, in hexadecimal: equal data have equal ones."""
    found = hashlib.sha256()
    for images in (data.train, data.validation, data.test):
        for array in jax.tree.leaves(images):
            found.update(f"{array.dtype}{array.shape}".encode() + np.asarray(array).tobytes())
    return found.hexdigest()


def load_test(config: Config) -> tuple[Split, tuple[str, ...]]:
    """The test examples of a config's data set, and the names of the classes.

    Raises:
        ConfigError: the data set is unknown, out of reach, damaged or unsuitable.
    """
    if config.dataset == "digits":
        _, test, classes = _load_digits()
        return test, classes
    with _prepared(config) as builder:
        return _read(builder, _test_split(config, builder)), _classes(builder)


def _load_tfds(config: Config) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test split of a TensorFlow data set, read from array_record files without TensorFlow."""
    with _prepared(config) as builder:
        test = _test_split(config, builder)
        return _read(builder, "train"), _read(builder, test), _classes(builder)


@contextlib.contextmanager
def _prepared(config: Config) -> Iterator[Any]:
    """Builder of a suitable data set, prepared; what goes wrong while it is read is told in one line."""
    with _quiet_absl(), _told_in_one_line(config):
        builder = _builder(config)
        _check_features(config, builder)
        yield builder if _is_prepared(config, builder) else _prepare(config, builder)


def _test_split(config: Config, builder: Any) -> str:
    test = next((name for name in ("test", "validation") if name in builder.info.splits), None)
    if "train" not in builder.info.splits or test is None:
        raise ConfigError(
            f"--dataset: got {config.dataset}, which has the splits {', '.join(builder.info.splits)}, "
            "wanted train and test (or validation)"
        )
    return test


def _classes(builder: Any) -> tuple[str, ...]:
    return tuple(builder.info.features["label"].names)


def _data_dir(config: Config) -> Path:
    return (config.data_dir or Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")).expanduser()


@contextlib.contextmanager
def _told_in_one_line(config: Config) -> Iterator[None]:
    """Whatever goes wrong while prepared files are read, told in one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"--data-dir: got {_data_dir(config)}, where {config.dataset} cannot be read ({reason}); wanted a folder "
            "of prepared TensorFlow Datasets: repair it, or remove the data set there and prepare it again"
        ) from error


def _builder(config: Config) -> Any:
    import tensorflow_datasets as tfds

    directory = _data_dir(config)
    if directory.exists() and not (directory.is_dir() and os.access(directory, os.R_OK | os.X_OK)):
        raise ConfigError(f"--data-dir: got {directory}, wanted a folder that can be read")
    known = tfds.list_builders(with_community_datasets=False)
    name = re.split("[/:]", config.dataset)[0]  # what follows is a variant or version
    if name not in known and not (name and (directory / name).is_dir()):
        raise ConfigError(
            f"--dataset: got {config.dataset!r}, wanted digits or a name in TensorFlow Datasets{closest(name, known)}"
        )
    return tfds.builder(config.dataset, data_dir=directory)


def _check_features(config: Config, builder: Any) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    has_label = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    if not ("image" in features and isinstance(features["image"], tfds.features.Image) and has_label):
        raise ConfigError(
            f"--dataset: got {config.dataset}, whose features are {', '.join(sorted(features))}, wanted an image "
            "classification set with the features image and label"
        )
    shape, dtype = features["image"].shape, np.dtype(features["image"].np_dtype)
    if None in shape or dtype != np.uint8:
        raise ConfigError(
            f"--dataset: got {config.dataset}, whose images have shape {shape} and dtype {dtype}, wanted uint8 images "
            "of one fixed shape"
        )


def _is_prepared(config: Config, builder: Any) -> bool:
    """Whether the data set's files are there; refuses files of another format than array_record."""
    directory = Path(builder.data_dir)
    if not (directory / "dataset_info.json").exists():
        return False
    stored = builder.info.file_format.value
    if stored != "array_record":
        raise ConfigError(
            f"--data-dir: got {_data_dir(config)}, where {config.dataset} is prepared as {stored}, wanted "
            "array_record; give another --data-dir, and it is prepared there"
        )
    return True


def _prepare(config: Config, builder: Any) -> Any:
    """Builder of the data set, downloaded and prepared, where TensorFlow is installed and a server answers.

    TFDS reads prepared sets without TensorFlow, but encodes images with it. Out of reach, it would retry for minutes
    without a word; here that is refused at once.
    """
    import tensorflow_datasets as tfds

    directory = _data_dir(config)
    missing = None
    if importlib.util.find_spec("tensorflow") is None:
        missing = "which cannot be prepared without TensorFlow"
    elif builder.url_infos and not _any_answers(list(builder.url_infos)):
        missing = "whose servers are out of reach"
    if missing:
        raise ConfigError(
            f"--dataset: got {config.dataset}, which is not in {directory} and {missing}; wanted a prepared set. "
            "Prepare it once, where there is a network, in an environment of its own:  python -m venv prepare && "
            "prepare/bin/pip install tensorflow tensorflow-datasets importlib_resources && prepare/bin/python -c "
            f"\"import tensorflow_datasets as tfds; tfds.builder('{config.dataset}', data_dir='{directory}', "
            "file_format='array_record').download_and_prepare()\""
        )
    print(f"preparing {config.dataset} in {directory}", flush=True)
    builder = tfds.builder(config.dataset, data_dir=directory, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return builder


def _any_answers(urls: list[str]) -> bool:
    """Whether any of some addresses answers within `CONNECT_SECONDS`, whatever the answer."""
    import requests

    answers: queue.Queue[bool] = queue.Queue()

    def ask(url: str) -> None:
        try:
            requests.head(url, timeout=CONNECT_SECONDS)
            answers.put(True)
        except requests.RequestException:
            answers.put(False)

    # Daemons, because a name server that hangs keeps a thread beyond the request's time-out.
    one_per_host = {url.split("/")[2]: url for url in urls}.values()
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in one_per_host]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + CONNECT_SECONDS
    with contextlib.suppress(queue.Empty):
        return any(answers.get(timeout=max(0.0, deadline - time.monotonic())) for _ in threads)
    return False


def _read(builder: Any, name: str) -> Split:
    source = builder.as_data_source(split=name)
    examples = source.__getitems__(range(len(source)))
    images = np.stack([example["image"] for example in examples])
    return Split(images, np.array([example["label"] for example in examples], np.int32))


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Keeps remarks about group sizes, OpenCV and missing info files, which nobody can act on, off the terminal."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
