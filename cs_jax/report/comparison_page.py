"""The page of several runs compared."""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from cs_jax.experiment.config import SEARCH, TICKET
from cs_jax.experiment.storage.config_file import decides_result
from cs_jax.report import density_plots, plots
from cs_jax.report.pages import Page, Plot, Section, Table, describe_lines, numbers, percent, plot, points, shown
from cs_jax.report.plots import Line, Point
from cs_jax.report.read_run import Run, Summary, TicketNetwork

LABEL = 44  # letters of a run's name in a legend
RESULTS = ("density", "test_accuracy")


def compare(runs: Sequence[Run]) -> Page:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    named = dict(zip(names, runs, strict=True))
    done = {name: run.summary for name, run in named.items() if run.summary is not None}
    sections = [_tickets(named, done), _overlaid(named), _different(named)]
    return Page(f"{len(runs)} runs compared", ", ".join(names), _best(done), [], sections)


def _best(done: Mapping[str, Summary]) -> str:
    tickets = [(name, summary["ticket"]) for name, summary in done.items()]
    if not tickets:
        return "No run has ended yet."
    best = max(tickets, key=lambda pair: (pair[1]["test_accuracy"] or 0, -pair[1]["density"]))
    lowest = min(ticket["density"] for _, ticket in tickets)
    sparsest = [pair for pair in tickets if pair[1]["density"] == lowest]
    if [best] == sparsest:
        return f"The most accurate ticket, and the sparsest, is that of {_at_density(*best)}."
    told = f"The most accurate ticket is that of {_at_density(*best)}."
    if len(sparsest) > 1:
        return f"{told} {len(sparsest)} are the sparsest, at density {percent(lowest)}."
    return f"{told} The sparsest is that of {_at_density(*sparsest[0])}."


def _at_density(name: str, ticket: TicketNetwork) -> str:
    return f"{name}: {percent(ticket['test_accuracy'])} of the test set at density {percent(ticket['density'])}"


def _tickets(runs: Mapping[str, Run], done: Mapping[str, Summary]) -> Section:
    section = Section("Results", [f"{name}: {note}" for name, run in runs.items() for note in run.unfinished()])
    head = ("Run", "Method", "Epochs", "Density", "Weights", "Validation", "Test", "Dense, test")
    head += ("Points beside dense", "Seconds")
    rows = [
        [name, run.settings.get("method", "-"), *(_ticket_row(run, done[name]) if name in done else ["-"] * 8)]
        for name, run in runs.items()
    ]
    section.texts.append("Epochs of a ticket are those of its search and its retraining.")
    section.parts.append(Table("Tickets", head, rows, words=2, wide=True))
    labels = plots.short([*done], length=LABEL, kind="run")
    points = [point for label, summary in zip(labels, done.values(), strict=True) if (point := _point(label, summary))]
    if points:
        told = [f"{point.label}: {percent(point.accuracy)} at {percent(point.density)}" for point in points]
        title, remark = "Test accuracy against density", "up and to the left is better"
        figure = density_plots.trade_off(points)
        section.parts.append(plot("accuracy-density", title, remark, f"{title}. {'; '.join(told)}.", figure))
    repeated = _repeated({name: runs[name] for name in done})
    if repeated:
        caption = "Over seeds, mean and standard deviation"
        section.parts.append(Table(caption, ("Runs", "Number", "Density", "Test accuracy"), repeated))
    return section


def _point(label: str, summary: Summary) -> Point | None:
    ticket, dense = summary["ticket"], summary["dense"]
    if ticket["test_accuracy"] is None:
        return None
    return Point(label, ticket["density"], ticket["test_accuracy"], dense["test_accuracy"] if dense else None)


