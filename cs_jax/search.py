"""Continuous Sparsification: rounds of search, the ticket, its rewind and retraining.

References:
    Savarese, Silva and Maire, "Winning the Lottery with Continuous Sparsification", NeurIPS 2020, arXiv:1912.04427,
    algorithm 2.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax import budget, masks, rules, schedules, training
from cs_jax.config import Config
from cs_jax.images import ImageSet
from cs_jax.selection import Selection
from cs_jax.training import Hyperparams, Recipe, StepMetrics, TrainState

PyTree = Any

SEARCH, TICKET, DENSE = "search", "ticket", "dense"


class NonFiniteLossError(ArithmeticError):
    """Loss or weights are no longer finite; says in which phase, round, epoch and step."""


class Snapshot(NamedTuple):
    """What a rewind puts back: weights, masked or not, and BatchNorm state."""

    params: PyTree
    batch_stats: PyTree


class Ticket(NamedTuple):
    """A sparse network before it is retrained: rewound weights and hard masks."""

    snapshot: Snapshot
    masks: PyTree


class EpochRecord(NamedTuple):
    """What is reported of an epoch, at its end; one line of metrics.jsonl. None where a figure has no meaning."""

    phase: str  # search, ticket or dense
    round: int | None  # of the search, from 0
    epoch: int  # inside the round or phase, from 0
    temperature: float | None
    learning_rate: float  # of the weights
    loss: float  # mean over the epoch's examples, penalty included
    penalty: float  # weighted, mean over the epoch's examples
    density: float  # of the hard masks
    soft_accuracy: float | None  # on the validation set, with the masks of this epoch; search alone
    hard_accuracy: float | None  # on the validation set, with hard masks; None while the search's are empty
    seconds: float


class Observer:
    """What wants to know how a run goes on. Every method may be left out."""

    def on_phase_start(self, phase: str, round: int | None, state: TrainState) -> None:
        """Before the first epoch of a search round, of the ticket or of the dense network."""

    def on_steps(self, done: int, total: int, state: TrainState, metrics: StepMetrics) -> None:
        """After every compiled call: `done` of the epoch's `total` steps. The state is donated to the next call."""

    def on_epoch_end(self, record: EpochRecord, state: TrainState) -> None:
        """After an epoch and its evaluation."""

    def on_phase_end(self, phase: str, round: int | None, state: TrainState) -> None:
        """After the last epoch, before any reset."""


