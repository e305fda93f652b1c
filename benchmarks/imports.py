"""Cost of `import cs_jax` beyond that of the libraries that it builds on.

    python benchmarks/imports.py [--repeats 7]

Fresh interpreters, in turn; medians and the median of the differences within each repeat.
"""

import dataclasses
import statistics
import subprocess
import sys
import time

import tyro
from rich.console import Console
from rich.table import Table

STATEMENTS = ("import flax.linen, optax", "import cs_jax")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    repeats: int = 7
    """Fresh interpreters for each statement, after one that is not counted."""


def main(settings: Settings) -> None:
    repeats = [[seconds(statement) for statement in STATEMENTS] for _ in range(settings.repeats + 1)][1:]
    base, ours = zip(*repeats, strict=True)
    table = Table("statement", "median s", "min s", title=f"Python {sys.version.split()[0]}, n={settings.repeats}")
    for statement, times in zip(STATEMENTS, (base, ours), strict=True):
        table.add_row(statement, f"{statistics.median(times):.2f}", f"{min(times):.2f}")
    table.add_row("difference", f"{statistics.median(b - a for a, b in repeats):.2f}", "")
    Console().print(table)


def seconds(statement: str) -> float:
    """Wall time of an interpreter that runs one statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
