"""What a user is told in one line: what was given and cannot be used, and what to beware of."""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A flag or file cannot be used as it was given; says which, what came and what was wanted, in one line."""


class CsJaxWarning(UserWarning):
    """What every warning of this package is: a run shows each of them, every time."""


def out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory for what JAX was asked to do."""
    return any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory"))


@contextlib.contextmanager
def told_of(file: Path, *others: type[Exception]) -> Iterator[None]:
    """Puts the name of a file before what is said of its content, by a ConfigError or one of others."""
    try:
        yield
    except (ConfigError, *others) as error:
        raise ConfigError(f"{file}: {str(error).splitlines()[0]}") from error


def one_of(value: str, choices: Any) -> str:
    """ "one of a, b, c", with the closest match where there is one."""
    return f"one of {', '.join(choices)}{closest(value, choices)}"


def closest(value: str, choices: Any) -> str:
    """ " (did you mean a?)", or nothing where no choice is alike."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def in_words(value: Any) -> str:
    """A setting's value as it is given on a command line; "nothing" where there is none."""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "nothing"
    return "nothing" if value is None else str(value)


@contextlib.contextmanager
def quiet(name: str, level: int) -> Iterator[None]:
    """Keeps what a library's logger says below a level off the terminal.

    Args:
        name: of the logger.
        level: as in `logging`, the least that is still told.
    """
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
