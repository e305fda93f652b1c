"""Several runs in one process, in one compiled program or one after another; each run has a directory and a log."""

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
from cs_jax.experiment.storage import directory_checks, paths, run_directory
from cs_jax.sweep import autotune
from cs_jax.sweep.display import SweepDisplay
from cs_jax.sweep.spec import PlannedRun
from cs_jax.training.executor import Executor
from cs_jax.training.shared_device import Together

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another process that was stopped and is still saving the same run."""

OnEvent = Callable[..., None]
"""Callback for a run's name and one keyword: `epoch` (epochs finished), `done` (ticket) or `failed` (reason)."""


class Job(NamedTuple):
    """A run and the destinations of its output."""

    name: str
    config: Config
    log: Path  # file for the printed lines of the run
    write_report: Callable[[Path], object] | None = None  # called with the run directory at the end; None: no report


class Reporter(Tracker):
    """Calls a callback at the end of every epoch of a run."""

    def __init__(self, name: str, on_event: OnEvent) -> None:
        self._name, self._on_event = name, on_event

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        self._on_event(self._name, epoch=step + 1)


def run_jobs(jobs: Sequence[Job], on_event: OnEvent, reason: str = "") -> None:
    """Trains all runs to their end; several runs share one program.

    Args:
        jobs: one or more runs.
        on_event: receives epochs and ends of the runs, one event at a time.
        reason: first line of each log: the reason for the number of runs in one program; "" for no line.

    Raises:
        Stopped: on SIGINT or SIGTERM, after all runs were saved.
    """
    if len(jobs) == 1:
        _run_job(jobs[0], on_event, reason)
        return

    def in_thread(job: Job, watch: Interrupts) -> Callable[[Executor], None]:
        return lambda executor: _run_job(job, on_event, reason, executor, Interrupts(watch))

    with Interrupts() as watch:
        with watch.held(), warnings_as_lines(Console(stderr=True)):
            results = Together().run([in_thread(job, watch) for job in jobs])
        errors = [result for result in results if result is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):  # unexpected errors first
            raise error
        watch.check()  # a signal may have arrived after the last step


def _run_job(
    job: Job, on_event: OnEvent, reason: str, executor: Executor | None = None, watch: Interrupts | None = None
) -> None:
    """Trains one run to its end, and reports the epochs and the end to `on_event`."""
    started, path = time.monotonic(), job.config.run_directory
    with open(job.log, "a") as log:
        terminal = Console(file=log, width=120)
        if reason:
            print_line(terminal, reason)
        while True:
            existed = directory_checks.holds_run(path)
            try:
                summary = experiment_run.run(
                    job.config,
                    write_report=job.write_report,
                    trackers=[Reporter(job.name, on_event)],
                    terminal=terminal,
                    executor=executor,
                    watch=watch,
                )
            except LockedError as error:
                if executor is not None or time.monotonic() > started + LOCK_TIMEOUT:  # runs in one program cannot wait
                    return on_event(job.name, failed=str(error))
                time.sleep(0.5)
            except (ConfigError, NonFiniteLossError, OSError) as error:
                created_meanwhile = directory_checks.holds_run(path) and not existed and isinstance(error, ConfigError)
                if not created_meanwhile:  # otherwise a process that was being stopped created the directory: try again
                    failure = " ".join(str(error).split())
                    print_line(terminal, f"failed: {failure}")
                    return on_event(job.name, failed=failure)
            else:
                return on_event(job.name, done=summary["ticket"])


def train(config: Config, tickets: int, write_report: Callable[[Path], object] | None = None) -> None:
    """Searches for tickets with consecutive seeds, skips finished runs, and prints a table of all tickets.

    Args:
        config: settings of the first run; the other runs have the next seeds. `config.out`, if set, becomes the parent
            directory of all runs.
        tickets: number of runs, at least 1.
        write_report: writes the report of a run directory; None writes no reports.

    Raises:
        ConfigError: a setting or directory cannot be used; nothing was written.
        OSError: a run failed; the message names the first failed run and its log.
        Stopped: on SIGINT or SIGTERM, after unfinished runs were saved.
    """
    terminal, runs = Console(), _plan_runs(config, tickets)
    with Interrupts() as watch:
        waiting = [run for run in runs if not _is_done(run.config)]
        check_all(run.config for run in waiting)
        failures: dict[str, str] = {}
        count, reason = autotune.choose_run_count([run.config for run in waiting], None) if waiting else (0, "")
        if reason:
            print_line(terminal, reason)
        try:
            with SweepDisplay(terminal, len(runs), waiting) as display:
                for first in range(0, len(waiting), count or 1):
                    failures |= _run_with_display(waiting[first : first + count], display, reason, write_report)
            watch.check()
        except Stopped as stop:
            stop.hint = "; unfinished tickets are saved; run the same command to resume"
            raise
    summaries = [run_directory.read_summary(run.config.run_directory) for run in runs]
    done = [summary for summary in summaries if summary is not None]
    if done:
        print_tickets(terminal, done)
    if failures:
        first = next(run for run in runs if run.name in failures)
        cause = f"{failures[first.name]}; see {_log_of(first.config)}"
        raise OSError(f"{len(failures)} of {tickets} tickets failed, first {first.name}: {cause}")
    print_line(terminal, f"{runs[0].config.run_directory.parent}: {', '.join(run.name for run in runs)}")


def _plan_runs(config: Config, tickets: int) -> list[PlannedRun]:
    """Runs with consecutive seeds, in directories with the default names.

    Raises:
        ConfigError: the last seed would be too large, or `config.out` is a run directory.
    """
    if config.seed + tickets > 2**32:
        raise ConfigError(f"--tickets {tickets}: must be at most {2**32 - config.seed} with --seed {config.seed}")
    if config.out is not None and directory_checks.holds_run(config.out):
        raise ConfigError(f"--out {config.out}: is a run directory; choose a parent directory for --tickets {tickets}")
    runs = []
    for seed in range(config.seed, config.seed + tickets):
        own = dataclasses.replace(config, seed=seed, out=None)
        name = own.run_directory.name
        out = None if config.out is None else config.out / name
        runs.append(PlannedRun(name, own.method, None, dataclasses.replace(own, out=out)))
    return runs


def _is_done(config: Config) -> bool:
    """True if the run has finished. Raises a ConfigError if the directory cannot be used for this run."""
    path = config.run_directory
    if not directory_checks.holds_run(path):
        directory_checks.check_free(config)
        return False
    directory_checks.check_same_config(config)
    return run_directory.read_summary(path) is not None


def _log_of(config: Config) -> Path:
    return config.run_directory / paths.LOG_FILE


def _run_with_display(
    runs: Sequence[PlannedRun], display: SweepDisplay, reason: str, write_report: Callable[[Path], object] | None
) -> dict[str, str]:
    """Trains runs and shows their progress; returns the reason of each failure, by run name."""
    by_name, failures = {run.name: run for run in runs}, {}

    def on_event(name: str, **event: Any) -> None:
        run = by_name[name]
        if "epoch" in event:
            display.on_epoch(0, run, event["epoch"])
            return
        if "failed" in event:
            failures[name] = event["failed"]
        display.on_end(0, run, event.get("done"), event.get("failed", ""))

    for run in runs:
        display.on_start(0, run)
        run.config.run_directory.mkdir(parents=True, exist_ok=True)
    run_jobs([Job(run.name, run.config, _log_of(run.config), write_report) for run in runs], on_event, reason)
    return failures
