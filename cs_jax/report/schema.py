"""Files checked against what they should hold: the fields and types that a TypedDict declares."""

import functools
import json
import reprlib
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar, Union

from cs_jax.core.errors import ConfigError

Kind = TypeVar("Kind")


def content_of(path: Path) -> bytes | None:
    """A file's content; None where there is no such file."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: got no ordinary file, wanted one")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def optional(path: Path, kind: type[Kind]) -> Kind | None:
    content = content_of(path)
    return None if content is None else checked(path, parsed(path, content), kind)


def parsed(path: Path, content: bytes, where: str = "") -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}{where}: got damaged text, wanted JSON") from error


def checked(path: Path, value: Any, kind: type[Kind], where: str = "") -> Kind:
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
