"""Worker process of a sweep: trains the runs in its input, and compiles equal networks once.

Each input line is a JSON object with one run, or with several runs that can share a program. Each output line is a JSON
object with an event. The input ends when the sweep has ended or died. Then the process saves its unfinished runs and
ends.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cs_jax import commands
from cs_jax.commands.report import write_report
from cs_jax.experiment.observers.interrupts import Stopped
from cs_jax.experiment.storage import config_file
from cs_jax.sweep import autotune, tickets
from cs_jax.sweep.tickets import Job
from cs_jax.training import compile_cache


def send(output: IO[str], **event: Any) -> None:
    output.write(json.dumps(event) + "\n")
    output.flush()


def main() -> int:
    """Trains runs until the input ends; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the sweep stops its workers
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with events
    compile_cache.keep_programs()
    send(output, ready=True)

    def on_event(name: str, **event: Any) -> None:
        send(output, run=name, **event)

    for job in _jobs():
        runs = [
            Job(run["name"], config_file.from_json(run["config"]), Path(run["log"]), write_report)
            for run in job["runs"]
        ]
        count, reason = autotune.choose_run_count([run.config for run in runs], job["tickets"])
        if count < len(runs):
            send(output, returned=[run.name for run in runs[count:]])
        try:
            tickets.run_jobs(runs[:count], on_event, reason)
        except Stopped:
            sys.exit(0)
    return 0


def _jobs() -> Iterator[dict[str, Any]]:
    """Parsed lines of the input. At the end of the input, the process gets SIGTERM, so that active runs are saved."""
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    busy, ended = threading.Event(), threading.Event()

    def listen() -> None:
        try:
            with open(0, "rb", buffering=0, closefd=False) as lines:  # sys.stdin's lock would block the exit
                for line in lines:
                    jobs.put(json.loads(line))
        finally:
            ended.set()
            jobs.put(None)
            if busy.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    while (job := jobs.get()) is not None:
        busy.set()
        if ended.is_set():  # checked after `busy` is set: the listener may have missed that this job started
            return
        yield job
        busy.clear()


if __name__ == "__main__":
    commands.exit_process(main())
