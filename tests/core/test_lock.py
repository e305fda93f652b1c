"""Lock of a run folder: refusal, release, takeover after SIGKILL, folders that cannot be locked."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import Lock, LockedError


def test_a_second_holder_is_refused_with_the_first_ones_process_and_host(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with Lock(path):
        holder = f"process {os.getpid()} on host {socket.gethostname()}"
        message = f"^{tmp_path}: {holder} is writing to this folder; wait until that process has finished$"
        with pytest.raises(LockedError, match=message), Lock(path):
            pass
        assert json.loads(path.read_text()) == {"process": os.getpid(), "host": socket.gethostname()}


def test_nothing_is_left_and_the_next_one_may_hold_it(tmp_path: Path) -> None:
    for _ in range(2):
        with Lock(tmp_path / "run.lock"):
            pass
        assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    script = "import sys, time, pathlib; from cs_jax.core.lock import Lock\nwith Lock(pathlib.Path(sys.argv[1])): "
    holder = subprocess.Popen(
        [sys.executable, "-c", script + "print('held', flush=True); time.sleep(60)", str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid} on host"), Lock(path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert json.loads(path.read_text())["process"] == holder.pid
    with Lock(path):
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_a_folder_that_does_not_exist_is_refused_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: cannot be written: No such file or directory"):
        Lock(tmp_path / "nowhere" / "run.lock").__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing_with(code))
    with pytest.raises(ConfigError, match=f"^{tmp_path}: cannot be written: {os.strerror(code)}$") as refusal:
        Lock(tmp_path / "run.lock").__enter__()
    assert not isinstance(refusal.value, LockedError)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_used_without(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.lock"
    monkeypatch.setattr(fcntl, "flock", failing_with(code))
    with Lock(path), Lock(path):
        pass
    assert list(tmp_path.iterdir()) == []


def failing_with(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail
