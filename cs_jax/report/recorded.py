"""What a run directory holds, read back and checked: its files are text from elsewhere."""

import functools
import json
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar, Union

import numpy as np
import safetensors
import safetensors.numpy

from cs_jax.errors import ConfigError
from cs_jax.methods import METHODS, NONE, Method
from cs_jax.progress import SEARCH, TICKET
from cs_jax.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    SUMMARY_FILE,
)

Kind = TypeVar("Kind")

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


class Epoch(TypedDict):
    """A line of metrics.jsonl; null where a figure has no meaning."""

    phase: Literal["search", "ticket", "dense", "reinit", "shuffled", "random"]
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
    predictions: dict[str, np.ndarray] | None
    summary: Summary | None

    def phase(self, name: str) -> list[Epoch]:
        return [epoch for epoch in self.epochs if epoch["phase"] == name]

    @property
    def search_epochs(self) -> int:
        """How many epochs the search has when it ends."""
        return self.settings["epochs"] * self.settings["rounds"] if self._method.searches else 0

    @property
    def _method(self) -> Method:
        """The method, where it is known; else what is asked of it is that of the first."""
        return METHODS.get(self.settings.get("method", "cs"), METHODS["cs"])

    @property
    def name(self) -> str:
        return os.path.basename(os.path.realpath(self.folder)) or str(self.folder)

    def unfinished(self) -> list[str]:
        """What a run without a result lacks: the first phase that has not ended."""
        epochs = self.settings["epochs"]
        phases = [(SEARCH, "The search", self.search_epochs)]
        if (self.settings.get("after") or self._method.afters[0]) != NONE:
            phases += [(TICKET, "The ticket's retraining", epochs)]
        phases += [(name, f"The training of the control {name}", epochs) for name in self.settings.get("controls", ())]
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
    content = _bytes(folder / CONFIG_FILE)
    if content is None:
        raise ConfigError(f"run: got {folder}, which is no run: it has no {CONFIG_FILE}")
    settings = _checked(folder / CONFIG_FILE, _json(folder / CONFIG_FILE, content), Settings)
    epochs, cut = _read_metrics(folder / METRICS_FILE)
    summary = _optional(folder / SUMMARY_FILE, Summary)
    classes = None if summary is None else summary.get("classes")
    return Run(
        folder=folder,
        settings=settings,
        epochs=epochs,
        cut=cut,
        scores=_read_scores(folder / SCORES_FILE),
        predictions=_read_predictions(folder / PREDICTIONS_FILE, classes),
        summary=summary,
    )


def _read_metrics(path: Path) -> tuple[list[Epoch], bool]:
    """The epochs, and whether a half-written last line was left out."""
    lines = (_bytes(path) or b"").split(b"\n")
    epochs: list[Epoch] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            break
        try:
            value = _json(path, line, f", line {number}")
        except ConfigError:
            if any(rest.strip() for rest in lines[number:]):
                raise
            return epochs, True
        epoch = _checked(path, value, Epoch, f", line {number}")
        if (epoch["phase"] == SEARCH) != (epoch["round"] is not None):
            raise ConfigError(f"{path}, line {number}, round: wanted a round of the search, and null elsewhere")
        epochs.append(epoch)
    return epochs, False


def _read_scores(path: Path) -> Scores | None:
    stored = _optional(path, StoredScores)
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


def _read_predictions(path: Path, classes: Sequence[str] | None) -> dict[str, np.ndarray] | None:
    content = _bytes(path)
    if content is None:
        return None
    try:
        arrays = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: got a damaged file, wanted safetensors") from error
    kinds = {"labels": "i", "predicted": "i", "confidence": "f", "mistakes": "i", "images": "u"}
    for name, kind in kinds.items():
        if name not in arrays or arrays[name].dtype.kind != kind or arrays[name].ndim != (4 if kind == "u" else 1):
            raise ConfigError(f"{path}, {name}: got none or another kind of array, wanted what a run writes")
    labels, predicted, confidence, mistakes = (arrays[name] for name in list(kinds)[:4])
    images = arrays["images"]
    fits = (
        len(labels) == len(predicted) == len(confidence)
        and len(mistakes) == len(images)
        and 0 not in images.shape[1:]
        and images.dtype == np.uint8
        and np.isfinite(confidence).all()
        and _inside(mistakes, len(labels))
        and all(_inside(codes, len(classes) if classes else None) for codes in (labels, predicted))
    )
    if not fits:
        raise ConfigError(f"{path}: got arrays that do not fit each other or the classes of {SUMMARY_FILE}")
    return arrays


def _inside(indices: np.ndarray, end: int | None) -> bool:
    return not indices.size or bool(indices.min() >= 0 and (end is None or indices.max() < end))


def _bytes(path: Path) -> bytes | None:
    """A file's content; None where there is no such file."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: got no ordinary file, wanted one")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _optional(path: Path, kind: type[Kind]) -> Kind | None:
    content = _bytes(path)
    return None if content is None else _checked(path, _json(path, content), kind)


def _json(path: Path, content: bytes, where: str = "") -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}{where}: got damaged text, wanted JSON") from error


def _checked(path: Path, value: Any, kind: type[Kind], where: str = "") -> Kind:
    """`value`, which has the fields and types that `kind` declares.

    Raises:
        ConfigError: file, field, what came and what was wanted.
    """
    _check(value, kind, f"{path}{where}")
    return value


def _check(value: Any, kind: Any, where: str) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        _expect(isinstance(value, dict), value, "an object", where)
        for name, inner in _fields(kind).items():
            if name in value:
                _check(value[name], inner, f"{where}, {name}")
            else:
                _expect(name in kind.__optional_keys__, None, "a value", f"{where}, {name}")
    elif origin in (Union, types.UnionType):
        if value is not None:
            _check(value, arguments[0], where)
    elif origin is NotRequired:
        _check(value, arguments[0], where)
    elif origin is Annotated:
        _check(value, arguments[0], where)
        low, high = arguments[1]
        _expect(low <= value <= high, value, f"a number from {low} to {high}", where)
    elif origin is Literal:
        _expect(value in arguments, value, "one of " + ", ".join(arguments), where)
    elif origin is dict:
        _expect(isinstance(value, dict), value, "an object", where)
        for name, inner in value.items():
            _check(inner, arguments[1], f"{where}, {name!r}")
    elif origin is list:
        _expect(isinstance(value, list), value, "a list", where)
        for inner in () if arguments[0] is Any else value:
            _check(inner, arguments[0], where)
    else:
        wanted, holds = _SCALARS[kind]
        _expect(holds(value), value, wanted, where)


def _expect(holds: bool, value: Any, wanted: str, where: str) -> None:
    if not holds:
        raise ConfigError(f"{where}: got {reprlib.repr(value)}, wanted {wanted}")


_fields = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))

_SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: (
        "a finite number",
        lambda value: (
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        ),
    ),
}
