"""Reader of a run directory, with checks: files may be damaged, or come from another version."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from cs_jax.core.errors import ConfigError
from cs_jax.core.schema import convert
from cs_jax.experiment.config import SEARCH, TICKET
from cs_jax.experiment.connectivity import CHILDREN, error_barrier
from cs_jax.experiment.storage import config_file
from cs_jax.experiment.storage.paths import (
    CONFIG_FILE,
    CONNECTIVITY_FILE,
    MASKS_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    SUMMARY_FILE,
    TICKET_FILE,
)
from cs_jax.methods import METHODS, NONE, Method
from cs_jax.methods.controls import DENSE
from cs_jax.report.read_arrays import Masks, read_content, read_masks, read_predictions

Kind = TypeVar("Kind")

MAX_FLOAT = 3.5e38  # a run computes in float32
Share = Annotated[float, Meta(ge=0, le=1)]
Number = Annotated[float, Meta(ge=-MAX_FLOAT, le=MAX_FLOAT)]
Amount = Annotated[float, Meta(ge=0, le=MAX_FLOAT)]
Temperature = Annotated[float, Meta(ge=1, le=MAX_FLOAT)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
BinCount = Annotated[int, Meta(ge=0, le=2**40)]


class Settings(Struct, frozen=True):
    """Settings in config.json that the report uses by name."""

    epochs: Positive
    rounds: Positive
    preset: str | None = None
    dataset: str | None = None
    model: str | None = None
    seed: Count | None = None
    method: str = "cs"
    after: str | None = None
    controls: list[str] = []
    val_set_size: Count | None = None
    versions: dict[str, str] = {}
    data: str | None = None  # fingerprint of the data set


class Epoch(Struct, frozen=True):
    """Line of metrics.jsonl; undefined metrics are None."""

    phase: str  # "search", "ticket" or the name of a control
    round: Count | None
    epoch: Count
    temperature: Temperature | None
    loss: Number | None
    density: Share | None
    soft_accuracy: Share | None
    hard_accuracy: Share | None
    seconds: Amount | None
    layer_density: dict[str, Share | None] = {}
    flip_rate: Share | None = None
    images_per_second: Amount | None = None


class Network(Struct, frozen=True, kw_only=True):
    """Trained network in summary.json."""

    num_weights: Count
    val_accuracy: Share | None
    test_accuracy: Share | None


class SparseNetwork(Network, frozen=True, kw_only=True):
    """Trained network with a density."""

    density: Share


class TicketNetwork(SparseNetwork, frozen=True, kw_only=True):
    """The retrained ticket."""

    density_all_weights: Share


class Summary(Struct, frozen=True):
    """Fields in summary.json that the report uses."""

    ticket: TicketNetwork
    dense: Network | None
    seconds: Amount
    controls: dict[str, SparseNetwork] = {}
    classes: list[str] | None = None


class LinePoint(Struct, frozen=True):
    """Network on the line between two networks."""

    share: Share
    error: Share
    loss: Amount


class Child(Struct, frozen=True):
    """One of the two retrainings of the ticket."""

    test_accuracy: Share


class Connectivity(Struct, frozen=True):
    """Fields in connectivity.json that the report uses."""

    points: list[LinePoint]
    barrier: Share
    loss_barrier: Amount
    children: list[Child]


class StoredRound(Struct, frozen=True):
    """Number of scores in each bin, by layer, at the start and the end of a round."""

    round: Count
    start: dict[str, list[BinCount]]
    end: dict[str, list[BinCount]] | None = None


class StoredScores(Struct, frozen=True):
    """Content of scores.json."""

    edges: list[float]
    rounds: list[StoredRound]


class ScoreRound(NamedTuple):
    """Number of scores of all layers in each bin, before and after a round: integer arrays of shape (bins,)."""

    number: int
    before: np.ndarray
    after: np.ndarray | None  # None if the round has not finished


class Scores(NamedTuple):
    """Histograms of scores."""

    edges: np.ndarray  # (bins + 1,), increasing
    rounds: list[ScoreRound]
    sizes: dict[str, int]  # number of scores in each layer, by name


@dataclass(frozen=True)
class Run:
    """Checked contents of a run directory; None for files that do not exist."""

    folder: Path
    config: Settings
    settings: dict[str, Any]  # all of config.json
    epochs: list[Epoch]
    truncated: bool  # True if the last line of metrics.jsonl is cut off; the line was ignored
    scores: Scores | None
    masks: Masks | None
    predictions: dict[str, np.ndarray] | None
    connectivity: Connectivity | None
    summary: Summary | None

    @property
    def controls(self) -> list[str]:
        """Controls trained in addition to the ticket."""
        return [] if self.config.method == DENSE else self.config.controls

    def phase(self, name: str) -> list[Epoch]:
        """Epochs of a phase: "search", "ticket" or a control."""
        return [epoch for epoch in self.epochs if epoch.phase == name]

    @property
    def search_epochs(self) -> int:
        """Number of epochs of the search over all rounds, as configured."""
        return self.config.epochs * self.config.rounds if self.method.searches else 0

    @property
    def method(self) -> type[Method]:
        """The pruning method; "cs" if the method is unknown."""
        return METHODS.get(self.config.method, METHODS["cs"])

    @property
    def name(self) -> str:
        return os.path.basename(os.path.realpath(self.folder)) or str(self.folder)

    def unfinished(self) -> list[str]:
        """Notes on missing results: the first phase without all epochs, and a cut-off line in metrics.jsonl."""
        epochs = self.config.epochs
        phases = [(SEARCH, "search", self.search_epochs)]
        if self.config.after != NONE:
            phases += [(TICKET, "retraining of the ticket", epochs)]
        phases += [(name, f"training of the control {name}", epochs) for name in self.controls]
        notes = [f"The last line of {METRICS_FILE} is cut off and was ignored."] if self.truncated else []
        for phase, name, total in phases:
            done = len(self.phase(phase))
            if done < total:
                if self.summary:
                    return [f"{METRICS_FILE} has only {done} of {total} epochs of the {name}.", *notes]
                return [f"The {name} has not finished: {done} of {total} epochs.", *notes]
        return notes if self.summary else [f"All epochs have finished, but {SUMMARY_FILE} is missing.", *notes]


def read(folder: Path) -> Run:
    """Contents of a run directory; every file except config.json may be missing.

    Raises:
        ConfigError: the folder is not a run directory, or a file in it cannot be read or is damaged.
    """
    content = read_content(folder / CONFIG_FILE)
    if content is None:
        raise ConfigError(f"RUN {folder}: not a run directory; it has no {CONFIG_FILE}")
    settings = _parse(content, str(folder / CONFIG_FILE))
    config = convert(settings, Settings, str(folder / CONFIG_FILE))
    settings = config_file.effective(settings)
    epochs, truncated = _read_metrics(folder / METRICS_FILE)
    summary = _read_json(folder / SUMMARY_FILE, Summary)
    scores = _read_scores(folder / SCORES_FILE)
    return Run(
        folder=folder,
        config=msgspec.structs.replace(config, after=settings.get("after")),
        settings=settings,
        epochs=epochs,
        truncated=truncated,
        scores=scores,
        masks=read_masks(folder / MASKS_FILE, folder / TICKET_FILE, scores.sizes if scores else {}),
        predictions=read_predictions(folder / PREDICTIONS_FILE, summary and summary.classes),
        connectivity=_read_connectivity(folder / CONNECTIVITY_FILE),
        summary=summary,
    )


def _read_json(path: Path, kind: type[Kind]) -> Kind | None:
    """Content of a JSON file as an instance of `kind`; None if the file does not exist."""
    content = read_content(path)
    return None if content is None else convert(_parse(content, str(path)), kind, str(path))


def _parse(content: bytes, source: str) -> Any:
    """Value of a JSON text; NaN and infinities are errors.

    Uses the json module, because paths with undecodable bytes are stored as lone surrogates, which msgspec rejects.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from error


