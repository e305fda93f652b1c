"""Source of TensorFlow Datasets (TFDS): reads prepared sets without TensorFlow, and prepares sets with TensorFlow."""

import contextlib
import importlib.util
import logging
import os
import queue
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
from cs_jax.data.source import Examples
from cs_jax.data.split import Split, base_name, check_resident

CONNECT_SECONDS = 6
"""Seconds to wait for an answer from the servers of a data set."""


@contextlib.contextmanager
def opened(config: DataConfig, *splits: str, other_names: tuple[str, ...]) -> Iterator[Examples]:
    """Context manager: examples of a prepared image classification set, in memory or as record files to stream.

    Images without a fixed shape are always streamed; images with a fixed shape are streamed if `config.stream`. If the
    split "test" is missing, or its labels are secret (as on ImageNet), "validation" is read in its place. All errors
    inside the context are reported in one line.

    Args:
        config: gives the name and the folder of the data set.
        splits: "train" or "test".
        other_names: names of data sets from other sources, for error messages.

    Raises:
        ConfigError: the data set is unknown, missing, damaged or not suitable.
    """
    # TFDS logs messages about group sizes, OpenCV and missing info files, which do not help a user.
    with quiet("absl", logging.CRITICAL), _errors_in_one_line(config):
        builder = _builder(config, other_names)
        _check_features(config, builder)
        if not _is_prepared(config, builder):
            builder = _prepare(config, builder)
        read = _open_records if _is_streamed(config, builder) else _read
        test = _test_split(config, builder)
        yield Examples(read(builder, [test if split == "test" else split for split in splits]), _classes(builder))


def _is_streamed(config: DataConfig, builder: Any) -> bool:
    """True if images are streamed.

    Raises:
        ConfigError: images of varying shape without an image size, or settings for streaming with images in memory.
    """
    shape = builder.info.features["image"].shape
    if None in shape and config.image_size is None:
        raise ConfigError(
            f"--dataset {config.dataset}: images of shape {shape} require --image-size, the side in pixels of the "
            "square to resize them to"
        )
    if None in shape or config.stream:
        return True
    check_resident(config, f"requires --stream for {config.dataset}, whose images all have shape {shape}")
    return False


def _test_split(config: DataConfig, builder: Any) -> str:
    """Split to test on: "test", or "validation" if there is no "test" or its labels are secret."""
    named = [name for name in ("test", "validation") if name in builder.info.splits]
    test = next((name for name in named if name == named[-1] or _has_labels(builder, name)), None)
    if "train" not in builder.info.splits or test is None:
        raise ConfigError(
            f"--dataset {config.dataset}: requires the splits train and test (or validation), "
            f"but has {', '.join(builder.info.splits)}"
        )
    return test


def _has_labels(builder: Any, split: str) -> bool:
    """True if the first example of a split has a label; TFDS stores -1 for an unknown label."""
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return len(source) > 0 and source[0]["label"] != -1


def _classes(builder: Any) -> tuple[str, ...]:
    return tuple(builder.info.features["label"].names)


