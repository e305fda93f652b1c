"""Target density by two methods: shifted scores (as in cs_jax), and dual ascent on the penalty weight.

    python benchmarks/density_control.py [--targets 0.2 0.02] [--rates 1e-5 1e-6 1e-7 0] [--seeds 0 1 2 3 4]

Dual ascent follows Gallego-Posada et al., 2022 (arXiv:2208.04425). After every step, the penalty weight changes by
`rate * (mean mask - target density of the round)`, with masks in [0, 1]. Unlike in the paper, the penalty weight may be
negative, because a search without a penalty can end below the target. All other settings come from the preset `digits`.
The constant penalty of the preset is used only with shifted scores. All tickets have exactly the target density and are
retrained in the same way.

Columns: range of the share of scores above 0 at the end of the search (equal to the target if the search met it);
validation accuracy of the searched weights with the ticket's masks, before the rewind; test accuracy of the ticket.
"""

import dataclasses
import statistics
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from cs_jax.core import masks, target_density
from cs_jax.data.images import ImageSet
from cs_jax.data.stream import Images
from cs_jax.experiment import metrics, search
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.experiment import Search
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.presets import PRESETS
from cs_jax.experiment.progress import Observer
from cs_jax.methods.base import selection
from cs_jax.training import compiled, evaluation
from cs_jax.training.problem import Problem, Ticket
from cs_jax.training.step import StepInputs, TrainState


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    targets: tuple[float, ...] = (0.2, 0.02)
    """Target densities."""

    rates: tuple[float, ...] = (1e-5, 1e-6, 1e-7, 0.0)
    """Learning rates of the penalty weight; 0 searches without a penalty."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; one run for each seed in every row of the table."""


def main(settings: Settings) -> None:
    warnings.simplefilter("ignore", target_density.CollapsedLayerWarning)
    title = f"digits, seeds {' '.join(map(str, settings.seeds))}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    table = Table("target", "control", "scores above 0", "validation before rewind", "test accuracy", title=title)
    for target in settings.targets:
        for rate in (None, *settings.rates):
            results = [run(target, rate, seed) for seed in settings.seeds]
            shares, before, after = zip(*results, strict=True)
            name = "shifted" if rate is None else f"dual ascent, {rate:g}"
            spread = f"{min(shares):.4f} to {max(shares):.4f}"
            table.add_row(f"{target:g}", name, spread, _mean(before), _mean(after))
            print(target, name, results, flush=True)
    Console(width=120).print(table)


def run(target: float, rate: float | None, seed: int) -> tuple[float, float, float]:
    """Share of scores above 0, validation accuracy before the rewind, and test accuracy; `rate` None shifts scores."""
    config = dataclasses.replace(PRESETS["digits"], seed=seed, target_density=target, controls=())
    problem, data = prepare(config)
    assert problem.validation is not None
    if rate is None:
        last: list[Any] = []
        watch = Observer()
        watch.on_phase_end = lambda progress: last.append(jax.tree.map(jnp.copy, progress.state))
        start = search.begin_search(search.init_state(config, problem))
        ticket, _ = search.search_ticket(config, problem, start, watch)
        state = last[-1]
    else:
        ticket, state = search_by_dual_ascent(config, problem, target, rate)
    share = masks.density(masks.hard_mask(state.scores, init_value=config.mask_initial_value))
    before = accuracy(config, problem, state, ticket, problem.validation)
    retrained = search.retrain(config, problem, search.begin_retraining(problem, ticket), Observer())
    return share, before, accuracy(config, problem, retrained, ticket, data.test)


def accuracy(config: Config, problem: Problem, state: TrainState, ticket: Ticket, images: Images) -> float:
    logits = metrics.logits(Search(config, problem), state, ticket.masks, images)
    return evaluation.share_right(logits, images)


def search_by_dual_ascent(config: Config, problem: Problem, target: float, rate: float) -> tuple[Ticket, TrainState]:
    assert isinstance(problem.train, ImageSet)
    state, weight, snapshot = search.init_state(config, problem), 0.0, None
    for round in range(config.rounds):
        wanted = target_density.round_density(target, round, config.rounds)
        state = state.replace(step=jnp.zeros_like(state.step))
        key = jax.random.fold_in(problem.key, round)
        for epoch in range(config.epochs):
            if (round, epoch) == (0, config.rewind_epoch):
                snapshot = search.take_snapshot(state)
            hyper = search.hyperparams(config, SEARCH, epoch)
            order = np.asarray(problem.epoch_order(round, epoch))
            for start in range(0, len(order), config.batch_size):
                hyper = hyper._replace(penalty_weight=jnp.asarray(weight, float))
                indices = order[start : start + config.batch_size]
                inputs = StepInputs(problem.train, indices, key, hyper)
                state, _ = compiled.compiled_step(problem.recipe, state, inputs)
                weight += rate * (float(_mean_mask(state.scores, hyper.temperature)) - wanted)
        if round < config.rounds - 1:
            state = config.pruning_method.begin_round(problem, state, None)
    assert snapshot is not None
    chosen = selection(config, state.scores, target)
    return Ticket(
        snapshot, target_density.ticket_masks(chosen, state.scores, init_value=config.mask_initial_value)
    ), state


def _mean(values: tuple[float, ...]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


@jax.jit
def _mean_mask(scores: Any, temperature: jax.Array) -> jax.Array:
    leaves = jax.tree.leaves(scores)
    total = jnp.asarray([jnp.sum(jax.nn.sigmoid(temperature * leaf)) for leaf in leaves]).sum()
    return total / sum(leaf.size for leaf in leaves)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
