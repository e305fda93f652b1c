"""Errors and warnings for users, in one line each, and the wording of their messages."""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """Unusable flag, argument or file. The message is one line: `<flag or argument> <value>: <rule>; <what to do>`."""


class CsJaxWarning(UserWarning):
    """Base class of all warnings of this package. A run prints each warning that is issued, also repetitions."""


def out_of_memory(error: Exception) -> bool:
    """Whether a JAX error reports that the memory of a device is exhausted."""
    return any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory"))


@contextlib.contextmanager
def error_in_file(file: Path, *others: type[Exception]) -> Iterator[None]:
    """Context manager that converts errors about the content of a file into a one-line ConfigError with the path.

    Args:
        file: path at the start of the message.
        others: exception classes to convert, in addition to ConfigError.

    Raises:
        ConfigError: the path and the first line of the error.
    """
    try:
        yield
    except (ConfigError, *others) as error:
        raise ConfigError(f"{file}: {str(error).splitlines()[0]}") from error


def one_of(value: str, choices: Any) -> str:
    """Rule of a message: "one of a, b, c", followed by the choice closest to `value` if one is similar."""
    return f"one of {', '.join(choices)}{closest(value, choices)}"


def closest(value: str, choices: Any) -> str:
    """Hint of a message: " (did you mean a?)", or an empty string if no choice is similar to `value`."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def in_words(value: Any) -> str:
    """Value of a setting as text, as on a command line; "nothing" for None or an empty sequence."""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "nothing"
    return "nothing" if value is None else str(value)


@contextlib.contextmanager
def quiet(name: str, level: int) -> Iterator[None]:
    """Context manager that silences a library's log messages below a level.

    Args:
        name: name of the logger.
        level: lowest level to show, a number as in `logging`.
    """
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
