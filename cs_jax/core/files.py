"""Files that are there whole or not at all."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cs_jax.core.errors import ConfigError

_TEMPORARY = ".tmp"


def is_temporary(path: Path) -> bool:
    """Whether this is a file that was being written when its process was killed."""
    return path.name.startswith(".") and path.suffix == _TEMPORARY


def sync_below(folder: Path) -> None:
    """Waits until all that is below a folder, and the names in it, are on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_out(path: Path, *, source: Path | None = None, kind: str = "ticket") -> None:
    """Refuses a path, given as `--out`, that no file can be at, or where the source of its content is.

    Args:
        path: to write to.
        source: a file that is to stay.
        kind: what the source is.

    Raises:
        ConfigError: says what is there.
    """
    if path.is_dir():
        raise ConfigError(f"--out: got the folder {path}, wanted a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--out: got {path}, wanted a file in a folder that exists")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise ConfigError(f"--out: got {path}, wanted another file than the {kind}")


def write_whole(path: Path, content: bytes) -> None:
    """Puts a file with this content in place of what is at `path`; whoever reads meanwhile gets the old or the new.

    Raises:
        OSError: it cannot be written; what was there before is left, and nothing else.
    """
    write_all({path: content})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Puts files in place together: none of them before the content of all is on the disk.

    Args:
        contents: what to write by path; folders must exist.

    Raises:
        OSError: one cannot be written. A full disk changes no file; a path that is a folder, none after it.
    """
    staged = {
        path: path.with_name(f".{secrets.token_hex(8)}{_TEMPORARY}") for path in contents
    }  # short: names have limits
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
    """Writes a new file as far as the disk, which renaming alone does not wait for."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
