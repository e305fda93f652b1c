"""A process that runs one run of a sweep after another, so that equal networks are compiled once.

It reads a line of JSON for each run on its standard input, and writes one for whatever happens on its standard
output. When its input ends, because the sweep ends or has died, it saves the run under way and leaves.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from rich.console import Console

from cs_jax import commands, compilation, console, run_directory, stored_config
from cs_jax.errors import ConfigError
from cs_jax.interrupts import Stopped
from cs_jax.lock import LockedError
from cs_jax.search import NonFiniteLossError
from cs_jax.tracking import Tracker

PATIENCE = 60.0
"""Seconds to wait for a worker of an earlier sweep, which may still be saving the same run."""


class Reporter(Tracker):
    """Tells the sweep of every epoch."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        say(self._answers, epoch=step + 1)


def say(answers: IO[str], **event: Any) -> None:
    answers.write(json.dumps(event) + "\n")
    answers.flush()


def main() -> int:
    """Runs what it is told to, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the sweep too, which then ends this
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the sweep
    compilation.keep_programs()
    say(answers, ready=True)
    for job in _jobs():
        say(answers, **_answer(job, answers))
    return 0


def _jobs() -> Iterator[dict[str, Any]]:
    """Lines of the input. At its end a run under way gets SIGTERM, which saves it."""
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


def _answer(job: Mapping[str, Any], answers: IO[str]) -> dict[str, Any]:
    """What came of a run: its result, or why there is none."""
    started = time.monotonic()
    settings = stored_config.from_json(job["config"])
    path = settings.run_directory
    with open(job["log"], "a") as log:
        terminal = Console(file=log, width=120)
        while True:
            had_begun = run_directory.holds_run(path)
            try:
                summary = commands.run(settings, trackers=[Reporter(answers)], terminal=terminal)
                return {"done": summary["ticket"]}
            except Stopped:
                sys.exit(0)
            except LockedError as error:
                if time.monotonic() > started + PATIENCE:
                    return {"failed": str(error)}
                time.sleep(0.5)
            except (ConfigError, NonFiniteLossError, OSError) as error:
                begun_meanwhile = run_directory.holds_run(path) and not had_begun and isinstance(error, ConfigError)
                if not begun_meanwhile:  # by a worker of an earlier sweep
                    failure = " ".join(str(error).split())
                    console.say(terminal, f"failed: {failure}")
                    return {"failed": failure}


if __name__ == "__main__":
    commands.leave(main())
