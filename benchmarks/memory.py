"""Memory of a search, a ticket and a plain dense network, and what each flag that saves some of it does.

    python benchmarks/memory.py [--model resnet20] [--batch-size 128] [--image-size 32] [--repeats 0]

First what each kind of state takes, over the number of masked weights. Then the memory that a compiled step needs at
once, by the compiler's own account: what goes in and comes out, less what is updated in place, and all in between.
Nothing is run for that; with `--repeats`, steps of the search are timed too, interleaved in one process.
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

AS_IT_IS = "as it is"
FLAGS: dict[str, dict[str, Any]] = {
    AS_IT_IS: {},
    "--remat": {"remat": True},
    "--accumulate 4": {"accumulate": 4},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--score-dtype bfloat16": {"score_dtype": "bfloat16"},
    "all four": {"remat": True, "accumulate": 4, "dtype": "bfloat16", "score_dtype": "bfloat16"},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: str = "resnet20"
    """A network of cs_jax.models, but lenet300100."""

    batch_size: int = 128
    """Examples per step."""

    image_size: int = 32
    """Height and width; three channels."""

    repeats: int = 0
    """Timed rounds over the search's steps, after two that are not counted; 0 for none."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "image_size")
        for fields in FLAGS.values():
            Config(model=self.model, **fields)  # which refuses a model that has no such field


def main(settings: Settings) -> None:
    data = make_data(settings.batch_size, settings.image_size)
    console = Console(width=120)
    plain, narrow = (networks(settings, data, flag) for flag in (AS_IT_IS, "--score-dtype bfloat16"))
    console.print(state_table(settings, plain | {"search, --score-dtype bfloat16": narrow["search"]}))
    steps = {}
    for flag in FLAGS:
        steps[flag] = {name: make_step(*network, data) for name, network in networks(settings, data, flag).items()}
    times = interleave({flag: each["search"] for flag, each in steps.items()}, settings.repeats)
    console.print(step_table(settings, steps, times))
    extra = steps[AS_IT_IS]["search"].peak_bytes() - steps[AS_IT_IS]["dense"].peak_bytes()
    _, state = plain["search"]
    own = size((state.scores, state.score_momentum))
    console.print(f"search over dense: {extra / 2**20:.1f} MiB, scores and their momentum are {own / 2**20:.1f} MiB")


def networks(settings: Settings, data: ImageSet, flag: str) -> dict[str, Network]:
    """The three networks as a flag makes them."""
    config = Config(model=settings.model, batch_size=settings.batch_size, **FLAGS[flag])
    return make_networks(make_recipe(config, 10), data, score_dtype=config.score_dtype)


def state_table(settings: Settings, made: dict[str, Network]) -> Table:
    """Bytes of each kind of state, over the number of masked weights."""
    _, search = made["search"]
    masked = sum(leaf.size for leaf in jax.tree.leaves(search.scores))
    title = f"{settings.model}: bytes of state per masked weight, of which there are {masked:,}"
    table = Table("state", *made, title=title)
    kinds = {
        "weights": lambda state: state.params,
        "their momentum": lambda state: state.weight_momentum,
        "scores": lambda state: state.scores,
        "their momentum ": lambda state: state.score_momentum,
        "fixed masks": lambda state: state.masks,
        "BatchNorm statistics": lambda state: state.batch_stats,
        "all that a step takes": lambda state: state,
    }
    for kind, part in kinds.items():
        table.add_row(kind, *(f"{size(part(state)) / masked:.2f}" for _, state in made.values()))
    kept = {name: () if name == "dense" else (state.params, state.batch_stats) for name, (_, state) in made.items()}
    table.add_row("snapshot, beside it", *(f"{size(snapshot) / masked:.2f}" for snapshot in kept.values()))
    return table


def step_table(settings: Settings, steps: dict[str, dict[str, Stepper]], times: dict[str, list[float]]) -> Table:
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    title = f"{settings.model}, batch {settings.batch_size}: peak MiB of a step; {device}"
    timed = ("search, median ms", "ratio") if settings.repeats else ()
    table = Table("flags", *steps[AS_IT_IS], *timed, title=title)
    for flag, each in steps.items():
        peaks = [f"{stepper.peak_bytes() / 2**20:.1f}" for stepper in each.values()]
        if timed:
            ratio = median_ratio(times[flag], times[AS_IT_IS])
            peaks += [f"{1e3 * statistics.median(times[flag]):.0f}", f"{ratio:.2f}"]
        table.add_row(flag, *peaks)
    return table


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    start(main, Settings, __doc__)
