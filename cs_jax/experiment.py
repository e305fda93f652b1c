"""The whole experiment: data and network from a config, search, retraining, comparison, and the summary of it all."""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cs_jax import (
    channel_budget,
    channels,
    masks,
    methods,
    processes,
    records,
    run_directory,
    search,
    sharding,
    stored_config,
    training,
    trees,
)
from cs_jax import data as data_module
from cs_jax.accumulation import num_parts
from cs_jax.config import Config
from cs_jax.controls import CONTROLS, DENSE
from cs_jax.data import Data
from cs_jax.errors import ConfigError
from cs_jax.executor import Executor, share_right
from cs_jax.images import ImageSet
from cs_jax.methods.method import selection
from cs_jax.models import build
from cs_jax.multiply_adds import multiply_adds
from cs_jax.progress import SEARCH, TICKET, EpochRecord, Observer, Progress, Snapshot, Ticket
from cs_jax.run_directory import RunDirectory
from cs_jax.search import Problem
from cs_jax.shrink import shrink
from cs_jax.stored_config import FREE
from cs_jax.streaming import Images
from cs_jax.ticket import LoadedTicket, load_ticket
from cs_jax.training import Recipe, TrainState
from cs_jax.wiring import WiringWarning

PyTree = Any

MAX_MISTAKES = 24
"""Images of mistakes that are kept for the report."""


def prepare(config: Config, executor: Executor | None = None) -> tuple[Problem, Data]:
    """Data, network and key of a config, checked against each other before anything is trained.

    Args:
        config: what is asked.
        executor: takes the steps; by default those of this run alone.

    Raises:
        ConfigError: data and config do not fit, or the model cannot take the images.
    """
    executor = executor or Executor(sharding.layout(config.data_parallel, config.model_parallel))
    if executor.layout is not None:
        executor.layout.check_batch(config.batch_size)
    loaded = data_module.load(config)
    train, validation, test = map(executor.place_everywhere, (loaded.train, loaded.validation, loaded.test))
    data = Data(train, validation, test, loaded.classes)
    recipe = make_recipe(config, len(data.classes))
    problem = Problem(recipe, data.train, data.validation, jax.random.key(config.seed), executor=executor)
    try:
        jax.eval_shape(lambda: _smallest_step(config, problem))
        multiply_adds(problem.recipe.model, problem.train.image_shape)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        shape = data.train.image_shape
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--model: got {config.model}, which cannot be trained on images of shape {shape}, "
            f"{config.batch_size} at a time: {reason}"
        ) from error
    if config.granularity == "channel":
        problem = dataclasses.replace(problem, recipe=_by_channel(config, problem))
    _check_target(config, problem)
    _check_split(config, problem)
    return problem, data


def _by_channel(config: Config, problem: Problem) -> Recipe:
    """The problem's recipe with scores that stand for channels."""
    try:
        found = channels.of_model(problem.recipe.model, problem.train.image_shape)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--granularity: got channel beside --model {config.model}: {error}") from error
    return dataclasses.replace(problem.recipe, channels=found)


def make_recipe(config: Config, num_classes: int) -> Recipe:
    """What steps are built from, as a config has it."""
    return Recipe(
        model=build(config.model, num_classes=num_classes, dtype=config.dtype, remat=config.remat),
        augment=config.augment,
        decay=config.decay,
        part_size=None if config.accumulate == 1 else config.batch_size // config.accumulate,
        in_order=config.remat or config.accumulate > 1 or config.score_dtype != "float32",
    )


def check_all(configs: Iterable[Config]) -> None:
    """Refuses what any of many runs would be refused for, as `prepare` does, but reads shared data once.

    Raises:
        ConfigError: as `prepare`, of the first that cannot be trained.
    """
    problems: dict[Any, Problem] = {}
    for config in configs:
        cut = (config.image_size, config.stream, config.augment)
        data = (config.dataset, config.data_dir, config.val_set_size, config.max_train_examples, *cut)
        step = (
            *data,
            config.model,
            config.granularity,
            config.batch_size,
            config.accumulate,
            config.dtype,
            config.data_parallel,
            config.model_parallel,
        )
        if step not in problems:
            problems[step], _ = prepare(config)
        _check_target(config, problems[step])


def _check_split(config: Config, problem: Problem) -> None:
    """Refuses devices that would share no array of weights, and so do the same work each."""
    layout = problem.executor.layout
    if layout is None or config.model_parallel == 1:
        return
    shardings = layout.state(jax.eval_shape(lambda: problem.init_variables()["params"]))
    if all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings)):
        raise ConfigError(
            f"--model-parallel: got {config.model_parallel}, which divides no large array of --model {config.model}, "
            "wanted a number that divides its layers' features"
        )


