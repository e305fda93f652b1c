"""Per-epoch metrics: loss, accuracy, mask density, flip rate."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.arrays import on_host
from cs_jax.data.stream import Images
from cs_jax.experiment.config import SEARCH
from cs_jax.experiment.experiment import Search
from cs_jax.experiment.progress import EpochRecord, Progress
from cs_jax.methods import Method
from cs_jax.training import step
from cs_jax.training.evaluation import share_right
from cs_jax.training.step import Hyperparams, StepMetrics, TrainState


def of_epoch(
    search: Search, progress: Progress, state: TrainState, hyper: Hyperparams, started: float
) -> tuple[EpochRecord, PyTree]:
    """Per-epoch metrics, and the packed bits of the hard masks on the device, for the flip rate of the next epoch.

    Args:
        search: config, problem, and the observer, whose `on_batch` is called during the evaluation.
        progress: progress after the last step of the epoch.
        state: train state at the end of the epoch.
        hyper: hyperparameters of the epoch.
        started: time at which the last step ended, in seconds of `time.perf_counter`.

    Returns:
        The record, and a tree of uint8 arrays; None outside the search.
    """
    config, problem = search.config, search.problem
    metrics = step_figures(progress)
    sizes = np.full(metrics.loss.shape, config.batch_size)
    sizes[-1] = len(problem.train) - sizes[:-1].sum()
    searching = progress.phase == SEARCH
    soft_masks, hard_masks = (
        _search_masks(type(config.pruning_method), state, hyper) if searching else (None, state.masks)
    )
    counts, kept, flips = _mask_counts(hard_masks, progress.packed_masks if searching else None)
    layer_density = _layer_density(hard_masks, counts)
    size = sum(mask.size for mask in jax.tree.leaves(hard_masks))
    density = sum(int(rows.sum()) for rows in jax.tree.leaves(counts)) / size
    has_hard = soft_masks is None or density > 0  # learned hard masks may be empty in early epochs
    soft, hard = _evaluate(search, state, soft_masks, hard_masks if has_hard else None)
    record = EpochRecord(
        phase=progress.phase,
        round=progress.round,
        epoch=progress.epoch,
        temperature=float(hyper.temperature) if searching and config.pruning_method.anneals else None,
        learning_rate=float(hyper.learning_rate),
        loss=float(np.average(metrics.loss, weights=sizes)),
        penalty=float(np.average(metrics.penalty, weights=sizes)),
        density=density,
        layer_density=layer_density,
        flip_rate=None if flips is None else sum(map(int, jax.tree.leaves(flips))) / size,
        soft_accuracy=soft,
        hard_accuracy=hard,
        images_per_second=len(problem.train) / progress.seconds,
        seconds=progress.seconds + time.perf_counter() - started,
    )
    return record, kept if searching else None


def step_figures(progress: Progress) -> StepMetrics:
    """Loss terms of the current epoch's steps: arrays (steps,) on the host. Waits for running steps."""
    figures = jax.device_get(progress.figures)
    return jax.tree.map(lambda *calls: np.concatenate([np.atleast_1d(call) for call in calls]), *figures)


def _evaluate(
    search: Search, state: TrainState, soft_masks: PyTree, hard_masks: PyTree
) -> tuple[float | None, float | None]:
    """Validation accuracy with soft masks, and with hard masks, in [0, 1]; None without masks or validation set."""
    images = search.problem.validation
    if images is None:
        return None, None

    def measure(some_masks: PyTree) -> float | None:
        if some_masks is None:
            return None
        return share_right(logits(search, state, some_masks, images), images)

    return measure(soft_masks), measure(hard_masks)


def logits(search: Search, state: TrainState, some_masks: PyTree, images: Images) -> jax.Array:
    """Logits (examples, classes) of a state's weights with the given masks, in the order of the images."""
    variables = step.network(state.channels, state.params, state.batch_stats, some_masks)
    recipe, executor = search.problem.recipe, search.problem.executor
    batch_size, on_batch = search.config.batch_size, search.observer.on_batch
    return executor.predict(recipe.model, variables, images, batch_size=batch_size, on_batch=on_batch)


@functools.partial(jax.jit, static_argnames="method")
def _search_masks(method: type[Method], state: TrainState, hyper: Hyperparams) -> tuple[PyTree | None, PyTree]:
    """Soft and hard masks of a state in the search."""
    return method.soft_masks(state, hyper), method.hard_masks(state, hyper)


def _mask_counts(hard_masks: PyTree, kept_before: PyTree | None) -> tuple[PyTree, PyTree, PyTree | None]:
    """Number of kept entries per row, packed masks on devices, and number of flipped entries per array."""
    counts, kept, flips = _count(hard_masks, kept_before)
    counts, flips = on_host((counts, flips))
    return jax.tree.map(lambda rows: rows.astype(np.int64), counts), kept, flips  # sums may need more than 32 bits


@jax.jit
def _count(hard_masks: PyTree, kept_before: PyTree | None) -> tuple[PyTree, PyTree, PyTree | None]:
    counts = jax.tree.map(lambda mask: jnp.count_nonzero(mask, axis=-1 if mask.ndim else None), hard_masks)
    kept = jax.tree.map(lambda mask: jnp.packbits((mask != 0).ravel()), hard_masks)
    if kept_before is None:
        return counts, kept, None
    flips = jax.tree.map(lambda a, b: jnp.sum(lax.population_count(a ^ b).astype(jnp.int32)), kept, kept_before)
    return counts, kept, flips


def _layer_density(hard_masks: PyTree, counts: PyTree) -> dict[str, float]:
    """Density of each maskable array, by name, in [0, 1]."""
    rows = trees.leaves_by_path(counts)
    sizes = {path: mask.size for path, mask in trees.leaves_by_path(hard_masks).items()}
    return {trees.name(path): int(rows[path].sum()) / size for path, size in sizes.items()}
