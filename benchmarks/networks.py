"""Networks and data of the step benchmarks: dense, search and ticket network with equal weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from timing import Stepper

from cs_jax.core import masks
from cs_jax.core.arrays import DTYPES
from cs_jax.data.images import ImageSet
from cs_jax.tickets import fold
from cs_jax.training import compiled as compiled_steps
from cs_jax.training import step
from cs_jax.training.step import Hyperparams, Recipe, StepInputs, TrainState

Network = tuple[Recipe, TrainState]


def make_data(batch_size: int, image_size: int) -> ImageSet:
    """One batch of random square images: three channels, ten classes, uint8."""
    shape = (batch_size, image_size, image_size, 3)
    images = jax.random.randint(jax.random.key(0), shape, 0, 256).astype(jnp.uint8)
    labels = jnp.arange(batch_size, dtype=jnp.int32) % 10
    return ImageSet(images=images, labels=labels, mean=jnp.full(3, 120.0), std=jnp.full(3, 64.0))


def make_networks(recipe: Recipe, data: ImageSet, *, score_dtype: str = "float32") -> dict[str, Network]:
    """Recipe and state of the networks "dense", "search" and "ticket", with equal weights.

    The dense network has plain Flax layers without masks. The ticket has density 0.2.
    """
    variables = step.init_variables(recipe, jax.random.key(0), data.images.shape[1:])

    def network(recipe: Recipe, scores: Any, fixed: Any) -> Network:
        params, batch_stats = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
        return recipe, step.init_state(recipe, params, batch_stats, scores=scores, masks=fixed)

    scores = masks.init_scores(variables["masks"], 0.0, dtype=DTYPES[score_dtype])
    kept = jax.tree.map(lambda mask: 2.0 * jax.random.bernoulli(jax.random.key(2), 0.2, mask.shape), scores)
    return {
        "dense": network(dataclasses.replace(recipe, model=fold.plain(recipe.model)), {}, {}),
        "search": network(recipe, scores, {}),
        "ticket": network(recipe, {}, kept),
    }


def make_step(recipe: Recipe, state: TrainState, data: ImageSet) -> Stepper:
    """Compiled training step whose batch is all of `data`; the state is donated."""
    order, key = jnp.arange(len(data)), jax.random.key(1)
    hyper = Hyperparams(*(jnp.asarray(value, float) for value in (3.0, 0.0, 0.01, 0.01, 1e-8)))
    inputs = StepInputs(data, order, key, hyper)
    compiled = compiled_steps.compiled(recipe)[0].lower(recipe, state, inputs).compile()
    return Stepper(compiled, state, (inputs,))
