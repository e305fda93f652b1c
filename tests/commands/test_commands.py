"""`python -m cs_jax`, signals, and runs that go on, as users meet them."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import kill_resume
import numpy as np
import pytest
import safetensors.numpy

import cs_jax
from cs_jax.commands import main, parser
from cs_jax.experiment import run as commands
from cs_jax.experiment.observers.tracking import Tracker
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.storage import score_histograms
from cs_jax.experiment.storage.paths import (
    CONTROLS_FILE,
    MASKS_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    TICKET_FILE,
)
from cs_jax.experiment.storage.score_histograms import SCORE_EDGES

QUICK = "--model lenet300100 --epochs 2 --rounds 2 --rewind-epoch 1 --lr 0.01 --controls --no-report".split()
LONG = [*QUICK, "--epochs", "500", "--checkpoint-seconds", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", *QUICK, "--out", str(folder)]) == 0
    return folder


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", shown, re.MULTILINE) for name in ("train", "ticket", "verify", "report"))


@pytest.mark.parametrize("name", ["train", "ticket", "verify", "report"])
def test_each_command_has_a_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert not stop.value.code and f"python -m cs_jax {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["tran"],
            "python -m cs_jax: error: command 'tran': must be one of train, ticket, verify, shrink, speed, report, ",
        ),
        (["ticket"], "python -m cs_jax ticket: error: the following arguments are required: FILE"),
        (["ticket", "nowhere"], "python -m cs_jax ticket: error: nowhere: "),
        (["verify", "nowhere", "digits"], "python -m cs_jax verify: error: nowhere: "),
        (["report", "nowhere"], "python -m cs_jax report: error: "),
        (["train", "--epoch", "3"], "python -m cs_jax train: error: --epoch: unknown flag (did you mean --epochs?)"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert one_line(capsys).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_ticket_prints_what_is_in_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ticket", str(run / TICKET_FILE)]) == 0
    shown = capsys.readouterr().out
    density = json.loads((run / "summary.json").read_text())["ticket"]["density"]
    assert "lenet300100" in shown and "hidden1/kernel" in shown and f"{density:.2%}" in shown


def test_verify_measures_the_accuracy_that_was_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run / TICKET_FILE), "digits", "--batch-size", "100"]) == 0
    accuracy = json.loads((run / "summary.json").read_text())["ticket"]["test_accuracy"]
    line = capsys.readouterr().out
    assert f"test accuracy on digits {accuracy:.2%}, recorded {accuracy:.2%}" in line


def test_verify_takes_the_name_of_a_preset_for_its_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", str(run / TICKET_FILE), "fashion-mnist", "--data-dir", str(tmp_path)]
    assert main(words) == 2
    assert "--dataset fashion_mnist: is not in" in capsys.readouterr().err


def saved_again(run: Path, path: Path, **changes: Any) -> Path:
    """The run's ticket with other metadata."""
    ticket = cs_jax.load_ticket(run / TICKET_FILE)
    cs_jax.save_ticket(path, **ticket.variables, metadata=ticket.metadata | changes)
    return path


