"""Base class of config dataclasses: annotations of a field say what the field affects and which values it accepts.

A package declares the settings that it reads in its `config` module. `experiment.config.Config` inherits all settings.
A field is written as

    keep: Annotated[int, FILES, COUNT] = 3

The string below a field is its help text on the command line. A field without an `Effect` counts as
`RESULT`: it changes the result of a run, and compiled functions depend on its value.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np

from cs_jax.core.errors import ConfigError, in_words, one_of


@dataclasses.dataclass(frozen=True)
class Effect:
    """Effect of a setting on runs."""

    on: Literal["result", "speed", "files"]  # the result of a run, only its speed, or which files are read and written
    compiled: bool  # whether compiled functions depend on the value; if so, runs with other values compile again


RESULT = Effect("result", compiled=True)
"""Effect of fields without an annotation."""
RUNTIME = Effect("result", compiled=False)
"""For arguments of compiled functions, and for values that are used only between calls of these functions."""
SPEED = Effect("speed", compiled=False)
DEVICES = Effect("speed", compiled=True)
FILES = Effect("files", compiled=False)
DATA_FILES = Effect("files", compiled=True)
"""Compiled, because runs that share compiled functions also share the images on the device."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A rule for the values of a field. None is always valid; in a tuple, each entry is checked."""

    holds: Callable[[Any], bool]
    rule: str


def is_finite(value: float) -> bool:
    """Whether a number is finite in float32."""
    return abs(value) <= float(np.finfo(np.float32).max)


def is_positive(value: float) -> bool:
    return is_finite(value) and value >= float(np.finfo(np.float32).tiny)


def at_least(least: float) -> Check:
    """A check for finite numbers of at least `least`."""
    return Check(lambda value: is_finite(value) and value >= least, f"must be a finite number of at least {least:g}")


COUNT = Check(lambda value: value >= 1, "must be at least 1")
NOT_NEGATIVE = Check(lambda value: value >= 0, "must be at least 0")
POSITIVE = Check(is_positive, "must be a finite number above 0")
SEED = Check(lambda seed: 0 <= seed < 2**32, "must be 0 to 4294967295")
SHARE = Check(lambda value: 0 < value <= 1, "must be a share above 0 and at most 1")
OPEN_SHARE = Check(lambda value: 0 < value < 1, "must be a share above 0 and below 1")


def flag(name: str) -> str:
    """The command-line flag of a field: `--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


@functools.cache
def field_types(kind: type) -> Mapping[str, Any]:
    """Types of the fields of a config class, by name, with their annotations."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def bare_type(hint: Any) -> Any:
    """A field's type without annotations."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


@functools.cache
def effects(kind: type) -> Mapping[str, Effect]:
    """Effect of each field of a config class, by name."""
    return {name: next(_annotations(hint, Effect), RESULT) for name, hint in field_types(kind).items()}


def _annotations(hint: Any, kind: type) -> Any:
    return (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, kind))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of config classes; the constructor checks every field that has a `Check` or a `Literal` type.

    Raises:
        ConfigError: "FLAG VALUE: RULE", for the first invalid value.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            for check in _annotations(hint, Check):
                entries = value if isinstance(value, tuple) else () if value is None else (value,)
                self._check(name, all(map(check.holds, entries)), check.rule)
            kind = bare_type(hint)
            if typing.get_origin(kind) is Literal:
                self._check_choice(name, typing.get_args(kind))

    def _check(self, name: str, holds: bool, rule: str) -> None:
        """Raises a ConfigError with the rule unless the rule holds for the value of the field."""
        if not holds:
            raise self._error(name, rule)

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise self._error(name, f"must be {one_of(value, choices)}")

    def _error(self, name: str, rule: str) -> ConfigError:
        value = getattr(self, name)
        shown = "" if value is None or value is True else f" {in_words(value)}"
        return ConfigError(f"{flag(name)}{shown}: {rule}")
