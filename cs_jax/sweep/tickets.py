"""Several runs in one process, each with its own directory and log: at once in one program, or one after another."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import LockedError
from cs_jax.experiment import run as experiment_run
from cs_jax.experiment.config import Config
from cs_jax.experiment.observers.interrupts import Interrupts, Stopped
from cs_jax.experiment.observers.terminal import print_line, print_tickets, warnings_as_lines
from cs_jax.experiment.observers.tracking import Tracker
from cs_jax.experiment.prepare import check_all
from cs_jax.experiment.search import NonFiniteLossError
from cs_jax.experiment.storage import paths, run_directory
from cs_jax.sweep import autotune
from cs_jax.sweep.display import SweepDisplay
from cs_jax.sweep.spec import PlannedRun
from cs_jax.training.executor import Executor
from cs_jax.training.shared_device import Together

PATIENCE = 60.0
"""Seconds to wait for another process that was told to end, and may still be saving the same run."""

OnEvent = Callable[..., None]
"""Is told of a run, by its name, and what happened: `epoch=` so many done, `done=` its ticket or `failed=` why."""


class Job(NamedTuple):
    """A run among others."""

    name: str
    config: Config
    log: Path  # takes what it would have printed
    write_report: Callable[[Path], object] | None = None  # called with the run directory at its end


class Reporter(Tracker):
    """Tells of every epoch."""

    def __init__(self, name: str, on_event: OnEvent) -> None:
        self._name, self._on_event = name, on_event

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        self._on_event(self._name, epoch=step + 1)


def run_jobs(jobs: Sequence[Job], on_event: OnEvent, why: str = "") -> None:
    """Takes runs to their end: one by itself, several in one program.

    Args:
        jobs: one at least.
        on_event: told of their epochs and ends; of one at a time.
        why: for their logs: why so many are taken at once.

    Raises:
        Stopped: on SIGINT or SIGTERM, after all were saved.
    """
    if len(jobs) == 1:
        _run_job(jobs[0], on_event, why)
        return

    def life(job: Job, watch: Interrupts) -> Callable[[Executor], None]:
        return lambda executor: _run_job(job, on_event, why, executor, Interrupts(watch))

    with Interrupts() as watch:
        with watch.held(), warnings_as_lines(Console(stderr=True)):
            ends = Together().run([life(job, watch) for job in jobs])
        errors = [end for end in ends if end is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):  # what nobody expects comes first
            raise error
        watch.check()  # a signal may have come after the last step of all


def _run_job(
    job: Job, on_event: OnEvent, why: str, executor: Executor | None = None, watch: Interrupts | None = None
) -> None:
    """Takes a run to its end, and tells of it."""
    started, path = time.monotonic(), job.config.run_directory
    with open(job.log, "a") as log:
        terminal = Console(file=log, width=120)
        if why:
            print_line(terminal, why)
        while True:
            had_begun = run_directory.holds_run(path)
            try:
                trackers = [Reporter(job.name, on_event)]
                summary = experiment_run.run(
                    job.config,
                    write_report=job.write_report,
                    trackers=trackers,
                    terminal=terminal,
                    executor=executor,
                    watch=watch,
                )
            except LockedError as error:
                if executor is not None or time.monotonic() > started + PATIENCE:  # others would have to wait, too
                    return on_event(job.name, failed=str(error))
                time.sleep(0.5)
            except (ConfigError, NonFiniteLossError, OSError) as error:
                begun_meanwhile = run_directory.holds_run(path) and not had_begun and isinstance(error, ConfigError)
                if not begun_meanwhile:  # by a process that was told to end
                    failure = " ".join(str(error).split())
                    print_line(terminal, f"failed: {failure}")
                    return on_event(job.name, failed=failure)
            else:
                return on_event(job.name, done=summary["ticket"])


def train(config: Config, tickets: int, write_report: Callable[[Path], object] | None = None) -> None:
    """Searches tickets that differ in their seeds, those not done yet, and prints what they are worth.

    Args:
        config: of the first; the next ones have the next seeds. Its folder, where it has one, is that of all.
        tickets: how many.
        write_report: writes the report of a run directory; None for no reports.

    Raises:
        ConfigError: they cannot be searched as asked; nothing was written.
        OSError: some have failed; says which.
        Stopped: on SIGINT or SIGTERM, after what was under way was saved.
    """
    terminal, runs = Console(), _plan(config, tickets)
    with Interrupts() as watch:
        waiting = [run for run in runs if not _is_done(run.config)]
        check_all(run.config for run in waiting)
        failures: dict[str, str] = {}
        count, why = autotune.choose_run_count([run.config for run in waiting], None) if waiting else (0, "")
        if why:
            print_line(terminal, why)
        try:
            with SweepDisplay(terminal, len(runs), waiting) as display:
                for first in range(0, len(waiting), count or 1):
                    failures |= _run_displayed(waiting[first : first + count], display, why, write_report)
            watch.check()
        except Stopped as stop:
            stop.hint = "; tickets under way are saved: the same command goes on"
            raise
    summaries = [run_directory.read_summary(run.config.run_directory) for run in runs]
    done = [summary for summary in summaries if summary is not None]
    if done:
        print_tickets(terminal, done)
    if failures:
        first = next(run for run in runs if run.name in failures)
        reason = f"{failures[first.name]}; see {_log_of(first.config)}"
        raise OSError(f"{len(failures)} of {tickets} tickets failed, first {first.name}: {reason}")
    print_line(terminal, f"{runs[0].config.run_directory.parent}: {', '.join(run.name for run in runs)}")


def _plan(config: Config, tickets: int) -> list[PlannedRun]:
    """The runs of consecutive seeds, in folders that are named as ever.

    Raises:
        ConfigError: there are not as many seeds, or the folder is that of a run.
    """
    if config.seed + tickets > 2**32:
        raise ConfigError(
            f"--tickets: got {tickets}, wanted at most {2**32 - config.seed} from --seed {config.seed} on"
        )
    if config.out is not None and run_directory.holds_run(config.out):
        raise ConfigError(
            f"--out: got {config.out}, which holds one run, wanted a folder for all of --tickets {tickets}"
        )
    runs = []
    for seed in range(config.seed, config.seed + tickets):
        own = dataclasses.replace(config, seed=seed, out=None)
        name = own.run_directory.name
        out = None if config.out is None else config.out / name
        runs.append(PlannedRun(name, own.method, None, dataclasses.replace(own, out=out)))
    return runs


def _is_done(config: Config) -> bool:
    """Whether a run is done; refuses its folder if another is there."""
    path = config.run_directory
    if not run_directory.holds_run(path):
        run_directory.check_free(config)
        return False
    run_directory.check_same_config(config)
    return run_directory.read_summary(path) is not None


def _log_of(config: Config) -> Path:
    return config.run_directory / paths.LOG_FILE


def _run_displayed(
    runs: Sequence[PlannedRun], display: SweepDisplay, why: str, write_report: Callable[[Path], object] | None
) -> dict[str, str]:
    """Takes runs together, on a display; why some have failed, by their names."""
    planned, failures = {run.name: run for run in runs}, {}

    def on_event(name: str, **event: Any) -> None:
        run = planned[name]
        if "epoch" in event:
            display.on_epoch(0, run, event["epoch"])
            return
        if "failed" in event:
            failures[name] = event["failed"]
        display.on_end(0, run, event.get("done"), event.get("failed", ""))

    for run in runs:
        display.on_start(0, run)
        run.config.run_directory.mkdir(parents=True, exist_ok=True)
    run_jobs([Job(run.name, run.config, _log_of(run.config), write_report) for run in runs], on_event, why)
    return failures
