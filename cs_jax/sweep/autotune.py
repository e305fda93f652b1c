"""How many runs a device is to take at once: as many as somebody says, or as it is measured to be faster with."""

import json
import statistics
import time
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from cs_jax.core.errors import ConfigError, out_of_memory
from cs_jax.experiment import search
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.storage import config_file
from cs_jax.sweep.scheduler import MOST
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import STEPS_PER_CALL, Executor
from cs_jax.training.problem import Problem
from cs_jax.training.shared_device import Together

REPEATS = 3
STEPS = 4 * STEPS_PER_CALL
"""Of a trial's epoch at most."""

_found: dict[Hashable, "Trial"] = {}


class Trial(NamedTuple):
    """What runs of one kind have been measured to take."""

    runs: int
    at_once: float  # seconds of a step of all of them in one program; infinite where that needs too much memory
    in_turn: float  # of a step of each, one after another

    @property
    def is_faster_at_once(self) -> bool:
        return self.at_once < self.in_turn

    def __str__(self) -> str:
        how = "in one program" if self.is_faster_at_once else "one after another"
        at_once = f"{1e3 * self.at_once:.3g} ms" if jnp.isfinite(self.at_once) else "more memory than there is"
        return f"{how}: a step of {self.runs} runs takes {at_once} at once, {1e3 * self.in_turn:.3g} ms in turn"


def how_many(configs: Sequence[Config], tickets: int | None) -> tuple[int, str]:
    """How many of some runs are to be taken at once, the first ones, and why, in words; "" where there is one alone.

    Args:
        configs: of runs that can share a program, one at least.
        tickets: how many at most; None is what a short trial on the device finds to be faster, once for each kind. On
            a CPU that is one without a trial: convolutions are slower together there, and what comes out of a run is
            not to depend, to the last bit, on what a clock has said.
    """
    count = min(len(configs), tickets or MOST)
    if len(configs) == 1:
        return 1, ""
    if not _can_share(configs[0]):
        return 1, "one after another, as runs of several devices or of streamed images always are"
    if tickets is not None:
        return count, f"{count} runs in one program, as asked" if count > 1 else "one after another, as asked"
    if jax.default_backend() == "cpu":
        return 1, "one after another, as always on a CPU"
    first = configs[0]
    kind = (count, json.dumps(config_file.of_program(first), sort_keys=True, default=str))
    try:
        if kind not in _found:
            _found[kind] = measure(first, count)
    except (ConfigError, OSError) as error:  # which the run itself will meet
        return 1, f"one after another: not measured, as {' '.join(str(error).split())}"
    return count if _found[kind].is_faster_at_once else 1, str(_found[kind])


def _can_share(config: Config) -> bool:
    """Whether a run has one device and its images on it."""
    devices = (config.data_parallel or 1) * config.model_parallel
    return devices == 1 and not config.stream and config.image_size is None


def measure(config: Config, runs: int) -> Trial:
    """Times some steps of so many runs both ways, in turns, after each way was compiled; medians.

    Raises:
        ConfigError: the runs cannot be prepared.
    """
    problem, _ = prepare(config)
    seconds_in_turn(config, problem, runs)
    try:
        seconds_at_once(config, problem, runs)
        pairs = [
            (seconds_at_once(config, problem, runs), seconds_in_turn(config, problem, runs)) for _ in range(REPEATS)
        ]
    except JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return Trial(runs, float("inf"), seconds_in_turn(config, problem, runs))
    return Trial(runs, *map(statistics.median, zip(*pairs, strict=True)))


def seconds_in_turn(config: Config, problem: Problem, runs: int) -> float:
    """Seconds of a search step of each of so many runs, one after another."""
    (state,) = _states(config, problem, 1)
    return runs * _seconds(config, problem, state, Executor())


def seconds_at_once(config: Config, problem: Problem, runs: int) -> float:
    """Seconds of a search step of so many runs, taken together as `Together` takes them."""
    states = _states(config, problem, runs)

    def life(state: Any) -> Any:
        return lambda executor: _seconds(config, problem, state, executor)

    ends = Together().run([life(state) for state in states])
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    return max(end for end in ends if not isinstance(end, BaseException))


def _states(config: Config, problem: Problem, runs: int) -> list[Any]:
    """States before the first step, with arrays of their own."""
    state = search.init_state(config, problem)
    return jax.block_until_ready([jax.tree.map(jnp.copy, state) for _ in range(runs)])


def _seconds(config: Config, problem: Problem, state: Any, executor: Executor) -> float:
    """Seconds of a step of an epoch, or of its beginning where it is long."""
    method, size = config.pruning_method, config.batch_size
    recipe = method.recipe(problem.recipe) if method.searches else problem.recipe
    order = problem.epoch_order(0, 0)[: STEPS * size]
    epoch = Epoch(problem.train, order, problem.key, search.hyperparams(config, SEARCH, 0), batch_size=size)
    started, done, metrics = time.perf_counter(), 0, None
    for done, _, metrics in executor.train_epoch(recipe, state, epoch):  # noqa: B007
        pass
    jax.block_until_ready(metrics)
    return (time.perf_counter() - started) / done
