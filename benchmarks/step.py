"""Cost of masking: time and memory of a search step, a ticket step and a plain dense step of the same network.

    python benchmarks/step.py [--model resnet20] [--batch-size 128] [--repeats 15]

The dense network is written with Flax's own layers, without masks, and takes the same optimizer step. The steps run
interleaved in one process, so that a machine whose speed drifts slows all of them; medians and the medians of the
ratios within each repeat are printed.
"""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from timing import Stepper, interleave, median_ratio

from cs_jax import masks, training
from cs_jax.images import ImageSet
from cs_jax.models import MODELS
from cs_jax.training import Hyperparams, Recipe, TrainState


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: str = "resnet20"
    """A residual network of cs_jax.models."""

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
    data = make_data(settings)
    order, key = jnp.arange(settings.batch_size), jax.random.key(1)
    hyper = Hyperparams(*(jnp.asarray(value, float) for value in (3.0, 0.0, 0.01, 0.01, 1e-8)))
    steps = {}
    for name, (recipe, state) in make_states(settings).items():
        compiled = jax.jit(training.step, static_argnames="recipe", donate_argnames="state")
        compiled = compiled.lower(recipe, state, data, order, key, hyper).compile()
        steps[name] = Stepper(compiled, state, (data, order, key, hyper))
    return steps


def make_data(settings: Settings) -> ImageSet:
    shape = (settings.batch_size, settings.image_size, settings.image_size, 3)
    images = jax.random.randint(jax.random.key(0), shape, 0, 256).astype(jnp.uint8)
    labels = jnp.arange(settings.batch_size, dtype=jnp.int32) % 10
    return ImageSet(images=images, labels=labels, mean=jnp.full(3, 120.0), std=jnp.full(3, 64.0))


def make_states(settings: Settings) -> dict[str, tuple[Recipe, TrainState]]:
    """Recipe and state of the three networks, from the same weights; a ticket that keeps a fifth."""
    recipe = Recipe(MODELS[settings.model](), augment="flip-crop")
    variables = training.init_variables(recipe, jax.random.key(0), (settings.image_size, settings.image_size, 3))

    def state(recipe: Recipe, scores: Any, fixed: Any) -> tuple[Recipe, TrainState]:
        params, batch_stats = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
        return recipe, training.init_state(recipe, params, batch_stats, scores=scores, masks=fixed)

    scores = masks.init_scores(variables["masks"], 0.0)
    kept = jax.tree.map(lambda mask: 2.0 * jax.random.bernoulli(jax.random.key(2), 0.2, mask.shape), scores)
    return {
        "dense": state(Recipe(MODELS[settings.model](conv=nn.Conv), augment=recipe.augment), {}, {}),
        "search": state(recipe, scores, {}),
        "ticket": state(recipe, {}, kept),
    }


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
