"""Runs of a sweep, on as many devices or cores as there are, each with a process that runs one or several at a time."""

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cs_jax.core import files
from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import Lock
from cs_jax.experiment.storage import config_file, paths, run_directory
from cs_jax.sweep.spec import PlannedRun, Spec, make_spec

SPEC_FILE = "sweep.json"
RUNS_FOLDER = "runs"
LOGS_FOLDER = "logs"
LOCK_FILE = "sweep.lock"
FAILURES_FILE = "failures.json"
"""Names of runs that have failed and not been done since, with the reason."""

CHECK_SECONDS = 0.5
"""After which signals are looked for at the latest."""

MAX_RUNS_PER_PROGRAM = 8
"""Compatible runs that a worker with an accelerator is given where nobody says how many; it may give some back."""


class Device(NamedTuple):
    """Where a worker computes."""

    cores: tuple[int, ...]  # that it keeps to; none is all
    environment: dict[str, str]  # in which it sees its own device
    accelerator: bool = False  # which may be faster with several runs in one program


class SweepObserver:
    """What wants to know how a sweep goes on. Every method may be left out."""

    def on_start(self, worker: int, run: PlannedRun) -> None:
        """A worker has begun with a run, or goes on with it."""

    def on_requeue(self, worker: int, run: PlannedRun) -> None:
        """A worker, which is faster with fewer at once, has given a run back, which waits for another start."""

    def on_epoch(self, worker: int, run: PlannedRun, epoch: int) -> None:
        """So many epochs of a run are done, over all its phases."""

    def on_stop(self, running: int) -> None:
        """The sweep ends before its time, and waits until so many runs under way are saved."""

    def on_end(self, worker: int, run: PlannedRun, ticket: Mapping[str, Any] | None, failure: str) -> None:
        """A run has ended: with a ticket, as summary.json has it, or with a failure."""


def folder_of(directory: Path, run: PlannedRun) -> Path:
    """A run's own directory inside that of the sweep."""
    return directory / RUNS_FOLDER / run.name


def is_done(directory: Path, run: PlannedRun) -> bool:
    """Whether a run has its result.

    Raises:
        ConfigError: it has one, which is damaged.
    """
    return run_directory.read_summary(folder_of(directory, run)) is not None


def check_same_spec(directory: Path, spec: Spec) -> None:
    """Refuses a directory that holds another sweep. One that holds a part of this sweep may be gone on with.

    Runs that have failed, or not begun, may have other settings now, or be gone from the spec.

    Raises:
        ConfigError: another run there has other settings, or none in this spec; says which.
    """
    path = directory / SPEC_FILE
    if not path.exists():
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"--out: got {directory}, which is a file, wanted a folder")
        if directory.exists() and not all(map(_is_left_over, directory.iterdir())):
            raise ConfigError(f"--out: got {directory}, which is not empty and holds no sweep, wanted another folder")
        return
    failures = read_failures(directory)
    for run, difference in _changed_runs(directory, spec):
        if run.name not in failures and run_directory.holds_run(folder_of(directory, run)):
            raise ConfigError(f"{directory}: holds another sweep: {run.name} {difference}; give another --out")


