"""Properties of the masks and weights of every method, on a small network."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import small
from flax import linen as nn

from cs_jax import CollapsedLayerWarning
from cs_jax.commands import parser
from cs_jax.core import trees
from cs_jax.core.errors import ConfigError
from cs_jax.data.images import ImageSet
from cs_jax.data.load import Data
from cs_jax.experiment import pipeline, search
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.experiment import Experiment
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.progress import EpochRecord, Observer, Observers, Progress
from cs_jax.experiment.storage.checkpoints import Checkpoints
from cs_jax.experiment.storage.paths import TICKET_FILE
from cs_jax.experiment.storage.run_directory import open_run_directory
from cs_jax.layers.masked import MaskedDense
from cs_jax.methods import FINETUNE, LR_REWIND, METHODS, NONE, REWIND, Method
from cs_jax.methods.stochastic import draw_masks
from cs_jax.models import MODELS, BatchNorm
from cs_jax.tickets.ticket import load_ticket
from cs_jax.training import step
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem, Snapshot, Ticket
from cs_jax.training.step import Recipe, TrainState

pytestmark = pytest.mark.filterwarnings("ignore::cs_jax.UnfinishedSearchWarning")

DENSITY = 0.1234
CONFIG = dataclasses.replace(small.SEARCH, epochs=3, lr_schedule=(1, 2), lr_drops=(0.5, 0.1))
SEARCHING = [name for name, method in METHODS.items() if method.searches]
PRUNING = [name for name, method in METHODS.items() if method.wants_target is not False]


class Net(nn.Module):
    """Masked layers of 1080 and 600 weights, for 36 pixels, with BatchNorm between, and a classifier without masks."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = MaskedDense(30, name="first")(x.reshape(x.shape[0], -1))
        x = nn.relu(BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(self.num_classes, name="last")(nn.relu(MaskedDense(20, name="second")(x)))


FROZEN = [name for name, method in METHODS.items() if not method(Config()).recipe(Recipe(Net(4))).moves_weights]


def configure(method: str, **fields: Any) -> Config:
    """Config of a method, with a target density if the method accepts one."""
    target = DENSITY if METHODS[method].wants_target is not False else None
    return dataclasses.replace(CONFIG, **{"method": method, "target_density": target, **fields})


def named_afters(*wanted: str) -> list[tuple[str, str]]:
    """Pairs of method and retraining, for the retrainings in `wanted`."""
    return [(name, after) for name, method in METHODS.items() for after in wanted if after in method.retrainings]


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a: Any, b: Any) -> bool:
    return not all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def counts(some_masks: Any) -> dict[str, int]:
    """Number of kept weights in each array."""
    return {trees.name(path): int((mask != 0).sum()) for path, mask in trees.leaves_by_path(some_masks).items()}


def all_zero(tree: Any) -> bool:
    return all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(tree))


def copied(progress: Progress) -> Progress:
    """Copy of the progress and its state, whose arrays the run donates to the next step."""
    return progress._replace(state=jax.tree.map(np.array, progress.state))


class History(Observer):
    """Copies of the progress at every phase's start and end and after every epoch."""

    def __init__(self) -> None:
        self.starts: list[Progress] = []
        self.ends: list[Progress] = []
        self.epochs: list[Progress] = []
        self.records: list[EpochRecord] = []

    def on_phase_start(self, progress: Progress) -> None:
        self.starts.append(copied(progress))

    def on_phase_end(self, progress: Progress) -> None:
        self.ends.append(copied(progress))

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self.epochs.append(copied(progress))
        self.records.append(record)


@pytest.fixture
def problem(synthetic: ImageSet) -> Problem:
    """Epochs of two batches, both of 16, so that a step is compiled once."""
    images = synthetic.replace(images=synthetic.images[:32], labels=synthetic.labels[:32])
    return Problem(Recipe(Net(4), decay=1e-3), images, validation=images, key=jax.random.key(3))


def find_ticket(config: Config, problem: Problem, observer: Observer | None = None) -> Ticket:
    progress = search.begin_search(search.init_state(config, problem))
    return search.search_ticket(config, problem, progress, observer or Observer())[0]


