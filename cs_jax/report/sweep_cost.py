"""Section with the cost of a sweep's networks: epochs, training FLOPs and seconds."""

from collections.abc import Callable, Sequence

from cs_jax.report.pages import Section, Table
from cs_jax.report.sweep_cells import methods_of, show_target
from cs_jax.sweep.statistics import (
    CONTROL_EPOCHS_NOTE,
    Cell,
    counterpart,
    epoch_ratios,
    reference_methods,
    shown_epochs,
)

SECONDS = (
    "Seconds include all epochs and evaluations. For the first network of each kind in a process, they also include "
    "compilation, so the seconds of short runs are not comparable."
)
LONG_TABLE = 12  # rows; longer tables are folded


def cost(cells: Sequence[Cell]) -> Section | None:
    """Section with the cost by method and by network; None if there are no networks."""
    if not cells:
        return None
    section = Section("Cost", texts=[_budgets(cells), SECONDS])
    head = ("Method", "Epochs", "Training FLOPs", "Seconds")
    rows = [[method, *_ranges([cell for cell in cells if cell.method == method])] for method in methods_of(cells)]
    section.parts.append(Table("Cost of one network, minimum to maximum", head, rows, wide=True))
    head = ("Method", "Network", "Target", "Epochs", "Training FLOPs", "Seconds", "Compared with", "Ratio of FLOPs")
    rows = [_row(cell, cells) for cell in cells]
    folded = len(rows) > LONG_TABLE
    section.parts.append(Table("Cost of one network, mean over seeds", head, rows, words=3, wide=True, folded=folded))
    return section


def _budgets(cells: Sequence[Cell]) -> str:
    """Text that says whether compared networks were trained for the same number of epochs."""
    if not any(cell.compared_with for cell in cells):
        return "No networks are compared. Epochs: search and retraining together."
    ratios, controls = epoch_ratios(cells, False), epoch_ratios(cells, True)
    sentences = [CONTROL_EPOCHS_NOTE] if controls else []
    if ratios:
        shown = [f"{name} {_range(values, '{:.2f}'.format)}" for name, values in ratios.items()]
        sentences[:0] = [
            "Training budgets differ: a higher accuracy may come from longer training.",
            f"Ratio of epochs, search and retraining together: {'; '.join(shown)}.",
        ]
    elif reference_methods(cells) or not controls:
        kind = "methods" if controls else "networks"
        sentences.insert(
            0, f"All compared {kind} were trained for the same number of epochs, search and retraining together."
        )
    return " ".join(sentences)


def _ranges(cells: Sequence[Cell]) -> list[str]:
    return [
        _range([cell.epochs for cell in cells], "{:,.6g}".format),
        _range([cell.training_flops for cell in cells], "{:.3g}".format),
        _range([cell.seconds for cell in cells], "{:,.1f}".format),
    ]


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _row(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    other = counterpart(cell, cells)
    ratio = f"{cell.training_flops / other.training_flops:.2f}" if other and other.training_flops else "-"
    figures = [shown_epochs(cell, cells), f"{cell.training_flops:.3g}", f"{cell.seconds:,.1f}"]
    return [cell.method, cell.control or "ticket", show_target(cell), *figures, cell.compared_with or "-", ratio]
