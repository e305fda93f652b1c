"""What a run directory holds, read back and checked: its files are text from elsewhere."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np

from cs_jax.core.errors import ConfigError
from cs_jax.experiment.config import SEARCH, TICKET
from cs_jax.experiment.connectivity import CHILDREN, error_barrier
from cs_jax.experiment.storage import config_file
from cs_jax.experiment.storage.paths import (
    CONNECTIVITY_FILE,
    MASKS_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    SUMMARY_FILE,
    TICKET_FILE,
)
from cs_jax.experiment.storage.run_directory import CONFIG_FILE
from cs_jax.methods import METHODS, NONE, Method
from cs_jax.methods.controls import DENSE
from cs_jax.report.read_arrays import Masks, read_masks, read_predictions
from cs_jax.report.schema import checked, content_of, optional, parsed

Share = Annotated[float, (0, 1)]
Number = Annotated[float, (-3.5e38, 3.5e38)]  # float32, in which a run computes
Amount = Annotated[float, (0, 3.5e38)]
Temperature = Annotated[float, (1, 3.5e38)]
Count = Annotated[int, (0, 2**53)]
Positive = Annotated[int, (1, 2**31)]


class Settings(TypedDict):
    """What the report needs of config.json; it shows whatever else is there."""

    epochs: Positive
    rounds: Positive
    preset: NotRequired[str]
    dataset: NotRequired[str]
    model: NotRequired[str]
    seed: NotRequired[Count]
    method: NotRequired[str]
    after: NotRequired[str | None]
    controls: NotRequired[list[str]]
    val_set_size: NotRequired[Count]
    versions: NotRequired[dict[str, str]]
    data: NotRequired[str]  # a fingerprint


class Epoch(TypedDict):
    """A line of metrics.jsonl; null where a figure has no meaning."""

    phase: str  # search, ticket or a control
    round: Count | None
    epoch: Count
    temperature: Temperature | None
    loss: Number | None
    density: Share | None
    soft_accuracy: Share | None
    hard_accuracy: Share | None
    layer_density: NotRequired[dict[str, Share | None]]
    flip_rate: NotRequired[Share | None]
    images_per_second: NotRequired[Amount | None]
    seconds: Amount | None


class Network(TypedDict):
    """A trained network of summary.json."""

    num_weights: Count
    val_accuracy: Share | None
    test_accuracy: Share | None


class SparseNetwork(Network):
    """One that has a density."""

    density: Share


class TicketNetwork(SparseNetwork):
    """The ticket."""

    density_all_weights: Share


class Summary(TypedDict):
    """What the report needs of summary.json."""

    ticket: TicketNetwork
    dense: Network | None
    controls: NotRequired[dict[str, SparseNetwork]]
    seconds: Amount
    classes: NotRequired[list[str]]


class PathEntry(TypedDict):
    """A network on the line between two others."""

    share: Share
    error: Share
    loss: Amount


class Child(TypedDict):
    """A training of the ticket."""

    test_accuracy: Share


class Connectivity(TypedDict):
    """What the report needs of connectivity.json."""

    points: list[PathEntry]
    barrier: Share
    loss_barrier: Amount
    children: list[Child]


class StoredRound(TypedDict):
    """Numbers of scores by bin, for each layer, at a round's start and end."""

    round: Count
    start: dict[str, list[Any]]
    end: NotRequired[dict[str, list[Any]] | None]


class StoredScores(TypedDict):
    """scores.json."""

    edges: list[float]
    rounds: list[StoredRound]


class ScoreRound(NamedTuple):
    """(bins,) numbers of scores, of all layers together."""

    number: int
    before: np.ndarray
    after: np.ndarray | None  # None where the round has not ended


class Scores(NamedTuple):
    """Histograms of scores."""

    edges: np.ndarray  # (bins + 1,), increasing
    rounds: list[ScoreRound]
    sizes: dict[str, int]  # numbers of scores of each layer


@dataclass(frozen=True)
class Run:
    """What a run directory holds, checked; None where a file is not there."""

    folder: Path
    settings: Settings
    epochs: list[Epoch]
    cut: bool  # the last line of metrics.jsonl was half-written, and is left out
    scores: Scores | None
    masks: Masks | None
    predictions: dict[str, np.ndarray] | None
    connectivity: Connectivity | None
    summary: Summary | None

    @property
    def controls(self) -> list[str]:
        """Networks trained beside the ticket."""
        return [] if self.settings.get("method") == DENSE else self.settings.get("controls", [])

    def phase(self, name: str) -> list[Epoch]:
        return [epoch for epoch in self.epochs if epoch["phase"] == name]

    @property
    def search_epochs(self) -> int:
        """How many epochs the search has when it ends."""
        return self.settings["epochs"] * self.settings["rounds"] if self.found_by.searches else 0

    @property
    def found_by(self) -> type[Method]:
        """The method, where it is known; else what is asked of it is that of the first."""
        return METHODS.get(self.settings.get("method", "cs"), METHODS["cs"])

    @property
    def name(self) -> str:
        return os.path.basename(os.path.realpath(self.folder)) or str(self.folder)

    def unfinished(self) -> list[str]:
        """What a run without a result lacks: the first phase that has not ended."""
        epochs = self.settings["epochs"]
        phases = [(SEARCH, "The search", self.search_epochs)]
        if self.settings.get("after") != NONE:
            phases += [(TICKET, "The ticket's retraining", epochs)]
        phases += [(name, f"The training of the control {name}", epochs) for name in self.controls]
        notes = [f"The last line of {METRICS_FILE} is cut off, and left out."] if self.cut else []
        for phase, name, wanted in phases:
            done = len(self.phase(phase))
            if done < wanted:
                where = f"{done} of {wanted} epochs"
                if self.summary:
                    return [f"{METRICS_FILE} holds {where} of {name[0].lower()}{name[1:]}.", *notes]
                return [f"{name} has not ended: {where}.", *notes]
        return notes if self.summary else [f"All epochs have ended, but there is no {SUMMARY_FILE}.", *notes]


