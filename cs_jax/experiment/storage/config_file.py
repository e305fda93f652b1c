"""Config of a run as JSON: conversion in both directions, reading of config.json, comparison."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from cs_jax.core.errors import ConfigError, in_words
from cs_jax.core.schema import convert
from cs_jax.core.settings import effects, field_types
from cs_jax.core.version import __version__
from cs_jax.experiment.config import Config
from cs_jax.experiment.storage.paths import CONFIG_FILE
from cs_jax.methods import METHODS


def to_json(config: Config) -> dict[str, Any]:
    """The config's fields as JSON values: a tuple becomes a list, a path becomes a string."""
    return json.loads(msgspec.json.encode(config, enc_hook=str))


def from_json(fields: Mapping[str, Any], source: str = "stored settings") -> Config:
    """The config from the result of `to_json`.

    Args:
        fields: JSON value of every field, by name.
        source: name of the fields in error messages.

    Raises:
        ConfigError: a field is missing or unknown, or its value has the wrong type or is out of range.
    """
    stored = convert(dict(fields), _stored_type(), source)
    return Config(**{name: getattr(stored, name) for name in field_types(Config)})


@cache
def _stored_type() -> Any:
    """A type with the fields of a config, all required; `Config` checks their ranges."""
    return msgspec.defstruct("StoredConfig", list(field_types(Config).items()), forbid_unknown_fields=True)


def decides_result(name: str) -> bool:
    """True if a field of a config affects the result of a run. Other fields may change when a run is resumed."""
    return effects(Config)[name].on == "result"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], name_of: Callable[[str], str] = str) -> str:
    """Differences of settings that affect the result, as "NAME NEW (was OLD), ..."; "" if there are none.

    Args:
        before: settings as `to_json` returns them.
        now: settings to compare.
        name_of: maps a field's name to the name to print.
    """
    before, now = effective(before), effective(now)
    changed = [name for name in now if decides_result(name) and before[name] != now[name]]
    return ", ".join(f"{name_of(name)} {in_words(now[name])} (was {in_words(before[name])})" for name in changed)


def of_program(config: Config) -> dict[str, Any]:
    """Settings that affect compiled functions. Runs in which these settings are equal can share compiled functions."""
    settings = effective(to_json(config))
    return {name: settings[name] for name, effect in effects(Config).items() if effect.compiled}


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `to_json` returns them; if `after` is None, it is replaced by the method's default."""
    method = METHODS.get(settings.get("method", ""))
    if method is None or settings.get("after", "") is not None:
        return dict(settings)
    return {**settings, "after": method.retrainings[0]}


def read_stored(path: Path, given_by: str) -> dict[str, Any]:
    """The settings in the config.json of a run directory, as `to_json` returned them.

    Args:
        path: the run directory.
        given_by: flag or argument with the path, for error messages.

    Raises:
        ConfigError: the path is not a run directory, its config.json cannot be read, or another version of cs_jax
            wrote this file.
    """
    try:
        stored = json.loads((path / CONFIG_FILE).read_text())
        version = stored.pop("versions")["cs_jax"]
        stored.pop("data")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{given_by} {path}: not a run directory; it has no {CONFIG_FILE}") from None
    except OSError as error:
        raise ConfigError(f"{given_by} {path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{given_by} {path}: its {CONFIG_FILE} is damaged; choose another --out") from None
    if version != __version__:
        raise ConfigError(
            f"{given_by} {path}: the run was made by cs_jax {version}, but this is cs_jax {__version__}; use cs_jax "
            f"{version}, or choose another --out"
        )
    return stored
