"""Memory of dense, search and ticket steps, and the effect of each memory-saving flag.

    python benchmarks/memory.py [--model resnet20] [--batch-size 128] [--image-size 32] [--repeats 0]

The first table shows the bytes of each kind of state, divided by the number of masked weights. The second table shows
the peak memory of a compiled step by the compiler's memory analysis: arguments, results and temporary buffers. Buffers
that are updated in place count once. No step runs for these tables. With `--repeats`, search steps are also timed,
interleaved in one process.
"""

import dataclasses
import statistics
from typing import Any

import jax
from networks import Network, make_data, make_networks, make_step
from rich.console import Console
from rich.table import Table
from timing import Stepper, check_positive, interleave, median_ratio, start

from cs_jax.data.images import ImageSet
from cs_jax.experiment.config import Config
from cs_jax.experiment.prepare import make_recipe

NO_FLAG = "no flag"
FLAGS: dict[str, dict[str, Any]] = {
    NO_FLAG: {},
    "--remat": {"remat": True},
    "--accumulate 4": {"accumulate": 4},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--score-dtype bfloat16": {"score_dtype": "bfloat16"},
    "all four": {"remat": True, "accumulate": 4, "dtype": "bfloat16", "score_dtype": "bfloat16"},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    model: str = "resnet20"
    """Network of cs_jax.models; not lenet300100."""

    batch_size: int = 128
    """Examples per step."""

    image_size: int = 32
    """Height and width; three channels."""

    repeats: int = 0
    """Timed repeats of the search steps, after two warm-up repeats; 0 times nothing."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "image_size")
        for fields in FLAGS.values():
            Config(model=self.model, **fields)  # raises if the model does not support a flag


def main(settings: Settings) -> None:
    data = make_data(settings.batch_size, settings.image_size)
    console = Console(width=120)
    plain, narrow = (networks(settings, data, flag) for flag in (NO_FLAG, "--score-dtype bfloat16"))
    console.print(state_table(settings, plain | {"search, --score-dtype bfloat16": narrow["search"]}))
    steps = {}
    for flag in FLAGS:
        steps[flag] = {name: make_step(*network, data) for name, network in networks(settings, data, flag).items()}
    times = interleave({flag: each["search"] for flag, each in steps.items()}, settings.repeats)
    console.print(step_table(settings, steps, times))
    extra = steps[NO_FLAG]["search"].peak_bytes() - steps[NO_FLAG]["dense"].peak_bytes()
    _, state = plain["search"]
    stored = size((state.scores, state.score_momentum))
    console.print(
        f"peak memory of a search step minus a dense step: {extra / 2**20:.1f} MiB, of which scores and their momentum "
        f"are {stored / 2**20:.1f} MiB"
    )


def networks(settings: Settings, data: ImageSet, flag: str) -> dict[str, Network]:
    """The three networks of `make_networks`, built with a flag."""
    config = Config(model=settings.model, batch_size=settings.batch_size, **FLAGS[flag])
    return make_networks(make_recipe(config, 10), data, score_dtype=config.score_dtype)


def state_table(settings: Settings, made: dict[str, Network]) -> Table:
    """Table of the bytes of each kind of state per masked weight."""
    _, search = made["search"]
    masked = sum(leaf.size for leaf in jax.tree.leaves(search.scores))
    title = f"{settings.model}: bytes of state per masked weight; {masked:,} masked weights"
    table = Table("state", *made, title=title)
    kinds = {
        "weights": lambda state: state.params,
        "weight momentum": lambda state: state.weight_momentum,
        "scores": lambda state: state.scores,
        "score momentum": lambda state: state.score_momentum,
        "fixed masks": lambda state: state.masks,
        "BatchNorm statistics": lambda state: state.batch_stats,
        "whole state of a step": lambda state: state,
    }
    for kind, part in kinds.items():
        table.add_row(kind, *(f"{size(part(state)) / masked:.2f}" for _, state in made.values()))
    kept = {name: () if name == "dense" else (state.params, state.batch_stats) for name, (_, state) in made.items()}
    table.add_row("snapshot, in addition", *(f"{size(snapshot) / masked:.2f}" for snapshot in kept.values()))
    return table


def step_table(settings: Settings, steps: dict[str, dict[str, Stepper]], times: dict[str, list[float]]) -> Table:
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    title = f"{settings.model}, batch {settings.batch_size}: peak MiB of a step; {device}"
    timed = ("search, median ms", "ratio") if settings.repeats else ()
    table = Table("flags", *steps[NO_FLAG], *timed, title=title)
    for flag, each in steps.items():
        peaks = [f"{stepper.peak_bytes() / 2**20:.1f}" for stepper in each.values()]
        if timed:
            ratio = median_ratio(times[flag], times[NO_FLAG])
            peaks += [f"{1e3 * statistics.median(times[flag]):.0f}", f"{ratio:.2f}"]
        table.add_row(flag, *peaks)
    return table


def size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    start(main, Settings, __doc__)
