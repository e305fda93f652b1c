"""Reports of runs: results shown, missing files named, damaged files refused."""

import dataclasses
import html
import json
import re
import resource
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import safetensors.numpy

from cs_jax import commands, report
from cs_jax.commands import parser
from cs_jax.core.errors import ConfigError
from cs_jax.experiment.storage import config_file, score_histograms

EDGES = score_histograms.SCORE_EDGES


def make_run(
    folder: Path,
    *,
    epochs: int = 4,
    rounds: int = 2,
    layers: tuple[str, ...] = ("conv0/kernel", "block/conv1/kernel", "classifier/kernel"),
    classes: tuple[str, ...] = ("zero", "one", "two", "three"),
    image: tuple[int, int, int] = (8, 8, 1),
    dense: bool = True,
    validation: bool = True,
    empty: bool = False,
    thin: bool = False,
    seed: int = 0,
) -> Path:
    """Makes a run directory with realistic results; a thin run has no layers, scores and predictions."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    given = ["digits", "--epochs", str(epochs), "--rounds", str(rounds), "--rewind-epoch", "0", "--seed", str(seed)]
    given += [] if dense else ["--controls"]
    given += [] if validation else ["--val-set-size", "0"]
    write(
        folder / "config.json",
        {**config_file.to_json(parser.parse(given)), "data": "ab" * 32, "versions": {"cs_jax": "0.1", "jax": "0.9"}},
    )
    sizes = {layer: 200 * (index % 7 + 1) for index, layer in enumerate(layers)}
    shares = 0.0 if empty else rng.uniform(0.05, 0.2, len(layers)) / rounds
    kept = {
        layer: round(float(share) * size)
        for (layer, size), share in zip(sizes.items(), shares + np.zeros(len(layers)), strict=True)
    }
    lines = []
    for phase, round_ in (
        [("search", number) for number in range(rounds)] + [("ticket", None)] + [("dense", None)] * dense
    ):
        for epoch in range(epochs):
            done = (1 + (round_ or 0) * epochs + epoch) / (rounds * epochs) if phase == "search" else 1.0
            layer_density = {
                layer: 1.0 if phase == "dense" else 1 - done * (1 - kept[layer] / sizes[layer]) for layer in layers
            }
            density = sum(layer_density[layer] * sizes[layer] for layer in layers) / sum(sizes.values())
            accuracy = round(1 - 0.8 * 0.7 ** (epoch + 1 + (round_ or 0)), 4)
            lines.append({
                "phase": phase,
                "round": round_,
                "epoch": epoch,
                "temperature": 200.0 ** (epoch / max(1, epochs - 1)) if phase == "search" else None,
                "learning_rate": 0.1,
                "loss": 2.3 * 0.8 ** (epoch + (round_ or 0)) + 0.01,
                "penalty": 0.01,
                "density": density,
                "layer_density": layer_density,
                "soft_accuracy": accuracy if validation and phase == "search" else None,
                "hard_accuracy": accuracy - 0.1 * (phase == "search") if validation else None,
                "images_per_second": 5000.0,
                "seconds": 0.5,
            })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = []
    for number in range(rounds):
        start = {
            layer: histogram(np.full(size, -0.03) if not number else rng.normal(-2, 1, size))
            for layer, size in sizes.items()
        }
        end = {
            layer: histogram(
                np.concatenate([np.exp(rng.normal(0, 1, kept[layer])), -np.exp(rng.normal(0, 1.5, size - kept[layer]))])
            )
            for layer, size in sizes.items()
        }
        entries.append({"round": number, "start": start, "end": end})
    write(folder / "scores.json", {"edges": EDGES.tolist(), "rounds": entries})
    labels = rng.integers(0, len(classes), 300 + 2 * len(classes)).astype(np.int32)
    predicted = labels.copy()
    predicted[::15] = (predicted[::15] + 1) % len(classes)
    mistakes = np.flatnonzero(labels != predicted)[:24].astype(np.int32)
    arrays = {
        "labels": labels,
        "predicted": predicted,
        "confidence": rng.uniform(0.5, 1, len(labels)).astype(np.float32),
        "mistakes": mistakes,
        "images": rng.integers(0, 256, (len(mistakes), *image), dtype=np.uint8),
    }
    safetensors.numpy.save_file(arrays, folder / "predictions.safetensors")
    total, left = sum(sizes.values()), sum(kept.values())
    ticket = {
        "density": left / total,
        "density_all_weights": (left + 50) / (total + 50),
        "num_weights": left + 50,
        "num_all_weights": total + 50,
        "num_masked_weights": total,
        "val_accuracy": 0.95 if validation else None,
        "test_accuracy": float((labels == predicted).mean()),
    }
    reference = {"num_weights": total + 50, "val_accuracy": ticket["val_accuracy"], "test_accuracy": 0.9722}
    summary = {
        "dataset": "digits", "model": "resnet6", "method": "cs", "after": "rewind", "seed": seed, "search": [],
        "ticket": ticket, "dense": reference if dense else None, "controls": {}, "seconds": 34.2,
        "classes": list(classes),
    }  # fmt: skip
    write(folder / "summary.json", summary)
    if thin:
        (folder / "scores.json").unlink()
        (folder / "predictions.safetensors").unlink()
        kept_lines = [
            json.dumps({key: value for key, value in line.items() if key != "layer_density"}) for line in lines
        ]
        (folder / "metrics.jsonl").write_text("\n".join(kept_lines) + "\n")
    return folder


def histogram(scores: np.ndarray) -> list[int]:
    """Numbers of scores in the bins (a, b] between the edges."""
    return np.bincount(np.searchsorted(EDGES, scores) - 1, minlength=len(EDGES) - 1).tolist()


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2))


def edit(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file."""
    write(path, {**json.loads(path.read_text()), **changes})


