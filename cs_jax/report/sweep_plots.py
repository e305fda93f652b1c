"""Plots of a sweep: test accuracy against density, by method and control."""

import math
import statistics
from collections.abc import Sequence

from cs_jax.methods.controls import DENSE
from cs_jax.report import density_plots, plots
from cs_jax.report.density_plots import Band, Curves, Series
from cs_jax.report.pages import Plot, percent, plot
from cs_jax.report.sweep_cells import SweepResults, methods_of, tickets_of
from cs_jax.sweep.statistics import Cell, epoch_ratios

COLORS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE, plots.INK, plots.SKY, "#e69f00", "#882255")
CONTROL_DASHES = ("--", ":", "-.")
FEW_CONTROLS = 4  # maximum number of control curves in the plot of the methods; more curves get separate plots
LABEL = 22  # maximum number of characters of a method's name in a legend


def accuracy_plots(sweep: SweepResults) -> list[Plot]:
    """Plots of all tickets, and of the controls if they are few.

    A second plot with a smaller range of accuracies is added if outliers are far below the other accuracies.
    """
    controls = series([cell for cell in sweep.cells if cell.control not in (None, DENSE)], sweep)
    shown = controls if len(controls) <= FEW_CONTROLS else []
    curves = Curves([*series(tickets_of(sweep.cells), sweep), *shown], bands(sweep.cells))
    if not curves.series and not curves.bands:
        return []
    differ = epoch_ratios(sweep.cells, False)
    caveat = "; methods were trained for different numbers of epochs (see Cost)" if differ else ""
    drawn = [_plot("accuracy-density", "Test accuracy against density", curves, caveat=caveat)]
    floor = _floor(curves)
    if floor is not None:
        title = f"Test accuracy against density, above {percent(floor)}"
        drawn.append(_plot("accuracy-density-closer", title, curves, floor=floor, caveat=caveat))
    return drawn


def control_plots(sweep: SweepResults) -> list[Plot]:
    """A plot for each method with controls; empty if `accuracy_plots` shows the controls."""
    controls = [cell for cell in sweep.cells if cell.control not in (None, DENSE)]
    if len({(cell.method, cell.control) for cell in controls}) <= FEW_CONTROLS:
        return []
    drawn = []
    for number, method in enumerate(methods_of(controls)):
        group = [cell for cell in sweep.cells if cell.method == method and cell.control != DENSE]
        curves = Curves(series(group, sweep), bands(sweep.cells))
        drawn.append(_plot(f"controls-{number}", f"{method} and its controls", curves))
    return drawn


def series(cells: Sequence[Cell], sweep: SweepResults) -> list[Series]:
    """A curve for each method and control of `cells`; a method has the same colour and marker in all plots."""
    methods = methods_of(tickets_of(sweep.cells)) or methods_of(sweep.cells)
    controls = [*dict.fromkeys(cell.control for cell in sweep.cells if cell.control not in (None, DENSE))]
    groups: dict[tuple[str, str | None], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.density):
        groups.setdefault((cell.method, cell.control), []).append(cell)
    labels = dict(zip(methods, plots.short(methods, length=LABEL, kind="method"), strict=True))
    made = []
    for method, control in dict.fromkeys((cell.method, cell.control) for cell in cells):
        group, place = groups[method, control], methods.index(method) if method in methods else len(methods)
        label = labels.get(method, method)
        made.append(
            Series(
                label=f"{label}, {control}" if control else label,
                densities=[cell.density for cell in group],
                accuracies=[cell.accuracy for cell in group],
                deviations=[math.nan if cell.deviation is None else cell.deviation for cell in group],
                seeds=[
                    (result.density, result.test_accuracy)
                    for result in sweep.results
                    if (result.method, result.control) == (method, control)
                ],
                color=COLORS[place % len(COLORS)],
                marker=plots.MARKERS[place % len(plots.MARKERS)],
                dashes=CONTROL_DASHES[controls.index(control) % len(CONTROL_DASHES)] if control else "-",
                thin=control is not None,
            )
        )
    return made


def bands(cells: Sequence[Cell]) -> list[Band]:
    """Bands of the dense networks; methods with the same accuracy and deviation share a band."""
    found: dict[tuple[float, float], str] = {}
    for cell in cells:
        if cell.control == DENSE:
            found.setdefault((cell.accuracy, cell.deviation or 0.0), cell.method)
    alone = len(found) == 1
    names = plots.short([*found.values()], length=LABEL, kind="method")
    return [
        Band(DENSE if alone or name == DENSE else f"{DENSE}, {name}", *pair)
        for name, pair in zip(names, found, strict=True)
    ]


def _floor(curves: Curves) -> float | None:
    """Lower end of the y axis of a second plot without outliers; None if no second plot is necessary.

    Outliers are more than 1.5 interquartile ranges below the lower quartile.
    """
    accuracies = [accuracy for line in curves.series for accuracy in line.accuracies]
    if len(accuracies) < 8:
        return None
    quarter, _, three_quarters = statistics.quantiles(accuracies)
    usual = min(accuracy for accuracy in accuracies if accuracy >= quarter - 1.5 * (three_quarters - quarter))
    highest = max([*accuracies, *(band.accuracy for band in curves.bands)])
    floor = usual - 0.06 * (highest - usual)
    return floor if highest - min(accuracies) > 2 * (highest - floor) else None


def _plot(name: str, title: str, curves: Curves, *, floor: float | None = None, caveat: str = "") -> Plot:
    figure = density_plots.accuracy_by_density(curves, floor=floor)
    remark = f"up and to the left is better{caveat}"
    return plot(name, title, remark, f"{title}. {_describe(curves)}.", figure)


def _describe(curves: Curves) -> str:
    """Text with the values of all curves and bands, for the alternative text."""
    lines = []
    for line in curves.series:
        points = zip(line.densities, line.accuracies, strict=True)
        shown = ", ".join(f"{percent(accuracy)} at {percent(density)}" for density, accuracy in points)
        lines.append(f"{line.label}: {shown}")
    return "; ".join([*lines, *(f"{band.label}: {percent(band.accuracy)}" for band in curves.bands)])