def _ticket_row(run: Run, summary: Summary) -> list[str]:
    ticket, dense = summary["ticket"], summary["dense"]
    reference = dense["test_accuracy"] if dense else None
    return [
        str(len(run.phase(SEARCH)) + len(run.phase(TICKET))),
        percent(ticket["density"]),
        f"{ticket['num_weights']:,}",
        percent(ticket["val_accuracy"]),
        percent(ticket["test_accuracy"]),
        percent(reference),
        points(ticket["test_accuracy"], reference) or "-",
        f"{summary['seconds']:,.0f}",
    ]


def _repeated(done: Mapping[str, Run]) -> list[list[str]]:
    """Mean and deviation of runs that differ in their seed alone."""
    groups: dict[str, list[str]] = {}
    for name, run in done.items():
        aside = ("seed", "out", "data_dir", "preset", "versions")
        asked = {setting: value for setting, value in run.settings.items() if setting not in aside}
        groups.setdefault(json.dumps(asked, sort_keys=True), []).append(name)
    return [
        [", ".join(group), str(len(group)), *(_spread([done[name] for name in group], key) for key in RESULTS)]
        for group in groups.values()
        if len(group) > 1
    ]


def _spread(runs: Sequence[Run], key: str) -> str:
    figures = [cast(Mapping[str, Any], run.summary["ticket"])[key] for run in runs if run.summary]
    if None in figures:
        return "-"
    return f"{percent(statistics.mean(figures))} ± {percent(statistics.stdev(figures))}"


def _overlaid(runs: Mapping[str, Run]) -> Section:
    section = Section("Epoch by epoch")
    drawn = [
        _overlay(runs, "search-loss", "Loss of the search", SEARCH, "loss"),
        _overlay(runs, "search-accuracy", "Validation accuracy of the search, hard masks", SEARCH, "hard_accuracy"),
        _overlay(runs, "search-density", "Density over the search", SEARCH, "density"),
        _overlay(runs, "ticket-loss", "Loss of the ticket's retraining", TICKET, "loss"),
        _overlay(runs, "ticket-accuracy", "Validation accuracy of the ticket's retraining", TICKET, "hard_accuracy"),
    ]
    section.parts.extend(plot for plot in drawn if plot is not None)
    if not section.parts:
        section.notes.append("No run has an epoch yet.")
    return section


def _overlay(runs: Mapping[str, Run], name: str, title: str, phase: str, key: str) -> Plot | None:
    """A field of the metrics of all runs; a run without figures leaves its colour unused."""
    lines = []
    labels = plots.short([*runs], length=LABEL, kind="run")
    for label, run, look in zip(labels, runs.values(), itertools.cycle(plots.CYCLE), strict=False):
        values = numbers(run.phase(phase), key)
        if np.isfinite(values).any():
            lines.append(Line(label, range(1, len(values) + 1), values, *look))
    if not lines:
        return None
    shares, y_label = key != "loss", {"hard_accuracy": "validation accuracy"}.get(key, key)
    figure = plots.curves(
        lines, x_label="epoch", y_label=y_label, percent=shares, from_zero=key == "density", listed=True
    )
    return plot(name, title, "", f"{title}. {describe_lines(lines, percents=shares)}", figure)


def _different(runs: Mapping[str, Run]) -> Section:
    """Settings and versions that are not the same in all runs."""
    section = Section("What differs")
    settings = [
        {
            name: shown(value)
            for name, value in run.settings.items()
            if name not in ("versions", "data") and decides_result(name)
        }
        for run in runs.values()
    ]
    versions = [run.settings.get("versions", {}) for run in runs.values()]
    for caption, entries in (("Settings that differ", settings), ("Versions that differ", versions)):
        names = dict.fromkeys(itertools.chain(*entries))
        columns = [name for name in names if len({entry.get(name) for entry in entries}) > 1]
        if columns:
            rows = [
                [run, *(entry.get(name, "-") for name in columns)] for run, entry in zip(runs, entries, strict=True)
            ]
            section.parts.append(Table(caption, ("Run", *columns), rows, words=1 + len(columns), wide=True))
        else:
            section.texts.append(f"{caption}: none.")
    return section
