"""Timing of steps in interleaved repeats, and the start of a script; shared by the benchmarks."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import tyro

from cs_jax.core.errors import ConfigError


def start(main: Callable[[Any], None], settings: type, about: str | None) -> None:
    """Runs a benchmark with settings from the command line; on a ConfigError, prints one line and exits with code 2."""
    try:
        main(tyro.cli(settings, description=about))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_positive(settings: Any, *names: str) -> None:
    """Raises a ConfigError if one of the named settings is below 1; None is valid."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")


class Timed(Protocol):
    """A step that can be timed repeatedly."""

    def run(self) -> float:
        """Seconds of one step."""
        ...


class Stepper:
    """A compiled step and its state: the first result of a call is the first argument of the next call."""

    def __init__(self, compiled: Any, carry: Any, arguments: tuple) -> None:
        self.compiled = compiled
        self._carry = carry
        self._arguments = arguments

    def run(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self._carry, rest = self.compiled(self._carry, *self._arguments)
        jax.block_until_ready((self._carry, rest))
        return time.perf_counter() - started

    def peak_bytes(self) -> int:
        """Peak memory of the compiled step, from the compiler's memory analysis."""
        analysis = self.compiled.memory_analysis()
        held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return held + analysis.temp_size_in_bytes


def interleave(steps: Mapping[str, Timed], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in each repeat, after two warm-up repeats."""
    rounds = [{name: stepper.run() for name, stepper in steps.items()} for _ in range(repeats + 2)][2:]
    return {name: [seconds[name] for seconds in rounds] for name in steps}


def median_ratio(times: list[float], reference: list[float]) -> float:
    """Median of the ratios of two times in the same repeat."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))
