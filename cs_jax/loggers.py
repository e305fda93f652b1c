"""Remarks of other libraries that reach a terminal, and of which nobody can make anything."""

import contextlib
import logging
from collections.abc import Iterator


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
