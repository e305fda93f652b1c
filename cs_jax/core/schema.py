"""Type checks of values from JSON and TOML files, by msgspec; errors of msgspec become one-line ConfigErrors."""

import dataclasses
import re
import reprlib
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from cs_jax.core.errors import ConfigError

Kind = TypeVar("Kind")

MAX_NAME = 120
"""Maximum number of characters of a name in a message: names in an untrusted file may be long."""

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def convert(value: Any, kind: type[Kind], source: str) -> Kind:
    """The value as an instance of a type.

    Args:
        value: numbers, text, lists and dictionaries, as from a JSON or TOML reader.
        kind: a msgspec Struct, dataclass, NamedTuple, TypedDict or builtin type; ranges are `Annotated[int,
            msgspec.Meta(ge=0)]`. Only a Struct with `forbid_unknown_fields=True` refuses unknown keys.
        source: name of the file or table, at the start of the error message.

    Raises:
        ConfigError: "SOURCE: FIELD VALUE: RULE", for the first value that does not fit.

    >>> convert({"epochs": "two"}, dict[str, int], "config.json")
    Traceback (most recent call last):
    cs_jax.core.errors.ConfigError: config.json: epochs 'two': must be a whole number
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_decode)
    except (msgspec.ValidationError, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise ConfigError(f"{source}: {printable(_one_line(str(error), value, kind))}") from error


def decode(content: bytes, kind: type[Kind], source: str) -> Kind:
    """Value of a JSON document, as an instance of a type; a document with NaN or infinities is not valid.

    Raises:
        ConfigError: as for `convert`, or the bytes are not valid JSON.
    """
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from error
    return convert(value, kind, source)


def parse_words(words: str | list[str], kind: Any, name: str) -> Any:
    """Value of command-line arguments, as an instance of a type; "none" is None if the type allows None but not text.

    Args:
        words: one argument, or a list of arguments for a tuple type.
        kind: as for `convert`.
        name: flag, at the start of the error message.

    Raises:
        ConfigError: "NAME WORD: RULE", for the first argument that does not fit.

    >>> parse_words(["1", "2"], tuple[int, ...], "--lr-schedule")
    (1, 2)
    """
    if isinstance(words, str) and words.lower() == "none" and _fits(None, kind) and not _fits("none", kind):
        return None
    try:
        return msgspec.convert(words, kind, strict=False, dec_hook=_decode)
    except (msgspec.ValidationError, OverflowError) as error:
        problem, _, place = str(error).partition(" - at `")
        index = re.search(r"\[(\d+)\]", place)
        word = words[int(index[1])] if index else words
        inner = _inner(kind, int(index[1])) if index else kind
        raise ConfigError(f"{name} {word}: {_rule(problem, inner)}".removesuffix(" or null")) from error


def printable(text: str) -> str:
    """Text of a file on one line, with control characters escaped.

    >>> print(printable("a\\nb"))
    a\\nb
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shortened(name: str) -> str:
    """A name of at most `MAX_NAME` characters; a longer name ends with "..."."""
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "..."


def _decode(kind: type, value: Any) -> Any:
    """Hook of msgspec: converts a value to a type that msgspec does not support."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"Expected `{'str' if kind is Path else kind}`")  # msgspec adds the place


def _one_line(message: str, value: Any, kind: Any) -> str:
    """A msgspec error message as "FIELD VALUE: RULE"."""
    problem, _, place = message.partition(" - at `")
    steps = re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", place.rstrip("`"))
    field = ""
    for name, index in steps:
        if index == "..." and isinstance(value, dict):
            name = next((key for key, inner in value.items() if not _fits(inner, _inner(kind, ""))), "...")
        key: Any = int(index) if index.isdigit() else name
        shown = shortened(name)
        field += f"[{key}]" if index.isdigit() else f".{shown}" if field else shown
        kind = _inner(kind, key)
        try:
            value = value[key]
        except (LookupError, TypeError):
            return f"{field}: {_rule(problem, kind)}"
    found = re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", problem, re.DOTALL)
    if found:
        rule = {"missing required": "missing", "contains unknown": "unknown"}[found[1]]
        return f"{field}.{found[2][:MAX_NAME]}: {rule}".lstrip(".")
    return f"{field} {reprlib.repr(value)}: {_rule(problem, kind)}".lstrip()


def _rule(problem: str, kind: Any) -> str:
    """Rule that a msgspec error message reports, as plain text."""
    if problem.startswith("Invalid enum value"):
        choices = [str(choice) for option in (kind, *typing.get_args(kind)) for choice in _choices(option)]
        return f"must be one of {', '.join(choices)}" if choices else "not an allowed value"
    expected = re.match(r"Expected (`[^`]*`.*?)(, got `[^`]*`)?$", problem)
    if expected is None:
        return problem
    return "must be " + re.sub(
        r"`([^`]*)`", lambda names: " or ".join(_WORDS.get(name, name) for name in names[1].split(" | ")), expected[1]
    )


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind, dec_hook=_decode)
    except (msgspec.ValidationError, OverflowError, RecursionError, UnicodeEncodeError):
        return False
    return True


def _inner(kind: Any, key: Any) -> Any:
    """Type of a field or entry; Any if unknown."""
    for option in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(option) or isinstance(option, type) and hasattr(option, "__annotations__"):
            return typing.get_type_hints(option, include_extras=True).get(key, Any)
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is dict:
            return arguments[1]
        if origin in (list, tuple) and arguments:
            return arguments[key] if origin is tuple and Ellipsis not in arguments else arguments[0]
    return Any
