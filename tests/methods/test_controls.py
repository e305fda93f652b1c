"""Control networks trained in addition to a ticket: each changes one thing of the ticket and nothing else."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from cs_jax.commands import parser, train
from cs_jax.core.errors import ConfigError
from cs_jax.data.load import Data
from cs_jax.experiment import pipeline, search
from cs_jax.experiment.config import Config
from cs_jax.experiment.experiment import Experiment
from cs_jax.experiment.progress import Observer, Observers, Progress
from cs_jax.experiment.storage.run_directory import open_run_directory
from cs_jax.methods import FINETUNE, REWIND
from cs_jax.methods.controls import CONTROLS, DENSE
from cs_jax.training.problem import Problem, Snapshot, Ticket

pytestmark = pytest.mark.filterwarnings("ignore::cs_jax.UnfinishedSearchWarning")

CONFIG = dataclasses.replace(small.SEARCH, method="imp", target_density=0.1234, model="lenet300100")
"""IMP leaves its layers with different densities; so does Continuous Sparsification, whose masks have a scale."""


def find_ticket(config: Config, problem: Problem) -> Ticket:
    progress = search.begin_search(search.init_state(config, problem))
    return search.search_ticket(config, problem, progress, Observer())[0]


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a: Any, b: Any) -> bool:
    return not all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def counts(some_masks: Any) -> list[int]:
    """Number of kept weights in each array."""
    return [int((mask != 0).sum()) for mask in jax.tree.leaves(some_masks)]


def values(some_masks: Any) -> set[float]:
    return {float(value) for mask in jax.tree.leaves(some_masks) for value in np.unique(mask)}


@pytest.fixture(params=["imp", "cs"])
def config(request: pytest.FixtureRequest) -> Config:
    return dataclasses.replace(CONFIG, method=request.param)


@pytest.mark.slow
def test_dense_keeps_every_weight_from_initialisation(config: Config, problem: Problem) -> None:
    dense = CONTROLS[DENSE](problem, find_ticket(config, problem))
    fresh = problem.init_variables()
    assert_equal(tuple(dense.start), (fresh["params"], fresh["batch_stats"]))
    assert values(dense.masks) == {1.0} and sum(counts(dense.masks)) == 40800


def test_reinit_has_the_tickets_masks_over_other_initial_weights(config: Config, problem: Problem) -> None:
    ticket = find_ticket(config, problem)
    reinit = CONTROLS["reinit"](problem, ticket)
    assert_equal(reinit.masks, ticket.masks)
    fresh = problem.init_variables()["params"]
    for name, layer in reinit.start.params.items():
        for earlier in (fresh, ticket.start.params):
            assert (layer["kernel"] != earlier[name]["kernel"]).mean() > 0.99
        assert np.std(layer["kernel"]) == pytest.approx(float(np.std(fresh[name]["kernel"])), rel=0.1)


def test_shuffled_has_the_tickets_weights_and_as_many_in_each_layer(config: Config, problem: Problem) -> None:
    ticket = find_ticket(config, problem)
    shuffled = CONTROLS["shuffled"](problem, ticket)
    assert_equal(tuple(shuffled.start), tuple(ticket.start))
    assert counts(shuffled.masks) == counts(ticket.masks) and len(set(counts(ticket.masks))) == 2
    assert values(shuffled.masks) == values(ticket.masks)
    for mask, other in zip(jax.tree.leaves(shuffled.masks), jax.tree.leaves(ticket.masks), strict=True):
        both, alone = float(((mask != 0) & (other != 0)).mean()), float((other != 0).mean())
        assert both == pytest.approx(alone**2, rel=0.5)  # as by chance


def test_random_has_the_tickets_weights_and_as_many_in_all(config: Config, problem: Problem) -> None:
    ticket = find_ticket(config, problem)
    drawn = CONTROLS["random"](problem, ticket)
    assert_equal(tuple(drawn.start), tuple(ticket.start))
    assert sum(counts(drawn.masks)) == sum(counts(ticket.masks)) == round(0.1234 * 40800)
    assert values(drawn.masks) == values(ticket.masks)
    sizes = [mask.size for mask in jax.tree.leaves(drawn.masks)]
    np.testing.assert_allclose(np.divide(counts(drawn.masks), sizes), 0.1234, rtol=0.1)
    assert not np.allclose(np.divide(counts(ticket.masks), sizes), 0.1234, rtol=0.1)


def hand_made(shapes: dict[str, tuple[int, ...]], kept: dict[str, int]) -> Ticket:
    """A ticket that keeps the first weights of each array."""
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    masks = {
        name: {"kernel": jnp.asarray((np.arange(np.prod(shape)) < kept[name]).reshape(shape), float)}
        for name, shape in shapes.items()
    }
    return Ticket(Snapshot(params, {}), masks)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    "kept",
    [{"a": 9, "b": 4, "c": 1}, {"a": 1, "b": 1, "c": 8}, {"a": 0, "b": 0, "c": 2}, {"a": 9, "b": 15, "c": 21}],
    ids=["14", "10", "2 in one layer of 3", "all"],
)
@pytest.mark.filterwarnings("ignore::cs_jax.CollapsedLayerWarning")
def test_random_keeps_as_many_weights_as_any_ticket(kept: dict[str, int], scope: Any, problem: Problem) -> None:
    ticket = hand_made({"a": (3, 3), "b": (3, 5), "c": (7, 3)}, kept)
    drawn = CONTROLS["random"](problem, ticket)
    assert sum(counts(drawn.masks)) == sum(kept.values())


def test_random_of_a_ticket_without_weights_has_none_either(problem: Problem) -> None:
    ticket = hand_made({"a": (3, 3)}, {"a": 0})
    assert counts(CONTROLS["random"](problem, ticket).masks) == [0]


@pytest.mark.parametrize("control", CONTROLS)
def test_the_same_seed_makes_the_same_control_and_another_seed_another(control: str, problem: Problem) -> None:
    ticket = find_ticket(CONFIG, problem)
    other_key = dataclasses.replace(problem, key=jax.random.key(4))
    made, again, other = (CONTROLS[control](some, ticket) for some in (problem, problem, other_key))
    assert_equal(made, again)
    assert differ(made, other)


@pytest.mark.parametrize("control", CONTROLS)
def test_making_and_training_a_control_leaves_the_ticket_alone(control: str, problem: Problem) -> None:
    ticket = find_ticket(CONFIG, problem)
    before = jax.tree.map(np.array, ticket)
    made = CONTROLS[control](problem, ticket)
    config = dataclasses.replace(CONFIG, controls=(control,))
    state = search.retrain(config, problem, search.begin_retraining(problem, made, phase=control), Observer())
    assert_equal(state.masks, made.masks)
    assert differ(state.params, made.start.params)
    assert_equal(ticket, before)


class Phases(Observer):
    """Copies of the state at the start of every phase."""

    def __init__(self) -> None:
        self.starts: dict[str, Any] = {}

    def on_phase_start(self, progress: Progress) -> None:
        self.starts[progress.phase_name()] = jax.tree.map(np.array, progress.state)


def run(config: Config, problem: Problem, observer: Observer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs the whole experiment; returns the summary and the lines of metrics.jsonl."""
    assert problem.validation is not None
    data = Data(problem.train, problem.validation, problem.validation, classes=("a", "b", "c", "d"))
    with open_run_directory(config, new=True) as directory:
        directory.begin("fingerprint")
        summary = pipeline.run(
            Experiment(config, problem, Observers(directory, observer), data=data, directory=directory)
        )
    return summary, [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]