def page(run: Path) -> str:
    return (run / "report.html").read_text()


def words(text: str) -> str:
    """Visible text of the page."""
    body = re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(body).split())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("reported") / "run")
    report.write_report(run)
    return run


PLOTS = "loss accuracy density temperature layers layers-by-epoch scores-round-0 scores-round-1 confusion".split()


def test_a_report_is_a_page_and_its_plots_as_png(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = set(files(run))
    written = report.write_report(run)
    assert written == [run / "report.html", *(run / f"{name}.png" for name in PLOTS)]
    assert set(files(run)) - before == {path.name for path in written}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    assert page(run).count('src="data:image/svg+xml;base64,') == len(PLOTS)


def test_the_page_says_what_came_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["ticket"] |= {"density": 0.0312, "test_accuracy": 0.9611, "val_accuracy": 0.95, "num_weights": 1234}
    write(run / "summary.json", summary)
    report.write_report(run)
    text = words(page(run))
    assert "−1.11 percentage points vs dense" in text
    assert "ticket 12 1,234 3.12% 95.00% 96.11% dense 4 1,250 100.00% 95.00% 97.22%" in text
    assert "0 4 of 4 52.08% 80.79% 70.79% 1 4 of 4 4.17% 86.55% 76.55%" in text  # rounds
    assert "search 8 4.0 5,000 ticket 4 2.0 5,000 dense 4 2.0 5,000" in text
    assert "conv0/kernel 15 of 200 7.50%" in text
    assert "jax 0.9" in text


def test_controls_have_their_rows_and_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", thin=True)
    edit(run / "config.json", controls=["dense", "shuffled"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines += [line | {"phase": "shuffled", "loss": 0.5} for line in lines if line["phase"] == "dense"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((run / "summary.json").read_text())
    control = {"num_weights": 123, "density": 0.0625, "val_accuracy": 0.9, "test_accuracy": 0.89}
    write(run / "summary.json", {**summary, "controls": {"shuffled": control}})
    report.write_report(run)
    assert "dense 4 1,250 100.00% 95.00% 97.22% shuffled 4 123 6.25% 90.00% 89.00%" in words(page(run))
    assert "dense 4 2.0 5,000 shuffled 4 2.0 5,000" in words(page(run))
    assert re.search(r'alt="Loss by epoch\.[^"]*; shuffled: 0\.5 in epoch 9, 0\.5 in epoch 12\."', page(run))


def test_alternative_texts_tell_the_figures(reported: Path) -> None:
    texts = re.findall(r'<img [^>]*alt="([^"]+)"', page(reported))
    assert len(texts) == page(reported).count("<img ")
    assert texts[0] == (
        "Loss by epoch. search: 2.31 in epoch 1, 0.9521 in epoch 8; ticket: 2.31 in epoch 9, 1.188 in epoch 12; "
        "dense: 2.31 in epoch 9, 1.188 in epoch 12."
    )
    assert "Histogram of 1,200 scores in round 1. 2.58% above 0 before, 4.17% above 0 after." in texts
    assert "Confusion matrix of 4 classes: 287 of 308 examples on the diagonal." in texts
    assert re.match(r"Test example \d+, true class (zero|one|two|three), predicted class ", texts[-1])


def test_the_page_asks_for_nothing_outside_itself(reported: Path) -> None:
    text = page(reported)
    assert re.findall(r'(?:src|href)="(?!data:|#section-)[^"]*"', text) == []
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text


HOSTILE = "<script>alert('x')</script>\"&amp; $\\frac{ \udc80 \u5b57 \x00"


def test_text_out_of_files_is_only_ever_shown(tmp_path: Path) -> None:
    classes, layers = (HOSTILE, "$x^$", "", "<img src=x onerror=alert(1)>"), (HOSTILE, "$_{$", "</svg>")
    run = make_run(tmp_path / "<b>run", classes=classes, layers=layers)
    edit(run / "config.json", dataset=HOSTILE, extra="<script>", versions={"<script>": HOSTILE})
    report.write_report(run)
    text = page(run)
    assert not re.search(r"<(script|b>|img src=x|/svg)", text)
    assert "&lt;script&gt;alert(&#39;x&#39;)" in text


@pytest.mark.parametrize(
    "shape",
    [
        {"epochs": 1, "rounds": 1, "layers": ("kernel",), "classes": ("no", "yes"), "dense": False},
        pytest.param(
            {
                "epochs": 1,
                "rounds": 10,
                "layers": tuple(f"block{index}/kernel" for index in range(160)),
                "image": (224, 224, 3),
            },
            marks=pytest.mark.slow,
        ),
        {"epochs": 1, "rounds": 1, "classes": tuple(f"class {index}" for index in range(40)), "image": (8, 300, 4)},
    ],
    ids=["least", "many-layers-and-rounds", "many-classes"],
)
def test_runs_of_all_sizes_have_a_report_of_some_size(tmp_path: Path, shape: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", **shape)
    written = report.write_report(run)
    assert run / f"scores-round-{shape.get('rounds', 2) - 1}.png" in written
    assert run / "confusion.png" in written
    assert written[0].stat().st_size < 2_000_000


def test_a_thousand_classes_are_told_by_the_pairs_confused_most(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1, classes=tuple(f"c{index}" for index in range(1000)))
    labels, predicted = np.arange(1000, dtype=np.int32).repeat(4), np.arange(1000, dtype=np.int32).repeat(4)
    predicted[[8, 9, 10, 100]] = 7, 7, 7, 999
    arrays = safetensors.numpy.load_file(run / "predictions.safetensors")
    arrays |= {"labels": labels, "predicted": predicted, "confidence": np.full(4000, 0.9, np.float32)}
    arrays |= {"mistakes": np.array([9, 100], np.int32), "images": arrays["images"][:2]}
    safetensors.numpy.save_file(arrays, run / "predictions.safetensors")
    assert run / "confusion.png" not in report.write_report(run)
    text = words(page(run))
    assert "The ticket classifies 3,996 of 4,000 examples correctly." in text
    assert "Share of true class c2 c7 3 75.00% c25 c999 1 25.00% Most confident mistakes" in text
    assert "true c2 predicted c7 confidence 90.00% true c25 predicted c999 confidence 90.00%" in text


def test_a_network_without_mistakes_has_none_to_show(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1)
    arrays = safetensors.numpy.load_file(run / "predictions.safetensors")
    arrays |= {"predicted": arrays["labels"], "mistakes": arrays["mistakes"][:0], "images": arrays["images"][:0]}
    safetensors.numpy.save_file(arrays, run / "predictions.safetensors")
    report.write_report(run)
    text = words(page(run))
    assert "classifies 308 of 308 examples correctly" in text
    assert "Most confused" not in text and "mistakes" not in text


def test_without_validation_set_the_page_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1, validation=False)
    assert run / "accuracy.png" not in report.write_report(run)
    assert "There is no validation accuracy, because the run has no validation set." in words(page(run))
    assert "ticket 8 149 8.25% - 93.18%" in words(page(run))


def test_an_empty_ticket_is_said_to_be_empty(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=1, empty=True)
    report.write_report(run)
    assert "The ticket is empty: no maskable weight is left." in words(page(run))
    assert "3 of 3 layers keep no weights: conv0/kernel, block/conv1/kernel, classifier/kernel." in words(page(run))


def test_a_score_of_zero_is_not_counted_as_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", thin=True)
    counts = {"kernel": histogram(np.array([-1.0, 0.0, 1e-5, 3.0]))}
    write(run / "scores.json", {"edges": EDGES.tolist(), "rounds": [{"round": 0, "start": counts, "end": None}]})
    report.write_report(run)
    assert 'alt="Histogram of 4 scores in round 0. 50.00% above 0 before."' in page(run)


def test_a_search_that_was_killed_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=5)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:40])
    scores = json.loads((run / "scores.json").read_text())
    del scores["rounds"][1]["end"]
    write(run / "scores.json", scores)
    (run / "summary.json").unlink()
    (run / "predictions.safetensors").unlink()
    names = {path.stem for path in report.write_report(run)}
    assert names == {"report", *PLOTS} - {"confusion"}
    text = words(page(run))
    assert "The search has not finished: 7 of 10 epochs." in text
    assert "The last line of metrics.jsonl is cut off and was ignored." in text
    assert "1 2 of 5" in text
    assert "Round 1 has not finished" in text
    assert "predictions.safetensors is missing" in text


@pytest.mark.parametrize(
    "lines, said",
    [
        (0, "The search has not finished: 0 of 8 epochs."),
        (8, "The retraining of the ticket has not finished: 0 of 4 epochs."),
        (11, "The retraining of the ticket has not finished: 3 of 4 epochs."),
        (13, "The training of the control dense has not finished: 1 of 4 epochs."),
        (16, "All epochs have finished, but summary.json is missing."),
    ],
)
def test_the_page_says_how_far_a_run_came(tmp_path: Path, lines: int, said: str) -> None:
    run = make_run(tmp_path / "run", thin=True)
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:lines]
    (run / "metrics.jsonl").write_text("".join(kept))
    (run / "summary.json").unlink()
    report.write_report(run)
    assert said in words(page(run))


