"""What lies on the straight line between two networks, and between two trainings of one ticket.

A ticket is stable to the noise of SGD where two trainings of it, on other batches, end in networks that a line of equal
error joins.

References:
    Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020,
    arXiv:1912.05671.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import PyTree

from cs_jax.core import files, trees
from cs_jax.core.arrays import at_least_float32
from cs_jax.core.errors import ConfigError
from cs_jax.data.stream import Images
from cs_jax.experiment import metrics, search
from cs_jax.experiment.config import Config
from cs_jax.experiment.experiment import Search
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.experiment.storage import config_file, paths, run_directory
from cs_jax.experiment.storage.versions import versions
from cs_jax.methods import NONE
from cs_jax.tickets.overlap import check_alike
from cs_jax.tickets.ticket import load_ticket
from cs_jax.training.evaluation import share_right
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem, Snapshot, Ticket
from cs_jax.training.step import network

CHILDREN = ("child 1", "child 2")
"""The two trainings, by name."""

CHILD_KEYS = 2**31 - 1
"""Folded into a run's key for those of its children: a number that no purpose of a run has."""


class PathPoint(NamedTuple):
    """A network on the line between two others."""

    share: float  # of the second network in the weights: 0 at the first, 1 at the second
    error: float  # share of images that are classified wrong, counted exactly
    loss: float  # mean cross-entropy over the images


