"""One writer at a time: a lock on a run directory that dies with its process."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from cs_jax.core.errors import ConfigError


class LockedError(ConfigError):
    """Another process holds the directory."""


class Lock:
    """Holds a directory for this process, from entering the context to leaving it.

    The file names the process, for whoever is refused. It is the operating system that holds the lock, so the one of
    a process that has died, however it died, is free.

    Raises:
        LockedError: another process holds the directory; says its id and host.
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "Lock":
        try:
            self._file = self._take()
        except BlockingIOError:
            raise LockedError(f"{self._path.parent}: {self._holder()} is writing to it") from None
        except OSError as error:
            raise ConfigError(f"{self._path.parent}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)

    def _take(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(file)
                if _is_at(file, self._path):
                    os.ftruncate(file, 0)
                    os.write(file, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its holder has just left, and taken the file along

    def _holder(self) -> str:
        try:
            holder = json.loads(self._path.read_text())
            return f"process {holder['process']} on host {holder['host']}"
        except (OSError, ValueError, TypeError, KeyError):
            return "another process"


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: int) -> None:
    """Takes the operating system's lock on a file, or raises BlockingIOError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (
            errno.ENOLCK,
            errno.ENOSYS,
            errno.ENOTSUP,
        ):  # a file system without locks has to do without
            raise
