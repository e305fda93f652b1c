"""The commands `sweep` and `pareto`."""

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from cs_jax.commands import parser as command_line
from cs_jax.commands.parser import MODULE, command_parser
from cs_jax.core.errors import ConfigError
from cs_jax.experiment.observers.interrupts import Interrupts, Stopped
from cs_jax.experiment.observers.terminal import print_line
from cs_jax.experiment.prepare import check_all
from cs_jax.sweep import scheduler, storage
from cs_jax.sweep.devices import find_devices
from cs_jax.sweep.display import SweepDisplay
from cs_jax.sweep.results import read_results, read_tickets
from cs_jax.sweep.spec import Spec, read_spec
from cs_jax.sweep.statistics import (
    ABSENT,
    CONTROL_EPOCHS_NOTE,
    LEVEL,
    Cell,
    epoch_ratios,
    has_no_spread,
    is_reference,
    reference_methods,
    shown_epochs,
    shown_p,
    shown_target,
)

LISTED = 5
"""Maximum number of unfinished runs that `pareto` lists by name; `pareto` prints the number of other runs."""

MIN_METHOD_WIDTH = 6
"""Minimum width of the column of method names, in characters, if the terminal is narrow."""

UNLIMITED_WIDTH = 10_000
"""Console width in characters, larger than any table."""


@dataclass(frozen=True)
class _Sweep:
    """The sweep on the command line."""

    spec: Spec
    directory: Path
    arguments: tuple[str, ...]  # SPEC and --out

    def command(self, name: str) -> str:
        """Command line of another command for the same sweep, quoted for a shell."""
        return f"{MODULE} {name} {shlex.join(self.arguments)}"


def sweep(arguments: Sequence[str], *, prog: str) -> None:
    """run or resume a sweep: a grid of methods, densities and seeds"""
    parser = _sweep_parser(prog, sweep)
    parser.add_argument("--jobs", type=int, help="worker processes (default: one per GPU; without a GPU, one per core)")
    parser.add_argument("--tickets", metavar="N", help="maximum runs in one program (default: auto)")
    given = parser.parse_args(arguments)
    if given.jobs is not None and given.jobs < 1:
        raise ConfigError(f"--jobs {given.jobs}: must be at least 1")
    tickets = command_line.read_tickets(given.tickets or "auto")
    swept = _read_sweep(given)
    total, resume = len(swept.spec.runs), f"resume with: {swept.command('sweep')}"
    with Interrupts() as watch:
        failures = _run(swept, given.jobs, tickets, watch)
    if failures:
        name = next(iter(failures))
        log = swept.directory / storage.LOGS_FOLDER / f"{name}.txt"
        advice = "if a retry cannot help, correct the settings of failed runs in the spec"
        raise OSError(f"{len(failures)} of {total} runs failed, first {name}: see {log}; {advice}; {resume}")
    print_line(Console(), f"{swept.directory}: all {total} runs finished; compare them with: {swept.command('pareto')}")


def _run(swept: _Sweep, jobs: int | None, tickets: int | None, watch: Interrupts) -> dict[str, str]:
    """Checks all settings and runs the unfinished runs of a sweep; returns the reasons of failures, by run name."""
    spec, directory, terminal = swept.spec, swept.directory, Console()
    storage.check_same_spec(directory, spec)
    jax.config.update("jax_platforms", "cpu")  # JAX in this process must not allocate accelerator memory
    check_all(run.config for run in spec.runs)
    waiting = [run for run in spec.runs if not storage.is_done(directory, run)]
    for line in spec.ignored_settings() if waiting else ():
        print_line(terminal, line)
    watch.check()  # a library may have caught the exception that a signal raised
    with SweepDisplay(terminal, len(spec.runs), waiting) as display:
        try:
            devices = find_devices(jobs, len(waiting)) if waiting else []
            return scheduler.run_sweep(spec, directory, devices, display, tickets)
        except Stopped as stop:
            stop.hint = f"; unfinished runs are saved; resume with: {swept.command('sweep')}"
            raise