def test_a_run_that_has_only_begun_has_a_report_of_its_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in set(files(run)) - {"config.json"}:
        (run / name).unlink()
    assert report.write_report(run) == [run / "report.html"]
    text = words(page(run))
    for name in ("metrics.jsonl", "scores.json", "predictions.safetensors"):
        assert f"{name} is missing" in text or f"{name} has no" in text
    assert "epochs 4 15" in text


@pytest.mark.parametrize(
    "given",
    [
        "fashion-mnist --lr 0.02 --lr-schedule 3 5 --controls dense --mask-initial-value -0.1 --target-density 0.05",
        "digits --controls --seed 3",
        "digits --method imp --after finetune --controls shuffled random --scope layer --prune-rate 0.3",
    ],
)
def test_the_command_in_the_page_repeats_the_run(given: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", thin=True)
    settings = parser.parse([*given.split(), "--data-dir", "a b'c", "--out", str(run)])
    write(run / "config.json", {**config_file.to_json(settings), "data": "ab" * 32})
    report.write_report(run)
    found = re.search(r"<pre><code>(.*?)</code></pre>", page(run))
    assert found
    command = shlex.split(words(found[1]))
    assert command[:2] == ["python", "train.py"]
    assert parser.parse(command[2:]) == dataclasses.replace(settings, out=None)


def test_a_report_is_the_same_when_it_is_made_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", thin=True)
    report.write_report(run)
    first = files(run)
    report.write_report(run)
    assert files(run) == first


def damage_metrics(run: Path, **changes: Any) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **changes})
    (run / "metrics.jsonl").write_text("\n".join(lines))


