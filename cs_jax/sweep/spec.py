"""What a sweep is asked to do: a TOML file that names a grid of runs."""

import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs_jax.core.errors import ConfigError, one_of
from cs_jax.experiment.config import Config
from cs_jax.experiment.presets import DEFAULT_PRESET, PRESETS
from cs_jax.experiment.storage import config_file
from cs_jax.methods import METHODS

LISTS: dict[str, tuple[type, ...]] = {
    "methods": (str,),
    "densities": (int, float),
    "initial_scores": (int, float),
    "seeds": (int,),
}
"""Axes of the grid, and the types of what they list."""

KEYS = ("preset", *LISTS, "reference", "settings", "method")
"""What a spec can hold, at its top."""

OF_THE_GRID = {
    "preset": "preset above the tables",
    "seed": "seeds above the tables, a list",
    "method": "methods above the tables, a list",
    "out": "--out of the command, for all runs",
    "resume": "the same command again, which goes on",
}
"""Settings that the grid sets, or the sweep, and what to give in their place."""

DIALS = {"densities": "target_density", "initial_scores": "mask_initial_value"}
"""Axes that may be there, and the settings that are theirs then."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of the grid."""

    name: str  # of its folder
    variant: str  # the method's name in the spec
    initial_score: float | None  # initial score, where that is the axis
    config: Config  # without a folder

    @property
    def epochs(self) -> int:
        """Of all its phases."""
        return self.config.epochs * (self.config.search_rounds + len(self.config.retrainings))


@dataclass(frozen=True)
class Spec:
    """A sweep."""

    name: str
    content: Mapping[str, Any]  # of the file
    runs: tuple[PlannedRun, ...]  # method by method, then by density, then by seed
    reference: str  # variant that the others are compared with

    def without_effect(self) -> list[str]:
        """A line for each table of a method with keys that the method makes no use of.

        Under [settings] there may be any: they are for the methods that use them.
        """
        lines = []
        for variant, config in {run.variant: run.config for run in self.runs}.items():
            unused = [key for key in self.content.get("method", {}).get(variant, {}) if key in config.unused]
            if unused:
                told = f"which --method {config.method} makes no use of"
                lines.append(f"without effect: {', '.join(unused)} of [method.{variant}], {told}")
        return lines


