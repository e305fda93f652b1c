"""The commands `report` and `connect`."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from cs_jax.commands.parser import MODULE, command_parser
from cs_jax.core.errors import ConfigError
from cs_jax.data.load import fingerprint
from cs_jax.experiment import connectivity
from cs_jax.experiment.config import Config
from cs_jax.experiment.connectivity import CHILDREN, ends_highest
from cs_jax.experiment.observers.interrupts import Interrupts, Stopped
from cs_jax.experiment.observers.terminal import ProgressDisplay, print_line, warnings_as_lines
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.progress import Observers
from cs_jax.experiment.storage import paths, run_directory


def write_report(path: Path) -> list[Path]:
    """Writes the report of a run directory; returns the paths of its files."""
    from cs_jax import report as reports  # matplotlib loads for a while, and only a run's end wants it

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
            f"RUN {given.run} {given.others[0]}{more}: accepts one run directory; "
            f"to compare runs, use {MODULE} sweep SPEC and {MODULE} pareto SPEC"
        )
    for path in write_report(given.run):
        print_line(Console(), str(path))


def connect(arguments: Sequence[str], *, prog: str) -> None:
    """train a finished run's ticket twice, on other batches, and measure the line between the two"""
    parser = command_parser(prog, connect)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--points", type=int, default=11, help="networks on the line, with its two ends (11)")
    parser.add_argument("--seed", type=int, default=0, help="of the batches of the two trainings (0)")
    given = parser.parse_args(arguments)
    connectivity.check(points=given.points, seed=given.seed)
    settings, begun = connectivity.read_run(given.run)
    terminal, path = Console(), given.run / paths.CONNECTIVITY_FILE
    with (
        Interrupts() as watch,
        warnings_as_lines(terminal),
        run_directory.opened(settings, new=False) as directory,
    ):
        problem, data = prepare(settings)
        directory.check_same_data(fingerprint(data))
        try:
            with ProgressDisplay(for_display(settings), terminal) as display:
                observers = Observers(display, watch)
                found = connectivity.measure(
                    settings, problem, data.test, begun, observers, points=given.points, seed=given.seed
                )
        except Stopped as stop:
            stop.hint = "; nothing was written"
            raise
        with watch.held():  # a signal that comes now is too late
            connectivity.write(path, found)
            reported = (given.run / paths.REPORT_FILE).exists()
            written = write_report(given.run)[:1] if reported else []
    terminal.print(describe(found))
    for file in (path, *written):
        print_line(terminal, str(file))


def describe(found: Mapping[str, Any]) -> RenderableType:
    """What a person wants to know of what `measure` found, for rich to print: a table of the line, and the barrier."""
    table = Table("share", title="Between the children", box=box.SIMPLE_HEAD, title_justify="left")
    for header in ("test error", "test loss"):
        table.add_column(header, justify="right")
    for point in found["points"]:
        table.add_row(f"{point['share']:.2f}", f"{point['error']:.2%}", f"{point['loss']:.4f}")
    accuracies = " and ".join(f"{child['test_accuracy']:.2%}" for child in found["children"])
    children = f"children: right on {accuracies} of the test set"
    barrier = f"barrier: {100 * found['barrier']:.2f} points of error, {found['loss_barrier']:.4f} of loss"
    at_end = ends_highest(found["points"])
    barrier += at_end and f"; {at_end}"
    return Group(table, children, barrier)


@dataclass(frozen=True, kw_only=True)
class _TwoTrainings(Config):
    """A run's settings where `CHILDREN` are all that is trained, so that a display counts their epochs."""

    @property
    def search_rounds(self) -> int:
        return 0

    @property
    def retrainings(self) -> tuple[str, ...]:
        return CHILDREN


def for_display(config: Config) -> Config:
    """What a display counts the epochs of `measure` by; nothing is trained with it."""
    return _TwoTrainings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
