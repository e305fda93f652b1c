"""What checkpoints, files, figures and the progress bar cost a run.

    python benchmarks/overhead.py [--repeats 5] [-- PRESET and flags of train.py]

Runs the same experiment bare, with checkpoints alone and with everything, in one process, interleaved, each from its
first step to the ticket's test; data, network and compiled steps are shared, and the first of each is not counted.
Prints one table: seconds, medians of the ratios to the bare run, and the share that training waited for checkpoints.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from timing import median_ratio

from cs_jax.commands.parser import parse
from cs_jax.data.load import Data
from cs_jax.experiment import pipeline
from cs_jax.experiment.config import Config
from cs_jax.experiment.experiment import Experiment
from cs_jax.experiment.observers.interrupts import Interrupts
from cs_jax.experiment.observers.tracking import TensorBoard, Tracking
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.run import resume
from cs_jax.experiment.storage import run_directory
from cs_jax.experiment.storage.checkpoints import Checkpoints
from cs_jax.experiment.storage.paths import CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER
from cs_jax.experiment.storage.run_directory import RunDirectory
from cs_jax.training.problem import Problem

BARE, CHECKPOINTS, EVERYTHING = "bare", "checkpoints", "everything"


def main(repeats: int, words: list[str]) -> None:
    settings = parse(words)
    problem, data = prepare(settings)
    seconds: dict[str, list[float]] = {BARE: [], CHECKPOINTS: [], EVERYTHING: []}
    waiting = []
    for repeat in range(repeats + 1):
        order = list(seconds)
        for kind in order[repeat % 3 :] + order[: repeat % 3]:
            took, waited = measure(kind, settings, problem, data)
            print(f"{kind}: {took:.2f} s", flush=True)
            if repeat:
                seconds[kind].append(took)
                waiting += [waited / took] if kind == CHECKPOINTS else []
    epochs = (settings.search_rounds + len(settings.retrainings)) * settings.epochs
    epoch = statistics.median(seconds[BARE]) / epochs
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    title = f"{' '.join(words)}: {epochs} epochs of {epoch:.2f} s; {device}; medians of {repeats}"
    table = Table("run", "seconds", "ratio", "lowest and highest", "waits for checkpoints", title=title)
    for kind, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[BARE], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        waits = f"{statistics.median(waiting):.2%}" if kind == CHECKPOINTS else ""
        ratio = f"{median_ratio(times, seconds[BARE]):.3f}"
        table.add_row(kind, f"{statistics.median(times):.2f}", ratio, spread, waits)
    Console(width=120).print(table)


def measure(kind: str, settings: Config, problem: Problem, data: Data) -> tuple[float, float]:
    """Seconds of one experiment, and of those that it waited for checkpoints, where these are alone."""
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.replace(settings, out=Path(folder) / "run")
        with run_directory.opened(settings, new=True) as directory:
            directory.begin("")
            started = time.perf_counter()
            waited = run(kind, settings, problem, data, directory)
            return time.perf_counter() - started, waited


def run(kind: str, settings: Config, problem: Problem, data: Data, directory: RunDirectory) -> float:
    if kind == BARE:
        pipeline.run(Experiment(settings, problem, data=data, directory=directory))
    elif kind == CHECKPOINTS:
        with Checkpoints(settings, problem, directory.path / CHECKPOINTS_FOLDER) as checkpoints:
            pipeline.run(Experiment(settings, problem, checkpoints, data=data, directory=directory))
        return checkpoints.waited
    else:
        figures = TensorBoard(directory.path / TENSORBOARD_FOLDER)
        with open(os.devnull, "w") as nowhere, Interrupts() as watch, Tracking(settings, [figures]) as tracking:
            terminal = Console(file=nowhere, force_terminal=True)
            resume(Experiment(settings, problem, tracking, data=data, directory=directory), watch, terminal, new=True)
    return 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("words", nargs="*", default=["digits"], help="preset and flags of train.py, after --")
    given = parser.parse_args()
    main(given.repeats, given.words)
