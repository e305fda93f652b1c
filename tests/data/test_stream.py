"""Streamed images: batches, crops, several hosts, damaged records, and resumed runs."""

import contextlib
import dataclasses
import io
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import train
from cs_jax import commands
from cs_jax.core.errors import ConfigError
from cs_jax.data import decode, records
from cs_jax.data.images import ImageSet
from cs_jax.data.load import fingerprint, load_data
from cs_jax.data.split import STATISTICS
from cs_jax.data.stream import Batch, ImageStream, Share
from cs_jax.experiment import prepare as prepare_experiment
from cs_jax.experiment import search
from cs_jax.experiment.config import Config
from cs_jax.experiment.observers.interrupts import Interrupts
from cs_jax.experiment.presets import PRESETS
from cs_jax.experiment.progress import Progress
from cs_jax.experiment.storage.paths import TICKET_FILE
from cs_jax.models import LeNet300100, ResNet
from cs_jax.training import mesh
from cs_jax.training.epoch import Epoch
from cs_jax.training.evaluation import share_right
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem
from cs_jax.training.step import Hyperparams, Recipe, TrainState, init_state, init_variables

KEY = jax.random.key(3)
SIZE = 12


def photograph(number: int, width: int, height: int) -> bytes:
    """JPEG image whose colour encodes its number, dark on the left side."""
    shade = np.linspace(0.3, 1, width)[None, :, None]
    colour = np.array([50 + 5 * (number % 40), 128, 255 - 5 * (number % 40)])
    file = io.BytesIO()
    Image.fromarray((np.ones((height, 1, 1)) * shade * colour).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def prepare(
    folder: Path,
    *,
    splits: dict[str, int] | None = None,
    encode: Callable[[int], bytes] = lambda i: photograph(i, 20 + 3 * (i % 5), 30 - 2 * (i % 7)),
    label: Callable[[str, int], int] = lambda split, i: i % 4,
    shape: tuple[int | None, int | None, int] = (None, None, 3),
    shards: int = 3,
) -> Config:
    """Writes a set of images under `folder` in TFDS's own format, and gives the config that streams it."""
    import tensorflow_datasets as tfds

    encoding = "jpeg" if shape[0] is None else "png"
    image = tfds.features.Image(shape=shape, encoding_format=encoding)
    features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=4)})

    class ToyPhotos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> Any:
            def examples(split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
                for i in range(count):
                    yield i, {"image": io.BytesIO(encode(i)), "label": label(split, i)}

            return {split: examples(split, count) for split, count in (splits or {"train": 50, "test": 11}).items()}

        def _generate_examples(self) -> Any:
            return iter(())

    builder = ToyPhotos(data_dir=folder, file_format="array_record")
    download = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=shards)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(download_config=download)
    return Config(
        dataset="toy_photos",
        data_dir=folder,
        image_size=SIZE,
        augment="resized-crop",
        val_set_size=7,
        batch_size=8,
        epochs=1,
        rewind_epoch=0,
        loader_threads=2,
    )


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return prepare(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def stream(settings: Config) -> ImageStream:
    train_stream = load_data(settings).train
    assert isinstance(train_stream, ImageStream)
    return train_stream


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def test_a_stream_has_the_splits_without_overlap_and_reads_nothing_twice(settings: Config) -> None:
    loaded = load_data(settings)
    assert isinstance(loaded.train, ImageStream) and isinstance(loaded.validation, ImageStream)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (43, 7, 11)
    assert sorted([*loaded.train.indices, *loaded.validation.indices]) == list(range(50))
    assert loaded.train.image_shape == (SIZE, SIZE, 3)
    other = load_data(dataclasses.replace(settings, seed=1, max_train_examples=20))
    assert isinstance(other.validation, ImageStream) and isinstance(other.train, ImageStream)
    assert other.validation.indices.tolist() != loaded.validation.indices.tolist()
    assert len(other.train) == 20


def test_batches_are_the_examples_of_the_order(stream: ImageStream) -> None:
    order = np.random.default_rng(0).permutation(43)
    batches = list(stream.batches(order, batch_size=8))
    assert [len(batch.ids) for batch in batches] == [8, 8, 8, 8, 8, 3]
    whole = joined(batches)
    np.testing.assert_array_equal(whole.ids, stream.indices[order])
    assert (whole.images.shape, whole.images.dtype, whole.labels.dtype) == ((43, SIZE, SIZE, 3), np.uint8, np.int32)
    for place in (0, 17, 42):
        encoded, label = stream.records.read(int(whole.ids[place]))
        assert label == whole.labels[place]
        photo = np.asarray(Image.open(io.BytesIO(encoded)))
        middle = photo[photo.shape[0] // 2, photo.shape[1] // 2].astype(int)
        assert np.abs(whole.images[place][SIZE // 2, SIZE // 2] - middle).max() < 12


def test_the_middle_is_what_is_left_of_a_shorter_side_of_256_for_224() -> None:
    photo = Image.open(io.BytesIO(photograph(7, 480, 320)))
    resized = photo.resize((384, 256), Image.Resampling.BILINEAR)
    wanted = np.asarray(resized.crop((80, 16, 304, 240)), int)
    found = decode.decode(photograph(7, 480, 320), (224, 224, 3), 224, None)
    assert np.abs(found - wanted).max() <= 2


@pytest.mark.parametrize("width, height", [(500, 375), (31, 64), (1, 1), (3, 1000)])
def test_random_parts_lie_inside_and_are_near_square(width: int, height: int) -> None:
    random = np.random.default_rng(0)
    boxes = np.array([decode.random_box(random, width, height) for _ in range(300)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    w, h = right - left, bottom - top
    assert (w >= 1).all() and (h >= 1).all()
    if width > 100:
        share, aspect = w * h / (width * height), w / h
        assert 0.075 < share.min() < 0.15 and 0.85 < share.max() < 1.005
        assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    elif height == 1000:
        assert set(map(tuple, boxes.tolist())) == {(0, 498, 3, 502)}  # never fits in: the middle


def test_half_of_the_augmented_images_are_mirrored(stream: ImageStream) -> None:
    """Photographs are darker on the left."""
    batch = joined(list(stream.batches(np.arange(43).repeat(5), batch_size=43, crop_seed=5)))
    left, right = (batch.images[:, :, side].astype(int).sum((1, 2)) for side in (0, -1))
    assert 0.35 < (left > right).mean() < 0.65
    plain = joined(list(stream.batches(np.arange(43), batch_size=43)))
    assert (plain.images[:, :, 0].astype(int).sum((1, 2)) < plain.images[:, :, -1].astype(int).sum((1, 2))).all()


def test_batches_follow_from_their_arguments_alone(stream: ImageStream) -> None:
    order, options = np.random.default_rng(1).permutation(43), {"batch_size": 8}
    batches = list(stream.batches(order, crop_seed=2**64 - 1, **options))
    more_threads = dataclasses.replace(stream, threads=7)
    for one, other in zip(batches, more_threads.batches(order, crop_seed=2**64 - 1, **options), strict=True):
        assert equal(one, other)
    others = list(stream.batches(order, crop_seed=1, **options))
    assert not np.array_equal(batches[0].images, others[0].images)
    assert np.array_equal(batches[0].ids, others[0].ids)
    twice = joined(list(stream.batches(np.zeros(8, int), crop_seed=1, **options)))
    assert len({image.tobytes() for image in twice.images}) == 8  # one example, at eight places


@pytest.mark.parametrize("first", [1, 3, 5, 6])
def test_a_stream_that_begins_later_is_the_rest_of_the_whole(stream: ImageStream, first: int) -> None:
    options = {"batch_size": 8, "crop_seed": 9}
    whole = list(stream.batches(np.arange(43), **options))
    rest = list(stream.batches(np.arange(43), first_step=first, **options))
    assert len(rest) == 6 - first
    assert all(equal(one, other) for one, other in zip(whole[first:], rest, strict=True))


@pytest.mark.parametrize("batch_size, parts", [(8, 2), (9, 2), (10, 4), (7, 3), (6, 8)])
def test_the_shares_of_all_hosts_are_the_whole_batch(stream: ImageStream, batch_size: int, parts: int) -> None:
    options = {"batch_size": batch_size, "crop_seed": 4}
    order = np.random.default_rng(2).permutation(43)
    whole = list(stream.batches(order, **options))
    shares = [list(stream.batches(order, share=Share(part, parts), **options)) for part in range(parts)]
    assert {len(share) for share in shares} == {len(whole)}
    seen = []
    for step, batch in enumerate(whole):
        of_step = [share[step] for share in shares]
        sizes = [len(share.ids) for share in of_step]
        assert max(sizes) - min(sizes) <= 1
        assert equal(joined(of_step), batch)
        seen += [index for share in of_step for index in share.ids]
    assert sorted(seen) == sorted(stream.indices)


def test_parts_that_begin_later_share_the_same_rest(stream: ImageStream) -> None:
    options = {"batch_size": 10, "crop_seed": 4}
    whole = list(stream.batches(np.arange(43), **options))[2:]
    shares = [list(stream.batches(np.arange(43), first_step=2, share=Share(part, 3), **options)) for part in range(3)]
    for batch, *of_step in zip(whole, *shares, strict=True):
        assert equal(joined(of_step), batch)


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def assert_loaders_end() -> None:
    deadline = time.monotonic() + 10
    while loaders() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loaders()


def test_closing_ends_the_threads(stream: ImageStream) -> None:
    batches = stream.batches(np.arange(43), batch_size=4)
    next(batches)
    assert loaders()
    batches.close()
    assert_loaders_end()


def test_labels_are_kept_of_what_was_read_and_read_of_the_rest(settings: Config) -> None:
    test = load_data(settings).test
    assert isinstance(test, ImageStream)
    reads = []

    class Counting:
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return source[index]

    source = test.records.source
    test = dataclasses.replace(test, records=dataclasses.replace(test.records, source=Counting()))
    whole = joined(list(test.batches(np.arange(11), batch_size=4)))
    np.testing.assert_array_equal(test.labels, whole.labels)
    assert sorted(reads) == list(range(11))
    again = dataclasses.replace(test, indices=test.indices[::-1])
    np.testing.assert_array_equal(again.labels, whole.labels[::-1])
    assert len(reads) == 22


def test_some_examples_can_be_taken_and_none(stream: ImageStream) -> None:
    taken, none = stream.take([3, 1]), stream.take([])
    whole = joined(list(stream.batches(np.arange(4), batch_size=4)))
    np.testing.assert_array_equal(taken.images, whole.images[[3, 1]])
    np.testing.assert_array_equal(taken.labels, whole.labels[[3, 1]])
    assert (none.images.shape, none.labels.shape) == ((0, SIZE, SIZE, 3), (0,))


def test_statistics_are_of_a_sample_as_it_is_evaluated(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    train_stream = load_data(settings).train
    assert isinstance(train_stream, ImageStream)
    everything = dataclasses.replace(train_stream, indices=np.arange(50))
    pixels = joined(list(everything.batches(np.arange(50), batch_size=50))).images.reshape(-1, 3)
    np.testing.assert_allclose(train_stream.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(train_stream.std, pixels.std(0), rtol=1e-12)
    np.testing.assert_array_equal(load_data(dataclasses.replace(settings, seed=1)).train.mean, train_stream.mean)
    monkeypatch.setitem(STATISTICS, "toy_photos", STATISTICS["imagenet2012"])
    known = load_data(settings).test
    np.testing.assert_allclose(known.mean, 255 * np.array([0.485, 0.456, 0.406]))
    np.testing.assert_allclose(known.std, 255 * np.array([0.229, 0.224, 0.225]))


def test_the_fingerprint_tells_streams_apart(settings: Config) -> None:
    found = fingerprint(load_data(settings))
    assert fingerprint(load_data(dataclasses.replace(settings, loader_threads=1))) == found
    for change in ({"seed": 1}, {"image_size": 10}, {"max_train_examples": 40}, {"val_set_size": 8}):
        assert fingerprint(load_data(dataclasses.replace(settings, **change))) != found


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"image_size": None},
            r"--dataset toy_photos: images of shape \(None, None, 3\) require --image-size, the side",
        ),
        ({"val_set_size": 50}, "--val-set-size 50: must be less than 50, the number of training examples"),
    ],
)
def test_what_does_not_fit_the_set_is_refused(settings: Config, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data(dataclasses.replace(settings, **change))


def fixed(folder: Path) -> Config:
    """Writes a set of small images of one shape, and gives the config that loads it into memory."""

    def encode(i: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    settings = prepare(folder, encode=encode, shape=(6, 5, 3))
    return dataclasses.replace(settings, image_size=None, loader_threads=None, augment="flip-crop")


def test_settings_of_streams_are_refused_for_what_is_in_memory(tmp_path: Path) -> None:
    settings = fixed(tmp_path)
    digits = PRESETS["digits"]
    shaped = r"requires --stream for toy_photos, whose images all have shape \(6, 5, 3\)"
    unsupported = "requires streamed images, which --dataset digits does not support"
    for wrong, message in (
        (dataclasses.replace(settings, image_size=4), f"--image-size 4: {shaped}; omit --image-size"),
        (
            dataclasses.replace(settings, augment="resized-crop"),
            f"--augment resized-crop: {shaped}; choose none or crop or flip-crop",
        ),
        (
            dataclasses.replace(digits, stream=True),
            "--stream with --dataset digits: requires a data set of TensorFlow Datasets; omit",
        ),
        (dataclasses.replace(digits, image_size=4), f"--image-size 4: {unsupported}; omit --image-size"),
        (dataclasses.replace(digits, loader_threads=2), f"--loader-threads 2: {unsupported}; omit --loader-threads"),
        (
            dataclasses.replace(settings, stream=True, image_size=10**7),
            "--image-size 10000000: images do not fit into memory ",
        ),
        (
            dataclasses.replace(digits, augment="resized-crop"),
            f"--augment resized-crop: {unsupported}; choose none or ",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_data(wrong)


def test_images_of_one_shape_are_streamed_as_they_are_or_cut(tmp_path: Path) -> None:
    settings = fixed(tmp_path)
    in_memory = load_data(dataclasses.replace(settings, val_set_size=0))
    streamed = load_data(dataclasses.replace(settings, val_set_size=0, stream=True))
    assert isinstance(in_memory.test, ImageSet) and isinstance(streamed.test, ImageStream)
    whole = streamed.test.take(np.arange(11))
    np.testing.assert_array_equal(whole.images, in_memory.test.images)
    np.testing.assert_array_equal(whole.labels, in_memory.test.labels)
    cut = load_data(dataclasses.replace(settings, stream=True, image_size=4, augment="resized-crop"))
    assert cut.train.image_shape == (4, 4, 3)
    assert cut.train.take([0]).images.shape == (1, 4, 4, 3)


def test_labels_kept_secret_leave_validation_to_test_on(tmp_path: Path) -> None:
    """As in ImageNet, whose test split may be prepared too."""
    settings = prepare(
        tmp_path,
        splits={"train": 20, "validation": 5, "test": 6},
        label=lambda split, i: -1 if split == "test" else i % 4,
    )
    assert len(load_data(settings).test) == 5


SMALL = Recipe(ResNet(num_classes=4, stage_sizes=(1,), widths=(2,)), augment="flip-crop")
LENET = Recipe(LeNet300100(num_classes=4), augment="resized-crop")


def hyperparams() -> Hyperparams:
    return Hyperparams(*(jnp.asarray(value, float) for value in (3.0, 0.0, 0.1, 0.2, 0.0)))


def ticket_state(recipe: Recipe, images: ImageSet | ImageStream) -> TrainState:
    variables = init_variables(recipe, jax.random.key(0), images.image_shape)
    params, batch_stats = variables["params"], variables["batch_stats"]
    return init_state(recipe, params, batch_stats, scores={}, masks=variables["masks"])


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_streamed_images_train_and_are_evaluated_as_those_in_memory(stream: ImageStream) -> None:
    in_memory, order = stream.take(np.arange(43)), np.random.default_rng(3).permutation(43)
    ends = []
    for images in (stream, in_memory):
        epoch = Epoch(images, order, KEY, hyperparams(), batch_size=8)
        calls = list(Executor().train_epoch(SMALL, ticket_state(SMALL, images), epoch))
        assert [done for done, _, _ in calls] == [1, 2, 3, 4, 5, 6]
        ends.append((calls[-1][1], [float(metrics.loss) for _, _, metrics in calls]))
    assert_equal(*ends)
    state = ends[0][0]
    variables = {"params": state.params, "batch_stats": state.batch_stats, "masks": state.masks}
    told = []
    logits = [
        Executor().predict(SMALL.model, variables, images, batch_size=8, on_batch=lambda: told.append(1))
        for images in (stream, in_memory)
    ]
    assert_equal(*logits)
    assert len(told) == 12
    assert share_right(logits[0], stream) == share_right(logits[1], in_memory)
    assert_equal(
        *(
            Executor().estimate_statistics(SMALL.model, variables, images, batch_size=8)
            for images in (stream, in_memory)
        )
    )


def test_an_epoch_goes_on_from_any_step_and_the_next_one_augments_anew(stream: ImageStream) -> None:
    def epoch(state: Any, first_step: int = 0) -> list[Any]:
        whole = Epoch(stream, np.arange(43), KEY, hyperparams(), batch_size=8, first_step=first_step)
        calls = Executor().train_epoch(LENET, state, whole)
        return [jax.tree.map(np.array, (done, state, float(metrics.loss))) for done, state, metrics in calls]

    whole = epoch(ticket_state(LENET, stream))
    rest = epoch(jax.tree.map(jnp.asarray, whole[1][1]), first_step=2)
    assert_equal(whole[2:], rest)
    state = ticket_state(LENET, stream)
    later = epoch(state.replace(step=state.step + 6))
    assert later[0][2] != whole[0][2]


def test_leaving_an_epoch_ends_its_threads(stream: ImageStream) -> None:
    state = ticket_state(LENET, stream)
    calls = Executor().train_epoch(LENET, state, Epoch(stream, np.arange(43), KEY, hyperparams(), batch_size=4))
    with contextlib.closing(calls):
        next(calls)
    assert_loaders_end()


def shard(settings: Config, number: int = 1, split: str = "train") -> Path:
    assert settings.data_dir is not None
    return settings.data_dir / "toy_photos" / "1.0.0" / f"toy_photos-{split}.array_record-{number:05d}-of-00003"


def cut_short(path: Path) -> None:
    os.truncate(path, path.read_bytes().find(b"JFIF"))


def empty(path: Path) -> None:
    os.truncate(path, 0)


def scramble(path: Path) -> None:
    """Changes bytes of the records, not of the index at the end."""
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        start = content.find(b"JFIF")
        content[start : start + 400] = bytes(400)
        file.seek(0)
        file.write(content)


@pytest.mark.parametrize("damage", [cut_short, empty, Path.unlink])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_file_is_named_before_anything_is_written(
    tmp_path: Path, damage: Any, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = prepare(tmp_path)
    damage(shard(settings, split=split))
    assert train.main(words(settings, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{shard(settings, split=split)}: example " in error and "cannot be read (" in error
    assert "repair the file, or remove the data set and prepare it again" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [cut_short, empty, scramble])
def test_a_file_that_is_damaged_while_it_is_read_is_named(tmp_path: Path, damage: Any) -> None:
    train_stream = load_data(prepare(tmp_path)).train
    assert isinstance(train_stream, ImageStream)
    batches = train_stream.batches(np.argsort(train_stream.indices), batch_size=4)
    next(batches)
    path = train_stream.records.shards[2].path
    damage(path)
    with pytest.raises(ConfigError) as caught:
        list(batches)
    message = str(caught.value)
    assert message.startswith(f"{path}: example ") and "resumes an interrupted run from its last checkpoint" in message
    assert "\n" not in message
    assert int(message.split("example ")[1].split()[0]) >= 50 - train_stream.records.shards[2].examples
    assert_loaders_end()


def test_a_file_that_is_removed_while_it_is_read_is_read_on(tmp_path: Path) -> None:
    settings = prepare(tmp_path)
    train_stream = load_data(settings).train
    assert isinstance(train_stream, ImageStream)
    whole = list(train_stream.batches(np.arange(43), batch_size=8))
    for number in range(3):
        shard(settings, number).unlink()
    again = list(train_stream.batches(np.arange(43), batch_size=8))
    assert all(equal(one, other) for one, other in zip(whole, again, strict=True))
    with pytest.raises(ConfigError, match="00000-of-00003: example .* cannot be read .*No such file"):
        load_data(settings)


@pytest.mark.parametrize("content", [b"no image", photograph(1, 300, 200)[:900], b"GIF89a"])
def test_an_example_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    encode = lambda i: content if i == 5 else photograph(i, 30, 20)  # noqa: E731
    settings = prepare(tmp_path, encode=encode)
    with pytest.raises(ConfigError, match="train.array_record-.*: example .* of toy_photos/1.0.0's train split cannot"):
        load_data(settings)


def test_a_label_beyond_the_classes_is_named(settings: Config) -> None:
    loaded = load_data(settings).train
    assert isinstance(loaded, ImageStream)
    fewer = dataclasses.replace(loaded, records=dataclasses.replace(loaded.records, num_classes=3))
    with pytest.raises(ConfigError, match="label 3 is not 0 to 2"):
        list(fewer.batches(np.arange(43), batch_size=8))


def test_as_many_files_may_be_open_as_there_are_shards() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        records.allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024, hard)
        before = len(os.listdir("/dev/fd"))
        records.allow_open_files(1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000 + records.OTHER_FILES + before, hard)
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(ConfigError, match="ulimit -n .*: must be at least .* files; raise the hard limit"):
                records.allow_open_files(hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


QUICK = "--model lenet300100 --epochs 2 --rounds 1 --rewind-epoch 0 --lr 0.01 --batch-size 4 --val-set-size 7"


def words(settings: Config, out: Path, *more: str) -> list[str]:
    streams = f"--dataset toy_photos --data-dir {settings.data_dir} --image-size {SIZE} --augment resized-crop"
    return [*streams.split(), *QUICK.split(), "--no-report", "--controls", *more, "--out", str(out)]


@pytest.fixture(scope="module")
def finished(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(words(settings, folder)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_stops_inside_an_epoch_goes_on_to_the_same_ticket(
    settings: Config, finished: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed stream has only the remaining batches."""
    asked, whole = [], ImageStream.batches

    def watched(stream: ImageStream, order: Any, **options: Any) -> Iterator[Batch]:
        if options.get("crop_seed") is not None:
            asked.append((np.asarray(order), options, seen := []))
        else:
            seen = []
        for batch in whole(stream, order, **options):
            seen.append(batch.ids.tolist())
            yield batch

    def stopped(watch: Interrupts, progress: Progress, total: int) -> None:
        if (progress.phase, progress.epoch, progress.step) == ("search", 1, 3):
            os.kill(os.getpid(), number)
        watch.check()

    monkeypatch.setattr(ImageStream, "batches", watched)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "on_steps", stopped)
        assert train.main(words(settings, tmp_path / "run")) == 128 + number
    assert not (tmp_path / "run" / TICKET_FILE).exists()
    _, until, before = asked[-1]
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / TICKET_FILE).read_bytes() == (finished / TICKET_FILE).read_bytes()
    order, options, after = asked[2]
    assert (options["first_step"], options["crop_seed"]) == (3, until["crop_seed"])
    loaded = load_data(Config(**{**dataclasses.asdict(settings), "batch_size": 4})).train
    assert isinstance(loaded, ImageStream)
    assert before[:3] + after == [loaded.indices[order[at : at + 4]].tolist() for at in range(0, 43, 4)]
    assert len({options["crop_seed"] for _, options, _ in asked}) == 4  # two epochs of the search, two of the ticket


@pytest.mark.slow
def test_damage_inside_a_run_is_one_line_and_it_goes_on_once_it_is_repaired(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = prepare(tmp_path / "photos")
    whole = {path: path.read_bytes() for path in (shard(settings, number) for number in range(3))}

    def damaging(watch: Interrupts, progress: Progress, total: int) -> None:
        if (progress.phase, progress.epoch, progress.step) == ("search", 1, 3):
            for path in whole:
                empty(path)

    run = words(settings, tmp_path / "run", "--checkpoint-seconds", "0", "--checkpoint-steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "on_steps", damaging)
        assert train.main(run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "train.array_record" in error and "the file no longer contains it" in error
    for path, content in whole.items():
        path.write_bytes(content)
    assert train.main(run) == 0
    assert "resuming search 0" in capsys.readouterr().out
    assert (tmp_path / "run" / TICKET_FILE).read_bytes() == (finished / TICKET_FILE).read_bytes()


@pytest.mark.slow
def test_a_ticket_of_streamed_images_is_verified_and_connected(
    settings: Config, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(settings.data_dir)]
    assert commands.main(["verify", str(finished / TICKET_FILE), "toy_photos", *where]) == 0
    recorded = json.loads((finished / "summary.json").read_text())["ticket"]["test_accuracy"]
    assert f"test accuracy on toy_photos {recorded:.2%}, recorded" in capsys.readouterr().out
    assert commands.main(["connect", str(finished), "--points", "2"]) == 0
    assert "barrier" in capsys.readouterr().out


def test_snip_and_the_dense_control_take_streams(settings: Config, tmp_path: Path) -> None:
    more = ["--method", "snip", "--target-density", "0.25", "--epochs", "1", "--controls", "dense"]
    assert train.main(words(settings, tmp_path / "run", *more)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ticket"]["density"] == 0.25
    assert summary["dense"]["density"] == 1


def test_the_smallest_step_is_checked_without_reading(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATISTICS, "toy_photos", STATISTICS["imagenet2012"])
    monkeypatch.setattr(ImageStream, "batches", None)
    problem, _ = prepare_experiment.prepare(dataclasses.replace(settings, model="lenet300100"))
    assert isinstance(problem, Problem)
    with pytest.raises(ConfigError, match=r"--model vgg16: cannot be trained on images of shape \(12, 12,"):
        prepare_experiment.prepare(dataclasses.replace(settings, model="vgg16"))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_streamed_steps_are_the_same_on_several_devices(stream: ImageStream) -> None:
    """Batches of eight over four devices; each device has all three examples of the last batch."""
    recipe = Recipe(LeNet300100(num_classes=4), augment="resized-crop")
    hyper = search.hyperparams(PRESETS["digits"], "search", 0)
    wanted, found = (
        _steps(Executor(mesh.make_layout(devices, 1)), recipe, stream, np.arange(19), hyper) for devices in (1, 4)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), found, wanted)


def _steps(executor: Executor, recipe: Recipe, stream: ImageStream, order: np.ndarray, hyper: Any) -> Any:
    """Weights, and logits of the stream, after an epoch of batches of eight."""
    problem = Problem(recipe, stream, None, KEY, executor=executor)
    state = search.init_state(dataclasses.replace(PRESETS["digits"], lr=0.01), problem)
    epoch = Epoch(stream, order, KEY, hyper, batch_size=8)
    for _, state, _ in executor.train_epoch(recipe, state, epoch):  # noqa: B007, B020
        pass
    assert int(state.step) == 3
    variables = {"params": state.params, "batch_stats": {}, "masks": problem.init_variables()["masks"]}
    return state.params, executor.predict(recipe.model, variables, stream, batch_size=8)
