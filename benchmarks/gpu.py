"""Benchmarks of one accelerator: training steps, PyTorch, roofline, several tickets at once, CIFAR-10 end to end.

    python benchmarks/gpu.py            # needs CIFAR-10, prepared as for train.py cifar10
    python benchmarks/gpu.py --small    # small networks, and the digits in place of CIFAR-10; for a CPU

Steps run as in train.py, up to 100 in one call on an accelerator, on random images. If PyTorch is installed, search
steps in PyTorch are measured too, with the same number of steps between synchronisations. Compared steps run
interleaved.
"""

# pyright: reportMissingImports=false

import dataclasses
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory on the same device

import jax
import jax.numpy as jnp
import many_tickets
import numpy as np
from networks import Network, make_data, make_networks, make_step
from rich.console import Console
from rich.table import Table
from timing import Timed, check_positive, interleave, median_ratio, start

from cs_jax.commands import parser
from cs_jax.data.images import ImageSet
from cs_jax.experiment import search
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.run import run
from cs_jax.experiment.storage import paths
from cs_jax.models import MODELS
from cs_jax.models.multiply_adds import multiply_adds
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import Executor
from cs_jax.training.step import Recipe

BATCH_SIZE, IMAGE_SIZE = 128, 32

PEAKS = {"H100": (495e12, 3.35e12), "H200": (495e12, 4.8e12), "A100": (156e12, 2.04e12)}
"""Peak TF32 FLOP/s without sparsity, and memory bytes/s: vendor data of the SXM modules with 80 GB (H200: 141 GB)."""

CONSOLE = Console(width=120)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    small: bool = False
    """Use small networks, few steps, and the digits in place of CIFAR-10."""

    tickets: int = 8
    """Number of tickets that are searched at once."""

    repeats: int = 7
    """Timed repeats, after two warm-up repeats."""

    def __post_init__(self) -> None:
        check_positive(self, "tickets", "repeats")

    @property
    def steps(self) -> int:
        return 2 if self.small else 200

    @property
    def model(self) -> str:
        return "resnet6" if self.small else "resnet20"


class Steps:
    """Search, ticket or dense steps as in train.py; has the method `run` that `timing.interleave` calls."""

    def __init__(self, network: Network, data: ImageSet, steps: int) -> None:
        self._recipe, self._state = network
        self._data, self._steps = data, steps
        self._order = np.arange(steps * BATCH_SIZE) % len(data)
        self._hyper = search.hyperparams(parser.parse(["cifar10"]), SEARCH, 3)

    def run(self) -> float:
        """Mean seconds of a step."""
        started = time.perf_counter()
        epoch = Epoch(self._data, self._order, jax.random.key(1), self._hyper, batch_size=BATCH_SIZE)
        calls = Executor().train_epoch(self._recipe, self._state, epoch)
        for _, self._state, _ in calls:
            pass
        jax.block_until_ready(self._state)
        return (time.perf_counter() - started) / self._steps


def main(settings: Settings) -> None:
    device = jax.devices()[0].device_kind
    CONSOLE.print(f"{device}, {os.cpu_count()} cores, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}")
    prepare(whole_run(settings))  # raises here if the data set is missing, before any measurement
    recipe = Recipe(MODELS[settings.model](), augment="flip-crop")
    networks = make_networks(recipe, make_data(BATCH_SIZE, IMAGE_SIZE))
    seconds = print_steps(settings, networks)
    print_roofline(settings, device, networks["search"], seconds)
    print_tickets(settings)
    print_experiment(settings)


def print_steps(settings: Settings, networks: dict[str, Network]) -> float:
    """Prints the times of all steps; returns the median seconds of a search step."""
    data = make_data(BATCH_SIZE * min(settings.steps, 100), IMAGE_SIZE)
    stepped: dict[str, Timed] = {name: Steps(network, data, settings.steps) for name, network in networks.items()}
    if importlib.util.find_spec("torch"):
        import torch
        from pytorch_step import TorchStepper

        name = f"PyTorch {torch.__version__}, eager"
        stepped[name] = TorchStepper(BATCH_SIZE, "cuda" if torch.cuda.is_available() else "cpu", settings.steps)
    else:
        CONSOLE.print("PyTorch is not installed: the PyTorch step is not measured")
    times = interleave(stepped, settings.repeats)
    title = f"{settings.model}, batch {BATCH_SIZE}, {settings.steps} steps at a time, n={settings.repeats}"
    table = Table("step", "median ms", "min ms", "ratio to dense", "ratio to search", title=title)
    for name, found in times.items():
        ratios = (median_ratio(found, times[other]) for other in ("dense", "search"))
        milliseconds = (1e3 * statistics.median(found), 1e3 * min(found))
        table.add_row(name, *(f"{ms:.3f}" for ms in milliseconds), *(f"{ratio:.3f}" for ratio in ratios))
    CONSOLE.print(table)
    return statistics.median(times["search"])


def print_roofline(settings: Settings, device: str, network: Network, seconds: float) -> None:
    """Prints the share of the device's roofline that a search step reaches."""
    recipe, state = network
    state = jax.tree.map(jnp.zeros_like, state)  # the timed steps may have donated the original buffers
    compiled = make_step(recipe, state, make_data(BATCH_SIZE, IMAGE_SIZE)).compiled
    operations = 3 * 2 * multiply_adds(recipe.model, (IMAGE_SIZE, IMAGE_SIZE, 3)) * BATCH_SIZE
    moved = compiled.cost_analysis()["bytes accessed"]
    CONSOLE.print(f"a search step: {operations / 1e9:.1f} GFLOP; {moved / 1e6:.0f} MB accessed (compiler's estimate)")
    peaks = next((peaks for name, peaks in PEAKS.items() if name in device), None)
    if peaks is None:
        CONSOLE.print(f"{device}: peak speed unknown, so the share of the roofline is not computed")
        return
    computing, moving = operations / peaks[0], moved / peaks[1]
    bound = "compute" if computing > moving else "memory"
    CONSOLE.print(
        f"at the device's peak: {1e3 * computing:.3f} ms for compute, {1e3 * moving:.3f} ms for memory; "
        f"the step reaches {max(computing, moving) / seconds:.0%} of the roofline ({bound}-bound)"
    )


def print_tickets(settings: Settings) -> None:
    dataset, model = ("digits", "lenet300100") if settings.small else ("cifar10", "resnet20")
    for count in (1, settings.tickets):
        many_tickets.main(count, 1 if settings.small else 3, model, dataset)


def print_experiment(settings: Settings) -> None:
    """Runs the whole experiment, from compilation to the test of the ticket, and prints time and accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(whole_run(settings), out=Path(folder))
        started = time.perf_counter()
        summary = run(config)
        seconds = time.perf_counter() - started
        lines = (Path(folder) / paths.METRICS_FILE).read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    each = statistics.median(epoch["seconds"] for epoch in epochs)
    rate = statistics.median(epoch["images_per_second"] for epoch in epochs)
    CONSOLE.print(
        f"{config.dataset} end to end: {seconds:.0f} s for {len(epochs)} epochs; median epoch with evaluation "
        f"{each:.2f} s; {rate:,.0f} images/s in training; "
        f"ticket: test accuracy {summary['ticket']['test_accuracy']:.2%} "
        f"at density {summary['ticket']['density']:.2%}"
    )


def whole_run(settings: Settings) -> Config:
    small = ["digits", "--epochs", "3", "--rewind-epoch", "1", "--lr-schedule", "--lr-drops"]
    return parser.parse([*(small if settings.small else ["cifar10"]), "--no-report"])


if __name__ == "__main__":
    start(main, Settings, __doc__)