def damage_predictions(run: Path, **changes: Any) -> None:
    arrays = safetensors.numpy.load_file(run / "predictions.safetensors")
    safetensors.numpy.save_file(arrays | changes, run / "predictions.safetensors")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda run: (run / "config.json").unlink(), "not a run directory; it has no config.json"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not valid JSON: "),
        (lambda run: (run / "config.json").write_bytes(b"\xff"), "config.json: not valid JSON: "),
        (lambda run: (run / "config.json").write_text("[" * 100_000), "config.json: not valid JSON: "),
        (lambda run: (run / "config.json").write_text("3"), "config.json: 3: must be an object"),
        (lambda run: edit(run / "config.json", epochs="4"), "config.json: epochs '4': must be a whole number"),
        (lambda run: edit(run / "config.json", rounds=0), "config.json: rounds 0: must be a whole number >= 1"),
        (lambda run: edit(run / "config.json", versions={"a\nb": 1}), r"config.json: versions.a\\nb 1: must be text"),
        (lambda run: (run / "summary.json").write_text("nothing"), "summary.json: not valid JSON: "),
        (lambda run: edit(run / "summary.json", ticket=None), "summary.json: ticket None: must be an object"),
        (
            lambda run: edit(run / "summary.json", seconds=float("nan")),
            "summary.json: not valid JSON: NaN is not a JSON number",
        ),
        (lambda run: edit(run / "summary.json", seconds=10**400), r"summary.json: seconds 1000.*\.\.\..*: "),
        (lambda run: edit(run / "summary.json", classes=[1]), r"summary.json: classes\[0\] 1: must be text"),
        (lambda run: damage_metrics(run, density=1.5), "line 3: density 1.5: must be a number <= 1.0"),
        (lambda run: damage_metrics(run, phase=3), "line 3: phase 3: must be text"),
        (
            lambda run: damage_metrics(run, round=None),
            "line 3: round None: must be a number in the search, null in other phases",
        ),
        (lambda run: damage_metrics(run, loss=10**400), r"line 3: loss 1000.*\.\.\..*: "),
        (lambda run: damage_metrics(run, loss=True), "line 3: loss True: must be a number"),
        (lambda run: damage_metrics(run, layer_density={"a": "b"}), "line 3: layer_density.a 'b': must be a number"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n{}\n"), "metrics.jsonl, line 1: phase: missing"),
        (lambda run: (run / "metrics.jsonl").write_text("oh\n{}\n"), "metrics.jsonl, line 1: not valid JSON"),
        (
            lambda run: edit(run / "scores.json", edges=[1, 1]),
            "scores.json: edges: must be at least two increasing numbers",
        ),
        (
            lambda run: edit(run / "scores.json", edges=[0, 1]),
            r"scores.json: rounds: layer 'conv0/kernel' has \d+ counts; must have 1$",
        ),
        (
            lambda run: (run / "predictions.safetensors").write_bytes(b"oh"),
            "predictions.safetensors: not a valid safetensors file",
        ),
        (
            lambda run: damage_predictions(run, labels=np.zeros(308)),
            "predictions.safetensors: labels of shape .*308.*, dtype float64: must be integers",
        ),
        (
            lambda run: damage_predictions(run, labels=np.zeros(3, np.int32)),
            "predictions.safetensors: the arrays do not fit",
        ),
        (lambda run: damage_predictions(run, labels=np.full(308, 4, np.int32)), "do not fit each other or the classes"),
        (lambda run: damage_predictions(run, mistakes=np.arange(300, 321, dtype=np.int32)), "do not fit each other"),
        (lambda run: damage_predictions(run, images=np.zeros((3, 8, 8, 1), np.uint8)), "do not fit each other"),
        (lambda run: damage_predictions(run, confidence=np.full(308, np.nan, np.float32)), "do not fit each other"),
        (lambda run: (run / "scores.json").unlink() or (run / "scores.json").mkdir(), "scores.json: not a file"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    run = make_run(tmp_path / "run")
    damage(run)
    before = files(run)
    with pytest.raises(ConfigError, match=said) as caught:
        report.write_report(run)
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)
    assert files(run) == before


def test_what_is_no_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="not a run directory"):
            report.write_report(path)
    assert not (tmp_path / "nothing").exists()


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", thin=True)
    report.write_report(run)
    edit(run / "config.json", seed=17)
    before = files(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(ConfigError, match="cannot write the report: File too large"):
            report.write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(run) == before


def test_a_folder_in_the_way_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", thin=True)
    (run / "loss.png").mkdir()
    before = files(run)
    with pytest.raises(ConfigError, match="loss.png: is a folder"):
        report.write_report(run)
    assert files(run) == before


@pytest.mark.parametrize(
    "given, named", [(["one", "two"], "RUN one two"), (["one", "two", "three", "four"], "RUN one two ...")]
)
def test_the_command_refuses_several_runs_and_names_the_commands_that_compare(
    given: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["report", *given]) == 2
    assert capsys.readouterr().err == (
        f"python -m cs_jax report: error: {named}: must be one run directory; "
        "to compare runs, use python -m cs_jax sweep SPEC and python -m cs_jax pareto SPEC\n"
    )


def test_the_command_has_no_output_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["report", "one", "--out", "there"]) == 2
    assert capsys.readouterr().err == "python -m cs_jax report: error: unrecognized arguments: --out there\n"


