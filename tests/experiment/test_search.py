"""Rounds, snapshot, resets, ticket and retraining on a small network."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from cs_jax import CollapsedLayerWarning, UnfinishedSearchWarning
from cs_jax.core import masks, target_density
from cs_jax.data.images import ImageSet
from cs_jax.experiment import metrics, search
from cs_jax.experiment.config import SEARCH, TICKET, Config
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.methods.controls import DENSE
from cs_jax.training import evaluation
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem, Ticket
from cs_jax.training.step import Recipe, TrainState

CONFIG = dataclasses.replace(small.SEARCH, epochs=3, lr_schedule=(2,), lr_drops=(0.1,))


def copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def share_right(recipe: Recipe, variables: Any, images: ImageSet) -> float:
    return evaluation.share_right(Executor().predict(recipe.model, variables, images, batch_size=8), images)


class History(Observer):
    """Copies of the state at every phase's start and end and after every epoch."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, int | None, TrainState]] = []
        self.ends: list[tuple[str, int | None, TrainState]] = []
        self.epochs: list[tuple[EpochRecord, TrainState]] = []

    def on_phase_start(self, progress: Progress) -> None:
        self.starts.append((progress.phase, progress.round, copy(progress.state)))

    def on_phase_end(self, progress: Progress) -> None:
        self.ends.append((progress.phase, progress.round, copy(progress.state)))

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self.epochs.append((record, copy(progress.state)))

    @property
    def records(self) -> list[EpochRecord]:
        return [record for record, _ in self.epochs]


def begin(config: Config, problem: Problem) -> Progress:
    return search.begin_search(search.init_state(config, problem))


def run(config: Config, problem: Problem) -> tuple[Ticket, TrainState, History]:
    history = History()
    ticket, _ = search.search_ticket(config, problem, begin(config, problem), history)
    return ticket, search.retrain(config, problem, search.begin_retraining(problem, ticket), history), history


def test_the_ticket_is_the_snapshot_under_hard_masks(problem: Problem) -> None:
    ticket, state, history = run(CONFIG, problem)
    after_epoch_0 = history.epochs[0][1]
    assert_equal(tuple(ticket.start), (after_epoch_0.params, after_epoch_0.batch_stats))
    last_search = history.ends[1][2]
    assert_equal(ticket.masks, masks.hard_mask(last_search.scores, init_value=0.02))
    phase, round, start = history.starts[2]
    assert (phase, round) == ("ticket", None)
    assert_equal((start.params, start.batch_stats), tuple(ticket.start))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(start.weight_momentum))
    assert_equal(state.masks, ticket.masks)
    assert 0.0 < masks.density(ticket.masks) < 1.0


def test_rewinding_to_epoch_0_is_rewinding_to_initialisation(problem: Problem) -> None:
    config = dataclasses.replace(CONFIG, rewind_epoch=0, rounds=1)
    ticket, _ = search.search_ticket(config, problem, begin(config, problem), Observer())
    assert_equal(ticket.start.params, problem.init_variables()["params"])


@pytest.mark.parametrize("reset, temperature", [("paper", 50.0), ("released", 1.0)])
def test_between_rounds_only_scores_are_reset(problem: Problem, reset: Any, temperature: float) -> None:
    _, _, history = run(dataclasses.replace(CONFIG, reset=reset), problem)
    end, start = history.ends[0][2], history.starts[1][2]
    assert_equal(start.scores, masks.prune_scores(end.scores, temperature, init_value=0.02))
    for name in ("params", "batch_stats", "weight_momentum", "score_momentum"):
        assert_equal(getattr(start, name), getattr(end, name))
    last = history.ends[1][2]  # not reset after the last round
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(last.scores)) > 0.02


def test_pruned_entries_come_back_after_the_released_reset_alone(problem: Problem) -> None:
    """An entry at -0.05 restarts with a mask near 1 in one variant and near 0 in the other."""
    state = search.init_state(CONFIG, problem)
    state = state.replace(scores=jax.tree.map(lambda s: jnp.full_like(s, -0.05), state.scores))
    restarted = {}
    for reset in ("released", "paper"):
        config = dataclasses.replace(CONFIG, reset=reset, final_temp=200.0)
        scores = config.pruning_method.begin_round(problem, state, None).scores
        restarted[reset] = float(jax.tree.leaves(masks.soft_mask(scores, 1.0, init_value=0.0))[0][0, 0])
    assert restarted["released"] == pytest.approx(0.975, abs=1e-3)
    assert restarted["paper"] < 1e-3


def test_each_round_starts_its_schedules_again(problem: Problem) -> None:
    _, _, history = run(CONFIG, problem)
    searched, retrained = history.records[:6], history.records[6:]
    assert [int(state.step) for _, _, state in history.starts] == [0, 0, 0]
    assert [int(state.step) for _, _, state in history.ends] == [9, 9, 9]  # 3 epochs of 3 steps
    assert [record.round for record in searched] == [0, 0, 0, 1, 1, 1]
    assert [record.epoch for record in history.records] == [0, 1, 2] * 3
    np.testing.assert_allclose([record.temperature for record in searched], [1, math.sqrt(50), 50] * 2, rtol=1e-6)
    rates = [record.learning_rate for record in history.records]
    np.testing.assert_allclose(rates, [0.05, 0.05, 0.005] * 3, rtol=1e-6)
    assert {(record.phase, record.round, record.temperature) for record in retrained} == {("ticket", None, None)}


