"""The commands `sweep` and `pareto`."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console

from cs_jax import experiment, flags
from cs_jax.console import say
from cs_jax.errors import ConfigError
from cs_jax.flags import MODULE, command_parser
from cs_jax.interrupts import Interrupts, Stopped
from cs_jax.sweep import scheduler
from cs_jax.sweep.display import SweepDisplay, print_cells
from cs_jax.sweep.places import find_places
from cs_jax.sweep.results import read_results, read_tickets
from cs_jax.sweep.spec import Spec, read_spec

LISTED = 5  # runs that are not done; more are counted


def sweep(arguments: Sequence[str], *, prog: str) -> None:
    """run a grid of methods, densities and seeds that a file names, or go on with it"""
    parser = _sweep_parser(prog, sweep)
    parser.add_argument("--jobs", type=int, help="runs at a time (one for each GPU, or for each core without one)")
    parser.add_argument("--tickets", metavar="N", help="runs in one program, or auto: as measured to be faster (auto)")
    given = parser.parse_args(arguments)
    if given.jobs is not None and given.jobs < 1:
        raise ConfigError(f"--jobs: got {given.jobs}, wanted at least 1")
    tickets = flags.read_tickets(given.tickets or "auto", auto=True)
    spec, directory = _read_sweep(given)
    hint = f"the same command goes on: {_words('sweep', given)}"
    advice = "where trying again cannot help, correct the file: runs that have failed may have other settings"
    with Interrupts() as watch:
        failures = _run(spec, directory, given.jobs, tickets, Console(), watch, hint)
    if failures:
        name = next(iter(failures))
        log = directory / scheduler.LOGS_FOLDER / f"{name}.txt"
        raise OSError(f"{len(failures)} of {len(spec.runs)} runs failed, first {name}: see {log}; {hint}; {advice}")
    say(Console(), f"{directory}: all {len(spec.runs)} runs are done; {_words('pareto', given)} compares them")


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
    scheduler.check_same(directory, spec)
    jax.config.update("jax_platforms", "cpu")  # the accelerators are the workers': to look is to take their memory
    experiment.check_all(run.config for run in spec.runs)
    waiting = [run for run in spec.runs if not scheduler.is_done(directory, run)]
    for line in spec.without_effect() if waiting else ():
        say(terminal, line)
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
        say(terminal, f"the sweep has no {spec.reference} to compare methods with: {other}")
    for line in missing[:LISTED]:
        say(terminal, f"not done: {line}")
    if len(missing) > LISTED:
        say(terminal, f"not done: {len(missing) - LISTED} more of {len(spec.runs)} runs")
    for path in written:
        say(terminal, str(path))


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