def recorded(problem: Problem) -> tuple[Problem, list[tuple[int, int]]]:
    """The problem, and a list of the phase and epoch of every requested order."""
    asked = []

    def order(phase: int, epoch: int) -> jax.Array:
        asked.append((phase, epoch))
        return problem.epoch_order(phase, epoch)

    return dataclasses.replace(problem, order=order), asked


@pytest.mark.parametrize("method, rounds", [("imp", 2), ("snip", 0)])
def test_controls_are_trained_in_turn_as_long_as_the_ticket_and_see_its_batches(
    method: str, rounds: int, problem: Problem, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, method=method, controls=tuple(CONTROLS), out=tmp_path / "run")
    (watched, asked), phases = recorded(problem), Phases()
    summary, metrics = run(config, watched, phases)
    trained = ["ticket", *CONTROLS]
    expected = [(name, epoch) for name in trained for epoch in (0, 1)]
    assert [(line["phase"], line["epoch"]) for line in metrics[2 * rounds :]] == expected
    assert asked[-2 * len(trained) :] == [(rounds, 0), (rounds, 1)] * len(trained)
    starts = phases.starts
    ticket = Ticket(Snapshot(starts["ticket"].params, starts["ticket"].batch_stats), starts["ticket"].masks)
    for name, control in CONTROLS.items():
        made = control(problem, ticket)
        assert_equal((starts[name].params, starts[name].batch_stats, starts[name].masks), (*made.start, made.masks))
        assert all((moment == 0).all() for moment in jax.tree.leaves(starts[name].weight_momentum))
    assert summary["dense"]["density"] == 1.0 and list(summary["controls"]) == ["reinit", "shuffled", "random"]
    for name, result in summary["controls"].items():
        assert result["density"] == summary["ticket"]["density"] == round(0.1234 * 40800) / 40800
        assert result["val_accuracy"] == [line["hard_accuracy"] for line in metrics if line["phase"] == name][-1]


