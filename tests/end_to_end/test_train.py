"""`train.py` from the user's side: results, files, plain output, and errors."""

import contextlib
import io
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
import numpy as np
import pytest
from rich.console import Console

import train
from cs_jax import apply_masks
from cs_jax.commands import parser
from cs_jax.data.load import fingerprint
from cs_jax.experiment import pipeline, prepare, search
from cs_jax.experiment.experiment import Experiment
from cs_jax.experiment.observers.interrupts import Interrupts, Stopped
from cs_jax.experiment.observers.terminal import ProgressDisplay
from cs_jax.experiment.storage.paths import CONTROLS_FILE, TICKET_FILE
from cs_jax.experiment.storage.run_directory import open_run_directory

ROOT = Path(train.__file__).parent
QUICK = "--model lenet300100 --epochs 2 --rounds 2 --rewind-epoch 1 --lr 0.01".split()


def prepared(name: str) -> str:
    """Folder of prepared data sets; skips the test if data set `name` is missing there."""
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"TFDS_DATA_DIR ({folder or 'not set'}) holds no prepared {name}")
    return folder


def run_script(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick") / "run"
    assert train.main([*QUICK, "--out", str(folder)]) == 0
    return folder


def test_metrics_have_a_line_an_epoch(quick_run: Path) -> None:
    metrics = read_metrics(quick_run)
    assert [(line["phase"], line["round"], line["epoch"]) for line in metrics] == [
        ("search", 0, 0), ("search", 0, 1), ("search", 1, 0), ("search", 1, 1),
        ("ticket", None, 0), ("ticket", None, 1), ("dense", None, 0), ("dense", None, 1),
    ]  # fmt: skip
    keys = "phase round epoch temperature learning_rate loss penalty density layer_density flip_rate soft_accuracy"
    keys += " hard_accuracy images_per_second seconds"
    assert all(list(line) == keys.split() for line in metrics)


def test_the_summary_agrees_with_the_metrics(quick_run: Path) -> None:
    summary, metrics = json.loads((quick_run / "summary.json").read_text()), read_metrics(quick_run)
    assert (summary["dataset"], summary["model"], summary["seed"]) == ("digits", "lenet300100", 0)
    for record, line in zip(summary["search"], (metrics[1], metrics[3]), strict=True):
        assert {key: line[key] for key in record} == record
    assert (summary["method"], summary["after"], summary["controls"]) == ("cs", "rewind", {})
    ticket, dense = summary["ticket"], summary["dense"]
    assert json.loads((quick_run / CONTROLS_FILE).read_text()) == {"dense": dense}
    assert ticket["density"] == metrics[3]["density"] == metrics[5]["density"]
    assert ticket["val_accuracy"] == metrics[5]["hard_accuracy"]
    assert dense["val_accuracy"] == metrics[7]["hard_accuracy"]
    assert 0 <= ticket["test_accuracy"] <= 1
    everything = 64 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    masked = 64 * 300 + 300 * 100
    assert (dense["num_weights"], ticket["num_all_weights"]) == (everything, everything)
    assert ticket["num_weights"] == round(ticket["density"] * masked) + everything - masked
    assert ticket["density_all_weights"] == ticket["num_weights"] / everything
    assert (dense["num_all_weights"], dense["density"], dense["density_all_weights"]) == (everything, 1.0, 1.0)


def test_the_summary_says_what_each_network_cost(quick_run: Path) -> None:
    summary, metrics = json.loads((quick_run / "summary.json").read_text()), read_metrics(quick_run)
    ticket, dense = summary["ticket"], summary["dense"]
    assert (ticket["epochs"], dense["epochs"]) == (6, 2)
    an_epoch = 6 * (64 * 300 + 300 * 100 + 100 * 10) * 1257  # an addition and a multiplication, forward and twice back
    assert (ticket["training_flops"], dense["training_flops"]) == (6 * an_epoch, 2 * an_epoch)
    assert ticket["seconds"] == pytest.approx(sum(line["seconds"] for line in metrics[:6]), rel=1e-12)
    assert dense["seconds"] == pytest.approx(sum(line["seconds"] for line in metrics[6:]), rel=1e-12)
    assert summary["seconds"] == pytest.approx(ticket["seconds"] + dense["seconds"], rel=1e-12)


def test_test_accuracy_is_that_of_the_retrained_ticket_on_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parser.parse([*QUICK, "--controls", "--seed", "4", "--out", str(tmp_path / "run")])
    problem, data = prepare.prepare(settings)
    states = []
    retrain = search.retrain
    monkeypatch.setattr(search, "retrain", lambda *args, **kwargs: states.append(retrain(*args, **kwargs)) or states[0])
    with open_run_directory(settings, new=True) as directory:
        directory.begin(fingerprint(data))
        summary = pipeline.run(Experiment(settings, problem, data=data, directory=directory))
    weights = jax.tree.map(np.asarray, apply_masks(states[0].params, states[0].masks))
    x = (np.asarray(data.test.images, np.float32) - np.asarray(data.test.mean)) / np.asarray(data.test.std)
    x = x.reshape(360, -1)
    for layer in ("hidden0", "hidden1"):
        x = np.maximum(x @ weights[layer]["kernel"] + weights[layer]["bias"], 0)
    logits = x @ weights["classifier"]["kernel"] + weights["classifier"]["bias"]
    right = int((np.argmax(logits, axis=1) == data.test.labels).sum())
    assert summary["ticket"]["test_accuracy"] == right / 360


def test_a_terminal_shows_the_bar_with_step_and_loss(tmp_path: Path) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100)
    settings = parser.parse([*QUICK, "--controls", "--out", str(tmp_path / "run")])
    problem, data = prepare.prepare(settings)
    with open_run_directory(settings, new=True) as directory, ProgressDisplay(terminal, total_epochs=6) as display:
        directory.begin(fingerprint(data))
        pipeline.run(Experiment(settings, problem, display, data=data, directory=directory))
    text = shown.getvalue()
    assert re.search(r"search 0 epoch 0 step \d+/20 loss \d\.\d{4}", text)
    assert re.search(r"ticket +1 +\d\.\d{4}", text)


