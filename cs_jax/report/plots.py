"""Figures of numbers, drawn with matplotlib's objects: no window, no global state left behind, no files.

Draw and render inside `style()`. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colors, font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

BLUE, SKY, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#6b7280"
CYCLE = [(color, dashes) for dashes in ("-", "--", ":") for color in (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)]
"""Colour and dashes of the first, second, ... of several runs."""

WIDTH = 5.6  # inches: at 10.5 pt, text is still readable where the figure is shrunk to a telephone's width
MARKERS = "os^DvPX*"
LEGEND_COLUMNS = 4  # of names as long as "soft masks"
MANY_LAYERS = 40  # from here on, bars are thin and not every layer is named
SOFT, INK, LINE = "#e5e7eb", "#1f2933", "#9aa5b1"

_LEFT_ALONE = ("backend", "backend_fallback")  # of a window that the user may have open
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
    "svg.hashsalt": "cs_jax",  # the same figure gives the same file
    "text.color": INK,
    "text.parse_math": False,  # names are text, whatever they hold
    "xtick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
}


class Line(NamedTuple):
    """A curve; NaN where there is no figure."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = BLUE
    dashes: str = "-"


class Point(NamedTuple):
    """What a ticket costs and is worth."""

    label: str
    density: float
    accuracy: float
    dense: float | None  # accuracy of the dense network


class Series(NamedTuple):
    """A method over densities, with its deviations; NaN where there is one seed."""

    label: str
    densities: Sequence[float]
    accuracies: Sequence[float]
    deviations: Sequence[float]
    seeds: Sequence[tuple[float, float]]  # density and accuracy of each network
    color: str
    marker: str
    dashes: str = "-"
    thin: bool = False  # a control, which is drawn under the methods and without error bars


class Band(NamedTuple):
    """An accuracy that has no density of its own, such as that of the dense network."""

    label: str
    accuracy: float
    deviation: float  # 0 where there is one seed


class Span(NamedTuple):
    """A part of the x axis with a name, such as a round's epochs."""

    label: str
    start: float
    end: float


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for all figures here, whatever the user's own are; put back at the end."""
    with matplotlib.rc_context():
        values: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
        matplotlib.rcParams.update({name: value for name, value in values.items() if name not in _LEFT_ALONE})
        yield


def images(figure: Figure) -> tuple[bytes, bytes]:
    """The figure as an SVG image that needs no font, and as a PNG image of 150 dots an inch."""
    svg, png = io.BytesIO(), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    figure.set_layout_engine("none")  # places are found once: that takes as long as drawing does
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def short(names: Sequence[str], *, length: int = 24, kind: str = "class") -> list[str]:
    """Names as labels: on one line, cut in front, and replaced by `kind` and number where the font cannot draw them."""
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


