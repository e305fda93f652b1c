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

from cs_jax import commands, compilation, several, stored_config, trial
from cs_jax.interrupts import Stopped
from cs_jax.several import Job


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

    def told(name: str, **event: Any) -> None:
        say(answers, run=name, **event)

    for job in _jobs():
        runs = [Job(run["name"], stored_config.from_json(run["config"]), Path(run["log"])) for run in job["runs"]]
        count, why = trial.how_many([run.settings for run in runs], job["tickets"])
        if count < len(runs):
            say(answers, back=[run.name for run in runs[count:]])
        try:
            several.take(runs[:count], told, why)
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
    commands.leave(main())