def pareto(arguments: Sequence[str], *, prog: str) -> None:
    """compare the runs of a sweep: table and plots of accuracy against density"""
    from cs_jax import report as reports

    given = _sweep_parser(prog, pareto).parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # no accelerator is needed, and a sweep may be using one
    swept = _read_sweep(given)
    spec, directory = swept.spec, swept.directory
    results, missing = read_results(spec, directory)
    if not results:
        raise ConfigError(f"{directory}: no finished run; start the sweep with: {swept.command('sweep')}")
    tickets = [*read_tickets(spec, directory)]
    found = reports.SweepResults(spec.name, results, missing, tickets, spec.reference)
    written = reports.write_pareto(found, directory)
    terminal = Console()
    print_cells(terminal, found.cells)
    methods = [*dict.fromkeys(cell.method for cell in found.cells if cell.control is None and cell.target is not None)]
    if spec.reference not in spec.content["methods"] and len(methods) > 1:
        advice = f'set reference = "{methods[0]}" or another method in {given.spec}'
        print_line(terminal, f"methods are not compared: the sweep has no {spec.reference}; {advice}")
    for line in missing[:LISTED]:
        print_line(terminal, f"not finished: {line}")
    if len(missing) > LISTED:
        print_line(terminal, f"not finished: {len(missing) - LISTED} more of {len(spec.runs)} runs")
    for path in written:
        print_line(terminal, str(path))


def _sweep_parser(prog: str, command: Callable[..., None]) -> argparse.ArgumentParser:
    parser = command_parser(prog, command)
    parser.add_argument("spec", type=Path, metavar="SPEC", help="TOML file: see docs/experiments/sweeps.md")
    parser.add_argument("--out", type=Path, help="directory of the sweep (default: sweeps/NAME for a file NAME.toml)")
    return parser


def _read_sweep(given: argparse.Namespace) -> _Sweep:
    spec = read_spec(given.spec)
    directory = (given.out or Path("sweeps") / spec.name).expanduser()
    out = () if given.out is None else ("--out", str(given.out))
    return _Sweep(spec, directory, (str(given.spec), *out))


def print_cells(console: Console, cells: Sequence[Cell]) -> None:
    """Prints the results of a sweep as a table in percent, with a legend.

    The table has at most 80 columns unless methods have long names, and omits the costs and intervals of pareto.md. The
    legend lists compared networks with different numbers of epochs.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("network", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "density", "test %", "epochs", "points", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        target = shown_target(cell.target, cell.initial_score, "{:.4g}".format)
        table.add_row(cell.method, cell.control or "ticket", target, str(cell.n), *_figures(cell, cells))
    _fit(table, console, max(len(cell.method) for cell in cells))
    console.print(table, crop=False)
    console.print()
    for line in _legend(cells):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _fit(table: Table, console: Console, longest: int) -> None:
    """Sets column widths: on a narrow console, method names are folded; if necessary, the table exceeds the console."""
    natural = console.measure(table, options=console.options.update(max_width=UNLIMITED_WIDTH)).maximum
    names = max(longest, MIN_METHOD_WIDTH)
    table.columns[0].width = max(MIN_METHOD_WIDTH, names - max(0, natural - console.width))
    table.width = natural - names + table.columns[0].width


def _figures(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    """Texts of density, accuracy, epochs, difference and p in a row."""
    density = f"{cell.density:.2%}"
    if cell.density_deviation:
        density = f"{100 * cell.density:.2f}±{cell.density_deviation:.2%}"  # no spaces: the column is narrow
    deviation = "" if cell.deviation is None else f" ± {100 * cell.deviation:.2f}"
    figures = [density, f"{100 * cell.accuracy:.2f}{deviation}", f"{cell.epochs:,.6g}"]
    if is_reference(cell, cells):
        return [*figures, "ref.", ""]
    points = ABSENT if cell.difference is None else f"{100 * cell.difference:+.2f}"
    mark = "*" if cell.p_adjusted is not None and cell.p_adjusted < LEVEL else ""
    return [*figures, points, "no spread" if has_no_spread(cell) else shown_p(cell.p_adjusted) + mark]


def _legend(cells: Sequence[Cell]) -> Iterator[str]:
    """Lines below the table: the meaning of the columns, and differences in epochs."""
    compared = [f"vs {method} (ref.) at the same target" for method in reference_methods(cells)]
    if any(cell.compared_with and cell.control for cell in cells):
        compared.append("of a control, vs its ticket")
    yield "test %: accuracy ± sample standard deviation. epochs: search and retraining together."
    if not compared:
        return
    yield f"points: difference in test accuracy {'; '.join(compared)}."
    no_spread = " no spread: all differences are equal." if any(map(has_no_spread, cells)) else ""
    yield f"p: paired t-test over at least two seeds, adjusted by Holm's method; * below {LEVEL:g}.{no_spread}"
    if epoch_ratios(cells, False):
        unequal = [cell for cell in cells if cell.control is None and "(" in shown_epochs(cell, cells)]
        names = dict.fromkeys(f"{cell.method} {shown_epochs(cell, cells)}" for cell in unequal)
        yield f"Trained for different numbers of epochs: {', '.join(names)}."
    if epoch_ratios(cells, True):
        yield CONTROL_EPOCHS_NOTE
