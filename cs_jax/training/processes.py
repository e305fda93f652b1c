"""Several processes that do one run together, on one host or on many: how they start, agree and end.

All of them run the same program on the same settings. The first one, the leader, writes files and tells the user.
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
"""Coordinator that is found in the cluster's environment: of SLURM, Open MPI, Kubernetes or a TPU pod."""

PATIENCE = 60
"""Seconds to wait for all processes to come."""

SILENCE = 20
"""Seconds after which a process that says nothing counts as lost."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended before its time."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended or is out of reach; start all of them again with the same command, "
            "and the run goes on from its last checkpoint"
        )


def start(coordinator: str, count: int | None, index: int | None, *, prog: str) -> None:
    """Joins the other processes of a run; before JAX has looked for devices.

    Args:
        coordinator: HOST:PORT of the first process, the same for all; or `AUTOMATIC`.
        count: processes in all; None where the environment says it.
        index: of this process, from 0; None where the environment says it.
        prog: the program's name, for what is told when another process is lost.

    Raises:
        ConfigError: they do not fit each other, or no such environment is there.
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
                    f"--coordinator: got {AUTOMATIC}, but no SLURM, Open MPI, Kubernetes or TPU pod has started this "
                    "process; wanted HOST:PORT of the first process, --processes and --process-id"
                ) from error
            raise ConfigError(f"--coordinator: got {coordinator}, with which no run can start: {reason}") from error


def _check(coordinator: str, count: int | None, index: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"--coordinator: got {coordinator!r}, wanted HOST:PORT of the first process, with a port of 1 to 65535, or "
            f"{AUTOMATIC}"
        )
    if count is None or count < 1:
        raise ConfigError(
            f"--processes: got {'none' if count is None else count}, wanted how many run together, beside --coordinator"
        )
    if index is None or not 0 <= index < count:
        got = "none" if index is None else index
        raise ConfigError(f"--process-id: got {got}, wanted 0 to {count - 1}, another one in each process")


@contextlib.contextmanager
def _time_limit(coordinator: str, prog: str) -> Iterator[None]:
    """Ends the process in time, where JAX would end it with a crash later."""

    def give_up() -> None:
        what = f"not all processes have met at {coordinator} within {PATIENCE} s"
        _leave(f"{prog}: error: --coordinator: {what}; wanted every one of them to be started, and able to reach it", 2)

    timer = threading.Timer(PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _explain_abort(prog: str) -> None:
    """Tells why, where JAX ends the process: it aborts when another one is lost, whatever this one is doing."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _leave(f"{prog}: error: {LostProcessError()}", 1))
    _handlers.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)  # Python's own handlers would come too late


_handlers: list[Any] = []
"""Kept from being collected."""

_leaving = threading.Lock()


def _leave(line: str, code: int) -> None:
    """Ends the process at once, with a line; the first thread that wants to has it."""
    _leaving.acquire()
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    os._exit(code)


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Errors of a computation that another process has left are told as what they are.

    Raises:
        LostProcessError: in place of JAX's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not are_several() or not any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "peer")):
            raise
        _leaving.acquire()  # no other thread is to tell it again
        raise LostProcessError from error


def are_several() -> bool:
    return jax.process_count() > 1


def is_leader() -> bool:
    """Whether this process writes files and tells the user."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """The largest of the numbers, each 0 or more, that the processes come with; all of them call this."""
    if not are_several():
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def from_leader(function: Callable[[], Any]) -> Any:
    """What a function returns in the leader, a JSON value; the others wait for it, without calling it.

    Raises:
        ConfigError: the leader's; in every process.
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
    """Returns when all processes have come here."""
    agree(0)


def check_same_everywhere(about: Mapping[str, Any]) -> None:
    """Refuses processes that were started differently.

    Args:
        about: JSON values by what they are called; to be the same in every process.

    Raises:
        ConfigError: says what differs first, and in which process; in every process.
    """
    if not are_several():
        return
    everyone = _gather({**about, "host": socket.gethostname()})
    first = everyone[0]
    for index, other in enumerate(everyone):
        for name in about:
            if other.get(name) != first.get(name):
                raise ConfigError(
                    f"{name}: process {index} on host {other['host']} has {other.get(name)}, but process 0 on host "
                    f"{first['host']} has {first.get(name)}; wanted the same in every process"
                )


def _gather(value: Any) -> list[Any]:
    """Everyone's JSON value, in the order of the processes."""
    content = _as_bytes(value)
    padded = np.full(agree(content.size), ord(" "), np.uint8)
    padded[: content.size] = content
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def _as_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def gather_rows(share: np.ndarray, size: int) -> np.ndarray:
    """All of an array of so many rows, of which each process has a share, in the order of the processes."""
    if not are_several():
        return share
    padded = np.zeros((-(-size // jax.process_count()), *share.shape[1:]), share.dtype)
    padded[: len(share)] = share
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(share))))
    return np.concatenate([rows[:length] for rows, length in zip(everyone, lengths, strict=True)])


@functools.cache
def code_version() -> str:
    """Version of this package, and a hash of its source: the same where the same code runs."""
    found = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{__version__} ({found.hexdigest()[:12]})"
