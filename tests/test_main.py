"""Ctrl-C while `python -m cs_jax` and train.py load libraries, and the handler of SIGINT after that."""

import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cs_jax import commands

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = {"module": ["-m", "cs_jax", "train", "--help"], "script": [str(ROOT / "train.py"), "--help"]}
LIBRARIES = ("jaxlib", "safetensors", "tensorstore")
"""Loaded by JAX, by the package and by its commands: at the start, a third and three quarters of the loading time."""


def is_loaded(library: str, process: int) -> bool:
    return f"/{library}/" in Path(f"/proc/{process}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc shows what a process has loaded")
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_sigint_while_libraries_are_loaded_ends_the_process_without_a_traceback(entry_point: str, library: str) -> None:
    command = [sys.executable, *ENTRY_POINTS[entry_point]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        while process.poll() is None and not is_loaded(library, process.pid):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=60)
    assert shown == ("", "")
    assert process.returncode == -signal.SIGINT


def test_commands_run_with_pythons_own_handler_of_sigint(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[Any] = []
    monkeypatch.setattr(commands, "main", lambda: handlers.append(signal.getsignal(signal.SIGINT)) or 0)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        runpy.run_module("cs_jax", run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.default_int_handler]


@pytest.mark.parametrize("words", [["-m", "other", "cs_jax"], ["-c", "import other", "-m", "cs_jax"]])
def test_other_imports_of_the_package_leave_the_handler_of_sigint_alone(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__main__.py").touch()
    (tmp_path / "other" / "__init__.py").write_text(
        "import signal, cs_jax\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