def _data_dir(config: DataConfig) -> Path:
    return (config.data_dir or Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")).expanduser()


@contextlib.contextmanager
def _errors_in_one_line(config: DataConfig) -> Iterator[None]:
    """Converts every error during the reading of prepared files to a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except MemoryError as error:
        flag = f"--image-size {config.image_size}" if config.image_size else f"--dataset {config.dataset}"
        raise ConfigError(f"{flag}: images do not fit into memory ({reason_of(error)})") from error
    except Exception as error:
        raise ConfigError(
            f"--data-dir {_data_dir(config)}: {config.dataset} cannot be read ({reason_of(error)}); repair the "
            "prepared files in this folder, or remove the data set and prepare it again"
        ) from error


def _builder(config: DataConfig, other_names: tuple[str, ...]) -> Any:
    import tensorflow_datasets as tfds

    directory = _data_dir(config)
    if directory.exists() and not (directory.is_dir() and os.access(directory, os.R_OK | os.X_OK)):
        raise ConfigError(f"--data-dir {directory}: must be a readable folder")
    known = tfds.list_builders(with_community_datasets=False)
    name = base_name(config)
    if name not in known and not (name and (directory / name).is_dir()):
        raise ConfigError(
            f"--dataset {config.dataset!r}: must be {', '.join(other_names)} or a name in TensorFlow Datasets"
            f"{closest(name, [*other_names, *known])}"
        )
    return tfds.builder(config.dataset, data_dir=directory)


def _check_features(config: DataConfig, builder: Any) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    has_label = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    if not ("image" in features and isinstance(features["image"], tfds.features.Image) and has_label):
        found = ", ".join(f"{name} ({type(features[name]).__name__})" for name in sorted(features))
        raise ConfigError(
            f"--dataset {config.dataset}: must have the features image (Image) and label (ClassLabel), but has {found}"
        )
    shape, dtype = features["image"].shape, np.dtype(features["image"].np_dtype)
    if len(shape) != 3 or shape[-1] not in MODES or dtype != np.uint8:
        raise ConfigError(
            f"--dataset {config.dataset}: images must be uint8 with {min(MODES)} to {max(MODES)} channels, "
            f"but have shape {shape} and dtype {dtype}"
        )


def _is_prepared(config: DataConfig, builder: Any) -> bool:
    """True if the data set is prepared; raises if its format is not array_record."""
    directory = Path(builder.data_dir)
    if not (directory / "dataset_info.json").exists():
        return False
    stored = builder.info.file_format.value
    if stored != "array_record":
        raise ConfigError(
            f"--data-dir {_data_dir(config)}: {config.dataset} must be prepared as array_record, but is prepared as "
            f"{stored}; choose another folder, to prepare the data set there"
        )
    return True


def _prepare(config: DataConfig, builder: Any) -> Any:
    """Download and prepare the data set; returns the new builder.

    TFDS reads prepared sets without TensorFlow, but needs TensorFlow to encode images. If no server answers, TFDS would
    retry silently for minutes; this function raises an error after `CONNECT_SECONDS`.

    Raises:
        ConfigError: TensorFlow is not installed, no server answers, or the run has several processes.
    """
    import tensorflow_datasets as tfds

    directory = _data_dir(config)
    missing = None
    if importlib.util.find_spec("tensorflow") is None:
        missing = "cannot be prepared without TensorFlow"
    elif jax.process_count() > 1:
        missing = "cannot be prepared by several processes at once"
    elif builder.url_infos and not _any_answers(list(builder.url_infos)):
        missing = "cannot be downloaded, because its servers are out of reach"
    if missing:
        raise ConfigError(
            f"--dataset {config.dataset}: is not in {directory} and {missing}; "
            "prepare the data set once, with network access, in a separate environment:  python -m venv prepare && "
            "prepare/bin/pip install tensorflow tensorflow-datasets importlib_resources && prepare/bin/python -c "
            f"\"import tensorflow_datasets as tfds; tfds.builder('{config.dataset}', data_dir='{directory}', "
            "file_format='array_record').download_and_prepare()\""
        )
    print(f"preparing {config.dataset} in {directory}", flush=True)
    builder = tfds.builder(config.dataset, data_dir=directory, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return builder


def _any_answers(urls: list[str]) -> bool:
    """True if at least one of the addresses answers within `CONNECT_SECONDS`; any HTTP status counts."""
    import requests

    answers: queue.Queue[bool] = queue.Queue()

    def ask(url: str) -> None:
        try:
            requests.head(url, timeout=CONNECT_SECONDS)
            answers.put(True)
        except requests.RequestException:
            answers.put(False)

    # Daemon threads: a name server that hangs keeps a thread alive beyond the request's time-out.
    one_per_host = {url.split("/")[2]: url for url in urls}.values()
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in one_per_host]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + CONNECT_SECONDS
    with contextlib.suppress(queue.Empty):
        return any(answers.get(timeout=max(0.0, deadline - time.monotonic())) for _ in threads)
    return False


def _read(builder: Any, splits: list[str]) -> tuple[Split, ...]:
    """All examples of splits, decoded and in memory."""
    found = []
    for split in splits:
        source = builder.as_data_source(split=split)
        examples = source.__getitems__(range(len(source)))
        images = np.stack([example["image"] for example in examples])
        found.append(Split(images, np.array([example["label"] for example in examples], np.int32)))
    return tuple(found)


def _open_records(builder: Any, splits: list[str]) -> tuple[Records, ...]:
    """Examples of splits, with encoded images. All files are opened, and checked for truncation.

    Raises:
        ConfigError: a file is missing or damaged, a split is empty, or the system allows too few open files.
    """
    import tensorflow_datasets as tfds

    opened, shape = [], builder.info.features["image"].shape
    for split in splits:
        info = builder.info.splits[split]
        if info.num_examples == 0:
            raise ConfigError(f"--dataset {builder.info.name}: the {split} split is empty")
        shards = tuple(Shard(Path(path), size) for path, size in zip(info.filepaths, info.shard_lengths, strict=True))
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        opened.append(Records(source, builder.info.full_name, split, shards, len(_classes(builder)), shape))
    allow_open_files(sum(len(records.shards) for records in opened))
    for records in opened:
        records.check()
    return tuple(opened)
