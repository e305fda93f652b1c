"""Prepared TensorFlow Datasets: found, checked and opened without TensorFlow, or prepared where that is installed."""

import contextlib
import importlib.util
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cs_jax.core.errors import ConfigError, closest, quiet
from cs_jax.data.config import DataConfig
from cs_jax.data.decode import MODES
from cs_jax.data.records import Records, Shard, allow_open_files, reason_of

CONNECT_SECONDS = 6
"""How long a data set's server may take to answer before it counts as out of reach."""


@contextlib.contextmanager
def opened(config: DataConfig) -> Iterator[Any]:
    """Builder of a suitable data set, prepared; what goes wrong while it is read is told in one line."""
    # It remarks on group sizes, OpenCV and missing info files, which nobody can act on.
    with quiet("absl", logging.CRITICAL), _told_in_one_line(config):
        builder = _builder(config)
        _check_features(config, builder)
        yield builder if _is_prepared(config, builder) else _prepare(config, builder)


def test_split(config: DataConfig, builder: Any) -> str:
    """The split to test on: "test", or "validation" where there is none or its labels are kept secret."""
    named = [name for name in ("test", "validation") if name in builder.info.splits]
    test = next((name for name in named if name == named[-1] or _has_labels(builder, name)), None)
    if "train" not in builder.info.splits or test is None:
        raise ConfigError(
            f"--dataset: got {config.dataset}, which has the splits {', '.join(builder.info.splits)}, "
            "wanted train and test (or validation)"
        )
    return test


def _has_labels(builder: Any, split: str) -> bool:
    """Whether the first example of a split has a class; TFDS has -1 for one that is not known."""
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return len(source) > 0 and source[0]["label"] != -1


def base_name(config: DataConfig) -> str:
    """Of the data set, without a variant or version."""
    return re.split("[/:]", config.dataset)[0]


def classes(builder: Any) -> tuple[str, ...]:
    """Names of the classes."""
    return tuple(builder.info.features["label"].names)


def _data_dir(config: DataConfig) -> Path:
    return (config.data_dir or Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")).expanduser()


@contextlib.contextmanager
def _told_in_one_line(config: DataConfig) -> Iterator[None]:
    """Whatever goes wrong while prepared files are read, told in one line."""
    try:
        yield
    except ConfigError:
        raise
    except MemoryError as error:
        size = f"--image-size: got {config.image_size}" if config.image_size else f"--dataset: got {config.dataset}"
        raise ConfigError(f"{size}, whose images do not fit into memory: {reason_of(error)}") from error
    except Exception as error:
        raise ConfigError(
            f"--data-dir: got {_data_dir(config)}, where {config.dataset} cannot be read ({reason_of(error)}); wanted "
            "a folder of prepared TensorFlow Datasets: repair it, or remove the data set there and prepare it again"
        ) from error


def _builder(config: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    directory = _data_dir(config)
    if directory.exists() and not (directory.is_dir() and os.access(directory, os.R_OK | os.X_OK)):
        raise ConfigError(f"--data-dir: got {directory}, wanted a folder that can be read")
    known = tfds.list_builders(with_community_datasets=False)
    name = base_name(config)
    if name not in known and not (name and (directory / name).is_dir()):
        raise ConfigError(
            f"--dataset: got {config.dataset!r}, wanted digits or a name in TensorFlow Datasets{closest(name, known)}"
        )
    return tfds.builder(config.dataset, data_dir=directory)


def _check_features(config: DataConfig, builder: Any) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    has_label = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    if not ("image" in features and isinstance(features["image"], tfds.features.Image) and has_label):
        raise ConfigError(
            f"--dataset: got {config.dataset}, whose features are {', '.join(sorted(features))}, wanted an image "
            "classification set with the features image and label"
        )
    shape, dtype = features["image"].shape, np.dtype(features["image"].np_dtype)
    if len(shape) != 3 or shape[-1] not in MODES or dtype != np.uint8:
        raise ConfigError(
            f"--dataset: got {config.dataset}, whose images have shape {shape} and dtype {dtype}, wanted uint8 images "
            f"of {min(MODES)} to {max(MODES)} channels"
        )


def _is_prepared(config: DataConfig, builder: Any) -> bool:
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


def _prepare(config: DataConfig, builder: Any) -> Any:
    """Builder of the data set, downloaded and prepared, where TensorFlow is installed and a server answers.

    TFDS reads prepared sets without TensorFlow, but encodes images with it. Out of reach, it would retry for minutes
    without a word; here that is refused at once.
    """
    import tensorflow_datasets as tfds

    directory = _data_dir(config)
    missing = None
    if importlib.util.find_spec("tensorflow") is None:
        missing = "which cannot be prepared without TensorFlow"
    elif jax.process_count() > 1:
        missing = "which several processes do not prepare at once"
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


def open_records(builder: Any, *splits: str) -> tuple[Records, ...]:
    """The examples of splits, their images left encoded, in files that are all open, and whole at their ends.

    Raises:
        ConfigError: a file is missing or damaged, a split is empty, or so many files cannot be open.
    """
    import tensorflow_datasets as tfds

    opened = []
    for split in splits:
        info = builder.info.splits[split]
        if info.num_examples == 0:
            raise ConfigError(f"--dataset: got {builder.info.name}, whose {split} split is empty")
        shards = tuple(Shard(Path(path), size) for path, size in zip(info.filepaths, info.shard_lengths, strict=True))
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        opened.append(Records(source, builder.info.full_name, split, shards, len(classes(builder))))
    allow_open_files(sum(len(records.shards) for records in opened))
    for records in opened:
        records.check()
    return tuple(opened)