class Observers(Observer):
    """Several observers as one, told in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_phase_start(self, phase: str, round: int | None, state: TrainState) -> None:
        for observer in self._observers:
            observer.on_phase_start(phase, round, state)

    def on_steps(self, done: int, total: int, state: TrainState, metrics: StepMetrics) -> None:
        for observer in self._observers:
            observer.on_steps(done, total, state, metrics)

    def on_epoch_end(self, record: EpochRecord, state: TrainState) -> None:
        for observer in self._observers:
            observer.on_epoch_end(record, state)

    def on_phase_end(self, phase: str, round: int | None, state: TrainState) -> None:
        for observer in self._observers:
            observer.on_phase_end(phase, round, state)


@dataclass(frozen=True)
class Problem:
    """What a run works on."""

    recipe: Recipe
    train: ImageSet
    validation: ImageSet | None  # None where no example was set aside
    key: jax.Array  # PRNG key of the run
    order: Callable[[int, int], Any] | None = None  # indices into `train` of a phase's epoch; None is a shuffle

    def epoch_order(self, phase: int, epoch: int) -> Any:
        """Indices into `train`, in the order of an epoch. Phases are the rounds from 0, then the retraining."""
        if self.order is not None:
            return self.order(phase, epoch)
        return jax.random.permutation(_key(self.key, "order", phase, epoch), len(self.train))


def init_variables(problem: Problem) -> dict[str, PyTree]:
    """The network that a run starts from: "params", "batch_stats" and "masks" of ones."""
    return training.init_variables(problem.recipe, _key(problem.key, "init"), problem.train.images.shape[1:])


def init_state(config: Config, problem: Problem) -> TrainState:
    """State before the first step of the search: a fresh network, every score at its initial value."""
    variables = init_variables(problem)
    scores = masks.init_scores(variables["masks"], config.mask_initial_value)
    return training.init_state(problem.recipe, variables["params"], variables["batch_stats"], scores=scores, masks={})


def selection(config: Config, scores: PyTree) -> Selection:
    """Every masked array of the network, and the density that the config asks for.

    Raises:
        ValueError: the target cannot be met by this network.
    """
    return rules.select_all(scores, target_density=config.target_density, allow_empty_layers=config.allow_empty_layers)


def search_ticket(
    config: Config, problem: Problem, state: TrainState, observer: Observer
) -> tuple[Ticket, list[EpochRecord]]:
    """Trains weights and scores together over all rounds.

    With a target density, scores are held at it from epoch to epoch, and the ticket has it exactly.

    Args:
        config: rounds, epochs, schedules, reset and the rest.
        problem: model and data.
        state: what `init_state` makes; donated, not to be used again.
        observer: told of every phase, step and epoch.

    Returns:
        The ticket, and the record of each round's last epoch.

    Raises:
        NonFiniteLossError: in which round, epoch and step.

    Warns:
        CollapsedLayerWarning: the ticket leaves a layer without weights.
        UnfinishedSearchWarning: a target density cuts through masks that are still soft.
    """
    records = []
    snapshot = None
    for round in range(config.rounds):
        state = state.replace(step=jnp.zeros_like(state.step))
        observer.on_phase_start(SEARCH, round, state)
        for epoch in range(config.epochs):
            if round == 0 and epoch == config.rewind_epoch:
                snapshot = take_snapshot(state)
            state, record = _epoch(config, problem, state, observer, phase=SEARCH, number=round, epoch=epoch)
            records.append(record)
        observer.on_phase_end(SEARCH, round, state)
        if round < config.rounds - 1:
            state = reset_scores(config, state)
    assert snapshot is not None
    chosen = selection(config, state.scores)
    if chosen.budgets:
        budget.warn_if_soft(chosen, state.scores, config.final_temp)
    ticket = Ticket(snapshot, budget.ticket_masks(chosen, state.scores, init_value=config.mask_initial_value))
    return ticket, records[config.epochs - 1 :: config.epochs]


def take_snapshot(state: TrainState) -> Snapshot:
    """A copy of weights and BatchNorm state, which the next step overwrites in place."""
    return Snapshot(*jax.tree.map(jnp.copy, (state.params, state.batch_stats)))


def reset_scores(config: Config, state: TrainState) -> TrainState:
    """State for the next round: scores reset, weights, BatchNorm and momentum as they are.

    `paper` resets with the temperature that the round ended on. `released` resets with temperature 1, as the authors'
    script does, because it has set it back before: there pruned entries can come back.
    """
    last = schedules.temperature(config.epochs - 1, config.epochs, config.final_temp)
    temperature = last if config.reset == "paper" else 1.0
    return state.replace(scores=masks.prune_scores(state.scores, temperature, init_value=config.mask_initial_value))


def dense_ticket(variables: dict[str, PyTree]) -> Ticket:
    """The dense network as a ticket that keeps every weight, unscaled."""
    return Ticket(Snapshot(variables["params"], variables["batch_stats"]), variables["masks"])


def retrain(config: Config, problem: Problem, ticket: Ticket, observer: Observer, *, phase: str = TICKET) -> TrainState:
    """Trains a ticket's rewound weights for as many epochs as a round has; its masks stay fixed.

    The dense network, retrained the same way, sees the same batches.

    Args:
        config: epochs, schedules and the rest.
        problem: model and data.
        ticket: its weights are copied, not donated.
        observer: told of the phase, its steps and epochs.
        phase: `TICKET` or `DENSE`.

    Raises:
        NonFiniteLossError: in which epoch and step.
    """
    params, batch_stats = jax.tree.map(jnp.copy, tuple(ticket.snapshot))
    state = training.init_state(
        problem.recipe, params, batch_stats, scores={}, masks=jax.tree.map(jnp.copy, ticket.masks)
    )
    observer.on_phase_start(phase, None, state)
    for epoch in range(config.epochs):
        state, _ = _epoch(config, problem, state, observer, phase=phase, number=config.rounds, epoch=epoch)
    observer.on_phase_end(phase, None, state)
    return state


def _epoch(
    config: Config, problem: Problem, state: TrainState, observer: Observer, *, phase: str, number: int, epoch: int
) -> tuple[TrainState, EpochRecord]:
    started = time.perf_counter()
    round = number if phase == SEARCH else None
    hyper = hyperparams(config, phase, epoch)
    order = problem.epoch_order(number, epoch)
    state, metrics = training.train_epoch(
        problem.recipe,
        state,
        problem.train,
        order,
        _key(problem.key, "augment", number),
        hyper,
        batch_size=config.batch_size,
        on_steps=observer.on_steps,
    )
    _check_finite(state, metrics, phase, round, epoch)
    if config.target_density is not None and state.scores:
        held = budget.hold_density(selection(config, state.scores), state.scores, number, config.rounds)
        state = state.replace(scores=held)
    soft, hard, density = _evaluate(config, problem, state, hyper)
    sizes = np.full(metrics.loss.shape, config.batch_size)
    sizes[-1] = len(order) - sizes[:-1].sum()
    record = EpochRecord(
        phase=phase,
        round=round,
        epoch=epoch,
        temperature=schedules.temperature(epoch, config.epochs, config.final_temp) if phase == SEARCH else None,
        learning_rate=_learning_rate(config, epoch, config.lr),
        loss=float(np.average(metrics.loss, weights=sizes)),
        penalty=float(np.average(metrics.penalty, weights=sizes)),
        density=density,
        soft_accuracy=soft,
        hard_accuracy=hard,
        seconds=time.perf_counter() - started,
    )
    observer.on_epoch_end(record, state)
    return state, record


def hyperparams(config: Config, phase: str, epoch: int) -> Hyperparams:
    """The scalars of an epoch, on the device. The dense network has no penalty; a ticket's is constant."""
    score_lr = config.lr if config.score_lr is None else config.score_lr
    values = dict(
        temperature=schedules.temperature(epoch, config.epochs, config.final_temp),
        init_value=config.mask_initial_value,
        learning_rate=_learning_rate(config, epoch, config.lr),
        score_learning_rate=_learning_rate(config, epoch, score_lr),
        penalty_weight=0.0 if phase == DENSE else config.lmbda,
    )
    return Hyperparams(**{name: jnp.asarray(value, float) for name, value in values.items()})


