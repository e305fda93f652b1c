"""Bar charts, heat maps and matrices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from cs_jax.report.plots import BLUE, INK, MANY_LAYERS, Span, mark_spans, new_axes, percent_tick, short


@dataclass(frozen=True)
class Matrix:
    """Cells of a matrix plot: shares and texts."""

    rows: Sequence[str]  # names, from the top
    columns: Sequence[str]  # names
    shares: np.ndarray  # (rows, columns), in [0, 1]; NaN is an empty cell
    texts: np.ndarray  # (rows, columns), text of each cell


def bars(names: Sequence[str], shares: Sequence[float]) -> Figure:
    """Bar chart of a share in [0, 1] for each layer, first layer at the top."""
    many = len(names) > MANY_LAYERS
    figure, axes = new_axes(1.0 + len(names) * (0.07 if many else 0.24))
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
    axes.xaxis.set_major_formatter(FuncFormatter(percent_tick))
    axes.set_xlabel("density (share of weights kept)")
    return figure


def layer_labels(names: Sequence[str]) -> list[str]:
    """Names of layers as labels, without the suffix "/kernel" if there are several names and all have the suffix."""
    alike = len(names) > 1 and all(name.endswith("/kernel") for name in names)
    return short([name.removesuffix("/kernel") if alike else name for name in names], kind="layer")


def heat(names: Sequence[str], shares: np.ndarray, spans: Sequence[Span]) -> Figure:
    """Heat map of a share by layer and epoch; epochs are counted from 1.

    Args:
        names: names of the layers, from the top.
        shares: shares in [0, 1], shape (layers, epochs); NaN where unknown.
        spans: rounds on the x axis.
    """
    many = len(names) > MANY_LAYERS
    figure, axes = new_axes(1.4 + len(names) * (0.07 if many else 0.24))
    top = max(float(np.nanmax(shares, initial=0)), 1e-9)
    extent = (0.5, shares.shape[1] + 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(shares, aspect="auto", extent=extent, cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
    step = 1 + len(names) // MANY_LAYERS * 2
    axes.set_yticks(np.arange(len(names))[::step], layer_labels(names)[::step], fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(visible=False)
    axes.set_xlabel("epoch of the search")
    mark_spans(axes, spans, color="white")
    bar = figure.colorbar(image, ax=axes, location="right", format=FuncFormatter(percent_tick), fraction=0.06, pad=0.02)
    bar.ax.grid(visible=False)
    return figure


def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Confusion matrix: counts by true class (rows) and predicted class (columns); colour is the share of the row."""
    figure, axes = new_axes(5.2)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Square root scale: on a linear scale, rare mistakes would be invisible.
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
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def matrix(cells: Matrix, *, log: bool = False, title: str = "") -> Figure:
    """Matrix of shares as colours: with a text in each cell, or with a colour bar if the matrix is large.

    Args:
        cells: rows, columns, shares and texts.
        log: logarithmic colour scale, from the smallest share above 0.
        title: shown above the matrix, so that the PNG file can be understood without the page.
    """
    rows, columns, shares, texts = cells.rows, cells.columns, cells.shares, cells.texts
    crowded = len(rows) > MANY_LAYERS or len(columns) > 10
    lines = max(text.count("\n") + 1 for text in texts.flat)
    figure, axes = new_axes(1.2 + len(rows) * (0.09 if len(rows) > MANY_LAYERS else 0.12 + 0.16 * lines))
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
        bar = figure.colorbar(
            image, ax=axes, location="right", format=FuncFormatter(percent_tick), fraction=0.06, pad=0.02
        )
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.grid(visible=False)
    return figure
