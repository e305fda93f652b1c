"""Several tickets searched at once: in one vectorised program, or one after another.

    python benchmarks/many_tickets.py [--tickets 4] [--repeats 9] [--model resnet6]

Times a search step of so many tickets on the digits, each with an initial score of its own, as one program vectorised
over tickets and as a step for each in turn, interleaved in one process. Prints medians, and the median of the ratios
within each repeat: above 1, one program is slower. Processes side by side are what `python -m cs_jax sweep` does.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax import experiment, flags, search, training
from cs_jax.progress import SEARCH


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def main(tickets: int, repeats: int, model: str) -> None:
    config = flags.parse(["digits", "--model", model])
    problem, _ = experiment.prepare(config)
    one = search.init_state(config, problem)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * tickets), one)
    hyper = search.hyperparams(config, SEARCH, 3)
    dials = jnp.linspace(-0.1, 0.1, tickets)
    axes = hyper._replace(init_value=0, **{name: None for name in hyper._fields if name != "init_value"})  # pyright: ignore
    indices = np.arange(config.batch_size)
    step = functools.partial(training.step, problem.recipe)
    alone = jax.jit(step)
    together = jax.jit(jax.vmap(step, in_axes=(0, None, None, None, axes)))

    def in_turn() -> list[Any]:
        return [alone(one, problem.train, indices, problem.key, hyper._replace(init_value=dial)) for dial in dials]

    def at_once() -> Any:
        return together(many, problem.train, indices, problem.key, hyper._replace(init_value=dials))

    jax.block_until_ready((in_turn(), at_once()))
    pairs = [(seconds(in_turn), seconds(at_once)) for _ in range(repeats)]
    turn, once = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{model}, batch {config.batch_size}, {tickets} tickets, {repeats} repeats; {device}")
    print("| in turn, ms | one program, ms | ratio |\n| --- | --- | --- |")
    print(f"| {1e3 * turn:.1f} | {1e3 * once:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tickets", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", default="resnet6", choices=["resnet6", "resnet8", "lenet300100"])
    given = parser.parse_args()
    main(given.tickets, given.repeats, given.model)