def _learning_rate(config: Config, epoch: int, base: float) -> float:
    return schedules.learning_rate(epoch, base, config.lr_schedule, config.lr_drops)


def _evaluate(
    config: Config, problem: Problem, state: TrainState, hyper: Hyperparams
) -> tuple[float | None, float | None, float]:
    """Validation accuracy with soft masks and with hard ones (None without meaning), and density."""
    hard_masks = masks.hard_mask(state.scores, init_value=hyper.init_value) if state.scores else state.masks
    density = masks.density(hard_masks)
    images = problem.validation
    if images is None:
        return None, None, density
    if not state.scores:
        return None, accuracy(config, problem, state, hard_masks, images), density
    soft_masks = masks.soft_mask(state.scores, hyper.temperature, init_value=hyper.init_value)
    soft = accuracy(config, problem, state, soft_masks, images)
    return soft, accuracy(config, problem, state, hard_masks, images) if density > 0 else None, density


def accuracy(config: Config, problem: Problem, state: TrainState, some_masks: PyTree, images: ImageSet) -> float:
    """Share of `images` that the state's weights classify right under `some_masks`, in [0, 1]."""
    variables = {"params": state.params, "batch_stats": state.batch_stats, "masks": some_masks}
    return training.accuracy(problem.recipe.model, variables, images, batch_size=config.batch_size)


def _check_finite(state: TrainState, metrics: StepMetrics, phase: str, round: int | None, epoch: int) -> None:
    """A step's loss is that before its update, so what the last update made is looked at too."""
    where = f"round {round}" if phase == SEARCH else f"the {phase}'s training"
    bad = np.flatnonzero(~np.isfinite(metrics.loss))
    if bad.size:
        raise NonFiniteLossError(f"loss is {float(metrics.loss[bad[0]])} in {where}, epoch {epoch}, step {bad[0]}")
    if not _all_finite((state.params, state.scores)):
        raise NonFiniteLossError(
            f"weights or scores are no longer finite in {where}, after epoch {epoch}, step {len(metrics.loss) - 1}"
        )


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _key(key: jax.Array, purpose: str, *numbers: int) -> jax.Array:
    """The key of one purpose, so that no two draws of a run share one."""
    for number in (("init", "order", "augment").index(purpose), *numbers):
        key = jax.random.fold_in(key, number)
    return key
