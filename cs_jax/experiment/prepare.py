"""Data, network and training recipe of a config, checked before a run writes any file."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from cs_jax.core.errors import ConfigError
from cs_jax.data.images import ImageSet
from cs_jax.data.load import Data, load_data
from cs_jax.data.stream import Images
from cs_jax.experiment import search
from cs_jax.experiment.config import TICKET, Config
from cs_jax.methods import target_multiply_adds
from cs_jax.methods.base import selection
from cs_jax.models import build, channels
from cs_jax.models.multiply_adds import multiply_adds
from cs_jax.training import mesh
from cs_jax.training import step as training_step
from cs_jax.training.accumulation import num_parts
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem
from cs_jax.training.step import Recipe, StepInputs


def prepare(config: Config, executor: Executor | None = None) -> tuple[Problem, Data]:
    """Problem and data of a config, checked against each other before any training.

    Args:
        config: settings of the run.
        executor: runs the training steps; None creates an executor for this run only.

    Raises:
        ConfigError: the data cannot be loaded, data and config do not fit, the model does not accept the images, or
            there are too few devices.
    """
    executor = executor or Executor(mesh.make_layout(config.data_parallel, config.model_parallel))
    if executor.mesh_layout is not None:
        executor.mesh_layout.check_batch(config.batch_size)
    loaded = load_data(config)
    if config.batch_size > len(loaded.train):
        at_most = f"{len(loaded.train)}, the number of training examples"
        raise ConfigError(f"--batch-size {config.batch_size}: must be at most {at_most}")
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
            f"--model {config.model}: cannot be trained on images of shape {shape} in batches of {config.batch_size}: "
            f"{reason}"
        ) from error
    if config.granularity == "channel":
        problem = dataclasses.replace(problem, recipe=_by_channel(config, problem))
    _check_target(config, problem)
    _check_split(config, problem)
    return problem, data


def _by_channel(config: Config, problem: Problem) -> Recipe:
    """The problem's recipe, with one score per channel."""
    try:
        found = channels.of_model(problem.recipe.model, problem.train.image_shape)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--granularity channel: not possible with --model {config.model}: {error}") from error
    return dataclasses.replace(problem.recipe, channels=found)


def make_recipe(config: Config, num_classes: int) -> Recipe:
    """Recipe of the training step that a config describes."""
    return Recipe(
        model=build(config.model, num_classes=num_classes, dtype=config.dtype, remat=config.remat),
        augment=config.augment,
        decay=config.decay,
        part_size=None if config.accumulate == 1 else config.batch_size // config.accumulate,
        in_order=config.remat or config.accumulate > 1 or config.score_dtype != "float32",
    )


def check_all(configs: Iterable[Config]) -> None:
    """Checks configs like `prepare`; configs with the same data and network are prepared only once.

    Raises:
        ConfigError: as in `prepare`, for the first config that cannot be trained.
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
    """Raises if --model-parallel splits no weight array, because all devices would then do the same work."""
    layout = problem.executor.mesh_layout
    if layout is None or config.model_parallel == 1:
        return
    shardings = layout.state(jax.eval_shape(lambda: problem.init_variables()["params"]))
    if all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings)):
        raise ConfigError(
            f"--model-parallel {config.model_parallel}: splits no weight array of --model {config.model}; "
            "choose a number that divides the number of features of its layers"
        )


def _check_target(config: Config, problem: Problem) -> None:
    """Raises if the network cannot reach the target; checks the last round, which has the lowest density."""
    density, found = config.pruning_method.density(config.rounds - 1), problem.recipe.channels
    if found is not None and config.target_multiply_adds is not None:
        try:
            target_multiply_adds.check_share(found, config.target_multiply_adds, config.channel_multiple)
        except ValueError as error:
            raise ConfigError(f"--target-multiply-adds {config.target_multiply_adds:g}: {error}") from error
        return
    try:
        chosen = selection(config, jax.eval_shape(lambda: problem.init_variables()["masks"]), density, found)
        if any(budget.keep == 0 for budget in chosen.budgets):
            raise ValueError(f"keeps none of {chosen.size} weights; must keep at least one")
    except ValueError as error:
        reason = str(error).removeprefix("target_density: ").replace("allow_empty_layers=True", "--allow-empty-layers")
        reason = reason if found is None else reason.removesuffix(", or --allow-empty-layers")
        target, rounds = config.target_density, config.rounds
        got = f"--rounds {rounds}" if target is None else f"--target-density {target:g}"
        raise ConfigError(f"{got}: {reason}") from error


def _smallest_step(config: Config, problem: Problem) -> Any:
    """One step on the smallest part of a batch in an epoch, including the last batch."""
    state = search.fixed_state(problem, problem.init_ticket())
    hyper = search.hyperparams(config, TICKET, 0)
    n, batch_size, part_size = len(problem.train), config.batch_size, problem.recipe.part_size
    batches = {min(n, batch_size), n % batch_size or batch_size}
    indices = jnp.arange(min(size // num_parts(size, part_size) for size in batches))
    inputs = StepInputs(_stand_in(problem.train), indices, problem.key, hyper)
    return training_step.step(problem.recipe, state, inputs)


def _stand_in(images: Images) -> ImageSet:
    """One black image of the same shape, for tracing."""
    zeros, label = jnp.zeros((1, *images.image_shape), jnp.uint8), jnp.zeros(1, jnp.int32)
    return ImageSet(zeros, label, mean=jnp.asarray(images.mean, float), std=jnp.asarray(images.std, float))
