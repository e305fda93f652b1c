"""Results of a sweep: one result for each trained network."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cs_jax.core import trees
from cs_jax.core.errors import ConfigError
from cs_jax.experiment.storage.paths import SUMMARY_FILE, TICKET_FILE
from cs_jax.methods.controls import DENSE
from cs_jax.sweep import storage
from cs_jax.sweep.spec import PlannedRun, Spec
from cs_jax.sweep.statistics import Result
from cs_jax.tickets.ticket import load_ticket


class SweptTicket(NamedTuple):
    """Ticket of one run of a sweep."""

    method: str
    target: float | None  # target density, or target share of multiply-adds; None without a target
    initial_score: float | None  # None unless the sweep varies initial scores
    seed: int
    masks: dict[str, np.ndarray]  # boolean, true for kept weights; by name of the masked array


def read_results(spec: Spec, directory: Path) -> tuple[list[Result], list[str]]:
    """Results of finished runs, and a line for each other run: the run's name and, if the run failed, the reason.

    Args:
        spec: the grid of runs.
        directory: directory of the sweep.

    Raises:
        ConfigError: the directory belongs to another sweep, or a run's result is damaged.
    """
    storage.check_same_spec(directory, spec)
    failures = storage.read_failures(directory)
    results: list[Result] = []
    missing: list[str] = []
    for run in spec.runs:
        path = storage.folder_of(directory, run) / SUMMARY_FILE
        try:
            summary = json.loads(path.read_text())
            results.extend(_results(run, summary))
        except (FileNotFoundError, NotADirectoryError):
            reason = failures.get(run.name)
            missing.append(f"{run.name} failed: {reason}" if reason else run.name)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path}: damaged: {type(error).__name__} {error}") from error
    return results, missing


def read_tickets(spec: Spec, directory: Path) -> Iterator[SweptTicket]:
    """Tickets of finished runs. Runs of the method `dense` have no ticket.

    Args:
        spec: the grid of runs.
        directory: directory of the sweep.

    Raises:
        ConfigError: a ticket of a finished run is missing or damaged; the message names the file.
    """
    for run in spec.runs:
        folder = storage.folder_of(directory, run)
        if run.config.method == DENSE or not (folder / SUMMARY_FILE).exists():
            continue
        leaves = trees.leaves_by_path(load_ticket(folder / TICKET_FILE).found_masks)
        masks = {trees.name(path): np.asarray(mask) != 0 for path, mask in leaves.items()}
        yield SweptTicket(run.variant, run.config.target, run.initial_score, run.config.seed, masks)


def _results(run: PlannedRun, summary: Mapping[str, Any]) -> Iterator[Result]:
    """Results of a run's ticket and controls. The network of the method `dense` counts as a control."""
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
        raise ValueError(f"{value!r}: must be in [0, 1]")
    return value
