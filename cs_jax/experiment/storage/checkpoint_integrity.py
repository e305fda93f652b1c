"""Checks of checkpoint files: checksums, free space, log messages while saving."""

import errno
import hashlib
import logging
import os
import shutil
import sys
from pathlib import Path

import jax
from jaxtyping import PyTree

ARRAYS, PROGRESS, CHECKSUMS = "arrays", "progress.json", "SHA256SUMS"
PARTIAL = ".partial"
"""Ending of what is still being written."""

_LOGGERS = (logging.getLogger("absl"), logging.getLogger("asyncio"))


class CheckpointError(OSError):
    """A checkpoint could not be saved; those before it are whole."""


class QuietLogs:
    """Loggers and hook of the process, that say less while anybody saves: a save that fails is told by its error."""

    def __init__(self) -> None:
        self._saving = 0

    def begin(self) -> None:
        if not self._saving:
            self._levels = [logger.level for logger in _LOGGERS]
            for logger in _LOGGERS:
                logger.setLevel(logging.CRITICAL)
        if sys.unraisablehook != self._unraisable:
            self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._saving += 1

    def end(self) -> None:
        self._saving -= 1
        if not self._saving:
            for logger, level in zip(_LOGGERS, self._levels, strict=True):
                logger.setLevel(level)
            sys.unraisablehook = self._unraisable_before

    def _unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Passes over what writes that go on after a failed save say when they end: the event loop is gone by then."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._unraisable_before(unraisable)


quiet_logs = QuietLogs()


def checksums(folder: Path) -> str:
    """Hashes of all files below a folder but the list itself, in the form of `sha256sum`, in order of their names."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return "".join(f"{file_hash(folder / file)}  {file}\n" for file in files if file != CHECKSUMS)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a saved folder, in a few words; None if it is as it was written."""
    try:
        stored, found = (folder / CHECKSUMS).read_bytes(), checksums(folder).encode()
    except OSError as error:
        name = Path(error.filename or folder).name
        return f"{name} {'is missing' if error.errno == errno.ENOENT else f'cannot be read: {error.strerror}'}"
    if stored == found:
        return None
    wrong = next((line for line in found.splitlines() if line not in stored.splitlines()), None)
    return (
        f"{wrong.split(b'  ')[1].decode()} has changed" if wrong else f"{CHECKSUMS} has changed, or a file is missing"
    )


def file_hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_free_space(folder: Path, tree: PyTree) -> None:
    """Raises before anything is written if the arrays do not fit on the disk, as far as it tells."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_error(partial: Path, error: Exception) -> CheckpointError:
    """Takes away what a failed save has written, and explains its error in one line."""
    shutil.rmtree(partial, ignore_errors=True)
    reason = " ".join(str(error).split())
    if "No space left" in reason:
        reason = os.strerror(errno.ENOSPC)
    return CheckpointError(f"checkpoint {partial.stem} cannot be saved: {reason[:200]}; those before it are whole")
