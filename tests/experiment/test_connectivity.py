"""Error and loss on the line between two networks, and between two retrainings of a ticket."""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console
from rich.progress import Progress

from cs_jax import apply_masks, commands, load_ticket, save_ticket
from cs_jax.commands import report
from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import Lock
from cs_jax.data.images import ImageSet
from cs_jax.experiment import connectivity, search
from cs_jax.experiment.connectivity import Line, Retraining
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.progress import Observer
from cs_jax.experiment.storage.paths import CONNECTIVITY_FILE, LOCK_FILE, TICKET_FILE
from cs_jax.models import LeNet300100, ResNet
from cs_jax.training import step
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Snapshot
from cs_jax.training.step import Recipe


def test_interpolation_is_linear_and_keeps_structure_and_dtype() -> None:
    start = {"a": jnp.array([0.0, 8.0]), "b": [np.array([[1.0]]), jnp.array(2.0, jnp.bfloat16)]}
    end = {"a": jnp.array([4.0, -8.0]), "b": [np.array([[3.0]]), jnp.array(6.0, jnp.bfloat16)]}
    found = connectivity.interpolate(start, end, 0.25)
    expected = {"a": np.array([1.0, 4.0]), "b": [np.array([[1.5]]), np.array(3.0)]}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [jnp.float32, np.float64, jnp.bfloat16]


