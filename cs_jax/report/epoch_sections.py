"""Metrics of a run by epoch: loss, accuracy, density and temperature."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from cs_jax.experiment.config import SEARCH, TICKET
from cs_jax.experiment.storage.paths import METRICS_FILE
from cs_jax.report import plots
from cs_jax.report.pages import Plot, Section, describe_lines, plot
from cs_jax.report.plots import Line, Span, YAxis
from cs_jax.report.read_run import Run

AFTERWARDS = ("retraining", "controls")
"""Labels of the epochs after the search, if the ticket is retrained, and if only controls are trained."""


def curves(run: Run) -> Section:
    """Section with a plot for each metric."""
    section = Section("Metrics by epoch")
    if not run.epochs:
        section.notes.append(f"{METRICS_FILE} is missing or has no epochs yet.")
        return section
    search = {SEARCH: ("search", plots.BLUE, "-")}
    ticket = {TICKET: ("ticket", plots.ORANGE, "-")}
    looks = ((plots.GREY, "--"), (plots.GREEN, "-."), (plots.PURPLE, ":"), (plots.INK, "-."))
    controls = {name: (name, *look) for name, look in zip(run.controls, itertools.cycle(looks), strict=False)}
    hard = by_epoch(run, "hard_accuracy", {SEARCH: ("hard masks", plots.BLUE, "-"), **ticket, **controls})
    soft = by_epoch(run, "soft_accuracy", {SEARCH: ("soft masks", plots.SKY, "--")})
    loss = by_epoch(run, "loss", search | ticket | controls)
    density = by_epoch(run, "density", search | ticket)
    temperature = by_epoch(run, "temperature", search)
    drawn = [
        curve(run, YAxis("loss"), "mean over training examples, including the penalty", loss),
        curve(run, YAxis("validation accuracy", percent=True), "during the search and after it", soft + hard),
        curve(run, YAxis("density", percent=True, from_zero=True), "share of maskable weights kept", density),
        curve(run, YAxis("temperature", log=True), "higher temperatures make masks harder", temperature),
    ]
    section.parts.extend(plot for plot in drawn if plot is not None)
    if not soft + hard:
        section.notes.append("There is no validation accuracy, because the run has no validation set.")
    return section


def by_epoch(run: Run, key: str, looks: Mapping[str, tuple[str, str, str]]) -> list[Line]:
    """Curves of a metric, one for each phase. All phases after the search start at the epoch after the search.

    Args:
        run: the run.
        key: field of `Epoch`.
        looks: label, colour and dashes of the curves, by phase.
    """
    lines = []
    for phase, (label, color, dashes) in looks.items():
        epochs = run.phase(phase)
        before = 0 if phase == SEARCH else len(run.phase(SEARCH))
        places = [before + 1.0 + index for index in range(len(epochs))]
        lines.append(Line(label, places, [_number(getattr(epoch, key)) for epoch in epochs], color, dashes))
    return [line for line in lines if np.isfinite(line.y).any()]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def curve(run: Run, y_axis: YAxis, remark: str, lines: Sequence[Line]) -> Plot | None:
    """Plot of curves over epochs; None if there are no curves."""
    if not lines:
        return None
    title = y_axis.label.capitalize()
    alt = f"{title} by epoch. {describe_lines(lines, percents=y_axis.percent)}"
    return plot(y_axis.label.split()[-1], title, remark, alt, plots.curves(lines, y_axis, spans(run)))


def spans(run: Run) -> list[Span]:
    """Parts of the x axis: the rounds of the search, then the epochs after the search."""
    spans = []
    start = 1
    for number, group in itertools.groupby(run.phase(SEARCH), key=lambda epoch: epoch.round):
        length = len(list(group))
        spans.append(Span(f"round {number}", start, start + length - 1))
        start += length
    length = max(len(run.phase(phase)) for phase in (TICKET, *run.controls))
    return spans + ([Span(AFTERWARDS[not run.phase(TICKET)], start, start + length - 1)] if length else [])