@pytest.mark.parametrize("number, exit_code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_was_swallowed_comes_again_at_the_next_step(number: signal.Signals, exit_code: int) -> None:
    before = signal.getsignal(number)
    with Interrupts() as watch:
        with contextlib.suppress(KeyboardInterrupt):  # as a library's callback does
            os.kill(os.getpid(), number)
            time.sleep(1)
        with pytest.raises(Stopped) as stop:
            watch.on_batch()
    assert stop.value.exit_code == exit_code
    assert signal.getsignal(number) is before


def test_a_signal_waits_for_the_next_step_while_a_run_is_held() -> None:
    with Interrupts() as watch:
        with watch.held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # nothing is raised
            with pytest.raises(Stopped):
                watch.check()


def test_an_empty_ticket_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*QUICK, "--mask-initial-value", "-5", "--score-lr", "1e-9", "--controls", "--out", str(tmp_path / "run")]
    assert train.main(words) == 0
    assert "The ticket is empty" in capsys.readouterr().out


def test_the_config_file_says_what_was_asked_and_with_what(quick_run: Path) -> None:
    stored = json.loads((quick_run / "config.json").read_text())
    assert (stored["model"], stored["epochs"], stored["seed"], stored["lr_schedule"]) == ("lenet300100", 2, 0, [10, 13])
    assert {"cs_jax", "jax", "flax", "optax", "device"} <= stored["versions"].keys()


