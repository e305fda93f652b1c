"""Atomic file writes: a file exists with its whole content, or not at all."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cs_jax.core.errors import ConfigError

_TEMPORARY = ".tmp"


def is_temporary(path: Path) -> bool:
    """Whether a file is a temporary file of `write_all`, which a killed process leaves behind."""
    return path.name.startswith(".") and path.suffix == _TEMPORARY


def sync_below(folder: Path) -> None:
    """Waits until a folder with all files and folders in it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_out(path: Path, *, source: Path | None = None, kind: str = "ticket") -> None:
    """Raises a ConfigError if the value of `--out` cannot be the path of a new file.

    Args:
        path: value of `--out`.
        source: file that must not be overwritten, or None.
        kind: kind of the source in the message.

    Raises:
        ConfigError: `path` is a folder, the folder that contains `path` is missing, or `path` is the source.
    """
    if path.is_dir():
        raise ConfigError(f"--out {path}: must be a file, not a folder; add a file name")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder of the file must exist; create this folder, or choose another one")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise ConfigError(f"--out {path}: must not overwrite the {kind}; choose another file")


def write_whole(path: Path, content: bytes) -> None:
    """Writes or replaces a file atomically: a concurrent reader gets the whole old or the whole new content.

    Args:
        path: file to write; its folder must exist.
        content: new content of the file.

    Raises:
        OSError: the file cannot be written. The old file is unchanged, and no temporary file is left.
    """
    write_all({path: content})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Writes or replaces several files: no file appears before the contents of all files are on the disk.

    Args:
        contents: contents by path; folders must exist.

    Raises:
        OSError: a file cannot be written. On a full disk, no file is changed. If a path is a folder, this path and the
            paths after it are unchanged.
    """
    # Short names of a fixed length: a file name with a suffix could exceed the limit of the file system.
    staged = {path: path.with_name(f".{secrets.token_hex(8)}{_TEMPORARY}") for path in contents}
    try:
        for path, content in contents.items():
            _write(staged[path], content)
        for path in contents:
            os.replace(staged[path], path)
    except BaseException:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
        raise


def _write(path: Path, content: bytes) -> None:
    """Writes a new file and waits until the content is on the disk, because a rename does not wait for the content."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
