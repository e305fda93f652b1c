"""Density that comes out for the density that was asked for, and accuracy beside it.

    python benchmarks/density.py [--preset digits] [--targets 0.5 0.2 0.1 0.05 0.02] [--seeds 0 1 2]

Every target is searched and retrained with every seed, as `train.py` does; the dense network is trained once a seed,
on as many epochs as a ticket. Prints one table: the worst relative deviation from the target, and test accuracies.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from cs_jax.experiment.presets import PRESETS
from cs_jax.experiment.run import run
from cs_jax.methods.controls import DENSE


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    preset: str = "digits"
    """Preset of train.py."""

    targets: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.02)
    """Target densities."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each target."""


def main(settings: Settings) -> None:
    started = time.perf_counter()
    results: dict[float, list[dict]] = {target: [] for target in settings.targets}
    dense: dict[int, float] = {}
    for seed in settings.seeds:
        for target in settings.targets:
            config = dataclasses.replace(
                PRESETS[settings.preset], seed=seed, target_density=target, controls=() if seed in dense else (DENSE,)
            )
            with tempfile.TemporaryDirectory() as folder:
                summary = run(dataclasses.replace(config, out=Path(folder)), terminal=Console(quiet=True))
            results[target].append(summary["ticket"])
            if summary["dense"]:
                dense[seed] = summary["dense"]["test_accuracy"]
            print(f"seed {seed}, target {target:g}: {summary['ticket']}", flush=True)
    print_table(settings, results, dense, time.perf_counter() - started)


def print_table(settings: Settings, results: dict[float, list[dict]], dense: dict[int, float], seconds: float) -> None:
    seeds = " ".join(map(str, settings.seeds))
    device = jax.devices()[0].device_kind
    title = f"{settings.preset}, seeds {seeds}, {device}, jax {jax.__version__}, {seconds:.0f} s"
    table = Table("target", "density", "deviation", "test accuracy, by seed", "mean", "below dense", title=title)
    accuracies = [dense[seed] for seed in settings.seeds]
    reference = statistics.mean(accuracies)
    table.add_row("dense", "1", "", _listed(accuracies), f"{reference:.4f}", "")
    for target, tickets in results.items():
        densities = [ticket["density"] for ticket in tickets]
        accuracies = [ticket["test_accuracy"] for ticket in tickets]
        deviation = max(abs(density / target - 1) for density in densities)
        mean = statistics.mean(accuracies)
        found = ", ".join(sorted({f"{density:.5f}" for density in densities}))
        table.add_row(
            f"{target:g}", found, f"{deviation:.2%}", _listed(accuracies), f"{mean:.4f}", f"{reference - mean:+.4f}"
        )
    Console(width=120).print(table)


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
