"""Splits, digits, and TensorFlow Datasets that are whole, unsuitable, damaged or missing."""

import dataclasses
import importlib.util
import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cs_jax.commands import parser
from cs_jax.core.errors import ConfigError
from cs_jax.data import tfds as tfds_source
from cs_jax.data.load import fingerprint, load_data, load_test
from cs_jax.data.split import STATISTICS, split_validation
from cs_jax.experiment import presets
from cs_jax.experiment.config import Config
from cs_jax.experiment.prepare import prepare as prepare_experiment

DIGITS = presets.PRESETS["digits"]


def split(labels: list[int], size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    settings = dataclasses.replace(DIGITS, val_set_size=size)
    return split_validation(settings, np.array(labels), np.random.default_rng(seed))


def test_the_fingerprint_tells_data_apart() -> None:
    loaded = load_data(parser.parse([]))
    same, other = load_data(parser.parse([])), load_data(parser.parse(["--seed", "1"]))
    assert fingerprint(loaded) == fingerprint(same) != fingerprint(other)
    changed = dataclasses.replace(loaded, test=loaded.test.replace(labels=loaded.test.labels.at[-1].add(1)))
    assert fingerprint(changed) != fingerprint(loaded)


def test_the_test_set_is_read_alone() -> None:
    test, classes = load_test(parser.parse([]), mean=[70.0], std=[90.0])
    assert (len(test), test.image_shape, classes) == (360, (8, 8, 1), tuple("0123456789"))
    assert (test.mean.tolist(), test.std.tolist()) == ([70.0], [90.0])


def test_validation_is_drawn_evenly_over_classes() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20
    validation, train = split(labels, 30)
    assert np.bincount(np.array(labels)[validation]).tolist() == [10, 10, 10]
    assert sorted([*validation, *train]) == list(range(100))


def test_a_class_with_too_few_examples_gives_all_and_others_make_up_for_it() -> None:
    labels = [0] * 50 + [5] * 4 + [7] * 46
    validation, _ = split(labels, 31)
    counts = np.bincount(np.array(labels)[validation], minlength=8)
    assert counts[5] == 4
    assert sorted((counts[0], counts[7])) == [13, 14]


def test_the_split_follows_the_seed() -> None:
    labels = list(range(5)) * 20
    assert split(labels, 10)[0].tolist() == split(labels, 10)[0].tolist() != split(labels, 10, seed=1)[0].tolist()


def test_validation_can_be_empty_but_not_everything() -> None:
    validation, train = split([0, 1] * 5, 0)
    assert (len(validation), len(train)) == (0, 10)
    with pytest.raises(ConfigError, match="--val-set-size 10: must be less than 10, the number of training examples"):
        split([0, 1] * 5, 10)


def test_digits_are_split_without_overlap_and_spread_over_a_byte() -> None:
    digits = load_data(DIGITS)
    assert digits.validation is not None
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1257, 180, 360)
    assert digits.train.images.shape[1:] == (8, 8, 1)
    assert digits.train.images.dtype == jnp.uint8
    assert int(digits.train.images.max()) == 255
    assert np.bincount(digits.validation.labels).tolist() == [18] * 10
    images = [
        image.tobytes() for part in (digits.train, digits.validation, digits.test) for image in np.asarray(part.images)
    ]
    assert len(set(images)) == 1797


def test_the_test_set_is_the_same_for_every_seed() -> None:
    other = load_data(dataclasses.replace(DIGITS, seed=1))
    np.testing.assert_array_equal(load_data(DIGITS).test.images, other.test.images)
    assert not np.array_equal(load_data(DIGITS).train.images, other.train.images)


def test_pixels_are_normalised_by_the_examples_trained_on() -> None:
    digits = load_data(DIGITS)
    pixels = np.asarray(digits.train.images, np.float64)
    np.testing.assert_allclose(digits.train.mean, [pixels.mean()], rtol=1e-6)
    np.testing.assert_allclose(digits.train.std, [pixels.std()], rtol=1e-6)
    np.testing.assert_array_equal(digits.test.mean, digits.train.mean)


def test_max_train_examples_takes_from_what_validation_leaves() -> None:
    digits = load_data(dataclasses.replace(DIGITS, max_train_examples=100))
    assert digits.validation is not None
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (100, 180, 360)
    everything = load_data(dataclasses.replace(DIGITS, max_train_examples=10**6))
    assert len(everything.train) == 1257


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size 64: must be at most 20, the number of training examples"):
        prepare_experiment(dataclasses.replace(DIGITS, max_train_examples=20))


@pytest.fixture
def absl_unchanged() -> Iterator[None]:
    level = logging.getLogger("absl").level
    yield
    assert logging.getLogger("absl").level == level


