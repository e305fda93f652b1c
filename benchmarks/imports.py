"""Import time of `cs_jax`, and its difference from the import time of Flax and optax.

    python benchmarks/imports.py [--repeats 7]

Each statement runs in a new interpreter; the statements are interleaved. Prints medians over repeats. The difference is
the median of the differences within each repeat.
"""

import dataclasses
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table
from timing import check_positive, start

STATEMENTS = ("import flax.linen, optax", "import cs_jax")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    repeats: int = 7
    """Timed runs of each statement, after one warm-up run."""

    def __post_init__(self) -> None:
        check_positive(self, "repeats")


def main(settings: Settings) -> None:
    repeats = [[seconds(statement) for statement in STATEMENTS] for _ in range(settings.repeats + 1)][1:]
    base, ours = zip(*repeats, strict=True)
    table = Table("statement", "median s", "min s", title=f"Python {sys.version.split()[0]}, n={settings.repeats}")
    for statement, times in zip(STATEMENTS, (base, ours), strict=True):
        table.add_row(statement, f"{statistics.median(times):.2f}", f"{min(times):.2f}")
    table.add_row("difference", f"{statistics.median(b - a for a, b in repeats):.2f}", "")
    Console().print(table)


def seconds(statement: str) -> float:
    """Wall time of an interpreter that runs one statement, including its start and exit."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    start(main, Settings, __doc__)
