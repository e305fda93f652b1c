"""Results of a sweep as its report reads them: selections of cells, and their figures as text."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cs_jax.report.overlap_sections import shown_share
from cs_jax.report.pages import percent
from cs_jax.sweep.results import SweptTicket
from cs_jax.sweep.statistics import Cell, Result, shown_target, summarize

TIE = 1e-9  # means of equal accuracies, added in another order, may differ in the last digit


@dataclass(frozen=True)
class SweepResults:
    """Everything that the report of a sweep shows."""

    name: str
    results: Sequence[Result]  # one for each trained network
    missing: Sequence[str] = ()  # a line for each run that has not finished
    tickets: Sequence[SweptTicket] = ()  # for the overlap of masks
    reference: str = "imp"  # method that the other methods are compared with

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
    """Tickets of a target."""
    return [cell for cell in tickets_of(cells) if cell.target == target]


def most_accurate(tickets: Sequence[Cell]) -> list[Cell]:
    """The ticket with the highest accuracy; several tickets if they are equal."""
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