def prepare(folder: Path, **variant: Any) -> Config:
    """Writes a small set of images under `folder` in TFDS's own format, and gives the config that reads it."""
    import tensorflow_datasets as tfds

    shape = variant.get("shape", (6, 5, 3))
    splits = variant.get("splits", {"train": 30, "test": 10})
    labels = variant.get("labels", lambda i: i % 3)
    label = variant.get("label", tfds.features.ClassLabel(num_classes=3))

    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=shape), "label": label})

    def examples(count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            size = [side or 4 + i % 2 for side in shape]
            png = io.BytesIO()
            Image.fromarray(np.full(size, 2 * i, np.uint8)).save(png, "PNG")
            yield i, {"image": io.BytesIO(png.getvalue()), "label": labels(i)}

    class ToyImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: examples(count) for split, count in splits.items()}

        def _generate_examples(self) -> Any:
            return iter(())

    builder = ToyImages(data_dir=folder, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Config(dataset="toy_images", data_dir=folder, val_set_size=3, batch_size=8, epochs=1, rewind_epoch=0)


@pytest.mark.usefixtures("absl_unchanged")
def test_a_prepared_set_is_read_without_tensorflow(tmp_path: Path) -> None:
    loaded = load_data(prepare(tmp_path))
    assert loaded.validation is not None
    assert (len(loaded.train), len(loaded.validation), len(loaded.test), len(loaded.classes)) == (27, 3, 10, 3)
    assert loaded.train.images.shape[1:] == (6, 5, 3)
    pixels = np.asarray(loaded.test.images)
    np.testing.assert_array_equal(np.sort(pixels[:, 0, 0, 0]), 2 * np.arange(10))
    np.testing.assert_array_equal(loaded.test.labels, pixels[:, 0, 0, 0] // 2 % 3)


def test_cifar10_is_normalised_by_the_authors_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(tmp_path)
    monkeypatch.setitem(STATISTICS, "toy_images", STATISTICS["cifar10"])
    loaded = load_data(settings)
    np.testing.assert_allclose(loaded.train.mean, [125.3, 123.0, 113.9], rtol=1e-6)
    np.testing.assert_allclose(loaded.test.std, [63.0, 62.1, 66.7], rtol=1e-6)


def test_data_dir_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(prepare(tmp_path), data_dir=None)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(load_data(settings).test) == 10


def test_a_set_without_test_split_is_tested_on_its_validation_split(tmp_path: Path) -> None:
    loaded = load_data(prepare(tmp_path, splits={"train": 20, "validation": 7}))
    assert len(loaded.test) == 7


@pytest.mark.parametrize(
    "variant, message",
    [
        (
            {"splits": {"train": 20}},
            r"--dataset toy_images: requires the splits train and test \(or validation\), but has train$",
        ),
        ({"shape": (None, None, 3)}, r"--dataset toy_images: images of shape \(None, None, 3\) require --image-size, "),
        (
            {"label": np.int64},
            r"--dataset toy_images: must have the features image \(Image\) .* has image \(Image\), label \(Tensor\)$",
        ),
        (
            {"labels": lambda i: -1 if i == 4 else 0},
            "--dataset toy_images: labels must be 0 to 2, but the training split has label -1",
        ),
    ],
    ids=["splits", "shape", "features", "labels"],
)
def test_a_set_that_does_not_suit_is_refused(tmp_path: Path, variant: dict[str, Any], message: str) -> None:
    settings = prepare(tmp_path, **variant)
    with pytest.raises(ConfigError, match=message):
        load_data(settings)


def shard(folder: Path) -> Path:
    return next(folder.glob("toy_images/1.0.0/*train.array_record*"))


def truncate(folder: Path) -> None:
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content[: len(content) // 2])


def empty(folder: Path) -> None:
    shard(folder).write_bytes(b"")


def scramble(folder: Path) -> None:
    content = bytearray(shard(folder).read_bytes())
    content[len(content) // 3 :: 7] = bytes(len(content[len(content) // 3 :: 7]))
    shard(folder).write_bytes(content)


def remove(folder: Path) -> None:
    shard(folder).unlink()


def spoil_info(folder: Path) -> None:
    (folder / "toy_images" / "1.0.0" / "dataset_info.json").write_text("{")


def spoil_features(folder: Path) -> None:
    (folder / "toy_images" / "1.0.0" / "features.json").write_text("[]")


@pytest.mark.parametrize("damage", [truncate, empty, scramble, remove, spoil_info, spoil_features])
@pytest.mark.usefixtures("absl_unchanged")
def test_a_damaged_set_is_told_in_one_line(tmp_path: Path, damage: Any) -> None:
    settings = prepare(tmp_path)
    damage(tmp_path)
    with pytest.raises(
        ConfigError, match="--data-dir .*: toy_images cannot be read .*; repair the prepared files in this folder"
    ) as caught:
        load_data(settings)
    assert "\n" not in str(caught.value)


def test_a_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Config(data_dir=tmp_path / "file")
    with pytest.raises(ConfigError, match="--data-dir .*file: must be a readable folder"):
        load_data(settings)


def test_an_unknown_set_is_refused_with_the_closest_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--dataset 'cifar11': must be digits or a name in TensorFlow Datasets .did you mean cifar10"
    ):
        load_data(Config(dataset="cifar11", data_dir=tmp_path))


@pytest.mark.parametrize("has_tensorflow, reason", [(True, "its servers are out of reach"), (False, "TensorFlow")])
def test_a_missing_set_is_reported_soon_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tensorflow: bool, reason: str
) -> None:
    """Also where name servers do not answer; no file is left."""
    import requests

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: has_tensorflow or None)
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: time.sleep(60))
    monkeypatch.setattr(tfds_source, "CONNECT_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(
        ConfigError,
        match=f"--dataset cifar10: is not in .*{reason}.*; prepare the data set once.*tfds.builder.'cifar10'",
    ):
        load_data(Config(data_dir=tmp_path))
    assert time.monotonic() - started < 15
    assert list(tmp_path.iterdir()) == []


def test_any_answer_counts_as_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def head(url: str, timeout: float) -> None:
        if "works" not in url:
            raise requests.ConnectionError(url)

    monkeypatch.setattr(requests, "head", head)
    assert tfds_source._any_answers(["https://fails.example/a", "https://works.example/b"])
    assert not tfds_source._any_answers(["https://fails.example/a", "https://fails.example/b"])


def test_a_set_prepared_in_another_format_is_refused(tmp_path: Path) -> None:
    settings = prepare(tmp_path)
    info = tmp_path / "toy_images" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        ConfigError, match="must be prepared as array_record, but is prepared as tfrecord; choose another folder"
    ):
        load_data(settings)
