"""Several processes that share one run, on one or several hosts: start, communication and end.

All processes run the same program with the same settings. The first process, the leader, writes files and prints.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cs_jax.core.errors import ConfigError
from cs_jax.core.version import __version__

AUTOMATIC = "auto"
"""Value of --coordinator that finds the coordinator in the environment of SLURM, Open MPI, Kubernetes or a TPU pod."""

PATIENCE = 60
"""Seconds to wait until all processes have connected."""

SILENCE = 20
"""Seconds without a heartbeat after which a process counts as lost."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended unexpectedly or cannot be reached."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended or cannot be reached; start all processes again with the same "
            "command to resume from the last checkpoint"
        )


def start(coordinator: str, count: int | None, index: int | None, *, prog: str) -> None:
    """Connect to the other processes of a run. Must be called before JAX initializes its devices.

    Args:
        coordinator: HOST:PORT of the first process, the same in all processes; or `AUTOMATIC`.
        count: total number of processes; None reads it from the environment.
        index: index of this process, from 0; None reads it from the environment.
        prog: name of the program, for error messages.

    Raises:
        ConfigError: arguments are out of range, or the environment has no coordinator.
    """
    address = None
    if coordinator != AUTOMATIC:
        _check(coordinator, count, index)
        address = coordinator
    _explain_abort(prog)
    with _time_limit(coordinator, prog):
        try:
            jax.distributed.initialize(
                address, count, index, initialization_timeout=2 * PATIENCE, heartbeat_timeout_seconds=SILENCE
            )
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            if coordinator == AUTOMATIC and "should be defined" in reason:
                raise ConfigError(
                    f"--coordinator {AUTOMATIC}: requires a process started by SLURM, Open MPI, Kubernetes or a TPU "
                    "pod; set --coordinator to HOST:PORT of the first process, with --processes and --process-id"
                ) from error
            raise ConfigError(f"--coordinator {coordinator}: cannot connect ({reason})") from error


def _check(coordinator: str, count: int | None, index: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"--coordinator {coordinator!r}: must be HOST:PORT of the first process, with a port of 1 to 65535, or "
            f"{AUTOMATIC}"
        )
    if count is None or index is None:
        raise ConfigError(f"--coordinator {coordinator}: requires --processes and --process-id")
    if count < 1:
        raise ConfigError(f"--processes {count}: must be at least 1")
    if not 0 <= index < count:
        raise ConfigError(f"--process-id {index}: must be 0 to {count - 1}, different in each process")


@contextlib.contextmanager
def _time_limit(coordinator: str, prog: str) -> Iterator[None]:
    """Exit with an error message after `PATIENCE` seconds; JAX would crash later, without this message."""

    def give_up() -> None:
        what = f"not all processes connected within {PATIENCE} s"
        _exit(f"{prog}: error: --coordinator {coordinator}: {what}; start all processes on hosts that reach it", 2)

    timer = threading.Timer(PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _explain_abort(prog: str) -> None:
    """Print an error message when JAX aborts this process because another process is lost."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _exit(f"{prog}: error: {LostProcessError()}", 1))
    _handlers.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)  # Python's signal handlers would run too late


_handlers: list[Any] = []
"""References that keep handlers from being garbage-collected."""

_exiting = threading.Lock()


def _exit(line: str, code: int) -> None:
    """Print a line and exit at once; only the first thread that calls this prints."""
    _exiting.acquire()
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    os._exit(code)


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Converts JAX errors that are caused by a lost process to a LostProcessError.

    Raises:
        LostProcessError: in place of JAX's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not are_several() or not any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "peer")):
            raise
        _exiting.acquire()  # no other thread prints the message again
        raise LostProcessError from error


def are_several() -> bool:
    """True if the run has several processes."""
    return jax.process_count() > 1


def is_leader() -> bool:
    """True in the process that writes files and prints."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """Largest number that a process has passed; numbers are at least 0. All processes must call this."""
    if not are_several():
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def from_leader(function: Callable[[], Any]) -> Any:
    """Result of a function that only the leader calls, a JSON value; the other processes wait for the result.

    Raises:
        ConfigError: the function raised a ConfigError in the leader; every process raises it.
    """
    if not are_several():
        return function()
    reply: dict[str, Any] = {}
    if is_leader():
        try:
            reply = {"result": function()}
        except ConfigError as error:
            _broadcast({"refused": str(error)})
            raise
    reply = _broadcast(reply)
    if "refused" in reply:
        raise ConfigError(reply["refused"])
    return reply["result"]


def _broadcast(value: Any) -> Any:
    content = _as_bytes(value)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    padded = np.zeros(size, np.uint8)
    if is_leader():
        padded[:] = content
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def wait() -> None:
    """Wait until all processes have called this."""
    agree(0)


def check_same_everywhere(about: Mapping[str, Any]) -> None:
    """Check that all processes were started with the same values.

    Args:
        about: JSON values by name.

    Raises:
        ConfigError: values differ; every process raises it. The message names the first difference and its process.
    """
    if not are_several():
        return
    gathered = _gather({**about, "host": socket.gethostname()})
    first = gathered[0]
    for index, other in enumerate(gathered):
        for name in about:
            if other.get(name) != first.get(name):
                raise ConfigError(
                    f"{name} {other.get(name)} in process {index} on host {other['host']}: must be the same in every "
                    f"process, but is {first.get(name)} in process 0 on host {first['host']}; start all processes with "
                    "the same value"
                )


def _gather(value: Any) -> list[Any]:
    """JSON values of all processes, in the order of the processes."""
    content = _as_bytes(value)
    padded = np.full(agree(content.size), ord(" "), np.uint8)
    padded[: content.size] = content
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def _as_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def gather_rows(share: np.ndarray, size: int) -> np.ndarray:
    """Whole array of `size` rows, joined from the rows of each process, in the order of the processes."""
    if not are_several():
        return share
    padded = np.zeros((-(-size // jax.process_count()), *share.shape[1:]), share.dtype)
    padded[: len(share)] = share
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(share))))
    return np.concatenate([rows[:length] for rows, length in zip(gathered, lengths, strict=True)])


@functools.cache
def code_version() -> str:
    """Version of this package and a hash of its source; equal if the code is equal."""
    found = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{__version__} ({found.hexdigest()[:12]})"
