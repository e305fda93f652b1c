"""Import time of `cs_jax` beyond the import time of the libraries that it uses.

    python benchmarks/imports.py [--repeats 7]

Each statement runs in a new interpreter, in turns. Prints medians, and the median over repeats of the difference.
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
    """New interpreters per statement, after one warm-up."""

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
    """Wall time of an interpreter that runs one statement, start and exit included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    start(main, Settings, __doc__)