def test_verify_tells_an_accuracy_that_is_not_the_recorded_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saved_again(run, tmp_path / "other.safetensors", accuracy={"val_accuracy": 0.1, "test_accuracy": 0.25})
    assert main(["verify", str(other), "digits"]) == 1
    shown = capsys.readouterr()
    assert "recorded 25.00%" in shown.out
    assert shown.err.startswith("python -m cs_jax verify: error: ") and "differs from the recorded 25.00%" in shown.err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": None}, "custom model or no normalization; this command supports tickets of train.py only"),
        ({"normalization": None}, "this command supports tickets of train.py only"),
        (
            {"model": {"name": "lenet300100", "num_classes": 10, "image_shape": [4, 16, 1]}, "classes": None},
            "ticket for images of shape (4, 16, 1); digits has images of shape (8, 8, 1)",
        ),
    ],
)
def test_verify_refuses_a_ticket_for_something_else(
    changes: dict[str, Any], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {name: value for name, value in changes.items() if value is not None}
    ticket = cs_jax.load_ticket(run / TICKET_FILE)
    metadata = {name: value for name, value in ticket.metadata.items() if name not in changes} | kept
    path = tmp_path / "other.safetensors"
    cs_jax.save_ticket(path, **ticket.variables, metadata=metadata)
    assert main(["verify", str(path), "digits"]) == 2
    assert message in one_line(capsys)


def test_the_ticket_of_a_run_holds_what_its_files_say(run: Path) -> None:
    ticket = cs_jax.load_ticket(run / TICKET_FILE)
    summary = json.loads((run / "summary.json").read_text())
    assert ticket.density == summary["ticket"]["density"] == cs_jax.density(ticket.variables["masks"])
    assert ticket.rewound is not None and ticket.model == cs_jax.models.LeNet300100(num_classes=10)
    stored = json.loads((run / "config.json").read_text())
    assert ticket.metadata["config"].items() <= stored.items()
    text = (run / TICKET_FILE).read_bytes()
    assert str(run).encode() not in text and b"data_dir" not in text and b'"out"' not in text


def test_predictions_are_those_of_the_ticket_in_the_file(run: Path) -> None:
    predictions = safetensors.numpy.load_file(run / PREDICTIONS_FILE)
    summary = json.loads((run / "summary.json").read_text())
    wrong = predictions["predicted"] != predictions["labels"]
    assert 1 - wrong.mean() == pytest.approx(summary["ticket"]["test_accuracy"], abs=1e-12)
    mistakes = predictions["mistakes"]
    assert wrong[mistakes].all() and len(mistakes) == min(wrong.sum(), 24) == len(predictions["images"])
    assert (np.diff(predictions["confidence"][mistakes]) <= 0).all()


def test_histograms_of_scores_count_what_is_kept(run: Path) -> None:
    stored = json.loads((run / SCORES_FILE).read_text())
    metrics = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    assert stored["edges"] == SCORE_EDGES.tolist() and [entry["round"] for entry in stored["rounds"]] == [0, 1]
    above = np.array(stored["edges"][:-1]) >= 0
    for entry, last in zip(stored["rounds"], (metrics[1], metrics[3]), strict=True):
        for name, counts in entry["end"].items():
            size = {"hidden0/kernel": 64 * 300, "hidden1/kernel": 300 * 100}[name]
            assert sum(counts) == size == sum(entry["start"][name])
            assert sum(np.array(counts)[above]) / size == last["layer_density"][name]


@pytest.mark.parametrize("score, bin", [(0.0, 64), (1e-9, 65), (-1e-9, 64), (1e9, 129), (-1e9, 0), (-1e-3, 55)])
def test_a_score_of_zero_counts_as_removed_and_none_is_lost(score: float, bin: int) -> None:
    counts = score_histograms.score_counts(jax.numpy.full((3,), score))
    assert counts.sum() == 3 == counts[bin]
    lower, upper = SCORE_EDGES[bin], SCORE_EDGES[bin + 1]
    assert lower < np.clip(np.float32(score), -9999, 9999) <= upper


class Listed(Tracker):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, step: int, scalars: Any, histograms: Any) -> None:
        assert step == len(self.losses)
        self.losses += [value for tag, value in scalars.items() if tag.endswith("/loss")]


def test_a_run_from_python_tells_its_trackers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Listed()
    summary = commands.run(parser.parse([*QUICK, "--out", str(tmp_path / "run")]), trackers=[tracker])
    metrics = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert tracker.losses == [line["loss"] for line in metrics]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())


@contextlib.contextmanager
def started(folder: Path, *words: str) -> Any:
    """A long run in a process of its own, in its first epochs."""
    command = [sys.executable, "-m", "cs_jax", "train", *LONG, *words, "--out", "run"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        while not process.stdout.readline().startswith("search 0"):
            assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143_and_the_run_goes_on(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == 143
    assert error == "python -m cs_jax train: interrupted by SIGTERM; saved: resume with --resume run\n"
    epochs = (tmp_path / "run" / METRICS_FILE).read_text().count("\n")
    command = [sys.executable, "-m", "cs_jax", "train", "--resume", "run"]
    again = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert again.stdout is not None
    first = again.stdout.readline()
    again.kill()
    again.communicate()
    assert re.fullmatch(rf"resuming search 0 at epoch {epochs}, step \d+\n", first)


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.02, 0.1])
def test_a_second_sigterm_does_not_lose_the_save(gap: float, tmp_path: Path) -> None:
    with started(tmp_path, "--checkpoint-seconds", "1000") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(gap)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert error.endswith("interrupted by SIGTERM; saved: resume with --resume run\n")
    assert process.returncode == 143
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("0*") if path.suffix == ""] != []


