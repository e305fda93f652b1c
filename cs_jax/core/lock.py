"""Lock of a run or sweep folder: only one process at a time writes to the folder."""

import contextlib
import errno
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from cs_jax.core.errors import ConfigError

_FILE_SYSTEM_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class LockedError(ConfigError):
    """Another process holds the lock of a folder."""


class Lock:
    """Context manager that holds the lock of a folder for this process.

    The operating system releases the lock when the process ends, also after SIGKILL. The lock file contains the id and
    host of the process as JSON, for the error message in other processes. The file is deleted when the context ends. On
    a file system without locks, several processes can enter.

    Args:
        path: lock file, in the folder to lock. The folder must exist.

    Raises:
        LockedError: on entering, if another process holds the lock. The message names the process and host, if known.
        ConfigError: on entering, if the folder is missing or not writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path, timeout=0, thread_local=False, on_acquired=_write_holder)

    def __enter__(self) -> "Lock":
        folder = self._path.parent
        try:
            folder.stat()  # FileLock creates a missing folder
            self._lock.acquire()
        except Timeout:
            message = f"{folder}: {self._read_holder()} is writing to this folder; wait until that process has finished"
            raise LockedError(message) from None
        except OSError as error:
            if error.errno not in _FILE_SYSTEM_HAS_NO_LOCKS:
                raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()  # before the release: afterwards the file may be another process's lock
        self._lock.release()

    def _read_holder(self) -> str:
        try:
            holder = json.loads(self._path.read_text())
            return f"process {holder['process']} on host {holder['host']}"
        except (OSError, ValueError, TypeError, KeyError):
            return "another process"


def _write_holder(file: int) -> None:
    os.ftruncate(file, 0)  # a killed process leaves its id and host
    os.pwrite(file, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)
