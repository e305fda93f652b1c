"""The commands `report` and `connect`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from cs_jax.commands.parser import MODULE, command_parser
from cs_jax.core.errors import ConfigError
from cs_jax.data.load import fingerprint
from cs_jax.experiment import connectivity
from cs_jax.experiment.connectivity import CHILDREN, Retraining, barrier_note
from cs_jax.experiment.observers.interrupts import Interrupts, Stopped
from cs_jax.experiment.observers.terminal import ProgressDisplay, print_line, warnings_as_lines
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.progress import Observers
from cs_jax.experiment.storage import paths, run_directory


def write_report(path: Path) -> list[Path]:
    """Writes the report of a run directory; returns the paths of the files."""
    from cs_jax import report as reports  # slow: imports matplotlib

    return reports.write_report(path)


def report(arguments: Sequence[str], *, prog: str) -> None:
    """write report.html and its plots into a run directory"""
    parser = command_parser(prog, report)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("others", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.others:
        more = " ..." * (len(given.others) > 1)
        raise ConfigError(
            f"RUN {given.run} {given.others[0]}{more}: must be one run directory; "
            f"to compare runs, use {MODULE} sweep SPEC and {MODULE} pareto SPEC"
        )
    for path in write_report(given.run):
        print_line(Console(), str(path))


def connect(arguments: Sequence[str], *, prog: str) -> None:
    """retrain a finished run's ticket twice with different batches; measure error and loss between the two networks"""
    parser = command_parser(prog, connect)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--points", type=int, default=11, help="points on the line, including both ends (default: 11)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the batches of the retrainings (default: 0)")
    given = parser.parse_args(arguments)
    connectivity.check(points=given.points, seed=given.seed)
    config, ticket = connectivity.read_run(given.run)
    terminal, path = Console(), given.run / paths.CONNECTIVITY_FILE
    with (
        Interrupts() as watch,
        warnings_as_lines(terminal),
        run_directory.open_run_directory(config, new=False) as directory,
    ):
        problem, data = prepare(config)
        directory.check_same_data(fingerprint(data))
        try:
            total = len(CHILDREN) * config.epochs
            with ProgressDisplay(terminal, total_epochs=total, labels=CHILDREN) as display:
                retraining = Retraining(config, problem, ticket, data.test)
                observers = Observers(display, watch)
                found = connectivity.measure(retraining, observers, points=given.points, seed=given.seed)
        except Stopped as stop:
            stop.hint = "; nothing was written"
            raise
        with watch.held():  # a signal must not interrupt the writing
            connectivity.write(path, found)
            reported = (given.run / paths.REPORT_FILE).exists()
            written = write_report(given.run)[:1] if reported else []
    terminal.print(describe(found))
    for file in (path, *written):
        print_line(terminal, str(file))


def describe(found: Mapping[str, Any]) -> RenderableType:
    """Table of the points on the line, and lines with accuracies and barriers, for printing with rich.

    Args:
        found: result of `connectivity.measure`.
    """
    title = "Line between the two retrained networks"
    table = Table("share of network 2", title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for header in ("test error", "test loss"):
        table.add_column(header, justify="right")
    for point in found["points"]:
        table.add_row(f"{point['share']:.2f}", f"{point['error']:.2%}", f"{point['loss']:.4f}")
    accuracies = " and ".join(f"{child['test_accuracy']:.2%}" for child in found["children"])
    children = f"test accuracy of the two networks: {accuracies}"
    barrier = f"barrier: error {100 * found['barrier']:.2f} percentage points, loss {found['loss_barrier']:.4f}"
    note = barrier_note(*([point[name] for point in found["points"]] for name in ("error", "loss")))
    barrier += note and f"; {note}"
    return Group(table, children, barrier)
