"""Sweep specs: TOML files that describe a grid of runs."""

import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from cs_jax.core.errors import ConfigError, closest, one_of
from cs_jax.core.schema import convert
from cs_jax.experiment.config import Config
from cs_jax.experiment.presets import DEFAULT_PRESET, PRESETS
from cs_jax.experiment.progress import total_epochs
from cs_jax.experiment.storage import config_file
from cs_jax.methods import METHODS

_FLOAT_LIMIT = 2.0**64
_NOT_EMPTY = msgspec.Meta(min_length=1)

RESERVED = {
    "preset": "set preset above the tables",
    "seed": "list seeds above the tables",
    "method": "list methods above the tables",
    "out": "give --out to the command",
    "resume": "run the same command to resume",
}
"""Settings that tables cannot contain, because the grid or the command sets them, with the advice for the user."""

AXES = {"densities": ("target_density", "density"), "initial_scores": ("mask_initial_value", "score")}
"""Optional axes of the grid: the setting that each one varies, and its label in the names of runs."""


class SpecFile(msgspec.Struct, kw_only=True):
    """Content of a TOML file, with the types and ranges that hold for every sweep."""

    preset: str = DEFAULT_PRESET
    methods: Annotated[list[str], _NOT_EMPTY]
    densities: Annotated[list[Annotated[float, msgspec.Meta(gt=0, le=1)]], _NOT_EMPTY] = []
    initial_scores: Annotated[list[Annotated[float, msgspec.Meta(gt=-_FLOAT_LIMIT, lt=_FLOAT_LIMIT)]], _NOT_EMPTY] = []
    seeds: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]], _NOT_EMPTY]
    reference: str = "imp"
    settings: dict[str, Any] = {}
    method: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid."""

    name: str  # also the name of its directory
    variant: str  # name of the method in the spec
    initial_score: float | None  # None unless the sweep varies initial scores
    config: Config  # without an output directory

    @property
    def epochs(self) -> int:
        """Epochs of the search and all retrainings together."""
        return total_epochs(self.config)


@dataclass(frozen=True)
class Spec:
    """A sweep: its runs, and the content of its TOML file."""

    name: str
    content: Mapping[str, Any]  # content of the TOML file, unchanged
    runs: tuple[PlannedRun, ...]  # ordered by method, then density or initial score, then seed
    reference: str  # variant with which the other variants are compared

    def ignored_settings(self) -> list[str]:
        """A warning for each [method.NAME] table with settings that the method ignores.

        The table [settings] may contain any setting: each method uses the settings that apply to it.
        """
        lines = []
        for variant, config in {run.variant: run.config for run in self.runs}.items():
            ignored = [key for key in self.content.get("method", {}).get(variant, {}) if key in config.unused]
            if ignored:
                lines.append(f"--method {config.method} ignores {', '.join(ignored)} in [method.{variant}]")
        return lines


def read_spec(path: Path) -> Spec:
    """The sweep described by a TOML file.

    Args:
        path: TOML file; the file name without the suffix becomes the sweep's name.

    Raises:
        ConfigError: the file cannot be read, or a key or value is invalid; the message names the file, table and key.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {' '.join(str(error).split())}") from error
    return make_spec(path.stem, content, str(path))


def make_spec(name: str, content: Any, source: str | None = None) -> Spec:
    """The sweep described by the content of a spec, after checks of the settings of every run.

    Args:
        name: name of the sweep.
        content: dictionary with the keys of `SpecFile`.
        source: start of error messages; None means the sweep's name.

    Raises:
        ConfigError: "SOURCE: KEY VALUE: RULE", for the first key or value that is invalid.
    """
    source = source or f"sweep {name}"
    spec = convert(content, SpecFile, source)
    try:
        _check_keys("", content, SpecFile.__struct_fields__)
        _check_values(spec, content)
        runs = tuple(run for variant in spec.methods for run in _runs(spec, variant))
        _check_runs(spec, runs)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return Spec(name, content, runs, spec.reference)