@pytest.mark.slow
def test_a_second_process_is_refused_with_the_first_ones_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with started(tmp_path) as process:
        before = (tmp_path / "run" / "config.json").read_bytes()
        assert main(["train", "--resume", "run"]) == 2
        assert f"run: process {process.pid} on host" in one_line(capsys)
        assert (tmp_path / "run" / "config.json").read_bytes() == before
        assert process.poll() is None
        assert json.loads((tmp_path / "run" / "run.lock").read_text())["process"] == process.pid


def listening(script: str) -> subprocess.Popen[str]:
    """A process that runs a script, once that has printed "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_second_sigint_ends_the_process_at_once_even_while_it_computes(tmp_path: Path) -> None:
    script = (
        "import time, signal, os, ctypes\n"
        "from cs_jax.experiment.observers.interrupts import Interrupts\n"
        "with Interrupts() as watch, watch.held():\n"
        "    print('ready', flush=True)\n"
        "    ctypes.CDLL(None).usleep.argtypes = [ctypes.c_uint]\n"
        "    deadline = time.monotonic() + 30\n"
        "    while time.monotonic() < deadline: ctypes.CDLL(None).usleep(20_000_000)\n"
    )
    process = listening(script)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=5)
    assert process.returncode == 130
    assert error == "ended at once; run the same command to resume from the last checkpoint\n"


@pytest.mark.slow
def test_a_signal_that_has_to_wait_is_told_to_be_heard() -> None:
    script = (
        "import time\n"
        "from cs_jax.experiment.observers.interrupts import Interrupts, Stopped\n"
        "with Interrupts() as watch, watch.held():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(3)\n"
    )
    process = listening(script)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert error == "stopping after this step or compilation; press Ctrl-C again to end at once without saving\n"


def test_a_ctrl_c_that_a_forked_child_hears_too_counts_once() -> None:
    script = (
        "import os, time\n"
        "from cs_jax.experiment.observers.interrupts import Interrupts, Stopped\n"
        "with Interrupts() as watch, watch.held():\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(3)\n"
        "        os._exit(0)\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(1)\n"
        "    try: watch.check()\n"
        "    except Stopped: print('stopped', flush=True)\n"
    )
    process = listening(script)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=20)
    assert (shown, process.returncode) == ("stopped\n", 0)


@pytest.mark.parametrize("line", ["{}", "no json", "[1]"])
def test_a_line_of_metrics_that_is_none_is_told_before_anything_is_trained(
    line: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(run, tmp_path)
    lines = (folder / METRICS_FILE).read_text().splitlines()
    (folder / METRICS_FILE).write_text("\n".join([lines[0], line, *lines[2:], ""]))
    assert main(["train", "--resume", str(folder)]) == 2
    assert "its metrics.jsonl is damaged" in one_line(capsys)


def test_metrics_that_lack_epochs_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    (folder / METRICS_FILE).write_text("")
    assert main(["train", "--resume", str(folder)]) == 2
    told = "its metrics.jsonl is damaged: not all 6 finished epochs have a valid line; remove "
    told += f"{folder / 'checkpoints'} to start from scratch"
    assert f"{folder}: {told}" in one_line(capsys)


@pytest.mark.parametrize("content", ["", "{", '{"edges": [], "rounds": []}'])
def test_scores_that_lack_rounds_are_told_before_anything_is_trained(
    content: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(run, tmp_path)
    (folder / SCORES_FILE).write_text(content)
    assert main(["train", "--resume", str(folder)]) == 2
    assert (
        f"{folder}: its scores.json lacks finished rounds; remove {folder / 'checkpoints'} to start from scratch"
        in one_line(capsys)
    )


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_masks_that_lack_rounds_are_told_before_anything_is_trained(
    content: bytes | None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unfinished(run, tmp_path) / MASKS_FILE
    path.unlink() if content is None else path.write_bytes(content)
    assert main(["train", "--resume", str(path.parent)]) == 2
    told = f"its masks.safetensors lacks finished rounds; remove {path.parent / 'checkpoints'} to start from scratch"
    assert f"{path.parent}: {told}" in one_line(capsys)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"reinit": {}}'])
def test_results_of_controls_that_are_lost_are_told_before_anything_is_trained(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], run_with_controls: Path
) -> None:
    folder = unfinished(run_with_controls, tmp_path)
    (folder / CONTROLS_FILE).write_text(content)
    assert main(["train", "--resume", str(folder)]) == 2
    assert f"{folder}: its controls.json lacks finished controls; remove " in one_line(capsys)


@pytest.fixture(scope="module")
def run_with_controls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls") / "run"
    settings = parser.parse([*QUICK, "--rounds", "1", "--out", str(folder)])
    commands.run(dataclasses.replace(settings, controls=("dense", "reinit")))
    return folder


def test_without_a_checkpoint_a_run_begins_again_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(run, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    assert main(["train", "--resume", str(folder)]) == 0
    assert "no checkpoint yet: starting from scratch\n" in capsys.readouterr().out
    assert (folder / TICKET_FILE).read_bytes() == (run / TICKET_FILE).read_bytes()
    assert (folder / SCORES_FILE).read_bytes() == (run / SCORES_FILE).read_bytes()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_finished_run_without_its_ticket_says_how_to_make_it_again(
    damage: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    damage(folder / TICKET_FILE)
    assert main(["train", "--resume", str(folder)]) == 2
    line = one_line(capsys)
    assert f"{folder / TICKET_FILE}: " in line and f"remove {folder / 'summary.json'} and run the same command" in line
    (folder / "summary.json").unlink()
    assert main(["train", "--resume", str(folder)]) == 0
    assert (folder / TICKET_FILE).read_bytes() == (run / TICKET_FILE).read_bytes()


def test_a_loaded_ticket_normalises_images_as_in_training(run: Path) -> None:
    ticket = cs_jax.load_ticket(run / TICKET_FILE)
    _, data = prepare(parser.parse(QUICK))
    logits = ticket.model.apply(ticket.variables, ticket.normalize(data.test.images), train=False)
    right = float((jax.numpy.argmax(logits, axis=-1) == data.test.labels).mean())
    assert right == pytest.approx(json.loads((run / "summary.json").read_text())["ticket"]["test_accuracy"], abs=1e-6)


def test_a_half_written_line_of_metrics_is_written_again(run: Path, tmp_path: Path) -> None:
    folder = unfinished(run, tmp_path)
    before = (folder / METRICS_FILE).read_bytes()
    with open(folder / METRICS_FILE, "ab") as file:
        file.write(b'{"phase": "tick')
    assert main(["train", "--resume", str(folder)]) == 0
    assert (folder / METRICS_FILE).read_bytes() == before
    assert (folder / TICKET_FILE).read_bytes() == (run / TICKET_FILE).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number, kills", [(signal.SIGKILL, 6), (signal.SIGTERM, 2)])
def test_runs_that_are_killed_at_any_moment_end_with_the_same_bytes(
    number: signal.Signals, kills: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run: anywhere, in the search, at the reset, at the rewind, in the retraining, while saving."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = "digits --epochs 3 --lr-schedule 2 --lr-drops 0.1 --no-report --controls --checkpoint-seconds 0.3".split()
    words += ["--max-train-examples", "640"]
    assert kill_resume.main(kills, number, seed=0, words=words) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"{kills} of {kills} ended with the same bytes"


def unfinished(run: Path, tmp_path: Path) -> Path:
    """A copy of a run that has everything but its end."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in ("summary.json", TICKET_FILE):
        (folder / name).unlink()
    return folder


def test_a_run_goes_on_with_other_versions_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(run, tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    stored["versions"] |= {"optax": "0.0.1", "cores": "1000"}
    (folder / "config.json").write_text(json.dumps(stored))
    assert main(["train", "--resume", str(folder)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming with")]
    assert re.fullmatch(r"resuming with optax [\d.]+, started with 0.0.1: results may .*", lines[0])
    assert re.fullmatch(r"resuming with cores \d+, started with 1000: results may .*", lines[1]) and len(lines) == 2


def test_a_run_does_not_go_on_with_other_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unfinished(run, tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "data": "0" * 64}))
    assert main(["train", "--resume", str(folder)]) == 2
    differ = f"--dataset digits: its examples differ from the examples at the start of {folder}; use --data-dir"
    assert differ in one_line(capsys)


def test_a_finished_run_without_its_report_gets_one(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert not (folder / "report.html").exists()
    assert main(["train", "--resume", str(folder), "--report"]) == 0
    assert "<title>" in (folder / "report.html").read_text()