def run(config: Config, problem: Problem) -> tuple[Ticket, TrainState, History]:
    history = History()
    ticket = find_ticket(config, problem, history)
    return ticket, search.retrain(config, problem, search.begin_retraining(problem, ticket), history), history


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", PRUNING)
def test_a_ticket_keeps_just_as_many_weights_as_its_density_has(method: str, scope: Any, problem: Problem) -> None:
    config = configure(method, scope=scope)
    ticket = find_ticket(config, problem)
    kept = counts(ticket.masks)
    assert sum(kept.values()) == round(DENSITY * 1680)
    assert (kept == {"first/kernel": 133, "second/kernel": 74}) == (scope == "layer")
    values = np.unique(np.concatenate([mask.ravel() for mask in jax.tree.leaves(ticket.masks)]))
    assert_equal(values, np.array([0, METHODS[method](config).mask_scale()], np.float32))


@pytest.mark.parametrize("method", [name for name in SEARCHING if name in PRUNING])
def test_of_equal_ranks_the_first_80_of_100_are_kept(method: str, problem: Problem) -> None:
    config = configure(method, rounds=1, target_density=0.8)
    ones = {"dense": {"kernel": jnp.ones((10, 10))}}
    some_scores, fixed = METHODS[method](config).begin(problem, {"masks": ones})
    state = step.init_state(problem.recipe, ones, {}, scores=some_scores, masks=fixed)
    for epoch in range(config.epochs):
        state = METHODS[method](config).end_epoch(state, 0, epoch)
    mask = METHODS[method](config).ticket_masks(state)["dense"]["kernel"]
    assert_equal(np.asarray(mask != 0).ravel(), np.arange(100) < 80)


@pytest.mark.parametrize(
    "method, target",
    [("imp", 0.2), ("imp", None), ("imp-c", 0.2), ("imp-c", None), ("iss", 0.2), ("iss", None), ("gmp", 0.2)],
)
def test_masks_only_shrink(method: str, target: float | None, problem: Problem) -> None:
    config, history = configure(method, target_density=target, rounds=3), History()
    find_ticket(config, problem, history)
    hyper = search.hyperparams(config, SEARCH, 0)
    kept = [METHODS[method].hard_masks(progress.state, hyper) for progress in history.epochs]
    for before, after in zip(kept[:-1], kept[1:], strict=True):
        assert not any(jax.tree.leaves(jax.tree.map(lambda b, a: bool(((a != 0) & (b == 0)).any()), before, after)))
    rounds = [sum(counts(kept[last]).values()) for last in (2, 5, 8)]
    assert 1680 > rounds[0] > rounds[1] > rounds[2] > 0


@pytest.mark.parametrize("method", [name for name in SEARCHING if name != "imp"])
def test_a_round_goes_on_with_weights_batch_norm_and_momentum(method: str, problem: Problem) -> None:
    history = History()
    find_ticket(configure(method), problem, history)
    end, start = history.ends[0].state, history.starts[1].state
    for name in ("params", "batch_stats", "masks", "weight_momentum", "score_momentum"):
        assert_equal(getattr(start, name), getattr(end, name))
    assert not all_zero((start.weight_momentum, start.score_momentum))
    assert (int(end.step), int(start.step)) == (6, 0)


@pytest.mark.parametrize("rewind_epoch", [0, 1])
def test_a_round_of_imp_starts_from_the_snapshot_without_momentum(rewind_epoch: int, problem: Problem) -> None:
    history = History()
    find_ticket(configure("imp", rewind_epoch=rewind_epoch, rounds=3), problem, history)
    fresh = problem.init_ticket().start
    early = Snapshot(history.epochs[0].state.params, history.epochs[0].state.batch_stats) if rewind_epoch else fresh
    assert differ(early.batch_stats, fresh.batch_stats) == bool(rewind_epoch)
    for end, start in zip(history.ends[:2], history.starts[1:], strict=True):
        assert_equal((start.state.params, start.state.batch_stats), tuple(early))
        assert_equal(start.state.masks, end.state.masks)
        assert all_zero((start.state.weight_momentum, start.state.step)) and not all_zero(end.state.weight_momentum)
        assert differ(end.state.params, early.params) and differ(end.state.batch_stats, early.batch_stats)


@pytest.mark.parametrize("reset, temperature", [("paper", 50.0), ("released", 1.0)])
@pytest.mark.parametrize("method", ["cs", "supermask"])
def test_scores_are_reset_between_rounds_with_the_last_temperature_or_with_1(
    method: str, reset: Any, temperature: float, problem: Problem
) -> None:
    history = History()
    find_ticket(configure(method, reset=reset), problem, history)
    assert all((score == np.float32(0.02)).all() for score in jax.tree.leaves(history.starts[0].state.scores))
    end = history.ends[0].state.scores
    expected = jax.tree.map(lambda score: np.minimum(np.float32(temperature) * score, np.float32(0.02)), end)
    assert_equal(history.starts[1].state.scores, expected)