def read(folder: Path) -> Run:
    """What a run directory holds; nothing is assumed of files that are not there.

    Raises:
        ConfigError: the folder is no run, or a file in it is damaged.
    """
    content = content_of(folder / CONFIG_FILE)
    if content is None:
        raise ConfigError(f"run: got {folder}, which is no run: it has no {CONFIG_FILE}")
    settings = checked(folder / CONFIG_FILE, parsed(folder / CONFIG_FILE, content), Settings)
    settings = cast(Settings, config_file.effective(settings))
    epochs, cut = _read_metrics(folder / METRICS_FILE)
    summary = optional(folder / SUMMARY_FILE, Summary)
    classes = None if summary is None else summary.get("classes")
    scores = _read_scores(folder / SCORES_FILE)
    return Run(
        folder=folder,
        settings=settings,
        epochs=epochs,
        cut=cut,
        scores=scores,
        masks=read_masks(folder / MASKS_FILE, folder / TICKET_FILE, scores.sizes if scores else {}),
        predictions=read_predictions(folder / PREDICTIONS_FILE, classes),
        connectivity=_read_connectivity(folder / CONNECTIVITY_FILE),
        summary=summary,
    )


def _read_metrics(path: Path) -> tuple[list[Epoch], bool]:
    """The epochs, and whether a half-written last line was left out."""
    lines = (content_of(path) or b"").split(b"\n")
    epochs: list[Epoch] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            break
        try:
            value = parsed(path, line, f", line {number}")
        except ConfigError:
            if any(rest.strip() for rest in lines[number:]):
                raise
            return epochs, True
        epoch = checked(path, value, Epoch, f", line {number}")
        if (epoch["phase"] == SEARCH) != (epoch["round"] is not None):
            raise ConfigError(f"{path}, line {number}, round: wanted a round of the search, and null elsewhere")
        epochs.append(epoch)
    return epochs, False


def _read_scores(path: Path) -> Scores | None:
    stored = optional(path, StoredScores)
    if stored is None:
        return None
    edges = np.array(stored["edges"], float)
    if len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise ConfigError(f"{path}, edges: wanted increasing numbers")
    rounds = []
    for entry in stored["rounds"]:
        after = _totals(path, end, len(edges) - 1) if (end := entry.get("end")) else None
        rounds.append(ScoreRound(entry["round"], _totals(path, entry["start"], len(edges) - 1), after))
    first = stored["rounds"][0]["start"] if rounds else {}
    return Scores(edges, rounds, {name: sum(counts) for name, counts in first.items()})


def _totals(path: Path, counts: Mapping[str, list[Any]], bins: int) -> np.ndarray:
    """(bins,) counts of all layers together."""
    wanted = f"{path}, rounds: wanted {bins} whole numbers for each layer"
    try:
        table = np.array(list(counts.values()) or np.zeros((0, bins), int))
    except (ValueError, OverflowError) as error:
        raise ConfigError(wanted) from error
    right = table.dtype.kind == "i" and table.shape[1:] == (bins,)
    if not right or table.min(initial=0) < 0 or table.max(initial=0) > 2**40:
        raise ConfigError(wanted)
    return table.sum(axis=0)


def _read_connectivity(path: Path) -> Connectivity | None:
    stored = optional(path, Connectivity)
    if stored is None:
        return None
    shares = [point["share"] for point in stored["points"]]
    if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or (np.diff(shares) <= 0).any():
        raise ConfigError(f"{path}, points: wanted increasing shares from 0 to 1")
    if len(stored["children"]) != len(CHILDREN):
        raise ConfigError(f"{path}, children: got {len(stored['children'])}, wanted {len(CHILDREN)}")
    for name, barrier in (("error", stored["barrier"]), ("loss", stored["loss_barrier"])):
        wanted = error_barrier([point[name] for point in stored["points"]])
        if not math.isclose(barrier, wanted, rel_tol=1e-6, abs_tol=1e-9):
            raise ConfigError(f"{path}: got a barrier of {name} {barrier:g}, wanted that of its points, {wanted:g}")
    return stored
