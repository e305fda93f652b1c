"""Results of a sweep for the report: selections of cells (means over seeds), and values as text."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cs_jax.report.overlap_sections import shown_share
from cs_jax.report.pages import percent
from cs_jax.sweep.results import SweptTicket
from cs_jax.sweep.statistics import Cell, Result, shown_target, summarize

TIE = 1e-9  # smaller differences of means are ties, because the order of additions changes the last digit


@dataclass(frozen=True)
class SweepResults:
    """Results, tickets and missing runs of a sweep."""

    name: str
    results: Sequence[Result]  # one for each trained network
    missing: Sequence[str] = ()  # a line for each run that has not finished
    tickets: Sequence[SweptTicket] = ()  # for mask overlap and layer densities
    reference: str = "imp"  # method with which the other methods are compared

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """Means over seeds, by method, control and target."""
        return summarize(self.results, reference=self.reference)


def tickets_of(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.control is None]


def methods_of(cells: Iterable[Cell]) -> list[str]:
    return [*dict.fromkeys(cell.method for cell in cells)]


def targets_of(cells: Iterable[Cell]) -> list[float]:
    """Targets of the tickets, largest first."""
    return sorted({cell.target for cell in tickets_of(cells) if cell.target is not None}, reverse=True)


def at_target(cells: Iterable[Cell], target: float) -> list[Cell]:
    """Tickets with a target."""
    return [cell for cell in tickets_of(cells) if cell.target == target]


def most_accurate(tickets: Sequence[Cell]) -> list[Cell]:
    """Tickets with the highest accuracy: usually one, more if tickets tie."""
    highest = max(cell.accuracy for cell in tickets)
    return [cell for cell in tickets if cell.accuracy > highest - TIE]


def show_target(cell: Cell) -> str:
    return shown_target(cell.target, cell.initial_score, shown_share)


def show_density(cell: Cell) -> str:
    return percent(cell.density) + (f" ± {percent(cell.density_deviation)}" if cell.density_deviation else "")


def show_accuracy(cell: Cell) -> str:
    return percent(cell.accuracy) + (f" ± {cell.deviation:.2%}" if cell.deviation is not None else "")


def counted(number: int, noun: str) -> str:
    """Number and noun, such as "1 run", "2 runs"."""
    return f"{number} {noun}{'s' * (number != 1)}"
