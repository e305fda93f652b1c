"""Search rounds, selection of the ticket, rewind and retraining; the same code for every method.

References:
    Savarese, Silva and Maire, "Winning the Lottery with Continuous Sparsification", NeurIPS 2020, arXiv:1912.04427,
    algorithm 2.
"""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cs_jax.core import schedules
from cs_jax.core.arrays import on_host
from cs_jax.experiment.config import SEARCH, TICKET, Config
from cs_jax.experiment.experiment import Search
from cs_jax.experiment.metrics import of_epoch
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.methods import FINETUNE, NONE, REWIND
from cs_jax.methods.controls import FRESH
from cs_jax.training import step as training_step
from cs_jax.training.epoch import Epoch
from cs_jax.training.problem import Problem, Snapshot, Ticket
from cs_jax.training.step import Hyperparams, StepMetrics, TrainState


class NonFiniteLossError(ArithmeticError):
    """Loss, weights or scores are not finite. The message names phase or round, epoch and step."""


def init_state(config: Config, problem: Problem) -> TrainState:
    """State before the first step of the search: an initial network, with the method's initial scores or masks."""
    variables = problem.init_variables()
    scores, fixed = config.pruning_method.begin(problem, variables)
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = training_step.init_state(problem.recipe, params, batch_stats, scores=scores, masks=fixed)
    return problem.executor.place(state)


def begin_search(state: TrainState) -> Progress:
    """Progress at the start of the search, from the state of `init_state`, which is donated."""
    return Progress(SEARCH, 0, 0, 0, state, snapshot=None)


def search_ticket(
    config: Config, problem: Problem, progress: Progress, observer: Observer
) -> tuple[Ticket, tuple[EpochRecord, ...]]:
    """Runs all rounds of the search and selects the ticket.

    Args:
        config: settings of the run.
        problem: model and data.
        progress: result of `begin_search`, or restored from a checkpoint; its state is donated.
        observer: receives the events of the search.

    Returns:
        The ticket and the metrics of each round's last epoch. The weights of the ticket are the start of its
        retraining: the snapshot if the config rewinds, else the trained weights. Without a retraining, BatchNorm
        statistics are estimated again with the ticket's masks.

    Raises:
        NonFiniteLossError: loss, weights or scores are not finite.

    Warns:
        CollapsedLayerWarning: a layer of the ticket has no weights.
        UnfinishedSearchWarning: the masks at the target density are still soft.
    """
    if config.search_rounds:
        progress = _phase(config, problem, progress, observer)
    while len(progress.round_ends) < config.search_rounds:
        progress = _phase(config, problem, begin_next_round(config, problem, progress), observer)
    state = progress.state
    found = config.pruning_method.ticket_masks(state)
    start = Snapshot(state.params, state.batch_stats)
    if config.search_rounds and config.retraining == REWIND:
        assert progress.snapshot is not None
        start = progress.snapshot
    if config.retraining == NONE:  # the running averages may belong to other masks
        model, batch_size = problem.recipe.model, config.batch_size
        variables = training_step.network(problem.recipe.channels, *start, found)
        statistics = problem.executor.estimate_statistics(model, variables, problem.train, batch_size=batch_size)
        start = start._replace(batch_stats=statistics)
    return Ticket(start, found), progress.round_ends


def begin_next_round(config: Config, problem: Problem, progress: Progress) -> Progress:
    """Progress at the start of the next round, from the end of a round."""
    assert progress.round is not None
    state = config.pruning_method.begin_round(problem, progress.state, progress.snapshot)
    state = problem.executor.place(state.replace(step=jnp.zeros_like(state.step)))
    return progress._replace(round=progress.round + 1, epoch=0, state=state)


def take_snapshot(state: TrainState) -> Snapshot:
    """Copy of weights and BatchNorm state on the host, because devices do not need the copy until the rewind."""
    return Snapshot(*jax.tree.map(np.array, on_host((state.params, state.batch_stats))))


def begin_retraining(
    problem: Problem, ticket: Ticket, *, phase: str = TICKET, round_ends: tuple[EpochRecord, ...] = ()
) -> Progress:
    """Progress at the start of a retraining: the ticket's weights, fixed masks, new optimizer state.

    Args:
        problem: model and data.
        ticket: weights and masks; the arrays are copied, not donated.
        phase: `TICKET` or the name of a control.
        round_ends: metrics of each search round's last epoch, for the summary.
    """
    return Progress(
        phase, None, 0, 0, fixed_state(problem, ticket), ticket.start if phase == TICKET else None, round_ends
    )


def fixed_state(problem: Problem, ticket: Ticket) -> TrainState:
    """Train state at the start of a retraining, with copies of the ticket's arrays."""
    (params, batch_stats), fixed = problem.executor.copy(tuple(ticket))
    state = training_step.init_state(problem.recipe, params, batch_stats, scores={}, masks=fixed)
    return problem.executor.place(state)


def retrain(config: Config, problem: Problem, progress: Progress, observer: Observer) -> TrainState:
    """Train state after `config.epochs` epochs of training a ticket's weights with fixed masks.

    Controls are trained with the same batches as the ticket.

    Args:
        config: settings of the run.
        problem: model and data.
        progress: result of `begin_retraining`, or restored from a checkpoint; its state is donated.
        observer: receives the events of the retraining.

    Raises:
        NonFiniteLossError: loss or weights are not finite.
    """
    return _phase(config, problem, progress, observer).state