@pytest.mark.parametrize("after", [REWIND, FINETUNE])
def test_a_control_of_the_tickets_weights_begins_where_the_ticket_does(
    after: str, problem: Problem, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, after=after, controls=("shuffled",), out=tmp_path / "run")
    phases = Phases()
    run(config, problem, phases)
    assert_equal(phases.starts["shuffled"].params, phases.starts["ticket"].params)
    assert differ(phases.starts["shuffled"].params, phases.starts["search 0"].params)


def first_half(problem: Problem, ticket: Ticket) -> Ticket:
    """The ticket's weights with masks that keep the first half of every array."""

    def half(mask: jax.Array) -> jax.Array:
        return (jnp.arange(mask.size) < mask.size // 2).reshape(mask.shape).astype(mask.dtype)

    return ticket._replace(masks=jax.tree.map(half, ticket.masks))


def test_a_control_is_added_by_one_line(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--model lenet300100 --method snip --target-density 0.2 --epochs 2 --rewind-epoch 0 --lr 0.01 --controls"
    words = [*words.split(), "first-half", "--out", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match="^--controls first-half: must be one of dense, "):
        parser.parse(words)
    added: Callable[[Problem, Ticket], Ticket] = first_half
    monkeypatch.setitem(CONTROLS, "first-half", added)
    summary, metrics = run(parser.parse(words), problem, phases := Phases())
    assert list(summary["controls"]) == ["first-half"]
    assert summary["controls"]["first-half"]["density"] == 0.5
    assert [line["density"] for line in metrics] == [0.2, 0.2, 0.5, 0.5]
    assert_equal(phases.starts["first-half"].params, phases.starts["ticket"].params)


@pytest.mark.slow
def test_a_control_of_ones_own_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTROLS, "first-half", first_half)
    words = "--model lenet300100 --method snip --target-density 0.2 --epochs 2 --rewind-epoch 0 --lr 0.01 --controls"
    settings = parser.parse([*words.split(), "first-half", "--out", str(tmp_path / "run")])
    train.run(settings)
    assert "first-half" in (tmp_path / "run" / "report.html").read_text()
