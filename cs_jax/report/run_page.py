"""The report page of a run: results, metrics by epoch, masks, scores, test set and settings."""

import io
import itertools
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from cs_jax.core.settings import flag
from cs_jax.experiment.config import SEARCH, TICKET, Config
from cs_jax.experiment.presets import PRESETS
from cs_jax.experiment.storage import config_file
from cs_jax.experiment.storage.paths import CONFIG_FILE, PREDICTIONS_FILE
from cs_jax.methods.controls import DENSE
from cs_jax.report import epoch_sections, heatmaps, mask_sections
from cs_jax.report.pages import Example, Page, Section, Table, Tile, percent, plot, points, shown
from cs_jax.report.read_run import Epoch, Network, Run, Summary

MATRIX_CLASSES = 40
"""Maximum number of classes in a confusion matrix; with more classes, only the most confused pairs are shown."""

CONFUSED_PAIRS = 12
EXAMPLE_SIDE = 96  # pixels, maximum for the longer side of an example


def page(run: Run) -> Page:
    """Page of a run. Call inside `plots.style()`."""
    sections = [
        _results(run),
        epoch_sections.curves(run),
        mask_sections.layers(run),
        mask_sections.masks(run),
        mask_sections.scores(run),
        _test_section(run),
        mask_sections.connectivity(run),
        _settings(run),
    ]
    names = {"dataset": "data set", "model": "model", "method": "method", "seed": "seed"}
    about = [run.settings.get(name) for name in names]
    lead = " · ".join(f"{name} {value}" for name, value in zip(names.values(), about, strict=True) if value is not None)
    return Page(f"Run {run.name}", lead, _tiles(run), [*filter(None, sections)])


def _tiles(run: Run) -> list[Tile]:
    if run.summary is None:
        return []
    ticket, dense = run.summary.ticket, run.summary.dense
    overall = f"{percent(ticket.density_all_weights)} of all weights: {ticket.num_weights:,}"
    reference = dense.test_accuracy if dense else None
    difference = points(ticket.test_accuracy, reference)
    size = f"{dense.num_weights:,} weights" if dense else "not trained"
    return [
        Tile("Density of the ticket", percent(ticket.density), overall),
        Tile(
            "Test accuracy of the ticket",
            percent(ticket.test_accuracy),
            difference and f"{difference} percentage points vs dense",
        ),
        Tile("Test accuracy of the dense network", percent(reference), size),
    ]


def _results(run: Run) -> Section:
    section = Section("Results", run.unfinished())
    if run.summary is not None:
        if run.summary.ticket.density == 0:
            section.notes.append("The ticket is empty: no maskable weight is left.")
        section.parts.append(_network_table(run, run.summary))
    times = [(phase, run.phase(phase)) for phase in (SEARCH, TICKET, *run.controls) if run.phase(phase)]
    if times:
        head = ("Phase", "Epochs", "Seconds", "Images per second")
        rows = [_time_row(phase, epochs) for phase, epochs in times]
        rows += [["total", "", f"{run.summary.seconds:,.1f}", ""]] if run.summary else []
        section.parts.append(Table("Time", head, rows))
    ends = [list(group)[-1] for _, group in itertools.groupby(run.phase(SEARCH), key=lambda epoch: epoch.round)]
    if ends:
        section.texts.append(run.method.remark_on_rounds)
        head = ("Round", "Epochs", "Density", "Soft masks", "Hard masks")
        caption = "Density and validation accuracy at the end of each round of the search"
        section.parts.append(Table(caption, head, [_round_row(run, end) for end in ends]))
    return section


def _network_table(run: Run, summary: Summary) -> Table:
    ticket, dense = summary.ticket, summary.dense
    search = len(run.phase(SEARCH))
    rows = [_network_row("ticket", search + len(run.phase(TICKET)), ticket.density, ticket)]
    rows += [_network_row(DENSE, len(run.phase(DENSE)), 1.0, dense)] if dense else []
    rows += [
        _network_row(name, len(run.phase(name)), network.density, network) for name, network in summary.controls.items()
    ]
    head = ("Network", "Epochs", "Weights", "Density", "Validation", "Test")
    return Table("Networks: training epochs, and accuracy on the validation and test sets", head, rows)


def _network_row(name: str, epochs: int, density: float, network: Network) -> list[str]:
    accuracies = (percent(network.val_accuracy), percent(network.test_accuracy))
    return [name, f"{epochs:,}", f"{network.num_weights:,}", percent(density), *accuracies]


def _round_row(run: Run, end: Epoch) -> list[str]:
    epochs = f"{end.epoch + 1} of {run.config.epochs}"
    return [str(end.round), epochs, *map(percent, (end.density, end.soft_accuracy, end.hard_accuracy))]


