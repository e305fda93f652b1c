"""Cost of masking: time and memory of a search step, a ticket step and a plain dense step of the same network.

    python benchmarks/step.py [--model resnet20] [--batch-size 128] [--repeats 15]

The dense network is written with Flax's own layers, without masks, and takes the same optimizer step. The steps run
interleaved in one process, so that a machine whose speed drifts slows all of them; medians and the medians of the
ratios within each repeat are printed.
"""

import dataclasses
import statistics

import jax
import tyro
from networks import make_data, make_networks, make_step
from rich.console import Console
from rich.table import Table
from timing import Stepper, interleave, median_ratio

from cs_jax.models import MODELS
from cs_jax.training.step import Recipe


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: str = "resnet20"
    """A network of cs_jax.models, but lenet300100."""

    batch_size: int = 128
    """Examples per step."""

    image_size: int = 32
    """Height and width; three channels."""

    repeats: int = 15
    """Timed rounds over all steps, after two that are not counted."""


def main(settings: Settings) -> None:
    steps = make_steps(settings)
    print_table(settings, steps, interleave(steps, settings.repeats))


def make_steps(settings: Settings) -> dict[str, Stepper]:
    """The compiled steps, by name."""
    data = make_data(settings.batch_size, settings.image_size)
    recipe = Recipe(MODELS[settings.model](), augment="flip-crop")
    return {name: make_step(*network, data) for name, network in make_networks(recipe, data).items()}


def device_title(settings: Settings) -> str:
    """What is measured, and where."""
    device = jax.devices()[0].device_kind
    return f"{settings.model}, batch {settings.batch_size}, {device}, jax {jax.__version__}, n={settings.repeats}"


def print_table(settings: Settings, steps: dict[str, Stepper], times: dict[str, list[float]]) -> None:
    table = Table("step", "median ms", "min ms", "ratio to dense", "peak MiB", title=device_title(settings))
    for name, seconds in times.items():
        table.add_row(
            name,
            f"{1e3 * statistics.median(seconds):.1f}",
            f"{1e3 * min(seconds):.1f}",
            f"{median_ratio(seconds, times['dense']):.3f}",
            f"{steps[name].peak_bytes() / 2**20:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