def test_drawing_leaves_the_users_settings_of_matplotlib(tmp_path: Path) -> None:
    with matplotlib.rc_context({"text.usetex": True, "font.size": 3.0}):
        before = dict(matplotlib.rcParams)
        report.write_report(make_run(tmp_path / "run", thin=True))
        assert dict(matplotlib.rcParams) == before


FRAMES = """<!DOCTYPE html><title>frames</title><script>
window.onload = () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const broken = [...page.images].filter(image => !image.complete || !image.naturalWidth).length;
    document.body.append(`[${root.clientWidth} ${root.scrollWidth} ${page.images.length} ${broken}]`);
  }
};
</script><body><iframe scrolling="no" width="1200" height="900" style="border: 0" src="report.html"></iframe>
<iframe scrolling="no" width="400" height="900" style="border: 0" src="report.html"></iframe>"""


def test_a_browser_shows_the_page_without_complaint_request_or_sideways_scrolling(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    run = make_run(tmp_path / "run", classes=(HOSTILE, "x" * 200, "y", "z"), layers=("long/" * 40, "b", "c"), epochs=1)
    summary = json.loads((run / "summary.json").read_text())
    summary["ticket"]["num_weights"] = 2**53  # makes a table wider than a telephone
    write(run / "summary.json", summary)
    report.write_report(run)
    (run / "frames.html").write_text(FRAMES)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-extensions --allow-file-access-from-files "
        "--enable-logging=stderr --v=0 --dump-dom --window-size=1300,1000"
    )
    command = [browser, *flags.split(), "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}"]
    shown = subprocess.run([*command, (run / "frames.html").as_uri()], capture_output=True, text=True, timeout=60)
    number = page(run).count("<img ")
    measured = re.findall(r"\[(\d+) (\d+) (\d+) (\d+)\]", shown.stdout)
    assert [tuple(map(int, sizes)) for sizes in measured] == [(1200, 1200, number, 0), (400, 400, number, 0)]
    assert "CONSOLE" not in shown.stderr
    asked = re.findall(r'"initiator":"([^"]*)"[^\n]*"url":"(?:http|ws|ftp)s?://', (tmp_path / "net.json").read_text())
    assert set(asked) <= {"not an origin"}  # the browser itself asks for what no page did
