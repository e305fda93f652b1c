"""The whole experiment: data and network from a config, search, retraining, comparison, and the summary of it all."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cs_jax import config as config_module
from cs_jax import data as data_module
from cs_jax import masks, run_directory, search, training
from cs_jax.config import FREE, Config
from cs_jax.data import Data
from cs_jax.errors import ConfigError
from cs_jax.images import ImageSet
from cs_jax.models import MODELS
from cs_jax.progress import DENSE, SEARCH, TICKET, EpochRecord, Observer, Progress, Snapshot, Ticket
from cs_jax.run_directory import RunDirectory
from cs_jax.search import Problem
from cs_jax.ticket import LoadedTicket, load_ticket, save_ticket
from cs_jax.training import Recipe, TrainState

PyTree = Any

MAX_MISTAKES = 24
"""Images of mistakes that are kept for the report."""


def prepare(config: Config) -> tuple[Problem, Data]:
    """Data, network and key of a config, checked against each other before anything is trained.

    Raises:
        ConfigError: data and config do not fit, or the model cannot take the images.
    """
    data = data_module.load(config)
    recipe = Recipe(
        model=MODELS[config.model](num_classes=len(data.classes)), augment=config.augment, decay=config.decay
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
    hyper = search.hyperparams(config, SEARCH, 0)
    indices = jnp.arange(len(problem.train) % config.batch_size or config.batch_size)
    return training.step(problem.recipe, state, problem.train, indices, problem.key, hyper)


def run(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    observer: Observer,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Searches a ticket, retrains it, trains the dense network where asked, and tests both.

    Args:
        config: what was asked.
        problem: of `prepare`.
        data: of `prepare`.
        directory: takes the ticket and its predictions.
        observer: told of every phase, step and epoch.
        progress: where an earlier process stood; None is the beginning.

    Returns:
        What summary.json holds. Accuracies and densities are shares, in [0, 1].

    Raises:
        NonFiniteLossError: in which round, epoch and step.
    """
    progress = progress or search.begin_search(search.init_state(config, problem))
    round_ends = progress.round_ends
    if progress.phase == DENSE:
        _summarize_ticket(directory)  # which must be there
    if progress.phase == SEARCH:
        ticket, round_ends = search.search_ticket(config, problem, progress, observer)
        progress = search.begin_retraining(problem, ticket, round_ends=round_ends)
    if progress.phase == TICKET:
        assert progress.snapshot is not None
        snapshot = progress.snapshot
        state = search.retrain(config, problem, progress, observer)
        _write_ticket(config, problem, data, directory, Ticket(snapshot, state.masks), state, observer)
    dense = None
    if config.dense:
        whole = search.dense_ticket(search.init_variables(problem))
        if progress.phase != DENSE:
            progress = search.begin_retraining(problem, whole, phase=DENSE, round_ends=round_ends)
        state = search.retrain(config, problem, progress, observer)
        test_logits = search.logits(config, problem, state, state.masks, data.test, observer)
        accuracies = _accuracies(config, problem, data, state, test_logits, observer)
        dense = {"num_weights": count_weights(whole)["num_weights"], **accuracies}
    return {
        "dataset": config.dataset,
        "classes": list(data.classes),
        "model": config.model,
        "seed": config.seed,
        "search": [_summarize_round(record) for record in round_ends],
        "ticket": _summarize_ticket(directory),
        "dense": dense,
        "seconds": directory.seconds(),
    }


def _write_ticket(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    ticket: Ticket,
    state: TrainState,
    observer: Observer,
) -> None:
    """Writes the retrained ticket, and what it makes of the test set."""
    logits = search.logits(config, problem, state, state.masks, data.test, observer)
    fields = config_module.to_json(config)
    metadata = {
        "dataset": config.dataset,
        "classes": list(data.classes),
        "model": {
            "name": config.model,
            "num_classes": len(data.classes),
            "image_shape": list(data.train.images.shape[1:]),
        },
        "normalization": {"mean": data.train.mean.tolist(), "std": data.train.std.tolist()},
        "mask_scale": float(masks.hard_mask(jnp.ones(()), init_value=config.mask_initial_value)),
        "accuracy": _accuracies(config, problem, data, state, logits, observer),
        "config": {name: value for name, value in fields.items() if name not in (*FREE, "dense")},  # what made it
        "versions": run_directory.versions(),
    }
    directory.write_predictions(_predictions(np.asarray(logits), data.test))
    save_ticket(
        directory.path / run_directory.TICKET_FILE,
        params=state.params,
        batch_stats=state.batch_stats,
        masks=state.masks,
        rewound=ticket.snapshot._asdict(),
        metadata=metadata,
    )


def _predictions(logits: np.ndarray, images: ImageSet) -> dict[str, np.ndarray]:
    """Classes and confidence for every example, and the images of the most confident mistakes."""
    labels, predicted = np.asarray(images.labels, np.int32), np.argmax(logits, axis=-1).astype(np.int32)
    confidence = np.asarray(jax.nn.softmax(logits).max(axis=-1), np.float32)
    wrong = np.flatnonzero(predicted != labels)
    mistakes = wrong[np.argsort(-confidence[wrong], kind="stable")][:MAX_MISTAKES].astype(np.int32)
    return {
        "labels": labels,
        "predicted": predicted,
        "confidence": confidence,
        "mistakes": mistakes,
        "images": np.asarray(images.images[mistakes]),
    }


def _summarize_ticket(directory: RunDirectory) -> dict[str, Any]:
    """What the ticket's file says of it."""
    saved = load_ticket(directory.path / run_directory.TICKET_FILE)
    variables = saved.variables
    ticket = Ticket(Snapshot(variables["params"], variables["batch_stats"]), variables["masks"])
    return {**count_weights(ticket), **saved.metadata["accuracy"]}


def verify(config: Config, ticket: LoadedTicket, name: str) -> float:
    """Share of a data set's test examples that a saved ticket classifies right, in [0, 1].

    Args:
        config: its data set, folder and batch size count.
        ticket: with its model, and the statistics that its images were normalised by.
        name: of its file, for messages.

    Raises:
        ConfigError: the data set cannot be read, or the ticket is for other images or classes.
    """
    normalization = ticket.metadata.get("normalization")
    if ticket.model is None or normalization is None:
        raise ConfigError(f"{name}: is of a model of its maker's own, wanted a ticket that train.py wrote")
    about = ticket.metadata["model"]
    split, classes = data_module.load_test(config)
    for what, got, wanted in (
        ("images of shape", tuple(about["image_shape"]), split.images.shape[1:]),
        ("classes", about["num_classes"], len(classes)),
    ):
        if got != wanted:
            raise ConfigError(f"{name}: is for {what} {got}, but {config.dataset} has {what} {wanted}")
    images = ImageSet(
        images=jnp.asarray(split.images),
        labels=jnp.asarray(split.labels),
        mean=jnp.asarray(normalization["mean"], float),
        std=jnp.asarray(normalization["std"], float),
    )
    logits = training.predict(ticket.model, ticket.variables, images, batch_size=config.batch_size)
    return training.share_right(logits, images)


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


def _accuracies(
    config: Config, problem: Problem, data: Data, state: TrainState, test_logits: Array, observer: Observer
) -> dict[str, float | None]:
    """Shares classified right with the fixed masks of a state."""
    right = {"val_accuracy": None, "test_accuracy": training.share_right(test_logits, data.test)}
    if data.validation is not None:
        logits = search.logits(config, problem, state, state.masks, data.validation, observer)
        right["val_accuracy"] = training.share_right(logits, data.validation)
    return right
