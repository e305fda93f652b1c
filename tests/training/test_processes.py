"""One run of several processes on this host: equal results, and errors where a process is missing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import device_counts
import jax
import numpy as np
import pytest

from cs_jax.commands import parser
from cs_jax.core.errors import ConfigError
from cs_jax.experiment.prepare import prepare
from cs_jax.training import processes

HELPERS = Path(__file__).parents[1] / "helpers"
TRAIN = HELPERS.parents[1] / "train.py"
QUICK = (
    "digits --epochs 3 --rounds 1 --rewind-epoch 1 --lr-schedule --lr-drops --controls --checkpoint-seconds 0".split()
)

LOST = (
    "train.py: error: another process of this run has ended or cannot be reached; start all processes again with the "
    "same command to resume from the last checkpoint"
)
"""JAX may have more to say after it."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(words: list[str | Path], folder: Path, each: tuple[list[str], ...] = ([], [])) -> list[subprocess.Popen]:
    """Starts the processes of one run, with two simulated devices each; `each` has their separate arguments."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(len(each))]
    return [
        subprocess.Popen(
            [sys.executable, *words, *own, *place, "--process-id", str(index)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, own in enumerate(each)
    ]


def said(process: subprocess.Popen, timeout: float = 300) -> list[str]:
    """Lines that a process printed, after its end."""
    return process.communicate(timeout=timeout)[0].splitlines()


@pytest.mark.slow
def test_two_processes_of_two_devices_compute_what_one_does(tmp_path: Path) -> None:
    both = start([HELPERS / "device_counts.py", tmp_path, "4x1"], tmp_path)
    with jax.enable_x64(True):
        problem, _ = prepare(device_counts.CONFIG)
        wanted = device_counts.train(problem)
    printed = [said(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    found = np.load(tmp_path / "4x1.npz")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-9, err_msg=name)
        if name.startswith("masks/"):
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_with_a_line_and_goes_on(tmp_path: Path) -> None:
    """A run of two processes is killed, resumed, stopped by SIGTERM to one process, and finished by one process."""
    words = [TRAIN, *QUICK, "--out", "run"]
    leader, worker = start(words, tmp_path)
    _wait_for_checkpoint(tmp_path / "run" / "checkpoints", 1, leader)
    worker.kill()
    killed = time.monotonic()
    lines = said(leader, timeout=60)
    assert time.monotonic() - killed < 60
    assert leader.returncode == 1
    assert LOST in lines
    worker.communicate()

    leader, worker = start(words, tmp_path)
    _wait_for_checkpoint(tmp_path / "run" / "checkpoints", 2, leader)
    worker.send_signal(signal.SIGTERM)
    lines = said(leader), said(worker)
    assert (leader.returncode, worker.returncode) == (143, 143), lines
    assert lines[0][-1] == "train.py: interrupted by SIGTERM; saved: resume with --resume run"
    assert any("resuming search 0 at epoch 1" in line for line in lines[0])
    assert not any("search 0" in line for line in lines[1])  # one tells the user

    alone = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    assert "resuming " in alone.stdout
    assert (tmp_path / "run" / "summary.json").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_an_error_that_nobody_expects_ends_all_processes(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from cs_jax import commands\n"
        "from cs_jax.experiment.storage import run_directory\n"
        "def fail(self, record, progress):\n    raise RuntimeError('unexpected')\n"
        "run_directory.RunDirectory.on_epoch_end = fail\n"
        "commands.exit_process(commands.run_command('train.py', commands.train.train, sys.argv[1:]))\n"
    )
    (tmp_path / "failing.py").write_text(code)
    leader, worker = start([tmp_path / "failing.py", *QUICK, "--out", "run"], tmp_path)
    lines = said(leader, timeout=200)
    assert leader.returncode == 1
    assert "RuntimeError: unexpected" in lines
    assert LOST in said(worker, timeout=60)
    assert worker.returncode == 1


def _wait_for_checkpoint(folder: Path, epochs: int, process: subprocess.Popen) -> None:
    """Waits for a complete checkpoint after the given number of epochs."""
    deadline = time.monotonic() + 200
    while not list(folder.glob(f"{epochs:05d}-[0-9]*[0-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_processes_that_were_started_differently_are_refused_by_name(tmp_path: Path) -> None:
    both = start([TRAIN, *QUICK, "--out", "run"], tmp_path, (["--lr", "0.1"], ["--lr", "0.2"]))
    for process in both:
        line = said(process)[-1]
        assert process.returncode == 2
        assert line.startswith("train.py: error: --lr 0.2 in process 1 on host ")
        assert ": must be the same in every process, but is 0.1 in process 0 on host " in line
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_nobody_answers_for_is_told_in_time(tmp_path: Path) -> None:
    code = (
        "from cs_jax.training import processes\nprocesses.PATIENCE = 1\n"
        f"processes.start('127.0.0.1:{free_port()}', 2, 1, prog='train.py')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("train.py: error: --coordinator 127.0.0.1:")
    assert line.endswith(": not all processes connected within 1 s; start all processes on hosts that reach it")


def test_an_environment_that_names_no_coordinator_is_refused(tmp_path: Path) -> None:
    words = [TRAIN, *QUICK, "--coordinator", "auto"]
    ended = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    message = "train.py: error: --coordinator auto: requires a process started by SLURM, Open MPI, Kubernetes or a TPU"
    assert ended.stderr.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--processes 2", "^--processes 2: requires --coordinator HOST:PORT of the first process$"),
        ("--process-id 0", "^--process-id 0: requires --coordinator HOST:PORT of the first process$"),
    ],
)
def test_words_that_lack_a_coordinator_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parser.parse_train(words.split())


@pytest.mark.parametrize(
    ("coordinator", "count", "index", "message"),
    [
        ("host", 2, 0, "--coordinator 'host': must be HOST:PORT of the first process, with a port of 1 to 65535"),
        ("host:65536", 2, 0, "--coordinator 'host:65536': must be HOST:PORT of the first process, with a port"),
        ("host:1", None, 0, "--coordinator host:1: requires --processes and --process-id"),
        ("host:1", 0, 0, "--processes 0: must be at least 1"),
        ("host:1", 2, 2, "--process-id 2: must be 0 to 1, different in each process"),
    ],
)
def test_a_job_that_cannot_start_is_refused(coordinator: str, count: int, index: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        processes.start(coordinator, count, index, prog="train.py")


def test_one_process_agrees_with_itself() -> None:
    assert processes.agree(3) == 3
    assert processes.from_leader(lambda: {"a": 1}) == {"a": 1}
    processes.check_same_everywhere({"a": 1})
