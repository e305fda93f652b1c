"""Kills real runs at random moments, resumes them with the same command, and compares the results.

    python tests/helpers/kill_resume.py [--kills 25] [--signal KILL] [--seed 0] [-- train.py's words]

A run on handwritten digits is killed at moments of six kinds in turn: anywhere, in the search, at the reset between
rounds, at the rewind, in the ticket's retraining, and while a checkpoint is written. The same command then resumes the
run and finishes it. Its ticket.safetensors must equal, byte for byte, the ticket of a run that was not killed.
metrics.jsonl and scores.json must have equal content. Prints one line per kill; exits with 1 if any result differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cs_jax.commands.parser import parse
from cs_jax.experiment.storage.checkpoint_layout import PARTIAL
from cs_jax.experiment.storage.paths import CHECKPOINTS_FOLDER, METRICS_FILE, SCORES_FILE, TICKET_FILE

TRAIN = Path(__file__).parents[2] / "train.py"
EXIT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def command(folder: Path, words: list[str]) -> list[str]:
    return [sys.executable, str(TRAIN), *words, "--out", str(folder)]


def finish(folder: Path, words: list[str]) -> str:
    """Runs the command to its end; returns its output."""
    result = subprocess.run(command(folder, words), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"exit code {result.returncode}: {result.stderr}")
    return result.stdout


def outcome(folder: Path) -> tuple[bytes, list[Any], Any]:
    """Ticket bytes, metrics without times, and score histograms: equal for equal runs."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    metrics = [{**line, "seconds": None, "images_per_second": None} for line in lines]
    return (folder / TICKET_FILE).read_bytes(), metrics, json.loads((folder / SCORES_FILE).read_text())


def moments(words: list[str], seconds: float) -> dict[str, Callable[[Path, random.Random], float | None]]:
    """Moments by kind: a function that gives the seconds to wait before the kill, or None if it is too early."""
    settings = parse(words)
    search = settings.epochs * settings.search_rounds
    epoch = seconds / (search + settings.epochs * len(settings.retrainings))

    def after(lines: int, most: float) -> Callable[[Path, random.Random], float | None]:
        return lambda folder, rng: rng.uniform(0, most) if count(folder) >= lines else None

    return {
        "anywhere": lambda folder, rng: rng.uniform(0, seconds),
        "search": after(1, (search - 1) * epoch),
        "reset": after(settings.epochs, 0.1),
        "rewind": after(search, 0.1),
        "retraining": after(search + 1, (settings.epochs - 1) * epoch),
        "saving": lambda folder, rng: rng.uniform(0, 0.05) if rng.random() < 0.2 and is_saving(folder) else None,
    }


def count(folder: Path) -> int:
    path = folder / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_saving(folder: Path) -> bool:
    return any((folder / CHECKPOINTS_FOLDER).glob(f"*{PARTIAL}"))


def kill_at(
    folder: Path, words: list[str], due: Callable[[Path, random.Random], float | None], number: int, rng: random.Random
) -> float:
    """Starts the command and kills it; returns the seconds until it ended, or 0 if it ended before the kill."""
    process = subprocess.Popen(command(folder, words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        wait = due(folder, rng)
        if wait is not None:
            time.sleep(wait)
            break
        time.sleep(0.002)
    asked = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate()
    # A signal ends the process at once while libraries load, before the handlers are installed, and at exit.
    if process.returncode not in (0, EXIT_CODES[number], -number):
        raise RuntimeError(f"exit code {process.returncode}: {error}")
    return time.monotonic() - asked if process.returncode else 0.0


def main(kills: int, number: int, seed: int, words: list[str]) -> int:
    """Number of kills after which the result differs."""
    rng, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        started = time.monotonic()
        finish(Path(temporary) / "whole", words)
        seconds = time.monotonic() - started
        expected = outcome(Path(temporary) / "whole")
        print(f"without a kill: {seconds:.0f} s, {len(expected[1])} epochs", flush=True)
        kinds = moments(words, seconds)
        for index in range(kills):
            kind = list(kinds)[index % len(kinds)]
            folder = Path(temporary) / str(index)
            while not (took := kill_at(folder, words, kinds[kind], number, rng)):  # ended before: again
                shutil.rmtree(folder)
            epochs = count(folder)
            if rng.random() < 0.5:  # the resumed run is killed too
                kill_at(folder, words, kinds["anywhere"], number, rng)
            went_on = [line for line in finish(folder, words).splitlines() if line.startswith("resuming ")]
            parts = [a == b for a, b in zip(outcome(folder), expected, strict=True)]
            wrong += not all(parts)
            result = "same" if all(parts) else f"OTHER (ticket, metrics, scores: {parts})"
            how = f"killed after {epochs} epochs, in {took:.1f} s; {(went_on or ['began anew'])[0]}"
            print(f"{index + 1} {kind}: {how}: {result}", flush=True)
    print(f"{kills - wrong} of {kills} ended with the same bytes")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", default=["digits"], help="flags of train.py, after --")
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(given.kills, signal.Signals[f"SIG{given.signal}"], given.seed, given.words) > 0)