def test_records_hold_what_the_state_gives(problem: Problem, lenet: Recipe) -> None:
    assert problem.validation is not None
    _, _, history = run(CONFIG, problem)
    for record, state in history.epochs:
        fixed = record.phase == "ticket"
        hard = state.masks if fixed else masks.hard_mask(state.scores, init_value=0.02)
        assert record.density == masks.density(hard)
        variables = {"params": state.params, "batch_stats": {}, "masks": hard}
        right = share_right(lenet, variables, problem.validation)
        assert record.hard_accuracy == (right if record.density > 0 else None)
        soft = None
        if not fixed:
            soft_masks = masks.soft_mask(state.scores, record.temperature, init_value=0.02)
            soft = share_right(lenet, variables | {"masks": soft_masks}, problem.validation)
        assert record.soft_accuracy == soft
    penalties = [record.penalty for record in history.records if record.phase == "ticket"]
    kept = sum(int((leaf > 0).sum()) for leaf in jax.tree.leaves(history.ends[2][2].masks))
    assert penalties == pytest.approx([1e-4 * kept * (1 + math.exp(-0.02))] * 3, rel=1e-5)


def test_loss_and_penalty_of_an_epoch_are_means_over_examples(lenet: Recipe, synthetic: ImageSet) -> None:
    """37 images: batches of 16, 16 and 5."""

    class Steps(Observer):
        def on_steps(self, progress: Progress, total: int) -> None:
            self.figures = metrics.step_figures(progress)

        def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
            self.record = record

    steps, config = Steps(), dataclasses.replace(CONFIG, epochs=1, rounds=1, rewind_epoch=0)
    problem = Problem(lenet, synthetic, validation=None, key=jax.random.key(3))
    search.search_ticket(config, problem, begin(config, problem), steps)
    for name in ("loss", "penalty"):
        figures = getattr(steps.figures, name).astype(np.float64)
        mean = (16 * figures[0] + 16 * figures[1] + 5 * figures[2]) / 37
        assert getattr(steps.record, name) == pytest.approx(mean, rel=1e-6)
        assert abs(mean - figures.mean()) > 1e-4 * mean


def test_the_flip_rate_is_the_share_of_masks_that_changed_since_the_epoch_before(problem: Problem) -> None:
    _, _, history = run(CONFIG, problem)
    kept = [
        np.concatenate([np.ravel(leaf) > 0 for leaf in jax.tree.leaves(state.scores)])
        for record, state in history.epochs
        if record.phase == "search"
    ]
    changed = [float((before != after).mean()) for before, after in zip(kept, kept[1:], strict=False)]
    assert max(changed) > 0
    assert [record.flip_rate for record in history.records] == [None, *changed, None, None, None]


def test_hard_accuracy_is_left_out_while_hard_masks_are_empty(problem: Problem) -> None:
    config = dataclasses.replace(CONFIG, score_lr=1e-9, mask_initial_value=-0.5, rounds=1)
    history = History()
    with pytest.warns(CollapsedLayerWarning, match="keeps no weight"):
        search.search_ticket(config, problem, begin(config, problem), history)
    assert [record.hard_accuracy for record in history.records] == [None] * 3
    assert [record.density for record in history.records] == [0.0] * 3
    assert None not in [record.soft_accuracy for record in history.records]


def test_without_validation_there_is_no_accuracy(problem: Problem) -> None:
    _, _, history = run(CONFIG, dataclasses.replace(problem, validation=None))
    assert {(record.soft_accuracy, record.hard_accuracy) for record in history.records} == {(None, None)}


def test_a_repeated_run_is_identical_and_another_seed_is_not(problem: Problem) -> None:
    first, second = run(CONFIG, problem), run(CONFIG, problem)
    other = run(CONFIG, dataclasses.replace(problem, key=jax.random.key(4)))
    assert_equal(first[0], second[0])
    assert_equal(copy(first[1]), copy(second[1]))
    without_time = [
        [record._replace(seconds=0.0, images_per_second=0.0) for record in history.records]
        for _, _, history in (first, second, other)
    ]
    assert without_time[0] == without_time[1] != without_time[2]


