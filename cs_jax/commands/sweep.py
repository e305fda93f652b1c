"""The commands `sweep` and `pareto`."""

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
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
from cs_jax.sweep import scheduler
from cs_jax.sweep.devices import find_places
from cs_jax.sweep.display import NARROWEST, UNBOUNDED, SweepDisplay
from cs_jax.sweep.results import read_results, read_tickets
from cs_jax.sweep.spec import Spec, read_spec
from cs_jax.sweep.statistics import (
    ABSENT,
    LEVEL,
    RETRAINED,
    Cell,
    budgets,
    has_no_spread,
    is_reference,
    references,
    shown_epochs,
    shown_p,
    shown_target,
)

LISTED = 5  # runs that are not done; more are counted


def sweep(arguments: Sequence[str], *, prog: str) -> None:
    """run a grid of methods, densities and seeds that a file names, or go on with it"""
    parser = _sweep_parser(prog, sweep)
    parser.add_argument("--jobs", type=int, help="runs at a time (one for each GPU, or for each core without one)")
    parser.add_argument("--tickets", metavar="N", help="runs in one program, or auto: as measured to be faster (auto)")
    given = parser.parse_args(arguments)
    if given.jobs is not None and given.jobs < 1:
        raise ConfigError(f"--jobs: got {given.jobs}, wanted at least 1")
    tickets = command_line.read_tickets(given.tickets or "auto")
    spec, directory = _read_sweep(given)
    hint = f"the same command goes on: {_words('sweep', given)}"
    advice = "where trying again cannot help, correct the file: runs that have failed may have other settings"
    with Interrupts() as watch:
        failures = _run(spec, directory, given.jobs, tickets, Console(), watch, hint)
    if failures:
        name = next(iter(failures))
        log = directory / scheduler.LOGS_FOLDER / f"{name}.txt"
        raise OSError(f"{len(failures)} of {len(spec.runs)} runs failed, first {name}: see {log}; {hint}; {advice}")
    print_line(Console(), f"{directory}: all {len(spec.runs)} runs are done; {_words('pareto', given)} compares them")


def _run(
    spec: Spec,
    directory: Path,
    jobs: int | None,
    tickets: int | None,
    terminal: Console,
    watch: Interrupts,
    hint: str,
) -> dict[str, str]:
    """Runs a sweep, checked as a whole before anything is written; why runs have failed, by their names."""
    scheduler.check_same_spec(directory, spec)
    jax.config.update("jax_platforms", "cpu")  # the accelerators are the workers': to look is to take their memory
    check_all(run.config for run in spec.runs)
    waiting = [run for run in spec.runs if not scheduler.is_done(directory, run)]
    for line in spec.without_effect() if waiting else ():
        print_line(terminal, line)
    watch.check()  # a callback of a library may have lost what a signal raised
    with SweepDisplay(terminal, len(spec.runs), waiting) as display:
        try:
            places = find_places(jobs, len(waiting)) if waiting else []
            return scheduler.run_sweep(spec, directory, places, display, tickets)
        except Stopped as stop:
            stop.hint = f"; runs under way are saved; {hint}"
            raise


def pareto(arguments: Sequence[str], *, prog: str) -> None:
    """table and plot of accuracy against density over a sweep's runs"""
    from cs_jax import report as reports

    given = _sweep_parser(prog, pareto).parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # what is read needs no accelerator, and a sweep may be using it
    spec, directory = _read_sweep(given)
    results, missing = read_results(spec, directory)
    if not results:
        raise ConfigError(f"{directory}: has no finished run yet, wanted one at least: {_words('sweep', given)}")
    tickets = [*read_tickets(spec, directory)]
    written, cells = reports.write_pareto(
        spec.name, results, missing, directory, reference=spec.reference, tickets=tickets
    )
    terminal = Console()
    print_cells(terminal, cells)
    methods = [*dict.fromkeys(cell.method for cell in cells if cell.control is None and cell.target is not None)]
    if spec.reference not in spec.content["methods"] and len(methods) > 1:
        other = f'reference = "{methods[0]}" in {given.spec} chooses another'
        print_line(terminal, f"the sweep has no {spec.reference} to compare methods with: {other}")
    for line in missing[:LISTED]:
        print_line(terminal, f"not done: {line}")
    if len(missing) > LISTED:
        print_line(terminal, f"not done: {len(missing) - LISTED} more of {len(spec.runs)} runs")
    for path in written:
        print_line(terminal, str(path))


