"""A config's form on disk: written as JSON beside a run, read again, compared."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cs_jax.core.errors import ConfigError, in_words
from cs_jax.core.version import __version__
from cs_jax.experiment.config import Config
from cs_jax.experiment.storage.paths import CONFIG_FILE
from cs_jax.methods import METHODS

NOT_IN_RESULT = (
    "preset",
    "data_dir",
    "loader_threads",
    "out",
    "keep",
    "checkpoint_steps",
    "checkpoint_seconds",
    "report",
    "data_parallel",
    "model_parallel",
)
"""Fields that do not change a run's result, and may differ where it goes on."""

RUNTIME_ARGUMENTS = (
    "seed",
    "lr",
    "score_lr",
    "lr_schedule",
    "lr_drops",
    "lmbda",
    "final_temp",
    "mask_initial_value",
    "target_density",
    "target_multiply_adds",
    "channel_multiple",
    "prune_rate",
)
"""Fields that no compiled step is built from: they are its arguments, or have their say between steps."""

KINDS: dict[Any, str] = {
    int: "a whole number",
    int | None: "a whole number",
    float: "a number",
    float | None: "a number",
    bool: "true or false",
    str: "a name",
    str | None: "a name",
    tuple[str, ...]: "names",
    tuple[int, ...]: "whole numbers",
    tuple[float, ...]: "numbers",
    Path | None: "a path",
    Literal["paper", "released"]: "paper or released",
    Literal["weight", "channel"]: "weight or channel",
    Literal["global", "layer"]: "global or layer",
}
"""What a field of a type wants, in words."""


def to_json(config: Config) -> dict[str, Any]:
    """The config's fields as JSON values."""
    fields = dataclasses.asdict(config)
    return {name: _json_value(value) for name, value in fields.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def differences(before: Mapping[str, Any], now: Mapping[str, Any], name_of: Callable[[str], str] = str) -> str:
    """Settings that are not the same and decide what a run ends with, in words; "" where there are none.

    Args:
        before: settings as `to_json` gives them.
        now: those to compare.
        name_of: what a setting is called.
    """
    before, now = effective(before), effective(now)
    changed = [name for name in now if name not in NOT_IN_RESULT and before[name] != now[name]]
    return ", ".join(f"{name_of(name)} {in_words(now[name])} (was {in_words(before[name])})" for name in changed)


def of_program(config: Config) -> dict[str, Any]:
    """What decides which programs a run needs, and when: runs that have it in common can share them."""
    settings = effective(to_json(config))
    own = {*NOT_IN_RESULT, *RUNTIME_ARGUMENTS} - {"data_dir", "data_parallel", "model_parallel"}
    return {name: value for name, value in settings.items() if name not in own}


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `to_json` gives them, with what follows the search named where it was left to the method."""
    method = METHODS.get(settings.get("method", ""))
    if method is None or settings.get("after", "") is not None:
        return dict(settings)
    return {**settings, "after": method.retrainings[0]}


def from_json(fields: Mapping[str, Any], source: str = "stored settings") -> Config:
    """The config that `to_json` gave.

    Args:
        fields: every one of them.
        source: what they are called where they cannot be used.

    Raises:
        ConfigError: a field is missing, unknown, or has a value of another type or out of range.
    """
    kinds = get_type_hints(Config)
    for wrong, names in (("lack", kinds.keys() - fields.keys()), ("have the unknown", fields.keys() - kinds.keys())):
        if names:
            raise ConfigError(f"{source} {wrong} {min(names)!r}: made by another version")
    values = {name: _restored(fields[name], kind) for name, kind in kinds.items()}
    for name, kind in kinds.items():
        if not _fits(values[name], kind):
            raise ConfigError(f"{source} have {name} {fields[name]!r}, wanted {KINDS.get(kind, kind)}")
    return Config(**values)


def _restored(value: Any, kind: Any) -> Any:
    """A JSON value as the field of this type has it."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if kind == Path | None and isinstance(value, str) else value


def _fits(value: Any, kind: Any) -> bool:
    origin, options = get_origin(kind), get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(entry, options[0]) for entry in value)
    if origin is Literal:
        return value in options
    if options:
        return any(_fits(value, option) for option in options)
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def read_stored(path: Path, given_by: str) -> dict[str, Any]:
    """The settings in the config.json of a run directory, of this version, as `to_json` gave them.

    Args:
        path: the directory.
        given_by: the flag that names it, for messages.

    Raises:
        ConfigError: it holds no run, one of another version, or one that cannot be read.
    """
    try:
        stored = json.loads((path / CONFIG_FILE).read_text())
        version = stored.pop("versions")["cs_jax"]
        stored.pop("data")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{given_by}: got {path}, which holds no run, wanted a folder with {CONFIG_FILE}") from None
    except OSError as error:
        raise ConfigError(f"{given_by}: got {path}, which cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{given_by}: got {path}, whose {CONFIG_FILE} is damaged: give another --out") from None
    if version != __version__:
        raise ConfigError(
            f"{given_by}: got {path}, a run of cs_jax {version}, wanted one of {__version__}: go on with "
            f"that version, or give another --out"
        )
    return stored