def test_an_epoch_has_every_example_once_and_every_epoch_its_own_order(problem: Problem) -> None:
    orders = [np.asarray(problem.epoch_order(phase, epoch)) for phase in range(2) for epoch in range(2)]
    assert all(sorted(order) == list(range(48)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_dense_network_starts_alike_sees_the_same_batches_and_keeps_everything(problem: Problem) -> None:
    config, history = dataclasses.replace(CONFIG, controls=(DENSE,)), History()
    dense = problem.init_ticket()
    state = search.retrain(config, problem, search.begin_retraining(problem, dense, phase=DENSE), history)
    assert_equal(history.starts[0][2].params, problem.init_variables()["params"])
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(state.masks))
    assert [(record.phase, record.density, record.penalty) for record in history.records] == [("dense", 1.0, 0.0)] * 3


def test_the_ticket_can_be_retrained_again(problem: Problem) -> None:
    ticket, state, _ = run(CONFIG, problem)
    again = search.retrain(CONFIG, problem, search.begin_retraining(problem, ticket), Observer())
    assert_equal(state.params, again.params)


@pytest.mark.parametrize(
    "phase, message",
    [
        (SEARCH, "in round 0, epoch 0, step [0-2]$"),
        (TICKET, "in the ticket's training, epoch 0, step [0-2]$"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(problem: Problem, phase: str, message: str) -> None:
    config = dataclasses.replace(CONFIG, lr=1e30)
    with pytest.raises(search.NonFiniteLossError, match="^loss is (nan|inf) " + message):
        if phase == SEARCH:
            search.search_ticket(config, problem, begin(config, problem), Observer())
        else:
            start = search.begin_retraining(problem, problem.init_ticket(), phase=phase)
            search.retrain(config, problem, start, Observer())


def test_an_update_that_is_not_finite_stops_the_run_even_if_it_is_the_last(problem: Problem) -> None:
    """One step: its loss is finite, the weights after it are not."""
    config = dataclasses.replace(CONFIG, lr=3e38, epochs=1, rounds=1, rewind_epoch=0, batch_size=48)
    problem = dataclasses.replace(problem, recipe=dataclasses.replace(problem.recipe, decay=100.0))
    with pytest.raises(
        search.NonFiniteLossError, match="^weights or scores are not finite in round 0, epoch 0, after step 0$"
    ):
        search.search_ticket(config, problem, begin(config, problem), Observer())


def test_every_phase_augments_differently(problem: Problem) -> None:
    """Keys differ between rounds and the retraining; ticket and dense share theirs, as they share their batches."""
    keys = []

    class Watcher(Executor):
        def train_epoch(self, recipe: Any, state: Any, epoch: Any) -> Any:
            keys.append(tuple(jax.random.key_data(epoch.key).tolist()))
            return super().train_epoch(recipe, state, epoch)

    problem = dataclasses.replace(problem, executor=Watcher())
    config = dataclasses.replace(CONFIG, controls=(DENSE,))
    ticket, _, _ = run(config, problem)
    search.retrain(config, problem, search.begin_retraining(problem, ticket, phase=DENSE), Observer())
    per_phase = [set(keys[i : i + 3]) for i in range(0, 12, 3)]
    assert [len(phase) for phase in per_phase] == [1, 1, 1, 1]
    assert per_phase[2] == per_phase[3]
    assert len(set(keys)) == 3


def test_one_epoch_a_round_has_the_final_temperature(problem: Problem) -> None:
    config = dataclasses.replace(CONFIG, epochs=1, rounds=1, rewind_epoch=0)
    _, _, history = run(config, problem)
    assert history.records[0].temperature == 50.0


def test_a_target_that_cuts_through_soft_masks_is_told(problem: Problem) -> None:
    config = dataclasses.replace(CONFIG, target_density=0.5, score_lr=1e-6, rounds=1)
    with pytest.warns(UnfinishedSearchWarning, match="100% of the masks are still soft at the end of the search"):
        search.search_ticket(config, problem, begin(config, problem), Observer())


@pytest.mark.filterwarnings("ignore::cs_jax.UnfinishedSearchWarning")
@pytest.mark.parametrize("target, rounds", [(0.1, 2), (0.01, 1), (1.0, 2)])
def test_a_target_density_is_met_exactly_and_approached_over_the_rounds(
    problem: Problem, target: float, rounds: int
) -> None:
    config = dataclasses.replace(CONFIG, target_density=target, rounds=rounds)
    ticket, _, history = run(config, problem)
    entries = sum(leaf.size for leaf in jax.tree.leaves(ticket.masks))
    assert masks.density(ticket.masks) == round(target * entries) / entries
    held = [record.density for record in history.records if record.phase == "search"]
    expected = [target ** ((number + 1) / rounds) for number in range(rounds) for _ in range(3)]
    np.testing.assert_allclose(held, expected, rtol=0.02)
    kept = [np.asarray(leaf) > 0 for leaf in jax.tree.leaves(history.ends[rounds - 1][2].scores)]
    for mask, above in zip(jax.tree.leaves(ticket.masks), kept, strict=True):
        assert (np.asarray(mask)[above] > 0).mean() > 0.97  # ties and reserved scores aside, those above 0


def test_without_a_target_no_score_is_shifted(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    shifts = []
    monkeypatch.setattr(target_density, "track_density", lambda *arguments: shifts.append(arguments))
    _, _, history = run(CONFIG, problem)
    assert shifts == [] and len(history.records) == 9
