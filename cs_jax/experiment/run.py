"""Starts or resumes a run, and writes its summary and report."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cs_jax.core.settings import flag
from cs_jax.data.load import Data, fingerprint
from cs_jax.experiment import pipeline
from cs_jax.experiment.config import Config
from cs_jax.experiment.experiment import Experiment
from cs_jax.experiment.observers.health import Health
from cs_jax.experiment.observers.interrupts import Interrupts, Stopped
from cs_jax.experiment.observers.terminal import ProgressDisplay, Terminal, print_line, print_result, warnings_as_lines
from cs_jax.experiment.observers.tracking import TensorBoard, Tracker, Tracking
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.presets import without_effect
from cs_jax.experiment.progress import Observers, total_epochs
from cs_jax.experiment.storage import config_file, directory_checks, paths, run_directory
from cs_jax.experiment.storage.checkpoints import Checkpoints
from cs_jax.experiment.storage.run_directory import RunDirectory
from cs_jax.experiment.storage.versions import versions
from cs_jax.training import processes
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem


def run(
    config: Config,
    *,
    write_report: Callable[[Path], object] | None = None,
    trackers: Sequence[Tracker] = (),
    terminal: Console | None = None,
    executor: Executor | None = None,
    watch: Interrupts | None = None,
) -> dict[str, Any]:
    """Runs the experiment of a config, or resumes it from its last checkpoint, and writes all its files.

    Args:
        config: settings of the run.
        write_report: called with the run directory at the end, to write the report; None for no report.
        trackers: receive the metrics of every epoch, in addition to TensorBoard.
        terminal: where progress and results are printed; by default standard output.
        executor: runs the training steps; None creates an executor for this run only.
        watch: handler of signals; None installs a new handler during the run.

    Returns:
        The content of summary.json.

    Raises:
        ConfigError: the config does not fit the data or the run directory.
        NonFiniteLossError: loss, weights or scores are not finite.
        Stopped: the process received SIGINT, SIGTERM or SIGHUP. The run is saved, unless no step was done.
        OSError: a file cannot be written.
    """
    terminal = terminal or Terminal(quiet=not processes.is_leader())
    processes.check_same_everywhere(_identity(config))
    with watch or Interrupts() as watch, warnings_as_lines(terminal), contextlib.ExitStack() as stack:
        unused = without_effect(config)
        if unused:
            print_line(terminal, f"--method {config.method} ignores {', '.join(unused)}")
        path = config.run_directory
        is_new = processes.from_leader(lambda: not directory_checks.holds_run(path))
        if is_new:
            processes.from_leader(lambda: directory_checks.check_free(config))
        else:
            processes.from_leader(lambda: directory_checks.check_same_config(config))
        summary = None if is_new else processes.from_leader(lambda: run_directory.read_summary(path))
        started, was_finished = time.perf_counter(), summary is not None
        if summary is None:
            figures = TensorBoard(path / paths.TENSORBOARD_FOLDER)
            tracking = stack.enter_context(Tracking(config, [figures, *trackers]))
            problem, data, directory = _open(config, executor, terminal, stack, new=is_new)
            experiment = Experiment(config, problem, tracking, data=data, directory=directory)
            summary = resume(experiment, watch, terminal, new=is_new)
            directory.write_summary(summary)
        print_result(terminal, summary)
        has_report = was_finished and (path / paths.REPORT_FILE).exists()
        if write_report and config.report and processes.is_leader() and not has_report:
            write_report(path)
        if was_finished:
            print_line(terminal, f"{path}: already finished")
        elif processes.is_leader():
            files = ", ".join(run_directory.list_files(path))
            print_line(terminal, f"{path}: {files}; {time.perf_counter() - started:.0f} s")
    return summary


def _open(
    config: Config, executor: Executor | None, terminal: Console, stack: contextlib.ExitStack, *, new: bool
) -> tuple[Problem, Data, RunDirectory]:
    """Problem and data of a config, and its run directory, locked until the stack is closed."""
    if new:
        problem, data, data_hash = _prepare(config, executor)  # before anything is written
        directory = stack.enter_context(run_directory.open_run_directory(config, new=True))
        processes.from_leader(lambda: directory.begin(data_hash))
        return problem, data, directory
    directory = stack.enter_context(run_directory.open_run_directory(config, new=False))
    problem, data, data_hash = _prepare(config, executor)
    changed = processes.from_leader(lambda: directory.check_same_data(data_hash))
    for name, (before, now) in changed.items():
        line = f"resuming with {name} {now}, started with {before}: results may differ in the last digits"
        print_line(terminal, line)
    return problem, data, directory


def _prepare(config: Config, executor: Executor | None) -> tuple[Problem, Data, str]:
    """Problem and data of a config, and the fingerprint of the data, which is the same in all processes."""
    problem, data = prepare(config, executor)
    data_hash = fingerprint(data)
    processes.check_same_everywhere({"data": data_hash})
    return problem, data, data_hash


def _identity(config: Config) -> dict[str, Any]:
    """Versions and settings that must be the same in all processes of a run."""
    fields = config_file.to_json(config)
    libraries = {name: version for name, version in versions().items() if name != "cs_jax"}
    settings = {flag(name): value for name, value in fields.items() if name != "data_dir"}
    return {"cs_jax": processes.code_version(), **libraries, **settings}


def resume(experiment: Experiment, watch: Interrupts, terminal: Console, *, new: bool) -> dict[str, Any]:
    """Runs an experiment from its last checkpoint to its end, and returns the content of summary.json.

    Args:
        experiment: its observer receives the metrics. Observers for terminal, health checks, checkpoints and signals
            are added.
        watch: handler of signals; the run is saved before `Stopped` is raised.
        terminal: where progress is printed.
        new: True for a run that was not started before. False prints a line if there is no checkpoint.
    """
    config, directory = experiment.config, experiment.directory
    folder = directory.path / paths.CHECKPOINTS_FOLDER
    validation = experiment.data.validation
    health = Health(config, 0 if validation is None else len(validation))
    metrics = directory.path / paths.METRICS_FILE
    with Checkpoints(config, experiment.problem, folder, metrics) as checkpoints, watch.held():
        progress = checkpoints.restore()
        processes.from_leader(lambda: directory.truncate_to(progress))
        if progress is not None:
            at_end = progress.epoch == config.epochs
            where = "at its end" if at_end else f"at epoch {progress.epoch}, step {progress.step}"
            print_line(terminal, f"resuming {progress.phase_name()} {where}")
        elif not new:
            print_line(terminal, "no checkpoint yet: starting from scratch")
        try:
            done = 0 if progress is None else progress.epochs_done(config)
            with ProgressDisplay(terminal, total_epochs=total_epochs(config), epochs_done=done) as display:
                leading = (directory, experiment.observer, display, health) if processes.is_leader() else ()
                observers = Observers(*leading, checkpoints, watch)
                return pipeline.run(dataclasses.replace(experiment, observer=observers), progress)
        except Stopped as stop:
            saved = checkpoints.save_latest()
            stop.hint = f"; saved: resume with --resume {directory.path}" if saved else "; nothing to save yet"
            raise
        except BrokenPipeError:  # the reader of standard output is gone
            if not processes.are_several():  # saving needs all processes at the same step
                checkpoints.save_latest()
            raise
        except OSError as error:
            raise OSError(f"{error}; run the same command to resume from the last checkpoint") from error
