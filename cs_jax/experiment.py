"""The whole experiment: data and network from a config, search, retraining, comparison, and the summary of it all."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from cs_jax import data as data_module
from cs_jax import masks, search, training
from cs_jax.config import Config, ConfigError
from cs_jax.data import Data
from cs_jax.images import ImageSet
from cs_jax.models import MODELS
from cs_jax.search import EpochRecord, Observer, Problem, Ticket
from cs_jax.training import Recipe, TrainState

PyTree = Any


def prepare(config: Config) -> tuple[Problem, Data]:
    """Data, network and key of a config, checked against each other before anything is trained.

    Raises:
        ConfigError: data and config do not fit, or the model cannot take the images.
    """
    data = data_module.load(config)
    recipe = Recipe(
        model=MODELS[config.model](num_classes=data.num_classes), augment=config.augment, decay=config.decay
    )
    problem = Problem(recipe, data.train, data.validation, jax.random.key(config.seed))
    try:
        jax.eval_shape(lambda: _smallest_step(config, problem))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        shape = data.train.images.shape[1:]
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--model: got {config.model}, which cannot be trained on images of shape {shape}, "
            f"{config.batch_size} at a time: {reason}"
        ) from error
    _check_target(config, problem)
    return problem, data


def _check_target(config: Config, problem: Problem) -> None:
    try:
        search.selection(config, jax.eval_shape(lambda: search.init_variables(problem)["masks"]))
    except ValueError as error:
        reason = str(error).removeprefix("target_density: ").replace("allow_empty_layers=True", "--allow-empty-layers")
        raise ConfigError(f"--target-density: got {config.target_density:g}: {reason}") from error


def _smallest_step(config: Config, problem: Problem) -> Any:
    """A step on as few examples as the last batch of an epoch has."""
    state = search.init_state(config, problem)
    hyper = search.hyperparams(config, search.SEARCH, 0)
    indices = jnp.arange(len(problem.train) % config.batch_size or config.batch_size)
    return training.step(problem.recipe, state, problem.train, indices, problem.key, hyper)


def run(config: Config, problem: Problem, data: Data, observer: Observer) -> dict[str, Any]:
    """Searches a ticket, retrains it, trains the dense network where asked, and tests both.

    Returns:
        What summary.json holds. Accuracies and densities are shares, in [0, 1].

    Raises:
        NonFiniteLossError: in which round, epoch and step.
    """
    started = time.perf_counter()
    ticket, round_ends = search.search_ticket(config, problem, search.init_state(config, problem), observer)
    state = search.retrain(config, problem, ticket, observer)
    summary = {
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "search": [_summarize_round(record) for record in round_ends],
        "ticket": {**count_weights(ticket), **_accuracies(config, problem, data, state)},
        "dense": None,
    }
    if config.dense:
        dense = search.dense_ticket(search.init_variables(problem))
        state = search.retrain(config, problem, dense, observer, phase=search.DENSE)
        summary["dense"] = {"num_weights": count_weights(dense)["num_weights"]} | _accuracies(
            config, problem, data, state
        )
    return summary | {"seconds": time.perf_counter() - started}


def count_weights(ticket: Ticket) -> dict[str, float | int]:
    """Densities of a ticket, over masked weights and over all weights, and the number of weights that it has.

    `num_weights` counts the masked weights that are kept and all weights that are never masked, out of
    `num_all_weights`; `num_masked_weights` is the number that a mask could remove.
    """
    masked = sum(mask.size for mask in jax.tree.leaves(ticket.masks))
    everything = sum(weight.size for weight in jax.tree.leaves(ticket.snapshot.params))
    density = masks.density(ticket.masks)
    kept = round(density * masked) + everything - masked
    return {
        "density": density,
        "density_all_weights": kept / everything,
        "num_weights": kept,
        "num_all_weights": everything,
        "num_masked_weights": masked,
    }


def _summarize_round(record: EpochRecord) -> dict[str, Any]:
    return {
        "round": record.round,
        "soft_accuracy": record.soft_accuracy,
        "hard_accuracy": record.hard_accuracy,
        "density": record.density,
    }


def _accuracies(config: Config, problem: Problem, data: Data, state: TrainState) -> dict[str, float | None]:
    def accuracy(images: ImageSet) -> float:
        return search.accuracy(config, problem, state, state.masks, images)

    return {
        "val_accuracy": None if data.validation is None else accuracy(data.validation),
        "test_accuracy": accuracy(data.test),
    }