def _check_values(spec: SpecFile, content: Mapping[str, Any]) -> None:
    """Checks the rules that types do not express."""
    if spec.preset not in PRESETS:
        raise ConfigError(f"preset {spec.preset!r}: must be {one_of(spec.preset, PRESETS)}")
    for key in ("methods", "densities", "initial_scores", "seeds"):
        repeated = [value for value, count in Counter(getattr(spec, key)).items() if count > 1]
        if repeated:
            raise ConfigError(f"{key} {repeated[0]!r}: listed more than once; list each value once")
    if spec.densities and spec.initial_scores:
        raise ConfigError("initial_scores: cannot be combined with densities; remove one of them")
    if "reference" in content and spec.reference not in spec.methods:
        raise ConfigError(f"reference {spec.reference!r}: must be {one_of(spec.reference, spec.methods)}")
    for name in spec.method:
        if name not in spec.methods:
            guess = "" if name in METHODS else closest(name, spec.methods)
            raise ConfigError(f"[method.{name}]: not in methods{guess}; add {name} to methods or remove the table")


def _check_runs(spec: SpecFile, runs: tuple[PlannedRun, ...]) -> None:
    name, count = Counter(run.name for run in runs).most_common(1)[0]
    if count > 1:
        axis = "densities" if spec.densities else "initial_scores"
        raise ConfigError(f"{axis}: {count} runs have the name {name}; use values that differ in the first six digits")
    if spec.initial_scores and all(run.initial_score is None for run in runs):
        able = ", ".join(name for name, method in METHODS.items() if method.learns_masks)
        rule = f"not used by {', '.join(spec.methods)}"
        raise ConfigError(f"initial_scores: {rule}; add a method that learns masks, one of {able}")


def _runs(spec: SpecFile, variant: str) -> Iterator[PlannedRun]:
    """Runs of a variant, with the axis values in the order of the spec."""
    method, own = _method_and_settings(spec, variant)
    base = {
        **config_file.to_json(PRESETS[spec.preset]),
        "controls": [],
        "report": False,
        "keep": 1,
        **spec.settings,
        **own,
        "method": method,
    }
    axis, values = _axis(spec, method)
    setting, label = AXES[axis]
    for value, seed in itertools.product(values, spec.seeds):
        varied = {} if value is None else {setting: value}
        name = f"{variant}-seed{seed}" if value is None else f"{variant}-{label}{value:g}-seed{seed}"
        try:
            config = config_file.from_json({**base, **varied, "seed": seed}, "settings")
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        yield PlannedRun(name, variant, value if axis == "initial_scores" else None, config)


def _method_and_settings(spec: SpecFile, variant: str) -> tuple[str, dict[str, Any]]:
    """The method of a variant, and the settings in its table, after checks of the keys in both tables."""
    if not re.fullmatch(r"[\w.+-]+", variant):
        raise ConfigError(f"methods {variant!r}: only letters, digits, '-', '_', '+' and '.' are allowed")
    own = dict(spec.method.get(variant, {}))
    method = own.pop("method", variant)
    if method not in list(METHODS):  # a value from a table may have any type
        key = f"[method.{variant}] method" if variant in spec.method and method != variant else "methods"
        advice = "" if key != "methods" else f"; or set method in a table [method.{variant}]"
        raise ConfigError(f"{key} {method!r}: must be {one_of(str(method), METHODS)}{advice}")
    varied = {AXES[axis][0]: f"{axis} lists its values" for axis in AXES if getattr(spec, axis)}
    reserved = RESERVED | varied
    known = [name for name in config_file.to_json(Config()) if name not in reserved]
    for table, settings in (("[settings] ", spec.settings), (f"[method.{variant}] ", own)):
        for key in filter(reserved.__contains__, settings):
            raise ConfigError(f"{table}{key}: not allowed in a table; {reserved[key]}")
        _check_keys(table, settings, known)
    return method, own


def _axis(spec: SpecFile, method: str) -> tuple[str, list[float] | list[None]]:
    """The axis of the grid, and its values for a method; [None] if the axis does not apply to the method."""
    if spec.initial_scores:
        return "initial_scores", spec.initial_scores if METHODS[method].learns_masks else [None]
    has_density = METHODS[method].wants_target is not False
    return "densities", spec.densities if spec.densities and has_density else [None]


def _check_keys(table: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{table}{key}: unknown key; must be {one_of(key, known)}")