def curves(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    log: bool = False,
    from_zero: bool = False,
    spans: Sequence[Span] = (),
    listed: bool = False,
) -> Figure:
    """Lines over epochs.

    Args:
        lines: what is drawn; the legend names them where there is more than one.
        x_label: of the axis.
        y_label: of the axis.
        percent: y is a share in [0, 1], shown in percent.
        log: y is shown on a logarithmic scale.
        from_zero: the y axis begins at 0.
        spans: named parts of the x axis, marked off from each other.
        listed: the legend has a row for each line, below each other, and the figure room for it.
    """
    columns = 1 if listed else min(len(lines), LEGEND_COLUMNS)
    rows = -(-len(lines) // max(1, columns))
    figure, axes = _axes(3.3 + 0.2 * (rows if listed else rows - 1))
    for line in lines:
        marker = "o" if np.isfinite(np.asarray(line.y, float)).sum() <= 20 else ""
        axes.plot(line.x, line.y, line.dashes, color=line.color, label=line.label, marker=marker, markersize=3.5)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.margins(y=0.08)
    if from_zero:
        axes.set_ylim(bottom=0)
    if log:
        _log_scale(axes, percent=percent)
    _mark(axes, spans)
    if spans:  # the same for all figures of a run
        axes.set_xlim(spans[0].start - 0.5, spans[-1].end + 0.5)
    if len(lines) > 1 or listed:
        figure.legend(loc="outside lower center", ncols=columns, handlelength=1.8)
    return figure


def bars(names: Sequence[str], shares: Sequence[float]) -> Figure:
    """A share in [0, 1] for each layer, first layer on top."""
    many = len(names) > MANY_LAYERS
    figure, axes = _axes(1.0 + len(names) * (0.07 if many else 0.24))
    places = np.arange(len(names))
    axes.barh(places, shares, height=0.75, color=BLUE)
    step = 1 + len(names) // MANY_LAYERS * 2
    axes.set_yticks(places[::step], layer_labels(names)[::step], fontsize=9)
    if not many:
        for place, share in zip(places, shares, strict=True):
            axes.annotate(f"{share:.1%}", (share, place), (3, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xlim(0, max(1e-9, *shares, 0) * 1.16)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    axes.set_xlabel("weights kept")
    return figure


def layer_labels(names: Sequence[str]) -> list[str]:
    """Layers' names, without the end that all have: where each is the kernel of something, of what."""
    alike = len(names) > 1 and all(name.endswith("/kernel") for name in names)
    return short([name.removesuffix("/kernel") if alike else name for name in names], kind="layer")


def heat(names: Sequence[str], shares: np.ndarray, spans: Sequence[Span]) -> Figure:
    """Shares in [0, 1], (layers, epochs), as colours; epochs are counted from 1."""
    many = len(names) > MANY_LAYERS
    figure, axes = _axes(1.4 + len(names) * (0.07 if many else 0.24))
    top = max(float(np.nanmax(shares, initial=0)), 1e-9)
    extent = (0.5, shares.shape[1] + 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(shares, aspect="auto", extent=extent, cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
    step = 1 + len(names) // MANY_LAYERS * 2
    axes.set_yticks(np.arange(len(names))[::step], layer_labels(names)[::step], fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(visible=False)
    axes.set_xlabel("epoch of the search")
    _mark(axes, spans, color="white")
    bar = figure.colorbar(image, ax=axes, location="right", format=FuncFormatter(_percent), fraction=0.06, pad=0.02)
    bar.ax.grid(visible=False)
    return figure


def histogram(
    edges: np.ndarray, before: np.ndarray, after: np.ndarray | None, shown: tuple[int, int], *, cut: bool
) -> Figure:
    """Numbers of scores between edges, before a round and after it.

    Args:
        edges: (bins + 1,), increasing; drawn at equal distances.
        before: (bins,) counts.
        after: (bins,) counts; None where the round has not ended.
        shown: first and last bin on the x axis.
        cut: whether scores above 0 are those that are kept: then they and the others have different colours.
    """
    figure, axes = _axes(2.9)
    places = np.arange(len(edges))
    if after is not None and not cut:
        axes.stairs(after, places, fill=True, color=BLUE, label="after")
    elif after is not None:
        for kept, color, label in ((False, ORANGE, "after: removed"), (True, BLUE, "after: kept")):
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
    axes.set_xlabel("score (logarithmic on both sides of 0)")
    axes.set_ylabel("weights")
    figure.legend(loc="outside lower center", ncols=3, handlelength=1.2, columnspacing=1.2, fontsize=9.5)
    return figure


def _score_ticks(edges: np.ndarray, limits: tuple[float, float]) -> list[float]:
    """0 and powers of ten on both sides, as many as their labels have room for."""
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


def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Examples of each true class (rows) by predicted class (columns); colour is the share of the row."""
    figure, axes = _axes(5.2)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # A root, or the few mistakes of a good network would not be seen beside what is right.
    axes.imshow(shares, cmap="Blues", norm=colors.PowerNorm(0.5, 0, 1), interpolation="nearest")
    labels = short(names, length=14)
    places = np.arange(len(names))
    size = 9 if len(names) <= 12 else 6.5
    axes.set_xticks(places, labels, rotation=0 if max(map(len, labels)) <= 2 else 90, fontsize=size)
    axes.set_yticks(places, labels, fontsize=size)
    if len(names) <= 12:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.4 else INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8.5)
    axes.grid(visible=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    shares: np.ndarray,
    texts: np.ndarray,
    *,
    log: bool = False,
    title: str = "",
) -> Figure:
    """A table of shares in [0, 1] as colours, with a text in each cell where there is room.

    Args:
        rows: their names, the first on top.
        columns: their names.
        shares: (rows, columns); NaN leaves a cell empty.
        texts: of the cells, (rows, columns).
        log: colours go by the logarithm, from the least share above 0.
        title: stands above, for a figure that is looked at without its page.
    """
    crowded = len(rows) > MANY_LAYERS or len(columns) > 10
    lines = max(text.count("\n") + 1 for text in texts.flat)
    figure, axes = _axes(1.2 + len(rows) * (0.09 if len(rows) > MANY_LAYERS else 0.12 + 0.16 * lines))
    axes.set_title(title, fontsize=10)
    known = shares[shares > 0]
    low, high = (known.min(), known.max()) if log and known.size else (0.0, 1.0)
    norm = colors.LogNorm(low, high * (1 + 1e-9)) if log and known.size else colors.Normalize(low, high)
    drawn = np.ma.masked_invalid(np.clip(shares, low, None))
    image = axes.imshow(drawn, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    step = 1 + len(rows) // MANY_LAYERS * 2
    axes.set_yticks(np.arange(len(rows))[::step], rows[::step], fontsize=9)
    turned: dict[str, Any] = {"rotation": 35, "ha": "right"} if max(map(len, columns)) * len(columns) > 40 else {}
    axes.set_xticks(np.arange(len(columns)), columns, fontsize=9, **turned)
    for (row, column), share in np.ndenumerate(shares) if not crowded else ():
        if np.isfinite(share):
            color = "white" if norm(max(share, low)) < 0.55 else INK
            axes.text(column, row, str(texts[row, column]), ha="center", va="center", color=color, fontsize=8)
    axes.grid(visible=False)
    if crowded:
        bar = figure.colorbar(image, ax=axes, location="right", format=FuncFormatter(_percent), fraction=0.06, pad=0.02)
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.grid(visible=False)
    return figure


def line_between(shares: Sequence[float], errors: Sequence[float], losses: Sequence[float]) -> Figure:
    """Error and loss on the line between two networks, one above the other, with the means of the two ends."""
    figure = Figure(figsize=(WIDTH, 4.2))
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, label, values in ((top, "test error", errors), (bottom, "test loss", losses)):
        axes.axhline((values[0] + values[-1]) / 2, color=GREY, linestyle=":", linewidth=1.4)
        axes.plot(shares, values, "-o", color=BLUE, markersize=4 if len(shares) <= 30 else 0)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
    top.yaxis.set_major_formatter(FuncFormatter(_percent))
    bottom.set_xlabel("share of child 2 in the weights")
    bottom.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def trade_off(points: Sequence[Point]) -> Figure:
    """Accuracy against density, with dense networks as squares at 100 %."""
    figure, axes = _axes(3.3 + 0.2 * len(points))
    for index, (label, density, accuracy, dense) in enumerate(points):
        color, _ = CYCLE[index % len(CYCLE)]
        marker = MARKERS[index // len({color for color, _ in CYCLE}) % len(MARKERS)]
        axes.plot(density, accuracy, marker, color=color, markersize=8, label=label, clip_on=False)
        if dense is not None:
            axes.plot(1.0, dense, "s", color=color, markersize=7, fillstyle="none", clip_on=False)
            axes.axhline(dense, color=color, linestyle=":", linewidth=1)
    if all(point.density > 0 for point in points):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08, y=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.set_xlabel("density: weights kept (square: dense network)")
    axes.set_ylabel("test accuracy")
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def fronts(series: Sequence[Series], bands: Sequence[Band], *, floor: float | None = None) -> Figure:
    """Accuracy against density of several methods, with a deviation up and down, and single seeds as dots.

    Points at one density are drawn side by side, or error bars of several methods would hide each other.

    Args:
        series: what is drawn, and listed in the legend.
        bands: drawn from side to side.
        floor: the accuracy at which the y axis begins; None shows all.
    """
    rows = -(-(len(series) + len(bands)) // 2)
    figure, axes = _axes(3.9 + 0.22 * rows)
    everything = np.array([density for one in series for density in one.densities])
    log = bool((everything > 0).all()) and everything.size > 0
    for one, shift in zip(series, _shifts(series, log), strict=True):
        _draw(axes, one, lambda density, shift=shift: np.asarray(density, float) * shift)
    for band, dashes in zip(bands, itertools.cycle(["--", ":", "-."]), strict=False):
        axes.axhline(band.accuracy, color=GREY, linestyle=dashes, linewidth=1.4, label=band.label, zorder=1)
        low, high = max(0.0, band.accuracy - band.deviation), min(1.0, band.accuracy + band.deviation)
        axes.axhspan(low, high, color=GREY, alpha=0.13, linewidth=0, zorder=0)
    if log:
        _log_densities(axes, everything)
    bottom, top = axes.get_ylim()
    if floor is not None:
        bottom, top = floor, axes.dataLim.y1 + 0.06 * (axes.dataLim.y1 - floor)
    axes.set_ylim(bottom, min(top, 1 + 0.03 * (1 - bottom)))
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.set_xlabel("density: weights kept")
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
    inside = [np.minimum(deviations, accuracies), np.minimum(deviations, 1 - accuracies)]  # no accuracy is above 100%
    axes.errorbar(
        place(series.densities), accuracies, inside, fmt="none", ecolor=series.color,
        elinewidth=1.1, capsize=2.2, zorder=4,
    )  # fmt: skip
    axes.plot(
        place(series.densities), series.accuracies, **look, label=series.label,
        markersize=5.5 + 1.5 * (series.marker in "PX*"), markeredgecolor="white", markeredgewidth=0.4, zorder=5,
    )  # fmt: skip


def _shifts(series: Sequence[Series], log: bool) -> list[float]:
    """By what each series' densities are multiplied, so that the marks of one density stand side by side."""
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


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.add_subplot()


def _percent(share: float, _: int | None = None) -> str:
    return f"{100 * share:.4g}%"


def _log_scale(axes: Axes, *, percent: bool = False) -> None:
    """A logarithmic y axis with plain numbers: those of matplotlib need mathematical text, which names must not get."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_percent if percent else lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _mark(axes: Axes, spans: Sequence[Span], color: str = LINE) -> None:
    """Lines between spans and a name above each; only numbers where there are many."""
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