def _time_row(phase: str, epochs: Sequence[Epoch]) -> list[str]:
    seconds = sum(epoch.seconds or 0 for epoch in epochs)
    speeds = [epoch.images_per_second for epoch in epochs if epoch.images_per_second is not None]
    return [phase, str(len(epochs)), f"{seconds:,.1f}", f"{statistics.median(speeds):,.0f}" if speeds else "-"]


def _test_section(run: Run) -> Section:
    section = Section("Test set")
    if run.predictions is None:
        section.notes.append(f"{PREDICTIONS_FILE} is missing: the ticket has not been tested yet.")
        return section
    labels, predicted = run.predictions["labels"].astype(int), run.predictions["predicted"].astype(int)
    names = run.summary.classes if run.summary else None
    if not names:  # without class names, only the classes that occur are known
        found, codes = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
        labels, predicted, names = codes[: len(labels)], codes[len(labels) :], [str(code) for code in found]
    right = int((labels == predicted).sum())
    section.texts.append(f"The ticket classifies {right:,} of {len(labels):,} examples correctly.")
    if len(names) > MATRIX_CLASSES:
        section.texts.append(f"There are {len(names):,} classes, so only the most confused pairs are shown.")
    elif len(labels):
        counts = np.bincount(labels * len(names) + predicted, minlength=len(names) ** 2).reshape(len(names), -1)
        alt = f"Confusion matrix of {len(names)} classes: {right:,} of {len(labels):,} examples on the diagonal."
        remark = "number of examples by true class (rows) and predicted class (columns)"
        section.parts.append(plot("confusion", "Confusion matrix", remark, alt, heatmaps.confusion(counts, names)))
    if right < len(labels):
        section.parts.append(_confused_pairs(labels, predicted, names))
    wrong = run.predictions["mistakes"]
    section.examples = [
        Example(number, _png(image), names[labels[number]], names[predicted[number]], percent(confidence))
        for number, image, confidence in zip(
            wrong.tolist(), run.predictions["images"], run.predictions["confidence"][wrong].tolist(), strict=True
        )
    ]
    return section


def _confused_pairs(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Table:
    wrong = labels != predicted
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:CONFUSED_PAIRS]
    rows = [
        [names[true], names[taken], f"{count:,}", percent(count / (labels == true).sum())]
        for (true, taken), count in zip(pairs.T[most], counts[most], strict=True)
    ]
    head = ("True class", "Predicted class", "Examples", "Share of true class")
    return Table("Most confused classes", head, rows, words=2)


def _png(image: np.ndarray) -> bytes:
    """Image (height, width, channels) as PNG with sides of at most `EXAMPLE_SIDE` pixels.

    Images with 3 or 4 channels are drawn in colour. Of other images, the first channel is drawn in grey.
    """
    drawn = Image.fromarray(image if image.shape[2] in (3, 4) else image[..., 0])
    if max(drawn.size) > EXAMPLE_SIDE:
        drawn.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    file = io.BytesIO()
    drawn.save(file, "png")
    return file.getvalue()


def _settings(run: Run) -> Section:
    section = Section("Settings")
    preset = run.config.preset
    known = preset in PRESETS
    defaults = config_file.effective(_plain(config_file.to_json(PRESETS[cast(str, preset)] if known else Config())))
    values = {name: value for name, value in run.settings.items() if name not in ("versions", "data", "preset")}
    changed = [name for name, value in values.items() if name != "out" and value != defaults.get(name)]
    base = f"preset {preset}" if known else "library defaults"
    if known and values.keys() <= defaults.keys():
        section.texts.append(
            "The following command repeats the run. If the run directory exists, add --out with another directory:"
        )
        words = [_word(name, values[name]) for name in changed]
        section.command = ["python", "train.py", cast(str, preset), *words]
    rows = [[name, shown(values[name]), shown(defaults[name]) if name in defaults else "unknown"] for name in changed]
    if not rows:
        section.texts.append(f"All settings are equal to the {base}.")
    else:
        section.parts.append(Table("Changed settings", ("Setting", "This run", base.capitalize()), rows, words=3))
    versions = [list(pair) for pair in run.config.versions.items()]
    if versions:
        data = [["data", run.config.data]] if run.config.data is not None else []
        section.parts.append(Table("Versions", ("Package", "Version"), [*versions, *data], words=2))
    else:
        section.notes.append(f"{CONFIG_FILE} has no versions.")
    rest = [[name, shown(value)] for name, value in values.items() if name not in changed]
    caption = f"{'Other' if rows else 'All'} settings: equal to the {base}, except out"
    section.parts.append(Table(caption, ("Setting", "This run"), rest, words=2, folded=True))
    return section


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as stored in JSON: tuples become lists."""
    return json.loads(json.dumps(settings))


def _word(name: str, value: Any) -> str:
    """Setting as a command-line flag with its value."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    values = value if isinstance(value, list) else [value]
    return " ".join([flag(name), *(shlex.quote(str(entry)) for entry in values)])
