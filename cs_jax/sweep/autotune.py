"""Number of runs that a device trains in one compiled program: given by the user, or measured."""

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
from cs_jax.sweep.scheduler import MAX_RUNS_PER_PROGRAM
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import STEPS_PER_CALL, Executor
from cs_jax.training.problem import Problem
from cs_jax.training.shared_device import Together

REPEATS = 3
STEPS = 4 * STEPS_PER_CALL
"""Maximum number of steps in one timing."""

_trials: dict[Hashable, "Trial"] = {}  # trials measured in this process, by kind of run


class Trial(NamedTuple):
    """Step times of several runs of one kind, in one program and one after another."""

    runs: int
    batched: float  # seconds for one step of all runs in one program; infinite if memory is too small
    sequential: float  # seconds for one step of each run, one after another

    @property
    def is_batched_faster(self) -> bool:
        return self.batched < self.sequential

    def __str__(self) -> str:
        batched, sequential = (f"{1e3 * seconds:.3g} ms" for seconds in (self.batched, self.sequential))
        if not jnp.isfinite(self.batched):
            return f"one after another: too little memory for {self.runs} runs in one program"
        choice = "in one program" if self.is_batched_faster else "one after another"
        return f"{choice}: a step of {self.runs} runs takes {batched} in one program, {sequential} one after another"


def choose_run_count(configs: Sequence[Config], tickets: int | None) -> tuple[int, str]:
    """Number of runs to train in one program, and the reason for the log.

    Args:
        configs: settings of one or more runs that can share a program.
        tickets: maximum number of runs in one program, at least 1. None measures on an accelerator whether one program
            is faster, once for each kind of run. On a CPU, None means 1 without a measurement: convolutions are slower
            in a shared program, and the last bits of a result must not depend on a timing.

    Returns:
        The number n, for the first n configs; and the reason, "" for a single config.
    """
    count = min(len(configs), tickets or MAX_RUNS_PER_PROGRAM)
    if len(configs) == 1:
        return 1, ""
    if not _can_share_device(configs[0]):
        return 1, "one after another: runs on several devices or with streamed images cannot share a program"
    if tickets is not None:
        return count, f"{count} runs in one program, as set by --tickets" if count > 1 else "one after another"
    if jax.default_backend() == "cpu":
        return 1, "one after another, the default on a CPU"
    first = configs[0]
    kind = (count, json.dumps(config_file.of_program(first), sort_keys=True, default=str))
    try:
        if kind not in _trials:
            _trials[kind] = measure(first, count)
    except (ConfigError, OSError) as error:  # the run itself will raise this error again
        return 1, f"one after another: the measurement failed: {' '.join(str(error).split())}"
    return count if _trials[kind].is_batched_faster else 1, str(_trials[kind])


def _can_share_device(config: Config) -> bool:
    """True if a run uses one device and keeps its images there."""
    devices = (config.data_parallel or 1) * config.model_parallel
    return devices == 1 and not config.stream and config.image_size is None


def measure(config: Config, runs: int) -> Trial:
    """Step times of `runs` runs in one program and one after another: medians of `REPEATS` interleaved timings.

    Args:
        config: settings of one run; all runs use these settings.
        runs: number of runs, at least 2.

    Raises:
        ConfigError: the runs cannot be prepared.
    """
    problem, _ = prepare(config)
    seconds_sequential(config, problem, runs)  # compiles
    try:
        seconds_batched(config, problem, runs)  # compiles
        pairs = [
            (seconds_batched(config, problem, runs), seconds_sequential(config, problem, runs)) for _ in range(REPEATS)
        ]
    except JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return Trial(runs, float("inf"), seconds_sequential(config, problem, runs))
    return Trial(runs, *map(statistics.median, zip(*pairs, strict=True)))


def seconds_sequential(config: Config, problem: Problem, runs: int) -> float:
    """Seconds for one search step of each of `runs` runs, one after another."""
    (state,) = _initial_states(config, problem, 1)
    return runs * _seconds_per_step(config, problem, state, Executor())


def seconds_batched(config: Config, problem: Problem, runs: int) -> float:
    """Seconds for one search step of `runs` runs in one program, as `Together` runs them."""

    def timing(state: Any) -> Any:
        return lambda executor: _seconds_per_step(config, problem, state, executor)

    results = Together().run([timing(state) for state in _initial_states(config, problem, runs)])
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return max(result for result in results if not isinstance(result, BaseException))


def _initial_states(config: Config, problem: Problem, count: int) -> list[Any]:
    """Training states before the first step; each has its own arrays, because steps donate them."""
    state = search.init_state(config, problem)
    return jax.block_until_ready([jax.tree.map(jnp.copy, state) for _ in range(count)])


def _seconds_per_step(config: Config, problem: Problem, state: Any, executor: Executor) -> float:
    """Seconds per step of an epoch, measured over at most `STEPS` steps."""
    method, size = config.pruning_method, config.batch_size
    recipe = method.recipe(problem.recipe) if method.searches else problem.recipe
    order = problem.epoch_order(0, 0)[: STEPS * size]
    epoch = Epoch(problem.train, order, problem.key, search.hyperparams(config, SEARCH, 0), batch_size=size)
    started, done, metrics = time.perf_counter(), 0, None
    for done, _, metrics in executor.train_epoch(recipe, state, epoch):  # noqa: B007
        pass
    jax.block_until_ready(metrics)
    return (time.perf_counter() - started) / done
