"""Plots with matplotlib, without windows or files. Draw and render inside `style()`, which restores global settings.

Colours are from the palette of Okabe and Ito, which is safe for colour-blind readers.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

BLUE, SKY, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#6b7280"

WIDTH = 5.6  # inches: text of 10.5 pt stays readable on the screen of a phone
MARKERS = "os^DvPX*"
LEGEND_COLUMNS = 4  # enough width for names of the length of "soft masks"
MANY_LAYERS = 40  # with more layers, bars are thin and labels are omitted at regular intervals
SOFT, INK, LINE = "#e5e7eb", "#1f2933", "#9aa5b1"

_KEPT = ("backend", "backend_fallback")  # the user may have a window open
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "grid.color": SOFT,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "cs_jax",  # equal plots give equal files
    "text.color": INK,
    "text.parse_math": False,  # names may contain "$"
    "xtick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
}


class Line(NamedTuple):
    """Curve; NaN where there is no value."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = BLUE
    dashes: str = "-"


@dataclass(frozen=True)
class YAxis:
    """Label and scale of a y axis."""

    label: str
    percent: bool = False  # values are shares in [0, 1], shown in percent
    log: bool = False  # logarithmic scale
    from_zero: bool = False  # starts at 0


class Span(NamedTuple):
    """Named part of the x axis, such as the epochs of a round."""

    label: str
    start: float
    end: float


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Context manager with the matplotlib settings of reports; restores the settings of the user at the end."""
    with matplotlib.rc_context():
        values: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
        matplotlib.rcParams.update({name: value for name, value in values.items() if name not in _KEPT})
        yield


def images(figure: Figure) -> tuple[bytes, bytes]:
    """A figure as SVG without embedded fonts, and as PNG with 150 dots per inch."""
    svg, png = io.BytesIO(), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    figure.set_layout_engine("none")  # keeps the layout of the SVG; a new layout takes the time of a drawing
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def short(names: Sequence[str], *, length: int = 24, kind: str = "class") -> list[str]:
    """Names as labels of one line; the start of a name longer than `length` characters is cut off.

    A name that the font cannot draw becomes `kind` and its index.
    """
    drawable = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    labels = [" ".join(name.split()) for name in names]
    return [
        f"{kind} {number}"
        if not label or not all(ord(letter) in drawable for letter in label)
        else label
        if len(label) <= length
        else "…" + label[1 - length :]
        for number, label in enumerate(labels)
    ]


def curves(lines: Sequence[Line], y_axis: YAxis, spans: Sequence[Span] = ()) -> Figure:
    """Plot of curves over epochs.

    Args:
        lines: curves; the plot has a legend if there are two or more.
        y_axis: label and scale.
        spans: named parts of the x axis, separated by vertical lines.
    """
    columns = min(len(lines), LEGEND_COLUMNS)
    rows = -(-len(lines) // max(1, columns))
    figure, axes = new_axes(3.3 + 0.2 * (rows - 1))
    for line in lines:
        marker = "o" if np.isfinite(np.asarray(line.y, float)).sum() <= 20 else ""
        axes.plot(line.x, line.y, line.dashes, color=line.color, label=line.label, marker=marker, markersize=3.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(y_axis.label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if y_axis.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))
        axes.margins(y=0.08)
    if y_axis.from_zero:
        axes.set_ylim(bottom=0)
    if y_axis.log:
        _log_scale(axes, percent=y_axis.percent)
    mark_spans(axes, spans)
    if spans:  # the same x range in all plots of a run
        axes.set_xlim(spans[0].start - 0.5, spans[-1].end + 0.5)
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=columns, handlelength=1.8)
    return figure


def histogram(
    edges: np.ndarray, before: np.ndarray, after: np.ndarray | None, shown: tuple[int, int], *, cut: bool
) -> Figure:
    """Histogram of scores before and after a round.

    Args:
        edges: edges of the bins, shape (bins + 1,), increasing; all bins are drawn with the same width.
        before: counts of shape (bins,).
        after: counts of shape (bins,); None if the round has not finished.
        shown: first and last bin on the x axis.
        cut: True if the method keeps the weights with scores above 0; kept and pruned weights have different colours.
    """
    figure, axes = new_axes(2.9)
    places = np.arange(len(edges))
    if after is not None and not cut:
        axes.stairs(after, places, fill=True, color=BLUE, label="after")
    elif after is not None:
        for kept, color, label in ((False, ORANGE, "after: pruned"), (True, BLUE, "after: kept")):
            counts = np.where((edges[1:] > 0) == kept, after, 0)
            axes.stairs(counts, places, fill=True, color=color, label=f"{label} ({counts.sum():,})")
    axes.stairs(before, places, color=INK, linewidth=1.2, label="before")
    zero = np.interp(0.0, edges, places)
    if cut:
        axes.axvline(zero, color=INK, linestyle=":", linewidth=1)
    most = max(before.max(initial=1), 1 if after is None else after.max(initial=1))
    _log_scale(axes)
    axes.set_ylim(0.7, most * 2)
    first, last = shown
    axes.set_xlim(min(first, zero) - 1, max(last + 1, zero) + 1)
    ticks = _score_ticks(edges, axes.get_xlim())
    axes.set_xticks(np.interp(ticks, edges, places), [f"{tick:g}".replace("-", "−") for tick in ticks])
    axes.set_xlabel("score (logarithmic scale on both sides of 0)")
    axes.set_ylabel("number of weights")
    figure.legend(loc="outside lower center", ncols=3, handlelength=1.2, columnspacing=1.2, fontsize=9.5)
    return figure


def _score_ticks(edges: np.ndarray, limits: tuple[float, float]) -> list[float]:
    """Ticks at 0 and at powers of ten on both sides, with enough space for the labels."""
    gap = (limits[1] - limits[0]) / 9
    ticks = [0.0]
    for step in range(12, 0, -1):
        powers = [10.0**power for power in range(-9, 10) if power % step == 0]
        candidates = np.array(sorted([0.0, *powers, *(-power for power in powers)]))
        places = np.interp(candidates, edges, np.arange(len(edges)))
        zero = np.interp(0.0, edges, np.arange(len(edges)))
        seen = (places >= limits[0]) & (places <= limits[1]) & (candidates >= edges[0]) & (candidates <= edges[-1])
        seen &= (candidates == 0) | (np.abs(places - zero) >= gap)
        if np.all(np.diff(places[seen]) >= gap):
            ticks = candidates[seen].tolist()
    return ticks


def line_between(shares: Sequence[float], errors: Sequence[float], losses: Sequence[float]) -> Figure:
    """Plot of error (top) and loss (bottom) on the line between two networks; a dotted line is the mean of the ends."""
    figure = Figure(figsize=(WIDTH, 4.2))
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, label, values in ((top, "test error", errors), (bottom, "test loss", losses)):
        axes.axhline((values[0] + values[-1]) / 2, color=GREY, linestyle=":", linewidth=1.4)
        axes.plot(shares, values, "-o", color=BLUE, markersize=4 if len(shares) <= 30 else 0)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
    top.yaxis.set_major_formatter(FuncFormatter(percent_tick))
    bottom.set_xlabel("share of the second network in the weights")
    bottom.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def new_axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.add_subplot()


def percent_tick(share: float, _: int | None = None) -> str:
    return f"{100 * share:.4g}%"


def _log_scale(axes: Axes, *, percent: bool = False) -> None:
    """Sets a logarithmic y axis with plain numbers: matplotlib's own labels need `text.parse_math`, which is off."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(percent_tick if percent else lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def mark_spans(axes: Axes, spans: Sequence[Span], color: str = LINE) -> None:
    """Draws lines between spans, and labels above spans; with more than 5 spans, later rounds have only numbers."""
    for left, right in zip(spans, spans[1:], strict=False):
        axes.axvline((left.end + right.start) / 2, color=color, linestyle="--", linewidth=1)
    crowded = len(spans) > 5
    for number, span in enumerate(spans):
        label = span.label.removeprefix("round ") if crowded and number else span.label
        middle = (span.start + span.end) / 2
        axes.annotate(
            label, (middle, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", fontsize=9, color=GREY, annotation_clip=False,
        )  # fmt: skip