def read_spec(path: Path) -> Spec:
    """The sweep that a TOML file asks for.

    Args:
        path: the file; its name without the ending is the sweep's.

    Raises:
        ConfigError: it cannot be read, or a key or value in it cannot be used; says which, and what was wanted.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no TOML: {' '.join(str(error).split())}") from error
    try:
        return make_spec(path.stem, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def make_spec(name: str, content: Mapping[str, Any]) -> Spec:
    """The sweep of a spec's content, checked in every run of its grid.

    Raises:
        ConfigError: which key, what came, what was wanted.
    """
    _check_keys("spec", content, KEYS)
    for key, kinds in LISTS.items():
        _check_list(content, key, kinds)
    for key in ("methods", "seeds"):
        if key not in content:
            raise ConfigError(f"{key}: got nothing, wanted a list")
    if "densities" in content and "initial_scores" in content:
        raise ConfigError("initial_scores: got them beside densities, wanted one of the two")
    preset = content.get("preset", DEFAULT_PRESET)
    if preset not in list(PRESETS):  # of any type, hashable or not
        raise ConfigError(f"preset: got {preset!r}, wanted {one_of(str(preset), PRESETS)}")
    for table in ("settings", "method"):
        if not isinstance(content.get(table, {}), dict):
            raise ConfigError(f"{table}: got {content[table]!r}, wanted a table")
    _check_tables(content.get("method", {}), content["methods"])
    reference = content.get("reference", "imp")
    if "reference" in content and reference not in content["methods"]:
        raise ConfigError(f"reference: got {reference!r}, wanted {one_of(str(reference), content['methods'])}")
    runs = tuple(run for variant in content["methods"] for run in _runs(content, preset, variant))
    ((name_of_most, most),) = Counter(run.name for run in runs).most_common(1)
    if most > 1:
        raise ConfigError(
            f"spec: got {most} runs that are called {name_of_most}, wanted values that differ in their first six digits"
        )
    if "initial_scores" in content and all(run.initial_score is None for run in runs):
        given, able = ", ".join(content["methods"]), [name for name, method in METHODS.items() if method.learns_masks]
        raise ConfigError(
            f"initial_scores: got them for {given}, without use for them, wanted a method of {', '.join(able)}"
        )
    return Spec(name, content, runs, reference)


def _runs(content: Mapping[str, Any], preset: str, variant: str) -> Iterator[PlannedRun]:
    """The runs of a variant, densest first as they are listed."""
    if not re.fullmatch(r"[\w.+-]+", variant):
        raise ConfigError(f"methods: got {variant!r}, wanted names of letters, digits, '-', '_', '+' and '.'")
    own = content.get("method", {}).get(variant, {})
    if not isinstance(own, dict):
        raise ConfigError(f"method.{variant}: got {own!r}, wanted a table")
    own = dict(own)
    method = own.pop("method", variant)
    if method not in list(METHODS):
        wanted = f"wanted {one_of(str(method), METHODS)}, or a [method.{variant}] that says its method"
        raise ConfigError(f"methods: got {method!r}, {wanted}")
    settings = {**content.get("settings", {}), **own}
    taken = OF_THE_GRID | {DIALS[axis]: f"{axis} alone, which are there" for axis in DIALS if axis in content}
    known = [name for name in config_file.to_json(Config()) if name not in taken]
    for table, given in (("settings", content.get("settings", {})), (f"method.{variant}", own)):
        for key in filter(taken.__contains__, given):
            raise ConfigError(f"{table}: got {key}, which is not for a table, wanted {taken[key]}")
        _check_keys(table, given, known)
    base = {
        **config_file.to_json(PRESETS[preset]),
        "controls": [],
        "report": False,
        "keep": 1,
        **settings,
        "method": method,
    }
    for value, seed in itertools.product(_axis(content, method), content["seeds"]):
        axis, shown = ("densities", "density") if "densities" in content else ("initial_scores", "score")
        given = {} if value is None else {DIALS[axis]: float(value)}
        middle = "" if value is None else f"-{shown}{value:g}"
        name = f"{variant}{middle}-seed{seed}"
        try:
            config = config_file.from_json({**base, **given, "seed": seed}, "settings")
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        yield PlannedRun(name, variant, given.get("mask_initial_value"), config)


def _axis(content: Mapping[str, Any], method: str) -> list[float | None]:
    """The densities or initial scores that a method takes; None alone where it takes none."""
    if "densities" in content:
        return content["densities"] if METHODS[method].wants_target is not False else [None]
    if "initial_scores" in content:
        return content["initial_scores"] if METHODS[method].learns_masks else [None]
    return [None]


def _check_tables(tables: Mapping[str, Any], methods: list[str]) -> None:
    """Refuses tables of what is not among the methods."""
    for name in tables:
        if name in METHODS and name not in methods:
            raise ConfigError(f"method: got the key {name!r}, wanted it in methods too, or one of {', '.join(methods)}")
    _check_keys("method", tables, methods)


def _check_keys(table: str, given: Mapping[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{table}: got the key {key!r}, wanted {one_of(key, known)}")


def _check_list(content: Mapping[str, Any], key: str, kinds: tuple[type, ...]) -> None:
    values = content.get(key, ["anything"])
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{key}: got {values!r}, wanted a list{' of one at least' * (values == [])}")
    for value in values if key in content else []:
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = {str: "names", int: "whole numbers"}.get(kinds[0], "numbers") if len(kinds) == 1 else "numbers"
            raise ConfigError(f"{key}: got {value!r}, wanted {wanted}")
        if key == "densities" and not 0 < value <= 1:
            raise ConfigError(f"{key}: got {value!r:.40}, wanted shares above 0 and at most 1")
        if key != "methods" and not abs(value) < 2**64:
            raise ConfigError(f"{key}: got {value!r:.40}, wanted finite numbers of a usual size")
        if values.count(value) > 1:
            raise ConfigError(f"{key}: got {value!r} twice, wanted each once")