def _read_metrics(path: Path) -> tuple[list[Epoch], bool]:
    """Epochs in metrics.jsonl, and whether a cut-off last line was ignored."""
    lines = (read_content(path) or b"").split(b"\n")
    epochs: list[Epoch] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            break
        source = f"{path}, line {number}"
        try:
            value = _parse(line, source)
        except ConfigError:
            if any(rest.strip() for rest in lines[number:]):
                raise
            return epochs, True
        epoch = convert(value, Epoch, source)
        if (epoch.phase == SEARCH) != (epoch.round is not None):
            raise ConfigError(f"{source}: round {epoch.round}: must be a number in the search, null in other phases")
        epochs.append(epoch)
    return epochs, False


def _read_scores(path: Path) -> Scores | None:
    stored = _read_json(path, StoredScores)
    if stored is None:
        return None
    edges = np.array(stored.edges)
    if len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise ConfigError(f"{path}: edges: must be at least two increasing numbers")
    rounds = []
    for entry in stored.rounds:
        after = _totals(path, entry.end, len(edges) - 1) if entry.end else None
        rounds.append(ScoreRound(entry.round, _totals(path, entry.start, len(edges) - 1), after))
    first = stored.rounds[0].start if rounds else {}
    return Scores(edges, rounds, {name: sum(counts) for name, counts in first.items()})


def _totals(path: Path, counts: Mapping[str, list[int]], bins: int) -> np.ndarray:
    """Counts summed over all layers, shape (bins,)."""
    for name, layer in counts.items():
        if len(layer) != bins:
            raise ConfigError(f"{path}: rounds: layer {name!r} has {len(layer)} counts; must have {bins}")
    return np.array([*counts.values()] or np.zeros((0, bins), int)).sum(axis=0)


def _read_connectivity(path: Path) -> Connectivity | None:
    stored = _read_json(path, Connectivity)
    if stored is None:
        return None
    shares = [point.share for point in stored.points]
    if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or (np.diff(shares) <= 0).any():
        raise ConfigError(f"{path}: points: must have increasing shares from 0 to 1")
    if len(stored.children) != len(CHILDREN):
        raise ConfigError(f"{path}: children: must have {len(CHILDREN)} entries, not {len(stored.children)}")
    for field, value, name in (("barrier", stored.barrier, "error"), ("loss_barrier", stored.loss_barrier, "loss")):
        computed = error_barrier([getattr(point, name) for point in stored.points])
        if not math.isclose(value, computed, rel_tol=1e-6, abs_tol=1e-9):
            raise ConfigError(f"{path}: {field} {value:g}: must be {computed:g}, the barrier of the points")
    return stored
