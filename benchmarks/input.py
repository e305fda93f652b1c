"""Speed of the input pipeline in images per second: only the loader, only the training step, and both together.

    python benchmarks/input.py [--model resnet50] [--batch-size 256] [--image-size 224] [--threads 8]

Synthetic photographs of about 400x500 pixels are prepared with TensorFlow Datasets and streamed with random crops as in
training. The files stay in the page cache, so disk speed is not measured. The three measurements run interleaved in one
process, so that a change of machine speed affects all of them. Prints medians over repeats. Also prints the ratio
(speed of both together / speed of the slower one of loader and step), as a median of the ratios within each repeat.
"""

import contextlib
import dataclasses
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from timing import check_positive, interleave, start

from cs_jax.core import masks
from cs_jax.data.images import RESIZED_CROP, ImageSet
from cs_jax.data.load import load_data
from cs_jax.data.stream import ImageStream, default_threads
from cs_jax.experiment.config import Config
from cs_jax.models import MODELS
from cs_jax.training import step
from cs_jax.training.compiled import compiled_step
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import Executor
from cs_jax.training.step import Hyperparams, Recipe, StepInputs, TrainState

CLASSES, SHARDS = 1000, 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    model: str = "resnet50"
    """Network of cs_jax.models."""

    batch_size: int = 256
    """Examples per step."""

    image_size: int = 224
    """Height and width of the crops."""

    threads: int | None = None
    """Threads that read and decode; default: one per core, at most 16."""

    images: int = 1024
    """Number of synthetic photographs; a repeat may read a photograph several times."""

    steps: int = 20
    """Steps per repeat."""

    repeats: int = 5
    """Timed repeats of the three measurements, after two warm-up repeats."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "image_size", "threads", "images", "steps", "repeats")


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stream = make_stream(settings, Path(folder))
        bench = Bench(settings, stream)
        what = {"loader": Run(bench.load), "step": Run(bench.step), "both": Run(bench.train)}
        times = interleave(what, settings.repeats)
    print_table(settings, stream.threads, times)


class Bench:
    """The three measurements: `load` only reads, `step` repeats steps on one batch, `train` does both."""

    def __init__(self, settings: Settings, stream: ImageStream) -> None:
        self._settings, self._stream = settings, stream
        self._recipe = Recipe(MODELS[settings.model](num_classes=CLASSES), augment=RESIZED_CROP)
        self._order = np.arange(settings.steps * settings.batch_size) % len(stream)
        self._batch = stream.take(self._order[: settings.batch_size])
        self._key = jax.random.key(1)
        self._hyper = Hyperparams(*(jnp.asarray(value, float) for value in (3.0, 0.0, 1e-3, 1e-3, 1e-8)))
        self._state = search_state(self._recipe, self._batch)

    def load(self) -> None:
        for _ in self._stream.batches(self._order, batch_size=self._settings.batch_size, crop_seed=0):
            pass

    def step(self) -> None:
        places = np.arange(self._settings.batch_size)
        inputs = StepInputs(self._batch, places, self._key, self._hyper)
        for _ in range(self._settings.steps):
            self._state, _ = compiled_step(self._recipe, self._state, inputs)
        jax.block_until_ready(self._state)

    def train(self) -> None:
        epoch = Epoch(self._stream, self._order, self._key, self._hyper, batch_size=self._settings.batch_size)
        calls = Executor().train_epoch(self._recipe, self._state, epoch)
        for _, self._state, _ in calls:
            pass
        jax.block_until_ready(self._state)


@dataclasses.dataclass(frozen=True)
class Run:
    """A function with the method `run` that `timing.interleave` calls."""

    call: Callable[[], None]

    def run(self) -> float:
        """Seconds of one call."""
        started = time.perf_counter()
        self.call()
        return time.perf_counter() - started


def search_state(recipe: Recipe, images: ImageSet) -> TrainState:
    variables = step.init_variables(recipe, jax.random.key(0), images.image_shape)
    scores = masks.init_scores(variables["masks"], 0.0)
    return step.init_state(recipe, variables["params"], variables["batch_stats"], scores=scores, masks={})


def make_stream(settings: Settings, folder: Path) -> ImageStream:
    """Stream of synthetic photographs, which are prepared in `folder`."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(settings.images, folder)
    config = Config(
        dataset="synthetic_photographs",
        data_dir=folder,
        image_size=settings.image_size,
        loader_threads=settings.threads or default_threads(),
        augment=RESIZED_CROP,
        val_set_size=0,
        batch_size=1,
    )
    stream = load_data(config).train
    assert isinstance(stream, ImageStream)
    return stream


def prepare(images: int, folder: Path) -> None:
    import tensorflow_datasets as tfds

    class SyntheticPhotographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder  # pyright: ignore

        def _info(self) -> Any:
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            label = tfds.features.ClassLabel(num_classes=CLASSES)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": examples(images), "test": examples(SHARDS)}

        def _generate_examples(self) -> Any:
            return iter(())

    builder = SyntheticPhotographs(data_dir=folder, file_format="array_record")
    download = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=SHARDS)
    builder.download_and_prepare(download_config=download)


def examples(count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Synthetic JPEG images with labels: smooth shapes with fine noise, 60 to 80 kB each."""
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = (int(random.integers(side - 60, side + 60)) for side in (400, 500))
        coarse = Image.fromarray(random.integers(0, 256, (12, 15, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), int)
        pixels = np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=88)
        yield number, {"image": io.BytesIO(file.getvalue()), "label": number % CLASSES}


def print_table(settings: Settings, threads: int, times: dict[str, list[float]]) -> None:
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    what = f"{settings.model}, batch {settings.batch_size}, {settings.image_size}x{settings.image_size}"
    title = f"{what}, {threads} threads; {device}; n={settings.repeats} of {settings.steps} steps"
    table = Table("", "images/s", "lowest to highest", title=title)
    count = settings.steps * settings.batch_size
    for name, seconds in times.items():
        rates = sorted(count / second for second in seconds)
        table.add_row(name, f"{statistics.median(rates):,.1f}", f"{rates[0]:,.1f} to {rates[-1]:,.1f}")
    slower = [max(pair) for pair in zip(times["loader"], times["step"], strict=True)]
    share = statistics.median(alone / both for alone, both in zip(slower, times["both"], strict=True))
    console = Console(width=120)
    console.print(table)
    console.print(f"both together / slower of loader and step: {share:.0%} (median of the ratios within each repeat)")


if __name__ == "__main__":
    start(main, Settings, __doc__)