def _changed_runs(directory: Path, spec: Spec) -> Iterator[tuple[PlannedRun, str]]:
    """Runs that a sweep was begun with and this spec has not, or has otherwise, with the difference in words."""
    path = directory / SPEC_FILE
    if not path.exists():
        return
    try:
        begun = make_spec(spec.name, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be used: {' '.join(str(error).split())}") from error
    planned = {run.name: run.config for run in spec.runs}
    for run in begun.runs:
        if run.name not in planned:
            yield run, "is not in this one"
            continue
        before, now = (config_file.to_json(config) for config in (run.config, planned[run.name]))
        differences = config_file.differences(before, now)
        if differences:
            yield run, f"has {differences}"


def read_failures(directory: Path) -> dict[str, str]:
    """Why runs have failed, by their names; empty where that cannot be read."""
    try:
        found = json.loads((directory / FAILURES_FILE).read_text())
        return {str(name): str(reason) for name, reason in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _note_failure(directory: Path, run: PlannedRun, reason: str) -> None:
    """Keeps on disk why a run has failed, or, with "", that it has not."""
    noted = read_failures(directory)
    left = {name: said for name, said in {**noted, run.name: reason}.items() if said}
    if left != noted:
        files.write_whole(directory / FAILURES_FILE, (json.dumps(left, indent=2) + "\n").encode())


def _is_left_over(path: Path) -> bool:
    """Whether a sweep that was killed, or is about, before its spec was there can have made this."""
    return path.name == LOCK_FILE or files.is_temporary(path)


def run_sweep(
    spec: Spec, directory: Path, places: Sequence[Device], watcher: SweepObserver, tickets: int | None = None
) -> dict[str, str]:
    """Runs what is not done yet of a sweep, and returns what failed, with the reason.

    Args:
        spec: the grid.
        directory: for the whole sweep; made where there is none.
        places: one for each worker.
        watcher: told of runs and epochs.
        tickets: compatible runs that a worker takes at once, at most; None is what it finds to be faster.

    Raises:
        ConfigError: the directory holds another sweep, a damaged result, or another process runs it.
        OSError: it cannot be written.
        Whatever a signal raises: runs under way are saved before.
    """
    check_same_spec(directory, spec)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: got {directory}, which cannot be made: {error.strerror}") from error
    with Lock(directory / LOCK_FILE):
        check_same_spec(directory, spec)  # again: another process may have begun one meanwhile
        for run, _ in _changed_runs(directory, spec):  # that have failed as they were
            shutil.rmtree(folder_of(directory, run), ignore_errors=True)
            _note_failure(directory, run, "")
        files.write_whole(directory / SPEC_FILE, (json.dumps(spec.content, indent=2) + "\n").encode())
        for folder in (RUNS_FOLDER, LOGS_FOLDER):
            (directory / folder).mkdir(exist_ok=True)
        waiting: deque[PlannedRun] = deque()
        for run in spec.runs:
            if is_done(directory, run):
                _forget_checkpoints(directory, run)  # a sweep that was killed may not have come to it
            else:
                waiting.append(run)
        pool = _Pool(directory, waiting, watcher, tickets)
        try:
            for place in places[: len(waiting)]:
                pool.add(place)
            pool.run()
        finally:
            pool.close()
        return pool.failures


def _forget_checkpoints(directory: Path, run: PlannedRun) -> None:
    """Of a run that is done: nothing is left to go on from."""
    shutil.rmtree(folder_of(directory, run) / paths.CHECKPOINTS_FOLDER, ignore_errors=True)


class _Pool:
    """Workers, and the runs that they are at."""

    def __init__(
        self, directory: Path, waiting: deque[PlannedRun], watcher: SweepObserver, tickets: int | None
    ) -> None:
        self.failures: dict[str, str] = {}
        self._directory, self._waiting, self._watcher, self._tickets = directory, waiting, watcher, tickets
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []  # that wait for what another may give back

    def add(self, place: Device) -> None:
        worker = _Worker(len(self._workers), place, self._directory)
        self._workers.append(worker)
        self._selector.register(worker.answers, selectors.EVENT_READ, worker)

    def run(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select(CHECK_SECONDS):
                worker: _Worker = key.data
                if not worker.read(self._hear):
                    self._selector.unregister(worker.answers)
                    self._replace(worker)

    def close(self) -> None:
        """Ends all workers; what they are at is saved first."""
        running = sum(len(worker.runs) for worker in self._workers)
        if running:
            self._watcher.on_stop(running)
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.wait()
        self._selector.close()

    def _hear(self, worker: "_Worker", event: dict[str, Any]) -> None:
        worker.may_give_back = False
        for name in reversed(event.get("back", ())):
            run = worker.runs.pop(name)
            self._waiting.appendleft(run)
            self._watcher.on_requeue(worker.number, run)
        if "epoch" in event:
            self._watcher.on_epoch(worker.number, worker.runs[event["run"]], event["epoch"])
        elif "run" in event:
            run = worker.runs.pop(event["run"])
            self._end(worker, run, event.get("done"), event.get("failed", ""))
        if not worker.runs:
            self._give(worker)
        self._give_idle()

    def _give_idle(self) -> None:
        idle, self._idle = self._idle, []
        for worker in idle:
            self._give(worker)

    def _give(self, worker: "_Worker") -> None:
        """Gives a worker the next runs, or lets it leave where there are none and none can come back."""
        if not self._waiting:
            if any(other.may_give_back for other in self._workers):
                self._idle.append(worker)
            else:
                worker.dismiss()
            return
        runs = self._next(worker)
        worker.runs = {run.name: run for run in runs}
        for run in runs:
            self._watcher.on_start(worker.number, run)
        worker.give(runs, self._tickets)

    def _next(self, worker: "_Worker") -> list[PlannedRun]:
        """The next run, and those that can be in a program with it, but not those that would leave others idle."""
        first = self._waiting.popleft()
        idle = sum(not key.data.runs for key in self._selector.get_map().values())
        most = self._tickets or (MAX_RUNS_PER_PROGRAM if worker.place.accelerator else 1)
        most = min(most, -(-(len(self._waiting) + 1) // idle))
        program = config_file.of_program(first.config)
        alike = [run for run in self._waiting if config_file.of_program(run.config) == program][: most - 1]
        for run in alike:
            self._waiting.remove(run)
        return [first, *alike]

    def _end(self, worker: "_Worker", run: PlannedRun, ticket: Mapping[str, Any] | None, failure: str) -> None:
        if ticket is None:
            self.failures[run.name] = failure
        else:
            _forget_checkpoints(self._directory, run)
        _note_failure(self._directory, run, failure)
        self._watcher.on_end(worker.number, run, ticket, failure)

    def _replace(self, worker: "_Worker") -> None:
        """Takes note of a worker that has ended; one that died while it ran something gets a successor."""
        code = worker.wait()
        worker.may_give_back = False
        if worker.runs:
            for run in worker.runs.values():
                self._end(worker, run, None, f"its process ended with exit code {code}; see {worker.log}")
            worker.runs = {}
            if self._waiting:
                self.add(worker.place)
        elif not worker.has_answered:
            raise OSError(f"a worker ended with exit code {code} before its first run; see {worker.log}")
        self._give_idle()


class _Worker:
    """A process that computes in a place of its own."""

    def __init__(self, number: int, place: Device, directory: Path) -> None:
        self.number, self.place, self._directory = number, place, directory
        self.runs: dict[str, PlannedRun] = {}  # that it is at
        self.may_give_back = False  # it has runs of which it has not said how many it takes at once
        self.has_answered = False
        self.log = directory / LOGS_FOLDER / f"worker{number}.txt"
        words = [sys.executable, "-m", "cs_jax.commands.worker"]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **place.environment},
                start_new_session=True,  # a signal of the terminal is for the sweep, which lets runs be saved
            )
        if place.cores:
            os.sched_setaffinity(self._process.pid, place.cores)
        assert self._process.stdout is not None
        self.answers = self._process.stdout
        self._rest = b""

    def give(self, runs: Sequence[PlannedRun], tickets: int | None) -> None:
        self.may_give_back = len(runs) > 1
        job = {"runs": [self._described(run) for run in runs], "tickets": tickets}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, which the end of its answers tells
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def _described(self, run: PlannedRun) -> dict[str, Any]:
        settings = {**config_file.to_json(run.config), "out": str(folder_of(self._directory, run))}
        return {"name": run.name, "config": settings, "log": str(self._directory / LOGS_FOLDER / f"{run.name}.txt")}

    def read(self, hear: Callable[["_Worker", dict[str, Any]], None]) -> bool:
        """Passes on what it has said; whether it may say more."""
        part = os.read(self.answers.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            self.has_answered = True
            hear(self, json.loads(line))
        return bool(part)

    def dismiss(self) -> None:
        """Lets it leave, after saving what it is at."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it was to do and, dead by then, has not read
            self._process.stdin.close()

    def wait(self) -> int:
        """Its exit code, once it has left."""
        code = self._process.wait()
        self.dismiss()
        self.answers.close()
        return code
