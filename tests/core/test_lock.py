"""One writer at a time."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import Lock


def test_a_second_holder_is_refused_with_the_first_ones_process_and_host(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with Lock(path):
        told = f"^{tmp_path}: process {os.getpid()} on host {socket.gethostname()} is writing to it$"
        with pytest.raises(ConfigError, match=told), Lock(path):
            pass
        assert json.loads(path.read_text()) == {"process": os.getpid(), "host": socket.gethostname()}


def test_nothing_is_left_and_the_next_one_may_hold_it(tmp_path: Path) -> None:
    for _ in range(2):
        with Lock(tmp_path / "run.lock"):
            pass
        assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    script = "import sys, time, pathlib; from cs_jax.lock import Lock; Lock(pathlib.Path(sys.argv[1])).__enter__()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script + "; print('held', flush=True); time.sleep(60)", str(path)],
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


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: cannot be written: No such file or directory"):
        Lock(tmp_path / "nowhere" / "run.lock").__enter__()
