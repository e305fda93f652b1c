"""Scheduler of a sweep: worker processes and the queue of runs."""

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cs_jax.core import files
from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import Lock
from cs_jax.experiment.storage import config_file
from cs_jax.sweep import storage
from cs_jax.sweep.devices import Device
from cs_jax.sweep.spec import PlannedRun, Spec

POLL_SECONDS = 0.5
"""Maximum seconds until a signal is noticed while workers send no events."""

MAX_RUNS_PER_PROGRAM = 8
"""Maximum number of runs in one program under `--tickets auto`.

A worker with an accelerator receives up to this number of compatible runs, and may return runs to the queue.
"""


class SweepObserver:
    """Callbacks for the progress of a sweep. Subclasses override those that they need."""

    def on_start(self, worker: int, run: PlannedRun) -> None:
        """A worker has started or resumed a run."""

    def on_requeue(self, worker: int, run: PlannedRun) -> None:
        """A worker has returned a run to the queue, because fewer runs in one program are faster."""

    def on_epoch(self, worker: int, run: PlannedRun, epoch: int) -> None:
        """A run has finished an epoch; `epoch` counts finished epochs over all phases."""

    def on_stop(self, running: int) -> None:
        """The sweep was interrupted and waits until `running` runs are saved."""

    def on_end(self, worker: int, run: PlannedRun, ticket: Mapping[str, Any] | None, failure: str) -> None:
        """A run has ended.

        Args:
            worker: number of the worker, from 0.
            run: the run.
            ticket: the "ticket" entry of summary.json; None if the run failed.
            failure: reason of the failure; "" if the run succeeded.
        """


def run_sweep(
    spec: Spec, directory: Path, devices: Sequence[Device], observer: SweepObserver, tickets: int | None = None
) -> dict[str, str]:
    """Runs the unfinished runs of a sweep.

    Args:
        spec: the grid of runs.
        directory: directory of the sweep; created if missing.
        devices: one device for each worker process.
        observer: receives the start, epochs and end of each run.
        tickets: maximum number of compatible runs that a worker trains in one program, at least 1. None lets each
            worker with an accelerator measure the faster number; on a CPU, None means 1.

    Returns:
        The reason of each failure, by run name.

    Raises:
        ConfigError: the directory belongs to another sweep, contains a damaged result, cannot be created, or is in use
            by another process.
        OSError: the directory cannot be written, or a worker cannot start.
        Stopped: on SIGINT or SIGTERM, after unfinished runs were saved.
    """
    storage.check_same_spec(directory, spec)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--out {directory}: cannot be created: {error.strerror}; choose another directory"
        raise ConfigError(message) from error
    with Lock(directory / storage.LOCK_FILE):
        storage.check_same_spec(directory, spec)  # again: another process may have started a sweep before the lock
        for run, _ in storage.changed_runs(directory, spec):  # only failed or unstarted runs can have changed
            shutil.rmtree(storage.folder_of(directory, run), ignore_errors=True)
            storage.record_failure(directory, run, "")
        files.write_whole(directory / storage.SPEC_FILE, (json.dumps(spec.content, indent=2) + "\n").encode())
        for folder in (storage.RUNS_FOLDER, storage.LOGS_FOLDER):
            (directory / folder).mkdir(exist_ok=True)
        queue: deque[PlannedRun] = deque()
        for run in spec.runs:
            if storage.is_done(directory, run):
                storage.delete_checkpoints(directory, run)  # the sweep may have been killed before this step
            else:
                queue.append(run)
        pool = _Pool(directory, queue, observer, tickets)
        try:
            for device in devices[: len(queue)]:
                pool.add(device)
            pool.run()
        finally:
            pool.close()
        return pool.failures


class _Pool:
    """Worker processes, and the queue of runs that are not assigned to a worker."""

    def __init__(self, directory: Path, queue: deque[PlannedRun], observer: SweepObserver, tickets: int | None) -> None:
        self.failures: dict[str, str] = {}
        self._directory, self._queue, self._observer, self._tickets = directory, queue, observer, tickets
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []  # kept alive for runs that another worker may return

    def add(self, device: Device) -> None:
        worker = _Worker(len(self._workers), device, self._directory)
        self._workers.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def run(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select(POLL_SECONDS):
                worker: _Worker = key.data
                if not worker.read_events(self._on_event):
                    self._selector.unregister(worker.output)
                    self._on_exit(worker)

    def close(self) -> None:
        """Stops all workers and waits until they have saved their unfinished runs."""
        running = sum(len(worker.runs) for worker in self._workers)
        if running:
            self._observer.on_stop(running)
        for worker in self._workers:
            worker.close_input()
        for worker in self._workers:
            worker.wait()
        self._selector.close()

    def _on_event(self, worker: "_Worker", event: dict[str, Any]) -> None:
        worker.may_return_runs = False
        for name in reversed(event.get("returned", ())):
            run = worker.runs.pop(name)
            self._queue.appendleft(run)
            self._observer.on_requeue(worker.number, run)
        if "epoch" in event:
            self._observer.on_epoch(worker.number, worker.runs[event["run"]], event["epoch"])
        elif "run" in event:
            run = worker.runs.pop(event["run"])
            self._end(worker, run, event.get("done"), event.get("failed", ""))
        if not worker.runs:
            self._assign(worker)
        self._assign_idle()

    def _assign_idle(self) -> None:
        idle, self._idle = self._idle, []
        for worker in idle:
            self._assign(worker)

    def _assign(self, worker: "_Worker") -> None:
        """Assigns runs to a worker, or stops the worker if the queue is empty and no worker can return a run."""
        if not self._queue:
            if any(other.may_return_runs for other in self._workers):
                self._idle.append(worker)
            else:
                worker.close_input()
            return
        runs = self._take_runs(worker)
        worker.runs = {run.name: run for run in runs}
        for run in runs:
            self._observer.on_start(worker.number, run)
        worker.send(runs, self._tickets)

    def _take_runs(self, worker: "_Worker") -> list[PlannedRun]:
        """The next run, and runs that can share a program with it; leaves runs for the other idle workers."""
        first = self._queue.popleft()
        idle = sum(not key.data.runs for key in self._selector.get_map().values())
        limit = self._tickets or (MAX_RUNS_PER_PROGRAM if worker.device.accelerator else 1)
        limit = min(limit, -(-(len(self._queue) + 1) // idle))
        program = config_file.of_program(first.config)
        compatible = [run for run in self._queue if config_file.of_program(run.config) == program][: limit - 1]
        for run in compatible:
            self._queue.remove(run)
        return [first, *compatible]

    def _end(self, worker: "_Worker", run: PlannedRun, ticket: Mapping[str, Any] | None, failure: str) -> None:
        if ticket is None:
            self.failures[run.name] = failure
        else:
            storage.delete_checkpoints(self._directory, run)
        storage.record_failure(self._directory, run, failure)
        self._observer.on_end(worker.number, run, ticket, failure)

    def _on_exit(self, worker: "_Worker") -> None:
        """Handles the end of a worker process. A worker that died during a run is replaced."""
        code = worker.wait()
        worker.may_return_runs = False
        if worker.runs:
            for run in worker.runs.values():
                self._end(worker, run, None, f"its process ended with exit code {code}; see {worker.log}")
            worker.runs = {}
            if self._queue:
                self.add(worker.device)
        elif not worker.has_started:
            raise OSError(f"a worker ended with exit code {code} before its first run; see {worker.log}")
        self._assign_idle()


class _Worker:
    """A worker process on one device: receives runs and sends events, as lines of JSON."""

    def __init__(self, number: int, device: Device, directory: Path) -> None:
        self.number, self.device, self._directory = number, device, directory
        self.runs: dict[str, PlannedRun] = {}  # runs assigned and not ended
        self.may_return_runs = False  # True until the worker has decided how many of its runs share a program
        self.has_started = False
        self.log = directory / storage.LOGS_FOLDER / f"worker{number}.txt"
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cs_jax.commands.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **device.environment},
                start_new_session=True,  # signals of the terminal reach the sweep only, which then saves all runs
            )
        if device.cores:
            os.sched_setaffinity(self._process.pid, device.cores)
        assert self._process.stdout is not None
        self.output = self._process.stdout
        self._incomplete = b""  # start of a line whose end has not arrived

    def send(self, runs: Sequence[PlannedRun], tickets: int | None) -> None:
        self.may_return_runs = len(runs) > 1
        job = {"runs": [self._to_json(run) for run in runs], "tickets": tickets}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has died; the end of its output shows that
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def _to_json(self, run: PlannedRun) -> dict[str, Any]:
        config = {**config_file.to_json(run.config), "out": str(storage.folder_of(self._directory, run))}
        log = self._directory / storage.LOGS_FOLDER / f"{run.name}.txt"
        return {"name": run.name, "config": config, "log": str(log)}

    def read_events(self, on_event: Callable[["_Worker", dict[str, Any]], None]) -> bool:
        """Calls `on_event` for each event that has arrived. Returns False at the end of the worker's output."""
        part = os.read(self.output.fileno(), 1 << 16)
        *lines, self._incomplete = (self._incomplete + part).split(b"\n")
        for line in lines:
            self.has_started = True
            on_event(self, json.loads(line))
        return bool(part)

    def close_input(self) -> None:
        """Closes the worker's input, so that the process saves its unfinished runs and ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has died without reading all input
            self._process.stdin.close()

    def wait(self) -> int:
        """Waits until the process has ended; returns its exit code."""
        code = self._process.wait()
        self.close_input()
        self.output.close()
        return code