def _check_target(config: Config, problem: Problem) -> None:
    """Refuses a density that the network cannot have: the least, which is that of the last round."""
    density, found = methods.of(config).density(config, config.rounds - 1), problem.recipe.channels
    if found is not None and config.target_multiply_adds is not None:
        try:
            channel_budget.check_share(found, config.target_multiply_adds, config.channel_multiple)
        except ValueError as error:
            raise ConfigError(f"--target-multiply-adds: got {config.target_multiply_adds:g}, {error}") from error
        return
    try:
        chosen = selection(config, jax.eval_shape(lambda: problem.init_variables()["masks"]), density, found)
        if any(budget.keep == 0 for budget in chosen.budgets):
            raise ValueError(f"keeps none of {chosen.size} weights, wanted one at least")
    except ValueError as error:
        reason = str(error).removeprefix("target_density: ").replace("allow_empty_layers=True", "--allow-empty-layers")
        reason = reason if found is None else reason.removesuffix(", or --allow-empty-layers")
        target, rounds = config.target_density, config.rounds
        got = f"--rounds: got {rounds}" if target is None else f"--target-density: got {target:g}"
        raise ConfigError(f"{got}: {reason}") from error


def _smallest_step(config: Config, problem: Problem) -> Any:
    """A step on as few examples as the smallest part has of any batch, of which the last of an epoch may be smaller."""
    state = search.fixed_state(problem, problem.init_ticket())
    hyper = search.hyperparams(config, TICKET, 0)
    n, batch_size, part_size = len(problem.train), config.batch_size, problem.recipe.part_size
    batches = {min(n, batch_size), n % batch_size or batch_size}
    indices = jnp.arange(min(size // num_parts(size, part_size) for size in batches))
    return training.step(problem.recipe, state, _stand_in(problem.train), indices, problem.key, hyper)


def _stand_in(images: Images) -> ImageSet:
    """Black images of the same shape, where only shapes count."""
    zeros, label = jnp.zeros((1, *images.image_shape), jnp.uint8), jnp.zeros(1, jnp.int32)
    return ImageSet(zeros, label, mean=jnp.asarray(images.mean, float), std=jnp.asarray(images.std, float))


def run(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    observer: Observer,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Searches a ticket, retrains it, trains its controls, and tests them all.

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
    if progress.phase == SEARCH:
        ticket, round_ends = search.search_ticket(config, problem, progress, observer)
        if config.retraining == methods.NONE:
            _write_ticket(config, problem, data, directory, None, search.fixed_state(problem, ticket), observer)
        else:
            progress = search.begin_retraining(problem, ticket, round_ends=round_ends)
    if progress.phase == TICKET:
        start = progress.snapshot
        state = search.retrain(config, problem, progress, observer)
        _write_ticket(config, problem, data, directory, start, state, observer)
    processes.wait()  # the leader has written it
    saved = load_ticket(directory.path / run_directory.TICKET_FILE)  # here too where this process has made it
    start = saved.rewound or saved.variables
    ticket = Ticket(Snapshot(start["params"], start["batch_stats"]), saved.found_masks)
    progress = progress._replace(round_ends=round_ends)
    controls = _train_controls(config, problem, data, directory, ticket, observer, progress)
    return {
        "dataset": config.dataset,
        "classes": list(data.classes),
        "model": config.model,
        "method": config.method,
        "after": config.retraining,
        "seed": config.seed,
        "search": [_summarize_round(record) for record in round_ends],
        "ticket": {
            **count_weights(ticket),
            **saved.metadata["accuracy"],
            **_cost(config, problem, directory, SEARCH, TICKET),
            **_smaller(config, problem, saved),
        },
        "dense": controls.pop(DENSE, None),
        "controls": controls,
        "seconds": directory.seconds(),
    }


def _train_controls(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    ticket: Ticket,
    observer: Observer,
    progress: Progress,
) -> dict[str, Any]:
    """What came of each control: those that an earlier process has trained are read."""
    names = config.trained_controls
    done = names[: names.index(progress.phase)] if progress.phase in names else ()
    results = {name: result for name, result in directory.read_controls().items() if name in done}
    for name in names[len(done) :]:
        begun = CONTROLS[name](config, problem, ticket)
        if progress.phase != name:
            progress = search.begin_retraining(problem, begun, phase=name, round_ends=progress.round_ends)
        state = search.retrain(config, problem, progress, observer)
        logits = records.logits(config, problem, state, state.masks, data.test, observer)
        results[name] = {
            **count_weights(begun),
            **_accuracies(config, problem, data, state, logits, observer),
            **_cost(config, problem, directory, name),
        }
        directory.write_controls(results)
    return results


def _cost(config: Config, problem: Problem, directory: RunDirectory, *phases: str) -> dict[str, float | int]:
    """What phases took: epochs, floating-point operations and seconds.

    Operations are those of a dense network, forward and twice as many backward, which a masked one computes as well.
    """
    epochs = config.epochs * (
        (config.search_rounds if SEARCH in phases else 0) + sum(phase in phases for phase in config.retrainings)
    )
    forward = 2 * multiply_adds(problem.recipe.model, problem.train.image_shape)
    return {
        "epochs": epochs,
        "training_flops": 3 * forward * len(problem.train) * epochs,
        "seconds": directory.seconds(*phases),
    }


def _smaller(config: Config, problem: Problem, ticket: LoadedTicket) -> dict[str, int]:
    """Multiply-adds of the ticket without the channels that do not matter, and of the dense network."""
    if config.granularity != "channel":
        return {}
    model, image_shape = problem.recipe.model, problem.train.image_shape
    dense = {"dense_multiply_adds": multiply_adds(model, image_shape)}
    try:
        smaller, _ = shrink(model, ticket.variables, image_shape)
    except ValueError as error:  # what was trained is kept
        message = f"the ticket cannot be made smaller, and nobody knows what it computes: {error}"
        warnings.warn(message, WiringWarning, stacklevel=2)
        return dense
    return {"multiply_adds": multiply_adds(smaller, image_shape), **dense}


def _write_ticket(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    start: Snapshot | None,
    state: TrainState,
    observer: Observer,
) -> None:
    """Writes the trained ticket, what its retraining began with, and what it makes of the test set."""
    logits = records.logits(config, problem, state, state.masks, data.test, observer)
    fields = stored_config.to_json(config)
    metadata = {
        "dataset": config.dataset,
        "classes": list(data.classes),
        "model": {
            "name": config.model,
            "num_classes": len(data.classes),
            "image_shape": list(data.train.image_shape),
            "dtype": config.dtype,
        },
        "normalization": {"mean": data.train.mean.tolist(), "std": data.train.std.tolist()},
        "mask_scale": methods.of(config).mask_scale(config),
        "accuracy": _accuracies(config, problem, data, state, logits, observer),
        "config": {name: value for name, value in fields.items() if name not in (*FREE, "controls")},  # what made it
        "versions": run_directory.versions(),
    }
    if state.channels is not None:
        metadata["unmasked"] = [trees.name(path) for path in state.channels.whole]
    directory.write_predictions(_predictions(np.asarray(logits), data.test))
    directory.write_ticket(
        params=state.params,
        batch_stats=state.batch_stats,
        masks=state.masks,
        rewound=start and start._asdict(),
        metadata=metadata,
    )


def _predictions(logits: np.ndarray, images: Images) -> dict[str, np.ndarray]:
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
        "images": np.asarray(images.take(mistakes).images),
    }


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
    images, classes = data_module.load_test(config, normalization["mean"], normalization["std"])
    for what, got, wanted in (
        ("images of shape", tuple(about["image_shape"]), images.image_shape),
        ("classes", about["num_classes"], len(classes)),
    ):
        if got != wanted:
            raise ConfigError(f"{name}: is for {what} {got}, but {config.dataset} has {what} {wanted}")
    logits = Executor().predict(ticket.model, ticket.variables, images, batch_size=config.batch_size)
    return share_right(logits, images)


def count_weights(ticket: Ticket) -> dict[str, float | int]:
    """Densities of a network, over masked weights and over all weights, and the number of weights that it has.

    `num_weights` counts the masked weights that are kept and all weights that are never masked, out of
    `num_all_weights`; `num_masked_weights` is the number that a mask could remove.
    """
    masked = sum(mask.size for mask in jax.tree.leaves(ticket.masks))
    everything = sum(weight.size for weight in jax.tree.leaves(ticket.start.params))
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
    right = {"val_accuracy": None, "test_accuracy": share_right(test_logits, data.test)}
    if data.validation is not None:
        logits = records.logits(config, problem, state, state.masks, data.validation, observer)
        right["val_accuracy"] = share_right(logits, data.validation)
    return right
