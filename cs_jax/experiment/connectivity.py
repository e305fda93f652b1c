"""Error and loss on the straight line between two networks, for example two retrainings of one ticket.

A ticket is stable to SGD noise if the error does not rise on the line between two retrainings with different batches.

References:
    Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020,
    arXiv:1912.05671.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from cs_jax.core.settings import SEED
from cs_jax.data.stream import Images
from cs_jax.experiment import metrics, search
from cs_jax.experiment.config import Config
from cs_jax.experiment.experiment import Search
from cs_jax.experiment.progress import Observer
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
"""Names of the two retrainings."""

CHILD_KEYS = 2**31 - 1
"""Number folded into a run's PRNG key for the two retrainings; different from the numbers of all `PURPOSES`."""


class PathPoint(NamedTuple):
    """A network on the line between two networks."""

    share: float  # share of the second network in the weights: 0 is the first network, 1 is the second network
    error: float  # share of images classified wrong, in [0, 1]
    loss: float  # mean cross-entropy over the images


@dataclass(frozen=True)
class Line:
    """Two networks with the same masks."""

    model: nn.Module  # Linen module, called with images and `train`
    ends: tuple[Snapshot, Snapshot]  # weights and BatchNorm statistics of the two networks
    masks: PyTree  # "masks" collection of both networks; {} for a model without masks


@dataclass(frozen=True)
class Retraining:
    """A ticket, with the config and data of its retraining."""

    config: Config  # epochs, schedules and batch size
    problem: Problem  # model and training data
    ticket: Ticket  # weights and masks at the start of the retraining
    test: Images  # images on which error and loss are measured


