"""Time and memory of dense, search and ticket steps of one network: the cost of masks.

    python benchmarks/step.py [--model resnet20] [--batch-size 128] [--repeats 15]

The dense network has plain Flax layers without masks, and the same optimizer of the weights. The steps run interleaved
in one process, so that a change of machine speed affects all steps. Prints medians over repeats, and medians of the
ratios to the dense step in the same repeat.
"""

import dataclasses
import statistics

import jax
from networks import make_data, make_networks, make_step
from rich.console import Console
from rich.table import Table
from timing import Stepper, check_positive, interleave, median_ratio, start

from cs_jax.models import MODELS
from cs_jax.training.step import Recipe


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    model: str = "resnet20"
    """Network of cs_jax.models; not lenet300100."""

    batch_size: int = 128
    """Examples per step."""

    image_size: int = 32
    """Height and width; three channels."""

    repeats: int = 15
    """Timed repeats of all steps, after two warm-up repeats."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "image_size", "repeats")


def main(settings: Settings) -> None:
    steps = make_steps(settings)
    print_table(settings, steps, interleave(steps, settings.repeats))


def make_steps(settings: Settings) -> dict[str, Stepper]:
    """Compiled steps by name: "dense", "search", "ticket"."""
    data = make_data(settings.batch_size, settings.image_size)
    recipe = Recipe(MODELS[settings.model](), augment="flip-crop")
    return {name: make_step(*network, data) for name, network in make_networks(recipe, data).items()}


def device_title(settings: Settings) -> str:
    """Table title: network, batch size, device, jax version, number of repeats."""
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
    start(main, Settings, __doc__)