@pytest.mark.parametrize("target", [DENSITY, None])
@pytest.mark.parametrize("method", ["iss", "supermask-iss"])
def test_scores_of_iss_start_again_where_they_are_left_and_the_others_stay(
    method: str, target: float | None, problem: Problem
) -> None:
    config, history = configure(method, target_density=target), History()
    find_ticket(config, problem, history)
    before, end, start = history.epochs[1].state, history.ends[0].state, history.starts[1].state
    assert not any((score < -100).any() for score in jax.tree.leaves(before.scores))  # none goes inside a round
    for ended, started in zip(jax.tree.leaves(end.scores), jax.tree.leaves(start.scores), strict=True):
        kept = ended > -100
        assert 0 < kept.sum() < kept.size
        assert (started[kept] == np.float32(0.02)).all()
        assert (ended[~kept] == -1e4).all() and (started[~kept] == -1e4).all()
        assert target is not None or (ended[kept] >= np.float32(0.02)).all()


@pytest.mark.parametrize("method", [name for name in SEARCHING if REWIND in METHODS[name].retrainings])
def test_a_ticket_rewound_to_epoch_0_has_the_initial_weights(method: str, problem: Problem) -> None:
    ticket = find_ticket(configure(method, rewind_epoch=0, after=REWIND), problem)
    assert_equal(tuple(ticket.start), tuple(problem.init_ticket().start))


def test_gmp_prunes_by_its_cubic_schedule_epoch_by_epoch(problem: Problem) -> None:
    history = History()
    find_ticket(configure("gmp", rounds=2, epochs=4, target_density=0.2), problem, history)
    shares = [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1]  # of three quarters of 8 epochs
    expected = [round(1680 * (0.2 + 0.8 * (1 - share) ** 3)) for share in shares]
    assert [sum(counts(progress.state.masks).values()) for progress in history.epochs] == expected


def test_magnitude_is_dense_until_the_end_of_the_last_epoch(problem: Problem) -> None:
    history = History()
    find_ticket(configure("magnitude"), problem, history)
    assert [record.density for record in history.records] == [1.0] * 5 + [round(DENSITY * 1680) / 1680]
    state = history.epochs[-1].state
    ranked = {name: np.abs(state.params[name]["kernel"]) for name in state.masks}
    smallest = min(ranked[name][mask["kernel"] != 0].min() for name, mask in state.masks.items())
    assert all((ranked[name][mask["kernel"] == 0] <= smallest).all() for name, mask in state.masks.items())


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SEARCHING])
def test_methods_without_a_search_train_nothing_before_the_ticket_which_starts_fresh(
    method: str, problem: Problem
) -> None:
    ticket, _, history = run(configure(method), problem)
    assert [progress.phase_name() for progress in history.starts] == ["ticket"]
    assert_equal(tuple(ticket.start), tuple(problem.init_ticket().start))


def test_dense_keeps_every_weight(problem: Problem) -> None:
    ticket, state, history = run(configure("dense"), problem)
    assert all((np.asarray(mask) == 1).all() for mask in jax.tree.leaves((ticket.masks, state.masks)))
    assert [record.density for record in history.records] == [1.0] * 3


def test_random_masks_have_about_the_density_in_each_layer_and_keep_weights_of_all_sizes(problem: Problem) -> None:
    ticket = find_ticket(configure("random"), problem)
    for name, mask in ticket.masks.items():
        kept = np.asarray(mask["kernel"]) != 0
        low, high = scipy.stats.binom.interval(1 - 1e-6, kept.size, DENSITY)
        assert low <= kept.sum() <= high
        sizes = np.abs(ticket.start.params[name]["kernel"])
        assert sizes[kept].mean() == pytest.approx(sizes.mean(), rel=0.2)