def test_the_way_between_far_ends_does_not_overflow_narrow_floats() -> None:
    found = connectivity.interpolate({"a": np.array([6e4], np.float16)}, {"a": np.array([-6e4], np.float16)}, 0.5)
    assert found["a"] == 0 and found["a"].dtype == np.float16


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_both_ends_are_exact_to_the_bit_and_equal_entries_stay(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    start, end = ({"a": rng.normal(scale=scale, size=1000).astype(dtype)} for scale in (1e-4, 1e4))
    start["a"][0], end["a"][1] = -0.0, np.inf
    for share, wanted in ((0, start), (0.0, start), (1, end), (1.0, end)):
        assert connectivity.interpolate(start, end, share)["a"].tobytes() == wanted["a"].tobytes()
    for share in (1 / 3, 0.9):
        assert connectivity.interpolate(start, start, share)["a"].tobytes() == (start["a"] + dtype(0)).tobytes()


@pytest.mark.parametrize(
    "others, share, text",
    [
        ({"a": np.ones(2)}, 1.1, r"share 1\.1: must be in \[0, 1\]"),
        ({"a": np.ones(2)}, float("nan"), r"share nan: must be in \[0, 1\]"),
        ({"a": np.ones(3)}, 0.0, r"others 'a' of shape \(3,\): must have shape \(2,\)"),
        ({}, 1.0, r"others 'a': missing; must have shape \(2,\)"),
        ({"a": np.ones(2, np.float32)}, 0.5, "others 'a' of dtype float32: must have dtype float64"),
        ({"a": np.ones(2, int)}, 0.5, "weights 'a' of dtype int64: must have a float dtype"),
    ],
)
def test_what_cannot_be_interpolated_is_refused(others: Any, share: float, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        connectivity.interpolate({"a": np.ones(2)}, others, share)


@pytest.mark.parametrize("start, end", [(1.0, np.ones(())), (np.ones(()), 1.0)])
def test_a_number_that_is_no_array_is_not_interpolated(start: Any, end: Any) -> None:
    with pytest.raises(ValueError, match="^weights 'a' 1.0: must be a float array$"):
        connectivity.interpolate({"a": start}, {"a": end}, 0.5)


@pytest.mark.parametrize(
    "errors, barrier",
    [([0.25, 0.25], 0.0), ([0.1, 0.1, 0.1], 0.0), ([0.0, 0.5, 0.25], 0.375), ([0.5, 0.0, 0.25], 0.125)],
)
def test_the_barrier_is_the_highest_error_less_the_mean_of_the_ends(errors: list[float], barrier: float) -> None:
    assert connectivity.error_barrier(errors) == barrier


@pytest.mark.parametrize(
    "errors, text",
    [
        ([], "errors of length 0: requires at least 2, one for each end"),
        ([0.5], "errors of length 1: requires at least 2, one for each end"),
        ([0.5, math.nan, 0.25], "errors nan: must be numbers"),
    ],
)
def test_a_barrier_of_no_line_is_refused(errors: list[float], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}$"):
        connectivity.error_barrier(errors)


def pixels(values: Any, labels: Any) -> ImageSet:
    """Images of (n, pixels) values in hundreds, normalised to the values less 1."""
    values = np.asarray(values)
    images = jnp.asarray(np.rint(100 * values[:, None, :, None]), jnp.uint8)
    return ImageSet(images, jnp.asarray(labels, jnp.int32), mean=jnp.array([100.0]), std=jnp.array([100.0]))


def magnitude_network(first: int, second: int) -> dict[str, Any]:
    """LeNet that predicts class 1 for a pixel x with |x| > 0.4, from hidden units for x and -x."""
    params = jax.tree.map(
        np.zeros_like, LeNet300100(num_classes=2).init(jax.random.key(0), jnp.ones((1, 1, 1, 1)))["params"]
    )
    params["hidden0"]["kernel"][0, [first, second]] = 1, -1
    params["hidden1"]["kernel"][[first, second], 0] = 1
    params["classifier"]["kernel"][0, 1] = 1
    params["classifier"]["bias"][1] = -0.4
    return params


@pytest.mark.parametrize(
    "errors, losses, said",
    [
        ([0.1, 0.3, 0.2], [1, 3, 2], ""),
        (
            [0.4, 0.3, 0.2],
            [1, 3, 2],
            "the error is highest at an end, so the error barrier is half the difference between the two ends",
        ),
        (
            [0.1, 0.3, 0.2],
            [1, 1, 2],
            "the loss is highest at an end, so the loss barrier is half the difference between the two ends",
        ),
        (
            [0.2, 0.2],
            [2, 1],
            "error and loss are highest at an end, so both barriers are half the difference between the two ends",
        ),
    ],
)
def test_a_note_names_what_is_highest_at_an_end(errors: list[float], losses: list[float], said: str) -> None:
    assert connectivity.barrier_note(errors, losses) == said


def test_swapped_hidden_units_are_the_same_network_behind_a_barrier() -> None:
    model, data = LeNet300100(num_classes=2), pixels([[0], [2], [1], [1.25]], [1, 1, 0, 0])
    masks = {"hidden0": {"kernel": jnp.ones((1, 300))}, "hidden1": {"kernel": jnp.ones((300, 100))}}
    ends = Snapshot(magnitude_network(0, 1), {}), Snapshot(magnitude_network(1, 0), {})
    path = connectivity.connect(Line(model, ends, masks), data, data, points=5, batch_size=3)
    expected = []  # between the ends both units are |1 - 2 share| x and its negative: their sum is its magnitude
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        logit = np.array([1, 1, 0, 0.25]) * abs(1 - 2 * share) - 0.4
        loss = np.log1p(np.exp(np.where([True, True, False, False], -logit, logit))).mean()
        expected.append((share, 0.5 if share == 0.5 else 0.0, pytest.approx(loss, rel=1e-6)))
    assert path == expected
    assert connectivity.error_barrier([point.error for point in path]) == 0.5


def test_a_permuted_dense_network_has_a_barrier(lenet: Recipe, synthetic: ImageSet) -> None:
    variables = step.init_variables(lenet, jax.random.key(0), synthetic.images.shape[1:])
    params = variables["params"]
    units = np.random.default_rng(0).permutation(300)
    permuted = params | {
        "hidden0": jax.tree.map(lambda weights: weights[..., units], params["hidden0"]),
        "hidden1": params["hidden1"] | {"kernel": params["hidden1"]["kernel"][units]},
    }
    logits = Executor().predict(lenet.model, variables, synthetic, batch_size=37)
    data = synthetic.replace(labels=jnp.argmax(logits, axis=-1))
    ends = Snapshot(params, {}), Snapshot(permuted, {})
    path = connectivity.connect(Line(lenet.model, ends, variables["masks"]), data, data, batch_size=16)
    assert [point.share for point in path] == [tenths / 10 for tenths in range(11)]
    assert path[0].error == path[-1].error == 0.0
    assert connectivity.error_barrier([point.error for point in path]) > 0.1


def test_masks_decide_what_the_line_leads_through(lenet: Recipe, synthetic: ImageSet) -> None:
    variables = step.init_variables(lenet, jax.random.key(0), synthetic.images.shape[1:])
    ends = Snapshot(variables["params"], {}), Snapshot(jax.tree.map(jnp.negative, variables["params"]), {})
    removed = jax.tree.map(jnp.zeros_like, variables["masks"])
    path = connectivity.connect(Line(lenet.model, ends, removed), synthetic, synthetic, points=3, batch_size=37)
    # Nothing but equal logits is left.
    assert [point.loss for point in path] == [pytest.approx(math.log(4))] * 3


class Normalized(nn.Module):
    """Two pixels as logits, after BatchNorm."""

    momentum: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x[:, 0, :, 0])


def normalized_end(scale: float, bias: float, mean: float, var: float) -> Snapshot:
    params, stats = {"scale": scale, "bias": bias}, {"mean": mean, "var": var}
    return Snapshot(*({"norm": {k: jnp.array([v, 0.5]) for k, v in one.items()}} for one in (params, stats)))


@pytest.mark.parametrize("batch_size, batches", [(2, 2), (5, 1), (99, 1)])
def test_statistics_of_every_point_are_one_pass_in_whole_batches_from_the_interpolated_ones(
    batch_size: int, batches: int
) -> None:
    # The data are one value, so that a batch of any of them has this mean and no variance.
    left = 0.5**batches
    data, validation = pixels([[1.5, 0.5]] * 5, [0] * 5), pixels([[0, 2], [2, 1], [1, 2]], [0, 1, 1])
    ends = normalized_end(1.0, 0.0, mean=3.0, var=2.0), normalized_end(3.0, -1.0, mean=-1.0, var=4.0)
    path = connectivity.connect(Line(Normalized(), ends, {}), data, validation, points=5, batch_size=batch_size)
    x = np.array([[-1, 1], [1, 0], [0, 1]])
    for point in path:
        share = point.share
        mean = left * np.array([3 - 4 * share, 0.5]) + (1 - left) * np.array([0.5, -0.5])
        var = left * np.array([2 + 2 * share, 0.5])
        logits = (x - mean) / np.sqrt(var + 1e-5) * np.array([1 + 2 * share, 0.5]) + np.array([-share, 0.5])
        margin = (logits[:, 1] - logits[:, 0]) * np.array([-1, 1, 1])
        assert point.error == np.mean(margin < 0)
        assert point.loss == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
    assert connectivity.error_barrier([point.error for point in path]) > 0


def test_statistics_do_not_follow_data_that_are_sorted() -> None:
    values = np.repeat([[0.0, 2.0], [2.0, 0.0]], 20, axis=0)
    data = pixels(values, np.repeat([1, 0], 20))
    end = normalized_end(1.0, 0.0, mean=0.0, var=1.0)
    line = Line(Normalized(momentum=0.0), (end, end), {})
    start, _ = connectivity.connect(line, data, data, points=2, batch_size=10)
    assert start.error == 0.0  # the last ten in order are all of one class: half of the images would be wrong


def test_identical_ends_have_no_barrier_and_stay_as_they_are(synthetic: ImageSet) -> None:
    recipe = Recipe(ResNet(num_classes=4, stage_sizes=(1,), widths=(4,)))
    variables = step.init_variables(recipe, jax.random.key(0), synthetic.images.shape[1:])
    end = Snapshot(variables["params"], variables["batch_stats"])
    before = jax.tree.map(np.array, end)
    line = Line(recipe.model, (end, end), variables["masks"])
    paths = [connectivity.connect(line, synthetic, synthetic, points=4, batch_size=16) for _ in range(2)]
    assert paths[0] == paths[1]
    assert len({point[1:] for point in paths[0]}) == 1
    assert connectivity.error_barrier([point.error for point in paths[0]]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, end, before)


class Dropped(nn.Module):
    """A layer after dropout, which needs a PRNG key in training mode."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x[:, 0, :, 0]))


def test_a_model_without_statistics_is_evaluated_alone() -> None:
    params = {"Dense_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    data = pixels([[0, 2], [2, 0]], [1, 0])
    ends = Snapshot(params, {}), Snapshot(jax.tree.map(jnp.negative, params), {})
    path = connectivity.connect(Line(Dropped(), ends, {}), data, data, points=2, batch_size=2)
    assert [point.error for point in path] == [0.0, 1.0]


traces: list[bool] = []


class Traced(Normalized):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        traces.append(train)
        return super().__call__(x, train)


def test_a_line_is_compiled_once() -> None:
    data = pixels(np.random.default_rng(0).uniform(0, 2, (7, 2)), [0] * 7)
    ends = normalized_end(1.0, 0.0, 0.0, 1.0), normalized_end(2.0, 0.0, 0.0, 2.0)
    connectivity.connect(Line(Traced(), ends, {}), data, data, points=5, batch_size=3)
    assert traces == [True, False]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"points": 1}, "points 1: must be at least 2"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"data": pixels(np.ones((0, 2)), [])}, "images of data 0: must be at least 1"),
        ({"validation": pixels(np.ones((0, 2)), [])}, "images of validation 0: must be at least 1"),
    ],
)
def test_a_line_without_points_or_images_is_refused(changes: dict[str, Any], text: str) -> None:
    end = normalized_end(1.0, 0.0, 0.0, 1.0)
    images = pixels([[1, 1]], [0])
    arguments = {"data": images, "validation": images, "points": 2, "batch_size": 1} | changes
    with pytest.raises(ConfigError, match=f"^{text}$"):
        connectivity.connect(Line(Normalized(), (end, end), {}), **arguments)


def test_ends_of_two_networks_are_refused_by_name() -> None:
    one = normalized_end(1.0, 0.0, 0.0, 1.0)
    other = one._replace(batch_stats={"norm": {"mean": jnp.zeros(2), "var": jnp.ones(3)}})
    images = pixels([[1, 1]], [0])
    with pytest.raises(ConfigError, match=r"^others 'norm/var' of shape \(3,\): must have shape \(2,\)$"):
        connectivity.connect(Line(Normalized(), (one, other), {}), images, images, batch_size=1)


TINY = (
    "train digits --model lenet300100 --epochs 2 --rounds 1 --rewind-epoch 1 --lr 0.02 --lr-schedule 1 --lr-drops 0.1 "
    "--max-train-examples 150 --target-density 0.2 --controls --no-report"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert commands.main([*TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def content(run: Path) -> dict[str, Any]:
    return json.loads((run / CONNECTIVITY_FILE).read_text())


@pytest.mark.slow
def test_the_command_writes_the_same_file_twice_but_for_the_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for _ in range(2):
        assert commands.main(["connect", str(run), "--points", "3"]) == 0
        found.append(content(run))
        assert found[-1].pop("seconds") > 0
        (run / CONNECTIVITY_FILE).unlink()
    assert found[0] == found[1]
    points, children = found[0]["points"], found[0]["children"]
    assert [point["share"] for point in points] == [0, 0.5, 1]
    # The network has no statistics, so the ends of the line are the children themselves.
    right = [child["test_accuracy"] for child in children]
    assert right == [pytest.approx(1 - points[end]["error"], abs=1e-12) for end in (0, -1)]
    for name, figure in (("barrier", "error"), ("loss_barrier", "loss")):
        assert found[0][name] == connectivity.error_barrier([point[figure] for point in points])
    assert points[0]["loss"] != points[-1]["loss"]
    assert found[0]["settings"] == {"points": 3, "seed": 0}
    shown = capsys.readouterr().out
    assert re.search(r"^child 1 +0 .*\nchild 1 +1 .*\nchild 2 +0 .*\nchild 2 +1 ", shown, re.MULTILINE)
    assert f"barrier: error {100 * found[0]['barrier']:.2f} percentage points" in shown


@pytest.mark.slow
def test_another_seed_trains_other_children(run: Path) -> None:
    losses = []
    for seed in ("0", "4294967295"):
        assert commands.main(["connect", str(run), "--points", "2", "--seed", seed]) == 0
        losses += [point["loss"] for point in content(run)["points"]]
    assert len(set(losses)) == 4


@pytest.mark.slow
def test_a_ticket_that_is_read_back_trains_to_what_its_run_has(run: Path) -> None:
    config, ticket = connectivity.read_run(run)
    problem, _ = prepare(config)
    state = search.retrain(config, problem, search.begin_retraining(problem, ticket), Observer())
    saved = load_ticket(run / TICKET_FILE).variables
    jax.tree.map(np.testing.assert_array_equal, apply_masks(state.params, ticket.masks), apply_masks(**{
        name: saved[name] for name in ("params", "masks")
    }))  # fmt: skip


def test_children_differ_in_their_batches_alone(run: Path) -> None:
    config, ticket = connectivity.read_run(run)
    problem, data = prepare(config)
    orders = [problem, *(connectivity.child(problem, number, seed=seed) for seed in (0, 1) for number in (1, 2))]
    assert len({tuple(np.asarray(one.epoch_order(1, 0)).tolist()) for one in orders}) == 5
    fixed = dataclasses.replace(problem, order=lambda phase, epoch: np.arange(len(problem.train)))
    found = connectivity.measure(Retraining(config, fixed, ticket, data.test), Observer(), points=3)
    assert len({point["loss"] for point in found["points"]}) == 1
    assert found["barrier"] == found["loss_barrier"] == 0


@pytest.mark.slow
def test_a_report_that_is_there_is_written_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["report", str(run)]) == 0
    assert "Linear mode connectivity" not in (run / "report.html").read_text()
    assert commands.main(["connect", str(run), "--points", "2"]) == 0
    assert "Linear mode connectivity" in (run / "report.html").read_text()
    assert (run / "connectivity.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"{run / CONNECTIVITY_FILE}\n{run / 'report.html'}\n")


def edited(run: Path, **changes: Any) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def compacted(run: Path) -> None:
    saved = load_ticket(run / TICKET_FILE)
    save_ticket(run / TICKET_FILE, **saved.variables, metadata=saved.metadata, compact=True)


@pytest.mark.parametrize(
    "change, words, text",
    [
        (lambda run: (run / "config.json").unlink(), [], ": not a run directory; it has no config.json"),
        (lambda run: (run / "summary.json").unlink(), [], ": not finished; finish it with --resume "),
        (lambda run: edited(run, after="none"), [], ": has no retraining; choose a run that retrains its ticket"),
        (
            lambda run: edited(run, data="0" * 64),
            [],
            "--dataset digits: its examples differ from the examples at the start of",
        ),
        (lambda run: edited(run, epochs="many"), [], "its settings: epochs 'many': must be a whole number"),
        (compacted, [], ": its ticket file is compact; choose a run with the rewound network in this file"),
        (lambda run: None, ["--points", "1"], "--points 1: must be at least 2"),
        (lambda run: None, ["--seed", "-1"], "--seed -1: must be 0 to 4294967295"),
        (lambda run: None, ["--points", "many"], "argument --points: invalid int value: 'many'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    run: Path, change: Callable[[Path], Any], words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert commands.main(["connect", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("python -m cs_jax connect: error: ") and text in error
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_another_process_writes_to_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lock(run / LOCK_FILE):
        assert commands.main(["connect", str(run)]) == 2
    assert "is writing to this folder" in capsys.readouterr().err
    assert not (run / CONNECTIVITY_FILE).exists()


def test_an_interrupt_writes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        while not (run / LOCK_FILE).exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert commands.main(["connect", str(run), "--points", "1000000"]) == 130
    thread.join()
    assert "interrupted by SIGINT" in capsys.readouterr().err
    assert not (run / CONNECTIVITY_FILE).exists() and not (run / LOCK_FILE).exists()


def test_the_display_counts_the_epochs_of_both_children(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(report, "Console", lambda: Console(file=shown, force_terminal=True, width=100))
    updates = []
    monkeypatch.setattr(
        Progress, "update", lambda self, task, **fields: updates.append((self.tasks[task].total, fields))
    )
    assert commands.main(["connect", str(run), "--points", "2"]) == 0
    ends = [fields["completed"] for _, fields in updates if "description" not in fields]
    assert ends == [1, 2, 3, 4] and {total for total, _ in updates} == {4}
    described = [fields["description"] for _, fields in updates if "description" in fields]
    assert described and all(re.match(r"child [12] epoch [01] step \d+/", line) for line in described)


def test_the_guide_to_analysis_runs_and_prints_what_it_shows(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    guide = (Path(__file__).parents[2] / "docs" / "experiments" / "analysis.md").read_text()
    namespace: dict[str, Any] = {}
    printed = []
    for kind, block in re.findall(r"```(python|text)\n(.*?)```", guide, re.DOTALL):
        if kind == "python":
            exec(block, namespace)
            printed.append(capsys.readouterr().out)
        else:
            assert printed[-1] == block
    assert printed[1].startswith("one and two: 100.00%, by chance ")
    assert re.fullmatch(r"barrier: [\d.]+ points\n", printed[2])
