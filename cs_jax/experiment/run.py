"""One run, from its start or from its last checkpoint, to its summary and its report."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cs_jax.core.settings import flag
from cs_jax.data.load import Data, fingerprint
from cs_jax.experiment import pipeline
from cs_jax.experiment.config import Config
from cs_jax.experiment.observers.health import Health
from cs_jax.experiment.observers.interrupts import Interrupts, Stopped
from cs_jax.experiment.observers.terminal import ProgressDisplay, Terminal, print_line, print_result, warnings_as_lines
from cs_jax.experiment.observers.tracking import TensorBoard, Tracker, Tracking
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.presets import without_effect
from cs_jax.experiment.progress import Observer, Observers
from cs_jax.experiment.storage import config_file, paths, run_directory
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
    """The whole experiment that a config asks for, from where an earlier process left it, with all its files.

    Args:
        config: what is asked.
        write_report: writes the report of the run directory that it is called with; None for no report.
        trackers: told of every epoch's figures, beside TensorBoard.
        terminal: where it is shown; standard output by default.
        executor: takes the steps; by default those of this run alone.
        watch: hears signals; by default one that listens to them from here on.

    Returns:
        What summary.json holds.

    Raises:
        ConfigError: it cannot be done as asked.
        NonFiniteLossError: in which round, epoch and step.
        Stopped: on SIGINT or SIGTERM, after the run was saved.
        OSError: a file cannot be written.
    """
    started, path = time.perf_counter(), config.run_directory
    terminal = terminal or Terminal(quiet=not processes.is_leader())
    processes.check_same_everywhere(_what_runs(config))
    with watch or Interrupts() as watch, warnings_as_lines(terminal), contextlib.ExitStack() as stack:
        figures = TensorBoard(path / paths.TENSORBOARD_FOLDER)
        tracking = stack.enter_context(Tracking(config, [figures, *trackers]))
        unused = without_effect(config)
        if unused:
            print_line(terminal, f"without effect: {', '.join(unused)}, which --method {config.method} makes no use of")
        new = processes.from_leader(lambda: not run_directory.holds_run(path))
        if new:
            processes.from_leader(lambda: run_directory.check_free(config))
            problem, data = prepare(config, executor)  # before anything is written
            hashed = _fingerprint(data)
            directory = stack.enter_context(run_directory.opened(config, new=True))
            processes.from_leader(lambda: directory.begin(hashed))
        else:
            processes.from_leader(lambda: run_directory.check_same_config(config))
            summary = processes.from_leader(lambda: run_directory.read_summary(path))
            if summary is not None:
                print_result(terminal, summary)
                reported = (path / paths.REPORT_FILE).exists() or not processes.is_leader()
                if write_report and config.report and not reported:
                    write_report(path)
                print_line(terminal, f"{path}: finished before, nothing was trained")
                return summary
            directory = stack.enter_context(run_directory.opened(config, new=False))
            problem, data = prepare(config, executor)
            hashed = _fingerprint(data)
            for name, (began, now) in processes.from_leader(lambda: directory.check_same_data(hashed)).items():
                print_line(
                    terminal, f"goes on with {name} {now}, began with {began}: figures may differ in the last digits"
                )
        summary = go_on(config, problem, data, directory, tracking, watch, terminal, new=new)
        directory.write_summary(summary)
        print_result(terminal, summary)
        if write_report and config.report and processes.is_leader():
            write_report(path)
        print_line(terminal, f"{path}: {', '.join(directory.files())}; {time.perf_counter() - started:.0f} s")
    return summary


def _what_runs(config: Config) -> dict[str, Any]:
    """What has to be the same in all processes of a run."""
    fields = config_file.to_json(config)
    libraries = {name: version for name, version in versions().items() if name != "cs_jax"}
    asked = {flag(name): value for name, value in fields.items() if name != "data_dir"}
    return {"cs_jax": processes.code_version(), **libraries, **asked}


def _fingerprint(data: Data) -> str:
    """That of the data, which all processes have to have."""
    found = fingerprint(data)
    processes.check_same_everywhere({"data": found})
    return found


def go_on(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    tracking: Observer,
    watch: Interrupts,
    terminal: Console,
    *,
    new: bool,
) -> dict[str, Any]:
    """What is left of the experiment; saved where a signal ends it."""
    folder = directory.path / paths.CHECKPOINTS_FOLDER
    health = Health(config, 0 if data.validation is None else len(data.validation))
    with (
        Checkpoints(config, problem, folder, directory.path / paths.METRICS_FILE) as checkpoints,
        watch.held(),
    ):
        progress = checkpoints.restore()
        processes.from_leader(lambda: directory.go_on_from(progress))
        if progress is not None:
            at_end = progress.epoch == config.epochs
            where = "its end" if at_end else f"epoch {progress.epoch}, step {progress.step}"
            print_line(terminal, f"goes on from {progress.phase_name()}, {where}")
        elif not new:
            print_line(terminal, "there is no checkpoint yet: begins from the start")
        try:
            total = config.epochs * (config.search_rounds + len(config.retrainings))
            done = 0 if progress is None else progress.epochs_done(config)
            with ProgressDisplay(terminal, total_epochs=total, epochs_done=done) as display:
                told = (directory, tracking, display, health) if processes.is_leader() else ()
                observers = Observers(*told, checkpoints, watch)
                return pipeline.run(config, problem, data, directory, observers, progress)
        except Stopped as stop:
            saved = checkpoints.save_latest()
            stop.hint = f"; saved: go on with --resume {directory.path}" if saved else "; nothing to save yet"
            raise
        except BrokenPipeError:  # nobody reads what is printed
            if not processes.are_several():  # a save is everybody's, and the others are elsewhere
                checkpoints.save_latest()
            raise
        except OSError as error:
            raise OSError(f"{error}; the same command goes on from the last checkpoint") from error