def _phase(config: Config, problem: Problem, progress: Progress, observer: Observer) -> Progress:
    """Runs the remaining epochs of a round or retraining."""
    observer.on_phase_start(progress)
    while progress.epoch < config.epochs:
        progress = _epoch(config, problem, progress, observer)
    observer.on_phase_end(progress)
    return progress


def _epoch(config: Config, problem: Problem, progress: Progress, observer: Observer) -> Progress:
    """Runs the remaining steps of an epoch, and its evaluation."""
    if progress.round == 0 and progress.epoch == config.rewind_epoch and progress.snapshot is None:
        progress = progress._replace(snapshot=take_snapshot(progress.state))
    progress = _steps(config, problem, progress, observer)
    started, state = time.perf_counter(), progress.state
    if progress.round is not None:
        state = config.pruning_method.end_epoch(state, progress.round, progress.epoch)
        state = problem.executor.place(state)
    hyper = hyperparams(config, progress.phase, progress.epoch)
    record, kept = of_epoch(Search(config, problem, observer), progress, state, hyper, started)
    epoch, ends = progress.epoch + 1, progress.round_ends
    if progress.phase == SEARCH and epoch == config.epochs:
        ends = (*ends, record)
    progress = progress._replace(
        epoch=epoch, step=0, state=state, round_ends=ends, figures=(), seconds=0.0, packed_masks=kept
    )
    observer.on_epoch_end(record, progress)
    return progress


def _steps(config: Config, problem: Problem, progress: Progress, observer: Observer) -> Progress:
    """Runs the remaining steps of an epoch."""
    started = time.perf_counter() - progress.seconds
    number = min(progress.number(config), config.search_rounds)  # controls get the batches of the ticket
    recipe = config.pruning_method.recipe(problem.recipe) if progress.phase == SEARCH else problem.recipe
    epoch = Epoch(
        problem.train,
        problem.epoch_order(number, progress.epoch),
        problem.key_for("augment", number),
        hyperparams(config, progress.phase, progress.epoch),
        batch_size=config.batch_size,
        first_step=progress.step,
    )
    calls = problem.executor.train_epoch(recipe, progress.state, epoch)
    with contextlib.closing(calls):  # also if a signal ends the run here
        for done, state, metrics in calls:
            if progress.figures:
                _check_loss(progress, progress.figures[-1], progress.step)
            seconds = time.perf_counter() - started
            figures = (*progress.figures, metrics)
            progress = progress._replace(step=done, state=state, figures=figures, seconds=seconds)
            observer.on_steps(progress, epoch.num_steps)
    check_finite(progress)
    return progress._replace(seconds=time.perf_counter() - started)


def hyperparams(config: Config, phase: str, epoch: int) -> Hyperparams:
    """Scalars of an epoch, on the device. The penalty weight is 0 for controls, and if scores are not trained."""
    score_lr = config.lr if config.score_lr is None else config.score_lr
    values = dict(
        temperature=schedules.temperature(epoch, config.epochs, config.final_temp),
        init_value=config.mask_initial_value,
        learning_rate=learning_rate(config, phase, epoch),
        score_learning_rate=_scheduled(config, epoch, score_lr),
        penalty_weight=config.lmbda if config.pruning_method.learns_masks and phase in (SEARCH, TICKET) else 0.0,
    )
    return Hyperparams(**{name: jnp.asarray(value, float) for name, value in values.items()})


def learning_rate(config: Config, phase: str, epoch: int) -> float:
    """Learning rate of the weights from the schedule; when fine-tuning, always the last value of the schedule."""
    finetunes = config.retraining == FINETUNE and phase not in (SEARCH, *FRESH)
    return _scheduled(config, config.epochs - 1 if finetunes else epoch, config.lr)


def _scheduled(config: Config, epoch: int, base: float) -> float:
    return schedules.learning_rate(epoch, base, config.lr_schedule, config.lr_drops)


def check_finite(progress: Progress) -> None:
    """Checks that losses, weights and scores are finite; waits for running steps.

    A step's loss is computed before its update, so the weights after the last update are checked too.

    Raises:
        NonFiniteLossError: a loss, weight or score is not finite.
    """
    if progress.figures:
        _check_loss(progress, progress.figures[-1], progress.step)
    if not _all_finite((progress.state.params, progress.state.scores)):
        raise NonFiniteLossError(
            f"weights or scores are not finite in {_where(progress)}, epoch {progress.epoch}, "
            f"after step {progress.step - 1}"
        )


def _check_loss(progress: Progress, metrics: StepMetrics, done: int) -> None:
    """Raises if a loss is not finite in the compiled call that ended after `done` steps of the epoch."""
    losses = np.atleast_1d(StepMetrics(*jax.device_get(tuple(metrics))).loss)  # sum on the host, without a dispatch
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        step = done - len(losses) + bad[0]
        raise NonFiniteLossError(
            f"loss is {float(losses[bad[0]])} in {_where(progress)}, epoch {progress.epoch}, step {step}"
        )


def _where(progress: Progress) -> str:
    return f"the {progress.phase}'s training" if progress.round is None else f"round {progress.round}"


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