def interpolate(params: PyTree, others: PyTree, share: float) -> PyTree:
    """Point on the straight line from `params` to `others`: `params + share * (others - params)`.

    The result has exactly the arrays of `params` at share 0, and exactly the arrays of `others` at share 1. An entry
    that is equal in both trees does not change at any share.

    Args:
        params: float arrays, any shapes: weights, or BatchNorm statistics.
        others: arrays under the same paths, of the same shapes and dtypes.
        share: share of `others` in the result, in [0, 1].

    Returns:
        Tree like `params` (structure, shapes, dtypes), computed in at least float32.

    Raises:
        ConfigError: an array is in only one of the trees, or differs in shape or dtype; or the share is out of range.
        ValueError: a leaf is not a float array.

    >>> interpolate({"kernel": jnp.array([0.0, 2.0])}, {"kernel": jnp.array([4.0, 2.0])}, 0.25)
    {'kernel': Array([1., 2.], dtype=float32)}
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share {share:g}: must be in [0, 1]")
    starts, ends = trees.leaves_by_path(params), trees.leaves_by_path(others)
    check_alike(starts, ends, "others")
    for path, start in starts.items():
        trees.check_float(start, path)
        trees.check_float(ends[path], path)
        if start.dtype != ends[path].dtype:
            raise ConfigError(f"others {trees.name(path)!r} of dtype {ends[path].dtype}: must have dtype {start.dtype}")
    return trees.replace_leaves(params, {path: _between(start, ends[path], share) for path, start in starts.items()})


def error_barrier(errors: Sequence[float]) -> float:
    """Highest error on a line minus the mean error of its two ends; at least 0.

    Frankle et al. (2020) call this value the instability. They call a network stable to SGD noise if this value of the
    test error is almost 0.

    Args:
        errors: errors or losses at points along the line, including both ends; not NaN.

    Raises:
        ConfigError: there are fewer than two errors, or one is NaN.

    >>> error_barrier([0.125, 0.5, 0.375])
    0.25
    """
    if len(errors) < 2:
        raise ConfigError(f"errors of length {len(errors)}: requires at least 2, one for each end")
    if any(map(math.isnan, errors)):
        raise ConfigError("errors nan: must be numbers")
    return max(errors) - (errors[0] + errors[-1]) / 2


def barrier_note(errors: Sequence[float], losses: Sequence[float]) -> str:
    """Note on a barrier without a rise between the ends: error or loss is highest at an end; "" for other barriers.

    Args:
        errors: errors at points along the line, including both ends.
        losses: losses at the same points.
    """
    found = [name for name, values in (("error", errors), ("loss", losses)) if max(values) in (values[0], values[-1])]
    if not found:
        return ""
    if len(found) == 1:
        name = found[0]
        return f"the {name} is highest at an end, so the {name} barrier is half the difference between the two ends"
    return "error and loss are highest at an end, so both barriers are half the difference between the two ends"


def connect(line: Line, data: Images, validation: Images, *, points: int = 11, batch_size: int) -> list[PathPoint]:
    """Error and loss at evenly spaced points of the straight line between two networks.

    Averaged weights need new BatchNorm statistics. At every point, the statistics are interpolated and then updated by
    one pass over `data` in training mode: without augmentation, in a fixed random order, in full batches only. After k
    batches, the interpolated statistics have the weight momentum**k. The ends get new statistics too, so their errors
    may differ from the errors measured in training. A model without BatchNorm needs no pass.

    Args:
        line: model, the two networks and their masks; the arrays are not changed.
        data: images for the BatchNorm statistics, usually the training images.
        validation: images on which error and loss are measured.
        points: int >= 2, number of points, including both ends.
        batch_size: int >= 1, images per call, for statistics and evaluation.

    Returns:
        The points, from the first to the second network. `error_barrier` accepts the errors of these points.

    Raises:
        ConfigError: the two networks have different arrays, there are no images, or a number is out of range.
        ValueError: the masks do not fit the model.

    References:
        Frankle et al., 2020, arXiv:1912.05671; Izmailov et al., 2018, arXiv:1803.05407, for the statistics of
        averaged weights.
    """
    _check_at_least(2, "points", points)
    _check_at_least(1, "batch_size", batch_size)
    _check_at_least(1, "images of data", len(data))
    _check_at_least(1, "images of validation", len(validation))
    model, masks, path = line.model, line.masks, []
    for share in (point / (points - 1) for point in range(points)):
        params, batch_stats = (interpolate(one, other, share) for one, other in zip(*line.ends, strict=True))
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
    """Config of a finished run, and its ticket with the weights at the start of the retraining.

    Args:
        path: the run directory.

    Raises:
        ConfigError: the directory has no finished run of this version of cs_jax; the run does not retrain the ticket;
            or the ticket file is compact (without the rewound network).
    """
    stored = config_file.read_stored(path, "run")
    config = config_file.from_json(stored, f"{path}: its settings")
    config = dataclasses.replace(config, out=path, data_parallel=None, model_parallel=1)
    if run_directory.read_summary(path) is None:
        raise ConfigError(f"run {path}: not finished; finish it with --resume {path}")
    if config.retraining == NONE:
        raise ConfigError(f"run {path}: has no retraining; choose a run that retrains its ticket")
    saved = load_ticket(path / paths.TICKET_FILE)
    if saved.rewound is None:
        raise ConfigError(f"run {path}: its ticket file is compact; choose a run with the rewound network in this file")
    start = Snapshot(saved.rewound["params"], saved.rewound["batch_stats"])
    return config, Ticket(start, saved.found_masks)


def check(*, points: int, seed: int) -> None:
    """Checks the number of points and the seed for `measure`.

    Raises:
        ConfigError: a number is out of range; the message names the flag.
    """
    _check_at_least(2, "--points", points)
    if not SEED.holds(seed):
        raise ConfigError(f"--seed {seed}: {SEED.rule}")


def child(problem: Problem, number: int, *, seed: int) -> Problem:
    """Copy of a run's problem with another PRNG key, for other batches and augmentation of the same data.

    Args:
        problem: model, data and PRNG key of the run.
        number: number of the retraining, from 1.
        seed: 0 to 4294967295; other seeds give other keys.
    """
    key = problem.key
    for folded in (CHILD_KEYS, seed, number):
        key = jax.random.fold_in(key, folded)
    return dataclasses.replace(problem, key=key)


def measure(retraining: Retraining, observer: Observer, *, points: int = 11, seed: int = 0) -> dict[str, Any]:
    """Retrains a ticket twice on different batches, and measures the line between the two networks.

    Args:
        retraining: ticket, config and data of a run.
        observer: receives the events of both retrainings, one after the other.
        points: int >= 2, number of points, including both ends.
        seed: seed for the order of batches and the augmentation, 0 to 4294967295.

    Returns:
        Content of connectivity.json: "points" ("share", "error" and "loss" of each), "barrier" and "loss_barrier",
        "children" ("test_accuracy" of each), "settings", "versions" and "seconds". Errors and accuracies are shares,
        in [0, 1].

    Raises:
        ConfigError: a number is out of range.
        NonFiniteLossError: loss or weights are not finite; the message names epoch and step.
    """
    check(points=points, seed=seed)
    started = time.perf_counter()
    config, problem, ticket, test = retraining.config, retraining.problem, retraining.ticket, retraining.test
    ends, children = [], []
    for number in range(1, len(CHILDREN) + 1):
        own = child(problem, number, seed=seed)
        state = search.retrain(config, own, search.begin_retraining(own, ticket), observer)
        logits = metrics.logits(Search(config, problem, observer), state, state.masks, test)
        ends.append(Snapshot(state.params, state.batch_stats))
        children.append({"test_accuracy": share_right(logits, test)})
    masks = network(problem.recipe.channels, ends[0].params, ends[0].batch_stats, ticket.masks)["masks"]
    line = Line(problem.recipe.model, (ends[0], ends[1]), masks)
    path = connect(line, problem.train, test, points=points, batch_size=config.batch_size)
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
    """Writes the result of `measure` as JSON; replaces the file at `path`.

    Raises:
        OSError: the file cannot be written; the old file is kept.
    """
    files.write_whole(path, (json.dumps(found, indent=2) + "\n").encode())


def _check_at_least(least: int, name: str, number: int) -> None:
    if number < least:
        raise ConfigError(f"{name} {number}: must be at least {least}")


def _between(start: Any, end: Any, share: float) -> Any:
    if share in (0, 1):
        return end if share else start
    wide = at_least_float32(start)
    return (wide + share * (at_least_float32(end) - wide)).astype(start.dtype)
