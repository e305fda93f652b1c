"""A process that runs what a sweep tells it, one run after another or several at once, so that equal networks are
compiled once.

It reads a line of JSON for each run, or for several that can share a program, on its standard input, and writes one for
whatever happens on its standard output. When its input ends, because the sweep ends or has died, it saves what is under
way and leaves.
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


def send(answers: IO[str], **event: Any) -> None:
    answers.write(json.dumps(event) + "\n")
    answers.flush()


def main() -> int:
    """Runs what it is on_event to, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the sweep too, which then ends this
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the sweep
    compile_cache.keep_programs()
    send(answers, ready=True)

    def on_event(name: str, **event: Any) -> None:
        send(answers, run=name, **event)

    for job in _jobs():
        runs = [
            Job(run["name"], config_file.from_json(run["config"]), Path(run["log"]), write_report)
            for run in job["runs"]
        ]
        count, why = autotune.choose_run_count([run.config for run in runs], job["tickets"])
        if count < len(runs):
            send(answers, back=[run.name for run in runs[count:]])
        try:
            tickets.run_jobs(runs[:count], on_event, why)
        except Stopped:
            sys.exit(0)
    return 0


def _jobs() -> Iterator[dict[str, Any]]:
    """Lines of the input. At its end what is under way gets SIGTERM, which saves it."""
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
    busy, ended = threading.Event(), threading.Event()

    def listen() -> None:
        try:
            with open(0, "rb", buffering=0, closefd=False) as lines:  # sys.stdin's lock would outlast the interpreter
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
        if ended.is_set():  # after the job came: the listener may not have seen that this one is busy
            return
        yield job
        busy.clear()


if __name__ == "__main__":
    commands.exit_process(main())
