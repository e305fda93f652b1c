"""Plots of accuracy against density."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cs_jax.report.plots import GREY, new_axes, percent_tick


class Series(NamedTuple):
    """Mean accuracies over seeds of a method or control, by density."""

    label: str
    densities: Sequence[float]  # in [0, 1], increasing
    accuracies: Sequence[float]  # in [0, 1]
    deviations: Sequence[float]  # standard deviations over seeds; NaN for one seed
    seeds: Sequence[tuple[float, float]]  # density and accuracy of each single network
    color: str
    marker: str
    dashes: str = "-"
    thin: bool = False  # for controls: drawn under the methods, without error bars


class Band(NamedTuple):
    """Accuracy of a network without a place on the density axis, such as the dense network; drawn as a band."""

    label: str
    accuracy: float
    deviation: float  # 0 for one seed


@dataclass(frozen=True)
class Curves:
    """Curves and bands of one plot."""

    series: Sequence[Series]
    bands: Sequence[Band] = ()  # drawn across the full width


def accuracy_by_density(curves: Curves, *, floor: float | None = None) -> Figure:
    """Plot of accuracy against density, with error bars of one standard deviation, and dots for single networks.

    On a logarithmic axis, curves are shifted slightly, so that error bars at equal densities do not overlap. The
    density axis is logarithmic if all densities are above 0.

    Args:
        curves: series and bands; the legend lists all of them.
        floor: lower end of the y axis, an accuracy in [0, 1]; points below are not shown. None shows all points.
    """
    rows = -(-(len(curves.series) + len(curves.bands)) // 2)
    figure, axes = new_axes(3.9 + 0.22 * rows)
    densities = np.array([density for series in curves.series for density in series.densities])
    log = bool((densities > 0).all()) and densities.size > 0
    for series, shift in zip(curves.series, _shifts(curves.series, log), strict=True):
        _draw(axes, series, lambda density, shift=shift: np.asarray(density, float) * shift)
    for band, dashes in zip(curves.bands, itertools.cycle(["--", ":", "-."]), strict=False):
        axes.axhline(band.accuracy, color=GREY, linestyle=dashes, linewidth=1.4, label=band.label, zorder=1)
        low, high = max(0.0, band.accuracy - band.deviation), min(1.0, band.accuracy + band.deviation)
        axes.axhspan(low, high, color=GREY, alpha=0.13, linewidth=0, zorder=0)
    if log:
        _log_densities(axes, densities)
    bottom, top = axes.get_ylim()
    if floor is not None:
        bottom, top = floor, axes.dataLim.y1 + 0.06 * (axes.dataLim.y1 - floor)
    axes.set_ylim(bottom, min(top, 1 + 0.03 * (1 - bottom)))
    axes.xaxis.set_major_formatter(FuncFormatter(percent_tick))
    axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))
    axes.set_xlabel("density (share of weights kept)")
    axes.set_ylabel("test accuracy")
    handles = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, handlelength=2.8, columnspacing=1.4, fontsize=9.5
    )
    return figure


def _draw(axes: Axes, series: Series, place: Callable[[Any], np.ndarray]) -> None:
    look: dict[str, Any] = {"color": series.color, "marker": series.marker, "linestyle": series.dashes}
    if series.thin:
        axes.plot(
            place(series.densities), series.accuracies, **look, label=series.label,
            linewidth=1, markersize=4, markerfacecolor="white", markeredgewidth=0.8, zorder=2,
        )  # fmt: skip
        return
    if series.seeds:
        densities, accuracies = zip(*series.seeds, strict=True)
        axes.plot(place(densities), accuracies, "o", color=series.color, markersize=2.4, alpha=0.45, zorder=3)
    accuracies, deviations = np.asarray(series.accuracies), np.asarray(series.deviations)
    inside = [np.minimum(deviations, accuracies), np.minimum(deviations, 1 - accuracies)]  # accuracies stay in [0, 1]
    axes.errorbar(
        place(series.densities), accuracies, inside, fmt="none", ecolor=series.color,
        elinewidth=1.1, capsize=2.2, zorder=4,
    )  # fmt: skip
    axes.plot(
        place(series.densities), series.accuracies, **look, label=series.label,
        markersize=5.5 + 1.5 * (series.marker in "PX*"), markeredgecolor="white", markeredgewidth=0.4, zorder=5,
    )  # fmt: skip


def _shifts(series: Sequence[Series], log: bool) -> list[float]:
    """Factor for the densities of each series, so that markers at equal densities are next to each other."""
    side_by_side = [index for index, one in enumerate(series) if not one.thin]
    shifts = [1.0] * len(series)
    if not log or len(side_by_side) < 2:
        return shifts
    known = np.unique(np.round(np.log10([density for one in series for density in one.densities]), 1))
    nearest = float(np.diff(known).min()) if len(known) > 1 else 0.3
    width = min(0.009 * max(1.0, float(np.ptp(known))), 0.5 * nearest / (len(side_by_side) - 1))
    for place, index in enumerate(side_by_side):
        shifts[index] = 10 ** (width * (place - (len(side_by_side) - 1) / 2))
    return shifts


def _log_densities(axes: Axes, densities: np.ndarray) -> None:
    axes.set_xscale("log")
    low, high = float(densities.min()), float(densities.max())
    axes.set_xlim(low / 1.35, high * 1.35)
    decades = np.log10(high / low)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