@pytest.mark.parametrize(
    "batch_size, batches", [(16, 2), (12, 2), (2, 10), (33, 1)], ids=["all", "whole ones", "ten at most", "one"]
)
def test_snip_keeps_the_highest_products_of_weight_and_gradient(
    batch_size: int, batches: int, problem: Problem
) -> None:
    ticket = find_ticket(configure("snip", batch_size=batch_size), problem)
    (params, batch_stats), ones = ticket.start, jax.tree.map(jnp.ones_like, ticket.masks)
    variables = {"batch_stats": batch_stats, "masks": ones}

    @jax.jit
    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        inputs = (images.astype(float) - 60) / 60
        logits, _ = problem.recipe.model.apply(
            {"params": params, **variables}, inputs, train=True, mutable=["batch_stats"]
        )
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(labels.size), labels])

    order = np.asarray(problem.epoch_order(0, 0))
    some = np.split(order, range(batch_size, 32, batch_size))[:batches]
    parts = [jax.grad(loss)(params, problem.train.images[batch], problem.train.labels[batch]) for batch in some]
    gradient = jax.tree.map(lambda *arrays: sum(arrays), *parts)
    ranks = np.concatenate([np.abs(params[name]["kernel"] * gradient[name]["kernel"]).ravel() for name in ones])
    kept = np.concatenate([np.asarray(ticket.masks[name]["kernel"]).ravel() for name in ones]) != 0
    assert kept.sum() == round(DENSITY * 1680)
    assert ranks[kept].min() >= ranks[~kept].max() * (1 - 1e-4)  # to rounding


@pytest.mark.parametrize("method", SEARCHING)
def test_weights_of_a_supermask_never_move_and_those_of_other_methods_do(method: str, problem: Problem) -> None:
    history = History()
    ticket = find_ticket(configure(method, after=METHODS[method].retrainings[-1]), problem, history)
    fresh = problem.init_ticket().start
    states = [progress.state.params for progress in history.epochs]
    assert [differ(params, fresh.params) for params in states] == [method not in FROZEN] * 6
    assert differ(ticket.start.params, fresh.params) == (method not in FROZEN)
    assert differ(ticket.start.batch_stats, fresh.batch_stats)
    assert all_zero(history.ends[-1].state.weight_momentum) == (method in FROZEN)


def test_supermasks_are_frozen() -> None:
    assert FROZEN[:2] == ["supermask", "supermask-iss"]