def interpolate(params: PyTree, others: PyTree, share: float) -> PyTree:
    """The tree at `share` of the straight line from `params` to `others`: `params + share * (others - params)`.

    The ends are exact: their own arrays. So is an entry that is the same at both ends.

    Args:
        params: float arrays, any shapes: weights, or BatchNorm statistics.
        others: arrays under the same paths, of the same shapes and dtypes.
        share: of `others` in the result, in [0, 1].

    Returns:
        Tree like `params` (structure, shapes, dtypes), computed in at least float32.

    Raises:
        ConfigError: an array is in one of the trees alone, or has two shapes or dtypes; or the share is out of range.
        ValueError: a leaf is no float array.

    >>> interpolate({"kernel": jnp.array([0.0, 2.0])}, {"kernel": jnp.array([4.0, 2.0])}, 0.25)
    {'kernel': Array([1., 2.], dtype=float32)}
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share: got {share:g}, wanted a number from 0 to 1")
    starts, ends = trees.leaves_by_path(params), trees.leaves_by_path(others)
    check_alike(starts, ends, "others")
    for path, start in starts.items():
        trees.check_float(start, path)
        trees.check_float(ends[path], path)
        if start.dtype != ends[path].dtype:
            raise ConfigError(f"others {trees.name(path)!r}: got dtype {ends[path].dtype}, wanted {start.dtype}")
    return trees.replace_leaves(params, {path: _between(start, ends[path], share) for path, start in starts.items()})


def error_barrier(errors: Sequence[float]) -> float:
    """How much worse the worst network on a line is than the mean of its two ends; at least 0.

    This is the instability of Frankle et al. (2020), who call networks stable to noise where it is next to nothing.

    Args:
        errors: along the line, both ends included; losses will do as well. Not NaN.

    Raises:
        ConfigError: there are less than two errors, or one is NaN.

    >>> error_barrier([0.125, 0.5, 0.375])
    0.25
    """
    if len(errors) < 2:
        raise ConfigError(f"errors: got {len(errors)}, wanted at least 2, one for each end")
    if any(map(math.isnan, errors)):
        raise ConfigError("errors: got nan, wanted numbers")
    return max(errors) - (errors[0] + errors[-1]) / 2


def ends_highest(points: Sequence[Mapping[str, Any]]) -> str:
    """Of what the barrier is no barrier: the figures along a line that are highest at an end of it; "" if none is."""
    found = []
    for name in ("error", "loss"):
        values = [point[name] for point in points]
        if max(values) in (values[0], values[-1]):
            found.append(name)
    if not found:
        return ""
    what = f"the {' and the '.join(found)} {'are' if len(found) > 1 else 'is'} highest at an end"
    return f"{what}, so this is half the difference of the ends"


def connect(
    model: nn.Module,
    ends: tuple[Snapshot, Snapshot],
    masks: PyTree,
    data: Images,
    validation: Images,
    *,
    points: int = 11,
    batch_size: int,
) -> list[PathPoint]:
    """Error and loss at evenly spaced points of the straight line between two networks under the same masks.

    Averaged weights need BatchNorm statistics of their own. So at every point they start from the interpolated ones
    and see one pass over `data` in training mode: without augmentation, in one random order that is always the same,
    in whole batches (the images that are left over are not seen). After k batches, momentum**k of the start is left.
    The ends are treated as all other points are, so their errors may differ from those that their training reported.
    A model without statistics is evaluated as it is.

    Args:
        model: Linen module, called with images and `train`.
        ends: the two networks; their arrays stay as they are.
        masks: of both, as the model takes them; {} where it has none.
        data: images for the BatchNorm statistics, in general those that the ends were trained on.
        validation: images that error and loss are measured on.
        points: on the line, both ends included; at least 2.
        batch_size: images per call, for statistics and evaluation.

    Returns:
        The points, from the first end to the second; `error_barrier` takes their errors.

    Raises:
        ConfigError: the ends do not fit each other, there are no images, or a number is out of range.
        ValueError: the masks do not fit the model.

    References:
        Frankle et al., 2020, arXiv:1912.05671; Izmailov et al., 2018, arXiv:1803.05407, for the statistics of
        averaged weights.
    """
    _check_at_least(2, "points", points)
    _check_at_least(1, "batch_size", batch_size)
    _check_at_least(1, "images of data", len(data))
    _check_at_least(1, "images of validation", len(validation))
    path = []
    for share in (point / (points - 1) for point in range(points)):
        params, batch_stats = (interpolate(one, other, share) for one, other in zip(*ends, strict=True))
        variables = {"params": params, "batch_stats": batch_stats, "masks": masks}
        batch_stats = Executor().estimate_statistics(model, variables, data, batch_size=batch_size)
        variables = {**variables, "batch_stats": batch_stats}
        logits = Executor().predict(model, variables, validation, batch_size=batch_size)
        labels = jnp.asarray(validation.labels)
        wrong = int(jnp.sum(jnp.argmax(logits, axis=-1) != labels))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        path.append(PathPoint(share, wrong / len(validation), float(losses.mean())))
    return path


def read_run(path: Path) -> tuple[Config, Ticket]:
    """Settings and ticket of a finished run, as its retraining began with it.

    Args:
        path: the run directory.

    Raises:
        ConfigError: it holds no finished run, or one that does not retrain its ticket, or whose file has lost what the
            retraining began with.
    """
    stored = config_file.read_stored(path, "run")
    config = config_file.from_json(stored, f"{path}: its settings")
    config = dataclasses.replace(config, out=path, data_parallel=None, model_parallel=1)
    if run_directory.read_summary(path) is None:
        raise ConfigError(f"run: got {path}, which has not finished, wanted a finished run")
    if config.retraining == NONE:
        raise ConfigError(f"run: got {path}, where nothing follows the search, wanted a run that retrains its ticket")
    saved = load_ticket(path / paths.TICKET_FILE)
    if saved.rewound is None:
        raise ConfigError(f"run: got {path}, whose ticket is compact, wanted one with the rewound network")
    start = Snapshot(saved.rewound["params"], saved.rewound["batch_stats"])
    return config, Ticket(start, saved.found_masks)


def check(*, points: int, seed: int) -> None:
    """Refuses what `measure` cannot be asked for.

    Raises:
        ConfigError: a number is out of range; says which flag.
    """
    _check_at_least(2, "--points", points)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed: got {seed}, wanted 0 to 4294967295")


def child(problem: Problem, number: int, *, seed: int) -> Problem:
    """A run's problem with other randomness: order of batches and augmentation, where the weights are given.

    Args:
        problem: of the run.
        number: of the child.
        seed: children of another seed are others.
    """
    key = problem.key
    for folded in (CHILD_KEYS, seed, number):
        key = jax.random.fold_in(key, folded)
    return dataclasses.replace(problem, key=key)


def measure(
    config: Config,
    problem: Problem,
    test: Images,
    ticket: Ticket,
    observer: Observer,
    *,
    points: int = 11,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains a ticket twice, as its run does but on other batches, and measures the line between the two networks.

    Args:
        config: of the run: epochs, schedules and the rest.
        problem: of the run.
        test: images that error and loss are measured on.
        ticket: what both begin with.
        observer: told of every phase, step and epoch, under the names of `CHILDREN`.
        points: on the line, both ends included; at least 2.
        seed: of the batches, 0 to 4294967295.

    Returns:
        What connectivity.json holds: "points" ("share", "error" and "loss" of each), "barrier" and "loss_barrier",
        "children" ("test_accuracy" of each), "settings", "versions" and "seconds". Errors and accuracies are shares,
        in [0, 1].

    Raises:
        ConfigError: a number is out of range.
        NonFiniteLossError: in which epoch and step.
    """
    check(points=points, seed=seed)
    started = time.perf_counter()
    ends, children = [], []
    for number, name in enumerate(CHILDREN, 1):
        own = child(problem, number, seed=seed)
        named = _Named(observer, name)
        state = search.retrain(config, own, search.begin_retraining(own, ticket), named)
        logits = metrics.logits(Search(config, problem, observer), state, state.masks, test)
        ends.append(Snapshot(state.params, state.batch_stats))
        children.append({"test_accuracy": share_right(logits, test)})
    model, batch_size = problem.recipe.model, config.batch_size
    masks = network(problem.recipe.channels, ends[0].params, ends[0].batch_stats, ticket.masks)["masks"]
    path = connect(model, (ends[0], ends[1]), masks, problem.train, test, points=points, batch_size=batch_size)
    return {
        "points": [point._asdict() for point in path],
        "barrier": error_barrier([point.error for point in path]),
        "loss_barrier": error_barrier([point.loss for point in path]),
        "children": children,
        "settings": {"points": points, "seed": seed},
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Puts a file with what `measure` found in place of what is at `path`.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    files.write_whole(path, (json.dumps(found, indent=2) + "\n").encode())


class _Named(Observer):
    """Tells an observer of a ticket's training under another name."""

    def __init__(self, observer: Observer, name: str) -> None:
        self._observer, self._name = observer, name

    def on_phase_start(self, progress: Progress) -> None:
        self._observer.on_phase_start(progress._replace(phase=self._name))

    def on_steps(self, progress: Progress, total: int) -> None:
        self._observer.on_steps(progress._replace(phase=self._name), total)

    def on_batch(self) -> None:
        self._observer.on_batch()

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self._observer.on_epoch_end(record._replace(phase=self._name), progress._replace(phase=self._name))

    def on_phase_end(self, progress: Progress) -> None:
        self._observer.on_phase_end(progress._replace(phase=self._name))


def _check_at_least(least: int, name: str, number: int) -> None:
    if number < least:
        raise ConfigError(f"{name}: got {number}, wanted at least {least}")


def _between(start: Any, end: Any, share: float) -> Any:
    if share in (0, 1):
        return end if share else start
    wide = at_least_float32(start)
    return (wide + share * (at_least_float32(end) - wide)).astype(start.dtype)
