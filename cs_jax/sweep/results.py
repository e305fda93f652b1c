"""What came of a sweep: a result for each network that its runs have trained."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cs_jax.core import trees
from cs_jax.core.errors import ConfigError
from cs_jax.experiment.storage.paths import SUMMARY_FILE, TICKET_FILE
from cs_jax.methods.controls import DENSE
from cs_jax.sweep import scheduler
from cs_jax.sweep.spec import PlannedRun, Spec
from cs_jax.sweep.statistics import Result
from cs_jax.tickets.ticket import load_ticket


class SweptTicket(NamedTuple):
    """Masks of a ticket that a run of the sweep has found."""

    method: str
    target: float | None  # density that was asked for; None where it was left to the dial
    initial_score: float | None  # initial score, where it was the axis of the sweep
    seed: int
    masks: dict[str, np.ndarray]  # whether each weight is kept, by name of the masked array


def read_results(spec: Spec, directory: Path) -> tuple[list[Result], list[str]]:
    """Results of the runs that have ended, and a line for each that has not: its name, and why if it has failed.

    Args:
        spec: the grid.
        directory: of the sweep.

    Raises:
        ConfigError: the directory holds another sweep, or a run's result is damaged.
    """
    scheduler.check_same_spec(directory, spec)
    failures = scheduler.read_failures(directory)
    results: list[Result] = []
    missing: list[str] = []
    for run in spec.runs:
        path = scheduler.folder_of(directory, run) / SUMMARY_FILE
        try:
            summary = json.loads(path.read_text())
            results.extend(_results(run, summary))
        except (FileNotFoundError, NotADirectoryError):
            reason = failures.get(run.name)
            missing.append(f"{run.name} failed: {reason}" if reason else run.name)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: is damaged: {type(error).__name__} {error}") from error
    return results, missing


def read_tickets(spec: Spec, directory: Path) -> Iterator[SweptTicket]:
    """Tickets of the runs that have ended; the dense network, as a method of its own, is nobody's ticket.

    Args:
        spec: the grid.
        directory: of the sweep.

    Raises:
        ConfigError: a ticket is missing or damaged; says which file.
    """
    for run in spec.runs:
        folder = scheduler.folder_of(directory, run)
        if run.config.method == DENSE or not (folder / SUMMARY_FILE).exists():
            continue
        leaves = trees.leaves_by_path(load_ticket(folder / TICKET_FILE).found_masks)
        masks = {trees.name(path): np.asarray(mask) != 0 for path, mask in leaves.items()}
        yield SweptTicket(run.variant, run.config.target, run.initial_score, run.config.seed, masks)


def _results(run: PlannedRun, summary: Mapping[str, Any]) -> Iterator[Result]:
    """The ticket and its controls. The dense network, as a method of its own, is nobody's ticket."""
    yield _result(run, DENSE if run.config.method == DENSE else None, summary["ticket"])
    if summary["dense"] is not None:
        yield _result(run, DENSE, summary["dense"])
    for name, network in summary["controls"].items():
        yield _result(run, name, network)


def _result(run: PlannedRun, control: str | None, network: Mapping[str, Any]) -> Result:
    return Result(
        method=run.variant,
        control=control,
        target=run.config.target,
        initial_score=run.initial_score,
        seed=run.config.seed,
        density=_share(network["density"]),
        test_accuracy=_share(network["test_accuracy"]),
        val_accuracy=network["val_accuracy"],
        epochs=network["epochs"],
        training_flops=network["training_flops"],
        seconds=network["seconds"],
    )


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"got {value!r}, wanted a share in [0, 1]")
    return value
