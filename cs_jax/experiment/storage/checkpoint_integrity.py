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

from cs_jax.experiment.storage.checkpoint_layout import CHECKSUMS

_LOGGERS = (logging.getLogger("absl"), logging.getLogger("asyncio"))


class CheckpointError(OSError):
    """A checkpoint cannot be saved; earlier checkpoints are complete."""


class QuietLogs:
    """Silences log messages of Orbax and asyncio while a run saves: a failed save raises a CheckpointError.

    `begin` and `end` may be nested, because several runs can be trained in one process.
    """

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
        """Ignores errors of writes that continue after a failed save, when the event loop is already closed."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._unraisable_before(unraisable)


quiet_logs = QuietLogs()


def checksums(folder: Path) -> str:
    """SHA-256 of all files below a folder except SHA256SUMS, in the format of `sha256sum`, sorted by name."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return "".join(f"{file_hash(folder / file)}  {file}\n" for file in files if file != CHECKSUMS)


def find_damage(folder: Path) -> str | None:
    """Short description of a difference between a folder and its SHA256SUMS; None for an intact folder."""
    try:
        stored, found = (folder / CHECKSUMS).read_bytes(), checksums(folder).encode()
    except OSError as error:
        name = Path(error.filename or folder).name
        return f"{name} {'is missing' if error.errno == errno.ENOENT else f'cannot be read: {error.strerror}'}"
    if stored == found:
        return None
    wrong = next((line for line in found.splitlines() if line not in stored.splitlines()), None)
    if wrong is None:
        return f"{CHECKSUMS} has changed, or a file is missing"
    return f"{wrong.split(b'  ')[1].decode()} has changed"


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_free_space(folder: Path, tree: PyTree) -> None:
    """Raises an OSError if the arrays do not fit on the disk. Does not check disk quotas."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_error(partial: Path, error: Exception) -> CheckpointError:
    """Deletes the partial checkpoint of a failed save, and returns its error in one line."""
    shutil.rmtree(partial, ignore_errors=True)
    reason = " ".join(str(error).split())
    if "No space left" in reason:
        reason = os.strerror(errno.ENOSPC)
    return CheckpointError(
        f"checkpoint {partial.stem}: cannot be saved: {reason[:200]}; earlier checkpoints are complete"
    )