def test_the_same_command_gives_the_same_numbers(quick_run: Path, tmp_path: Path) -> None:
    assert train.main([*QUICK, "--out", str(tmp_path / "again")]) == 0

    def figures(folder: Path) -> list[dict[str, Any]]:
        return [{**line, "seconds": None, "images_per_second": None} for line in read_metrics(folder)]

    assert figures(quick_run) == figures(tmp_path / "again")
    assert (quick_run / TICKET_FILE).read_bytes() == (tmp_path / "again" / TICKET_FILE).read_bytes()


@pytest.mark.slow
def test_plain_lines_and_the_table_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*QUICK, "--val-set-size", "0", "--controls", "--out", str(tmp_path / "run")]
    assert train.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "phase"
    assert [line[:8].strip() for line in lines[1:7]] == ["search 0"] * 2 + ["search 1"] * 2 + ["ticket"] * 2
    assert max(map(len, lines[:-1])) <= 80  # the last line holds a path
    assert not any("\x1b" in line or "\r" in line for line in lines)
    assert "dense" not in "".join(lines)
    assert any(line.split()[:1] == ["ticket"] and "%" in line for line in lines[7:])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dense"] is None
    assert not (tmp_path / "run" / CONTROLS_FILE).exists()


@pytest.mark.slow
def test_digits_end_with_a_small_and_good_ticket(tmp_path: Path) -> None:
    """Runs the default command in a new process and folder."""
    result = run_script(cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    summary = json.loads((tmp_path / "runs" / "digits-seed0" / "summary.json").read_text())
    ticket, dense = summary["ticket"], summary["dense"]
    assert ticket["density"] <= 0.04
    assert ticket["test_accuracy"] >= max(0.98, dense["test_accuracy"] - 0.01)


@pytest.mark.slow
def test_fashion_mnist_from_the_prepared_set(tmp_path: Path) -> None:
    words = "fashion-mnist --model lenet300100 --epochs 2 --rounds 1 --rewind-epoch 1".split()
    words += ["--max-train-examples", "6400"]
    words += ["--data-dir", prepared("fashion_mnist"), "--out", str(tmp_path / "run")]
    assert train.main(words) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ticket"]["test_accuracy"] > 0.5


@pytest.mark.slow
def test_cifar10_from_the_prepared_set(tmp_path: Path) -> None:
    words = "cifar10 --model lenet300100 --epochs 1 --rounds 1 --rewind-epoch 0 --max-train-examples 256".split()
    words += ["--val-set-size", "256", "--no-report", "--controls"]
    words += ["--data-dir", prepared("cifar10"), "--out", str(tmp_path / "run")]
    assert train.main(words) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ticket"]["num_all_weights"] == 953_010


@pytest.mark.parametrize(
    "words, message",
    [
        (["digit"], "preset digit: must be one of digits, "),
        (["--epochs", "none"], "--epochs none: must be a whole number"),
        (["--val-set-size", "1437"], "--val-set-size 1437: must be less than 1437, the number of training examples"),
        (["--batch-size", "1258"], "--batch-size 1258: must be at most 1257, the number of training examples"),
        (["--dataset", "imagenet", "--data-dir", "."], "--dataset 'imagenet': must be digits or a name in"),
        (["cifar10", "--data-dir", "nowhere"], "--dataset cifar10: is not in nowhere"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"train.py: error: {message}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_shows_its_result_again_and_trains_nothing(
    quick_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "prepare", None)  # not even its data is loaded
    before = contents(quick_run)
    for words in ([*QUICK, "--out", str(quick_run)], ["--resume", str(quick_run), "--keep", "9"]):
        assert train.main(words) == 0
        assert re.search(r"ticket +[\d,]+ +\d", capsys.readouterr().out)
    assert contents(quick_run) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", "1"], "holds a run with other settings: --seed 1 (was 0); choose another --out, or resume"),
        (["--model", "resnet6"], "--model resnet6 (was lenet300100)"),
        (["--lr-schedule", "1", "--lr-drops", "0.5"], "--lr-schedule 1 (was 10 13), --lr-drops 0.5 (was 0.1 0.1)"),
    ],
)
def test_a_run_does_not_go_on_with_settings_that_change_its_result(
    words: list[str], message: str, quick_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(quick_run)
    assert train.main([*QUICK, *words, "--out", str(quick_run)]) == 2
    assert train.main(["--resume", str(quick_run), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(message in line for line in lines)
    assert contents(quick_run) == before


def _damaged(run: Path, change: Any) -> None:
    stored = json.loads((run / "config.json").read_text())
    change(stored)
    (run / "config.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: (run / "config.json").unlink(), ": not a run directory; it has no config.json"),
        (lambda run: shutil.rmtree(run), ": not a run directory; it has no config.json"),
        (lambda run: (run / "config.json").write_text("{"), "its config.json is damaged"),
        (lambda run: (run / "config.json").write_text("[]"), "its config.json is damaged"),
        (
            lambda run: _damaged(run, lambda stored: stored["versions"].update(cs_jax="0.0.9")),
            ": the run was made by cs_jax 0.0.9, but this is cs_jax ",
        ),
        (
            lambda run: _damaged(run, lambda stored: stored.pop("epochs")),
            "its config.json is not valid: stored settings: epochs: missing",
        ),
        (
            lambda run: _damaged(run, lambda stored: stored.update(magic=1)),
            "its config.json is not valid: stored settings: magic: unknown",
        ),
        (
            lambda run: _damaged(run, lambda stored: stored.update(epochs="2")),
            "its config.json is not valid: stored settings: epochs '2': must be a whole number",
        ),
        (lambda run: (run / "summary.json").write_text("{"), "its summary.json is damaged; remove "),
        (lambda run: (run / "summary.json").write_text("{}"), "its summary.json is damaged; remove "),
    ],
)
def test_what_is_no_run_or_a_damaged_one_cannot_be_resumed(
    damage: Any, message: str, quick_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(quick_run, run)
    damage(run)
    before = contents(tmp_path)
    assert train.main(["--resume", str(run)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize("done", range(4))
def test_a_run_that_was_killed_as_it_began_begins_again(done: int, tmp_path: Path) -> None:
    names = ["run.lock", "metrics.jsonl", "scores.json", ".0123.tmp"]
    for name in names[: done + 1]:
        (tmp_path / name).write_text("{")
    assert train.main([*QUICK, "--controls", "--no-report", "--epochs", "2", "--out", str(tmp_path)]) == 0
    assert len(read_metrics(tmp_path)) == 6 and not (tmp_path / ".0123.tmp").exists()


def test_a_folder_that_is_not_empty_and_holds_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").write_text("mine")
    assert train.main([*QUICK, "--out", str(tmp_path)]) == 2
    assert ": not empty and not a run directory; choose an empty or new one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    "out, message",
    [("x" * 300, "cannot be used"), ("file", "is a file"), ("file/run", "cannot be created")],
)
def test_a_run_directory_that_cannot_be_made_is_refused(
    out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert train.main([*QUICK, "--out", str(tmp_path / out)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("train.py: error: --out ") and message in shown and shown.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*QUICK, "--lr", "1e30", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train.py: stopped: loss is nan in round 0, epoch 0, step ")
    assert error.count("\n") == 1


def test_an_unknown_flag_ends_the_process_with_exit_code_2(tmp_path: Path) -> None:
    result = run_script("--epoch", "3", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("train.py: error: --epoch: unknown flag (did you mean --epochs?)")
    assert result.stderr.count("\n") == 1
    assert (result.stdout, list(tmp_path.iterdir())) == ("", [])


def test_an_interrupt_ends_the_process_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *QUICK, "--epochs", "500", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("phase")
    assert process.stdout.readline().startswith("search 0")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "train.py: interrupted by SIGINT; saved: resume with --resume run\n"
    assert len(read_metrics(tmp_path / "run")) >= 1
