"""Kills a real sweep at random moments, restarts it at once, and compares the results.

    python tests/helpers/kill_sweep.py [--kills 5] [--seed 0]

The sweep's process gets SIGKILL, SIGTERM and SIGINT in turn. The same command restarts the sweep at once, while workers
of the killed process may still be saving. After the last kill the sweep finishes. If a sweep finishes earlier, it is
compared and another sweep is started. Its tickets must equal, byte for byte, those of a sweep without kills, and its
table must be equal except for the seconds. Prints one line per kill, with the seconds until the last worker ended.
Exits with 1 if any result differs.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cs_jax.experiment.storage.paths import CHECKPOINTS_FOLDER, TICKET_FILE
from cs_jax.sweep.spec import read_spec
from cs_jax.sweep.storage import RUNS_FOLDER

SPEC = """
methods = ["cs", "imp", "random"]
densities = [0.1]
seeds = [0, 1]

[settings]
model = "lenet300100"
rounds = 2
epochs = 10
lr_schedule = [8]
lr_drops = [0.1]
max_train_examples = 640
checkpoint_seconds = 0.3

[method.cs]
controls = ["shuffled"]
"""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def command(name: str, spec: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "cs_jax", name, str(spec), "--out", str(folder)]


def start(spec: Path, folder: Path) -> subprocess.Popen[str]:
    words = [*command("sweep", spec, folder), "--jobs", "2"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {error}")


def outcome(spec: Path, folder: Path) -> tuple[dict[str, bytes], list[list[str]]]:
    """Tickets by run, and the table without its column of seconds: equal for equal sweeps."""
    subprocess.run(command("pareto", spec, folder), check=True, stdout=subprocess.DEVNULL)
    rows = [row.split("|") for row in (folder / "pareto.md").read_text().splitlines() if row.startswith("|")]
    seconds = [cell.strip() for cell in rows[0]].index("seconds")
    tickets = {run.name: (folder / RUNS_FOLDER / run.name / TICKET_FILE).read_bytes() for run in read_spec(spec).runs}
    return tickets, [row[:seconds] + row[seconds + 1 :] for row in rows]


def leftovers(folder: Path) -> list[str]:
    """Checkpoint folders; a finished sweep has none."""
    return [str(path) for path in folder.glob(f"{RUNS_FOLDER}/*/{CHECKPOINTS_FOLDER}")]


def children(process: int) -> list[int]:
    """Process ids of a process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = stat(int(path.parent.name))
        if fields and int(fields[1]) == process:
            found.append(int(path.parent.name))
    return found


def stat(process: int) -> list[str]:
    """State, parent and further fields of a process; empty if the process does not exist."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(process: int) -> bool:
    return stat(process)[:1] not in ([], ["Z"])


def kill(process: subprocess.Popen[str], number: signal.Signals) -> tuple[list[int], float]:
    """Kills a sweep; returns its workers' process ids and the time of the signal."""
    workers = children(process.pid)
    asked = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate()
    told = process.returncode == 128 + number and "interrupted" in error
    # Without an own message it ended before the kill, or was killed before its handlers were installed.
    if not told and process.returncode not in (0, -number):
        raise RuntimeError(f"exit code {process.returncode} after {number.name}: {error}")
    return workers, asked


def outlived(workers: list[int], asked: float) -> float:
    """Waits until all workers have ended; returns the seconds since the signal."""
    while any(map(is_alive, workers)):
        time.sleep(0.05)
    return time.monotonic() - asked


class Kills:
    """Remaining kills, and the longest time that workers lived after a kill.

    Args:
        number: of kills.
        rng: chooses the moments.
        seconds: that a sweep takes.
    """

    def __init__(self, number: int, rng: random.Random, seconds: float) -> None:
        self.left, self.longest = number, 0.0
        self._number, self._rng, self._seconds = number, rng, seconds

    def spend(self, spec: Path, folder: Path) -> None:
        """Kills and restarts a sweep until no kill is left or the sweep ends; then waits for its end."""
        process = start(spec, folder)
        while self.left:
            wait = self._rng.uniform(0, 0.8 * self._seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
                break  # the sweep ended before the kill
            number = SIGNALS[(self._number - self.left) % len(SIGNALS)]
            workers, asked = kill(process, number)
            process = start(spec, folder)
            after, self.left = outlived(workers, asked), self.left - 1
            self.longest = max(self.longest, after)
            done = len(list(folder.glob(f"{RUNS_FOLDER}/*/{TICKET_FILE}")))
            told = f"{len(workers)} processes below it were gone {after:.1f} s later, {done} tickets done"
            print(f"{self._number - self.left} {number.name} after {wait:.1f} s: {told}", flush=True)
        finish(process)


def main(kills: int, seed: int) -> int:
    """Number of sweeps whose results differ."""
    wrong = sweeps = 0
    with tempfile.TemporaryDirectory() as temporary:
        spec, whole = Path(temporary) / "sweep.toml", Path(temporary) / "whole"
        spec.write_text(SPEC)
        started = time.monotonic()
        finish(start(spec, whole))
        todo = Kills(kills, random.Random(seed), time.monotonic() - started)
        expected = outcome(spec, whole)
        print(f"without a kill: {time.monotonic() - started:.0f} s, {len(expected[0])} runs", flush=True)
        while todo.left:
            folder, sweeps = Path(temporary) / str(sweeps), sweeps + 1
            todo.spend(spec, folder)
            same = [ours == theirs for ours, theirs in zip(outcome(spec, folder), expected, strict=True)]
            same.append(not leftovers(folder))
            wrong += not all(same)
            print("same" if all(same) else f"OTHER (tickets, table, no checkpoints: {same})", flush=True)
    told = f"the last worker was gone within {todo.longest:.1f} s"
    print(f"{sweeps - wrong} of {sweeps} sweeps ended with the same bytes, after {kills} kills; {told}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(given.kills, given.seed) > 0)