def _sweep_parser(prog: str, command: Callable[..., None]) -> argparse.ArgumentParser:
    parser = command_parser(prog, command)
    parser.add_argument("spec", type=Path, metavar="SPEC", help="TOML file: see docs/sweeps.md")
    parser.add_argument("--out", type=Path, help="folder of the sweep (sweeps/NAME, for a file NAME.toml)")
    return parser


def _read_sweep(given: argparse.Namespace) -> tuple[Spec, Path]:
    """The spec that was given, and the folder of its sweep."""
    spec = read_spec(given.spec)
    return spec, (given.out or Path("sweeps") / spec.name).expanduser()


def _words(command: str, given: argparse.Namespace) -> str:
    """The command, about the same sweep, as a shell takes it."""
    out = [] if given.out is None else ["--out", str(given.out)]
    return f"{MODULE} {command} {shlex.join([str(given.spec), *out])}"


def print_cells(console: Console, cells: Sequence[Cell]) -> None:
    """The table of a sweep, in percent, 80 columns wide with names of usual length: what is in its file, less costs and
    intervals; then what its words mean, and which networks were not trained for as long as what they stand beside.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("network", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "density", "test %", "epochs", "points", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        target = shown_target(cell.target, cell.dial, "{:.4g}".format)
        table.add_row(cell.method, cell.control or "ticket", target, str(cell.n), *_figures(cell, cells))
    _fit(table, console, max(len(cell.method) for cell in cells))
    console.print(table, crop=False)
    console.print()
    for line in _legend(cells):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _fit(table: Table, console: Console, longest: int) -> None:
    """Breaks names of methods where the console is too narrow. Beyond that the table is wider: nothing is cut off."""
    natural = console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum
    names = max(longest, NARROWEST)
    table.columns[0].width = max(NARROWEST, names - max(0, natural - console.width))
    table.width = natural - names + table.columns[0].width


def _figures(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    """Density, accuracy, epochs, difference and p of a row."""
    density = f"{cell.density:.2%}"
    if cell.density_deviation:
        density = f"{100 * cell.density:.2f}±{cell.density_deviation:.2%}"  # in few letters
    spread = "" if cell.deviation is None else f" ± {100 * cell.deviation:.2f}"
    figures = [density, f"{100 * cell.accuracy:.2f}{spread}", f"{cell.epochs:,.6g}"]
    if is_reference(cell, cells):
        return [*figures, "ref.", ""]
    points = ABSENT if cell.difference is None else f"{100 * cell.difference:+.2f}"
    mark = "*" if cell.p_adjusted is not None and cell.p_adjusted < LEVEL else ""
    return [*figures, points, "no spread" if has_no_spread(cell) else shown_p(cell.p_adjusted) + mark]


def _legend(cells: Sequence[Cell]) -> Iterator[str]:
    """What the words and signs of the table mean, of those that are in it."""
    beside = [f"beside {method} (ref.) at the same target" for method in references(cells)]
    if any(cell.beside and cell.control for cell in cells):
        beside.append("of a control, beside the ticket")
    yield "test %: accuracy; ± is the standard deviation of a sample. epochs: search and retraining."
    if not beside:
        return
    yield f"points: of test accuracy, {'; '.join(beside)}."
    alone = " no spread: all differences are the same." if any(map(has_no_spread, cells)) else ""
    yield f"p: of a paired t-test over two seeds at least, adjusted by Holm; * below {LEVEL:g}.{alone}"
    if budgets(cells, False):
        unequal = [cell for cell in cells if cell.control is None and "(" in shown_epochs(cell, cells)]
        told = dict.fromkeys(f"{cell.method} {shown_epochs(cell, cells)}" for cell in unequal)
        yield f"Not trained for as many epochs as what they stand beside: {', '.join(told)}."
    if budgets(cells, True):
        yield RETRAINED
