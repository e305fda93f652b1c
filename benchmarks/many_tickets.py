"""Time of a search for several tickets in one vectorised function, compared with one search after another.

    python benchmarks/many_tickets.py [--tickets 4] [--repeats 9] [--model resnet6] [--dataset digits]

Times the first search epoch (at most 400 steps) in two ways, interleaved in one process: with N tickets in one compiled
function, as in `train.py --tickets N`; and with one ticket, whose time is multiplied by N ("sequential"). Prints the
median time for one step of all N tickets, and the ratio (one function / sequential) as a median of the ratios within
each repeat. Above 1, the single function is slower. On a CPU, `python -m cs_jax sweep` starts one process per ticket
instead, which is not measured here.
"""

import argparse
import os
import statistics

import jax

from cs_jax.commands.parser import parse
from cs_jax.experiment.prepare import prepare
from cs_jax.sweep.autotune import seconds_batched, seconds_sequential


def main(tickets: int, repeats: int, model: str, dataset: str) -> None:
    preset = {"digits": "digits", "fashion_mnist": "fashion-mnist", "cifar10": "cifar10"}[dataset]
    config = parse([preset, "--model", model])
    problem, _ = prepare(config)

    def both() -> tuple[float, float]:
        return seconds_sequential(config, problem, tickets), seconds_batched(config, problem, tickets)

    both()  # compiles
    pairs = [both() for _ in range(repeats)]
    sequential, batched = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{dataset}, {model}, batch {config.batch_size}, {tickets} tickets, {repeats} repeats; {device}")
    print("| sequential, ms | one function, ms | ratio |\n| --- | --- | --- |")
    print(f"| {1e3 * sequential:.1f} | {1e3 * batched:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tickets", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", default="resnet6")
    parser.add_argument("--dataset", default="digits", choices=["digits", "fashion_mnist", "cifar10"])
    given = parser.parse_args()
    main(given.tickets, given.repeats, given.model, given.dataset)
