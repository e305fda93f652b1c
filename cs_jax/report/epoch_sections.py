"""A run's figures by epoch."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cs_jax.experiment.config import SEARCH, TICKET
from cs_jax.experiment.storage.paths import METRICS_FILE
from cs_jax.report import plots
from cs_jax.report.pages import Plot, Section, describe_lines, numbers, plot
from cs_jax.report.plots import Line, Span
from cs_jax.report.read_run import Run

AFTERWARDS = ("retraining", "controls")
"""What the span behind the search is called."""


def curves(run: Run) -> Section:
    section = Section("Epoch by epoch")
    if not run.epochs:
        section.notes.append(f"{METRICS_FILE} is missing or has no epochs yet: there is nothing to draw.")
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
    shares = {"percent": True}
    drawn = [
        curve(run, "Loss", "mean over the training examples, penalty included", loss),
        curve(run, "Validation accuracy", "of the search, then of retraining", soft + hard, **shares),
        curve(run, "Density", "maskable weights that hard masks keep", density, from_zero=True, **shares),
        curve(run, "Temperature", "higher makes masks harder", temperature, log=True),
    ]
    section.parts.extend(plot for plot in drawn if plot is not None)
    if not soft + hard:
        section.notes.append("No epoch has a validation accuracy: the run set no validation examples aside.")
    return section


def by_epoch(run: Run, key: str, looks: Mapping[str, tuple[str, str, str]]) -> list[Line]:
    """A field of the metrics by epoch; retraining goes on where the search ends."""
    lines = []
    for phase, (label, color, dashes) in looks.items():
        epochs = run.phase(phase)
        before = 0 if phase == SEARCH else len(run.phase(SEARCH))
        places = [before + 1.0 + index for index in range(len(epochs))]
        lines.append(Line(label, places, numbers(epochs, key), color, dashes))
    return [line for line in lines if np.isfinite(line.y).any()]


def curve(run: Run, title: str, remark: str, lines: Sequence[Line], **options: Any) -> Plot | None:
    if not lines:
        return None
    name = title.lower().split()[-1]
    figure = plots.curves(lines, x_label="epoch", y_label=title.lower(), spans=spans(run), **options)
    return plot(
        name, title, remark, f"{title} by epoch. {describe_lines(lines, percents='percent' in options)}", figure
    )


def spans(run: Run) -> list[Span]:
    """Rounds on the x axis, and the retraining behind them."""
    spans = []
    start = 1
    for number, group in itertools.groupby(run.phase(SEARCH), key=lambda epoch: epoch["round"]):
        length = len(list(group))
        spans.append(Span(f"round {number}", start, start + length - 1))
        start += length
    length = max(len(run.phase(phase)) for phase in (TICKET, *run.controls))
    return spans + ([Span(AFTERWARDS[not run.phase(TICKET)], start, start + length - 1)] if length else [])