class Penalties(Observer):
    """Penalty of every step: with a weight of 1, the sum of the masks."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def on_steps(self, progress: Progress, total: int) -> None:
        self.sums.append(float(progress.figures[-1].penalty))


def test_iss_draws_other_masks_of_0_and_1_in_every_step(problem: Problem) -> None:
    """Scores do not move; sums of 1680 masks with a mean of 0.505 differ for most draws."""
    config = configure("iss", score_lr=1e-30, lmbda=1.0, target_density=None)
    penalties = Penalties()
    find_ticket(config, problem, penalties)
    assert len(penalties.sums) == 12 and len(set(penalties.sums)) > 8  # 2 rounds of 3 epochs of 2 steps
    low, high = scipy.stats.binom.interval(1 - 1e-6, 1680, 1 / (1 + np.exp(-0.02)))
    assert all(total.is_integer() and low <= total <= high for total in penalties.sums)


def hyperparams() -> step.Hyperparams:
    return search.hyperparams(CONFIG, "search", 0)


def test_iss_draws_1_with_the_probability_of_a_score() -> None:
    values = np.array([-1e4, -4, -1, 0, 0.5, 3, 1e4], np.float32)
    drawn = draw_masks({"kernel": jnp.tile(values[:, None], (1, 20000))}, hyperparams(), jax.random.key(0))["kernel"]
    assert set(np.unique(drawn)) == {0.0, 1.0}
    ones = np.asarray(drawn).sum(axis=1)
    with np.errstate(over="ignore"):
        chances = 1 / (1 + np.exp(-values))
    low, high = scipy.stats.binom.interval(1 - 1e-6, 20000, chances)
    assert (ones[0], ones[-1]) == (0, 20000)
    assert ((low <= ones) & (ones <= high))[1:-1].all()
    assert not np.array_equal(drawn[3, :10000], drawn[3, 10000:])


def test_arrays_and_keys_of_their_own_draw_masks_of_their_own() -> None:
    scores = {"a": jnp.zeros(1000), "b": jnp.zeros(1000)}
    first, other = (draw_masks(scores, hyperparams(), jax.random.key(seed)) for seed in (0, 1))
    assert_equal(first, draw_masks(scores, hyperparams(), jax.random.key(0)))
    for one, two in ((first["a"], first["b"]), (first["a"], other["a"]), (first["b"], other["b"])):
        assert 400 < int((one != two).sum()) < 600


def test_the_gradient_of_iss_passes_straight_through_the_draw() -> None:
    scores = jnp.linspace(-6, 6, 25)
    factors = jnp.arange(1.0, 26.0)
    gradient = jax.grad(lambda s: (factors * draw_masks(s, hyperparams(), jax.random.key(0))).sum())(scores)
    chances = 1 / (1 + np.exp(-np.float64(scores)))
    np.testing.assert_allclose(gradient, factors * chances * (1 - chances), rtol=5e-5)  # float32
    gone = jax.grad(lambda s: draw_masks(s, hyperparams(), jax.random.key(0)).sum())(jnp.full(3, -1e4))
    assert_equal(gone, np.zeros(3, np.float32))


def test_what_iss_has_pruned_never_comes_back_against_any_momentum(problem: Problem) -> None:
    config, history = configure("iss"), History()
    find_ticket(config, problem, history)
    end = jax.tree.map(jnp.asarray, history.ends[0].state)
    gone = jax.tree.map(lambda score: score == -1e4, end.scores)
    upwards = jax.tree.map(lambda moment: jnp.full_like(moment, -50.0), end.score_momentum)
    progress = history.ends[0]._replace(state=end.replace(score_momentum=upwards))
    later = History()
    ticket, _ = search.search_ticket(config, problem, search.begin_next_round(config, problem, progress), later)
    for pruned, mask in zip(jax.tree.leaves(gone), jax.tree.leaves(ticket.masks), strict=True):
        assert pruned.any() and not (mask[pruned] != 0).any()
    for progress in later.epochs:
        drawn = draw_masks(progress.state.scores, hyperparams(), jax.random.key(0))
        assert not any(jax.tree.leaves(jax.tree.map(lambda mask, pruned: bool(mask[pruned].any()), drawn, gone)))
    moved = jax.tree.leaves(later.epochs[1].state.scores)[0][jax.tree.leaves(gone)[0]]
    assert (moved > -1e4).all()  # it did push


@pytest.mark.parametrize("method", [name for name in SEARCHING if METHODS[name].learns_masks])
def test_a_search_that_leaves_a_layer_without_weights_tells(method: str, problem: Problem) -> None:
    config = configure(method, target_density=None, lmbda=10.0, rounds=1)
    with pytest.warns(CollapsedLayerWarning, match="keeps no weight"):
        ticket = find_ticket(config, problem)
    assert counts(ticket.masks) == {"first/kernel": 0, "second/kernel": 0}


def prune_by_magnitude(weights: list[np.ndarray], shares: list[float], *, per_layer: bool) -> list[list[np.ndarray]]:
    """Kept weights after each level, by definition: the largest of the rest, the first of equal weights."""
    flat = [np.abs(weight).ravel() for weight in weights]
    groups = flat if per_layer else [np.concatenate(flat)]
    kept = [np.ones(len(group), bool) for group in groups]
    levels = []
    for share in shares:
        for number, group in enumerate(groups):
            left = [index for index in range(len(group)) if kept[number][index]]
            left.sort(key=lambda index, group=group: (-group[index], index))
            kept[number] = np.isin(np.arange(len(group)), left[: round(share * len(group))])
        parts = kept if per_layer else np.split(kept[0], np.cumsum([len(part) for part in flat])[:-1])
        levels.append([part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)])
    return levels


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    "fields, shares",
    [
        ({"target_density": 0.2}, [0.2 ** (1 / 3), 0.2 ** (2 / 3), 0.2]),
        ({"target_density": None, "prune_rate": 0.35}, [0.65, 0.65**2, 0.65**3]),
        ({"target_density": None}, [0.8, 0.8**2, 0.8**3]),
    ],
    ids=["target", "rate", "default rate"],
)
@pytest.mark.parametrize("method", ["imp", "imp-c"])
def test_three_levels_of_imp_are_those_of_its_definition(
    method: str, fields: dict[str, Any], shares: list[float], scope: Any, problem: Problem
) -> None:
    rng = np.random.default_rng(0)
    shapes = {"c": (10, 10), "a": (7, 9), "b": (3, 4, 5)}
    weights = {name: rng.integers(-4, 5, shape).astype(np.float32) for name, shape in shapes.items()}
    config = configure(method, rounds=3, scope=scope, **fields)
    params = {name: {"kernel": jnp.asarray(weight), "bias": jnp.full(3, 9.0)} for name, weight in weights.items()}
    ones = {name: {"kernel": jnp.ones(weight.shape)} for name, weight in weights.items()}
    state = step.init_state(problem.recipe, params, {}, scores={}, masks=ones)
    names = sorted(weights)  # the order of a tree
    expected = prune_by_magnitude([weights[name] for name in names], shares, per_layer=scope == "layer")
    for round in range(3):
        for epoch in range(config.epochs):
            state = METHODS[method](config).end_epoch(state, round, epoch)
            level = round if epoch == config.epochs - 1 else round - 1
            for index, name in enumerate(names):
                mask = np.asarray(state.masks[name]["kernel"])
                assert_equal(mask, expected[level][index].astype(np.float32) if level >= 0 else np.ones_like(mask))


@pytest.mark.parametrize("method, after", named_afters(REWIND, FINETUNE, LR_REWIND))
def test_retraining_keeps_the_masks_and_pruned_weights_count_for_nothing(
    method: str, after: str, problem: Problem
) -> None:
    ticket, state, _ = run(configure(method, after=after), problem)
    assert_equal(state.masks, ticket.masks)
    assert differ(state.params, ticket.start.params)

    def logits_after(changed: Any) -> np.ndarray:
        weights = dict(state.params)
        for name, mask in state.masks.items():
            kernel = weights[name]["kernel"]
            weights[name] = weights[name] | {"kernel": jnp.where(changed(mask["kernel"]), kernel + 1000, kernel)}
        variables = {"params": weights, "batch_stats": state.batch_stats, "masks": state.masks}
        return np.asarray(Executor().predict(problem.recipe.model, variables, problem.train, batch_size=16))

    unchanged = logits_after(lambda mask: jnp.zeros(mask.shape, bool))
    assert_equal(logits_after(lambda mask: mask == 0), unchanged)
    assert differ(logits_after(lambda mask: mask != 0), unchanged)


@pytest.mark.parametrize("method, after", named_afters(REWIND, FINETUNE, LR_REWIND))
def test_retraining_starts_from_early_weights_or_from_the_trained_ones(
    method: str, after: str, problem: Problem
) -> None:
    ticket, _, history = run(configure(method, after=after), problem)
    start = history.starts[-1].state
    assert_equal((start.params, start.batch_stats), tuple(ticket.start))
    assert_equal(start.masks, ticket.masks)
    assert all_zero((start.weight_momentum, start.step)) and start.scores == {}
    if method in SEARCHING:
        source = history.ends[-2] if after != REWIND else history.epochs[0]
        assert_equal(tuple(ticket.start), (source.state.params, source.state.batch_stats))
        assert differ(history.ends[-2].state.params, history.epochs[0].state.params) == (method not in FROZEN)


@pytest.mark.parametrize("method, after", named_afters(REWIND, FINETUNE, LR_REWIND))
def test_finetuning_has_the_last_learning_rate_and_other_retraining_the_whole_schedule(
    method: str, after: str, problem: Problem
) -> None:
    _, _, history = run(configure(method, after=after), problem)
    rates = [record.learning_rate for record in history.records]
    whole = [0.05, 0.025, 0.0025]
    searched = whole * (2 if method in SEARCHING else 0)
    np.testing.assert_allclose(rates, searched + ([0.0025] * 3 if after == FINETUNE else whole), rtol=1e-6)


@pytest.mark.parametrize("method", [name for name, _ in named_afters(NONE)])
def test_after_none_the_ticket_is_what_the_search_ended_with(
    method: str, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "net", Net)
    config, history = configure(method, after=NONE, out=tmp_path / "run", model="net"), History()
    data = Data(problem.train, problem.train, problem.train, classes=("a", "b", "c", "d"))
    with open_run_directory(config, new=True) as directory:
        directory.begin("fingerprint")
        observers = Observers(directory, history)
        summary = pipeline.run(Experiment(config, problem, observers, data=data, directory=directory))
    assert [progress.phase_name() for progress in history.starts] == ["search 0", "search 1"]
    assert (summary["after"], summary["ticket"]["epochs"]) == (NONE, 6)
    saved, state = load_ticket(tmp_path / "run" / TICKET_FILE), history.ends[-1].state
    found = METHODS[method](config).ticket_masks(state)
    kept = jax.tree.map(lambda mask: (mask != 0).astype(mask.dtype), found)
    assert saved.rewound is None
    assert_equal(saved.variables["params"], trees.apply_masks(state.params, kept))
    assert_equal(saved.variables["masks"], found)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_finds_the_same_ticket_and_another_seed_another(method: str, problem: Problem) -> None:
    config = configure(method)
    first, again = find_ticket(config, problem), find_ticket(config, problem)
    other = find_ticket(config, dataclasses.replace(problem, key=jax.random.key(4)))
    assert_equal(first, again)
    assert differ(first.start.params, other.start.params)
    assert differ(first.masks, other.masks) == (method != "dense")


class Stop(Exception):
    pass


class StopAt(Observer):
    """Stops a run after a step, given by the phase in words, the epoch and the steps done of it."""

    def __init__(self, *moment: str | int) -> None:
        self._moment = moment

    def on_steps(self, progress: Progress, total: int) -> None:
        if (progress.phase_name(), progress.epoch, progress.step) == self._moment:
            raise Stop


def finish(config: Config, problem: Problem, progress: Progress | None, observer: Observer) -> Any:
    """Runs the remaining search and retraining; returns the start weights of the retraining and its final state."""
    progress = progress or search.begin_search(search.init_state(config, problem))
    if progress.phase == "search":
        ticket, _ = search.search_ticket(config, problem, progress, observer)
        progress = search.begin_retraining(problem, ticket)
    start = progress.snapshot
    return start, search.retrain(config, problem, progress, observer)


@pytest.mark.parametrize("method", ["imp", "iss", "gmp"])
def test_a_run_stopped_in_the_middle_of_a_round_ends_with_the_same_bits(
    method: str, problem: Problem, tmp_path: Path
) -> None:
    config = configure(method, after=FINETUNE, epochs=2, checkpoint_steps=1, checkpoint_seconds=0.0)
    whole = finish(config, problem, None, Observer())
    for moment in (("search 0", 1, 1), ("search 1", 0, 1), ("ticket", 1, 1)):
        with Checkpoints(config, problem, tmp_path) as saved:
            with pytest.raises(Stop):
                finish(config, problem, saved.restore(), Observers(saved, StopAt(*moment)))
            saved.save_latest()
        assert (tmp_path / "start").exists() == (moment[0] == "ticket")
        with Checkpoints(config, problem, tmp_path) as saved:
            progress = saved.restore()
        assert progress is not None and (progress.phase_name(), progress.epoch, progress.step) == moment
        assert_equal(finish(config, problem, progress, Observer()), whole)


class EverySecond(Method):
    """Keeps every second weight from the end of the first epoch."""

    wants_target = False

    def end_epoch(self, state: TrainState, round: int, epoch: int) -> TrainState:
        def every_second(mask: jax.Array) -> jax.Array:
            return (jnp.arange(mask.size) % 2).reshape(mask.shape).astype(mask.dtype)

        return state.replace(masks=jax.tree.map(every_second, state.masks))


WORDS = "--epochs 2 --rounds 1 --rewind-epoch 1 --batch-size 16 --lr-schedule --lr-drops --controls".split()


def test_a_method_is_added_by_one_line(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="^--method every-second: must be one of cs, "):
        parser.parse([*WORDS, "--method", "every-second"])
    monkeypatch.setitem(METHODS, "every-second", EverySecond)
    config = parser.parse([*WORDS, "--method", "every-second"])
    assert type(config.pruning_method) is EverySecond and str(config.run_directory) == "runs/digits-every-second-seed0"
    ticket, state, history = run(config, problem)
    assert counts(ticket.masks) == {"first/kernel": 540, "second/kernel": 300}
    assert [record.density for record in history.records] == [0.5] * 4
    assert_equal(ticket.start.params, history.epochs[0].state.params)
    assert_equal(state.masks, ticket.masks)
    with pytest.raises(
        ConfigError, match="^--target-density 0.5: --method every-second prunes nothing; omit --target-density$"
    ):
        parser.parse([*WORDS, "--method", "every-second", "--target-density", "0.5"])


@pytest.mark.slow
def test_a_model_is_added_by_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", Net)
    words = "--model tiny --method magnitude --target-density 0.25 --max-train-examples 48".split()
    config = parser.parse([*WORDS, *words])
    problem, _ = prepare(config)
    ticket = find_ticket(config, problem)
    assert counts(ticket.masks).keys() == {"first/kernel", "second/kernel"}
    assert sum(counts(ticket.masks).values()) == (64 * 30 + 30 * 20) / 4
