"""SNIP: connection sensitivity at initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cs_jax.data.images import ImageSet, normalize
from cs_jax.methods.base import AtInitialization, keep_highest
from cs_jax.training import step
from cs_jax.training.accumulation import mean_over_parts
from cs_jax.training.problem import Problem
from cs_jax.training.step import Recipe

MAX_BATCHES = 10
"""Maximum number of batches whose gradients are added; with one batch, as in the paper, many ranks are noise."""


class Snip(AtInitialization):
    """SNIP: keeps the weights with the largest `|weight * gradient|` at initialisation.

    This is the absolute value of the gradient of the loss with respect to masks of one. The gradient is summed over the
    first batches of an epoch, at most `MAX_BATCHES`, without augmentation. The ticket has the initial weights.

    References:
        Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
        arXiv:1810.02340.
    """

    wants_target = True

    def begin(self, problem: Problem, variables: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        assert self.config.target_density is not None
        order = np.asarray(problem.epoch_order(0, 0))
        full = max(1, min(MAX_BATCHES, len(order) // self.config.batch_size))
        gradient = None
        for indices in np.split(order[: full * self.config.batch_size], full):
            batch, places = problem.train.take(indices), np.arange(len(indices))
            part = _mask_gradient(problem.recipe, variables, batch, places)
            gradient = part if gradient is None else jax.tree.map(jnp.add, gradient, part)
        ranks = jax.tree.map(jnp.abs, gradient)
        return {}, keep_highest(self.config, ranks, self.config.target_density)


@functools.partial(jax.jit, static_argnames="recipe")
def _mask_gradient(recipe: Recipe, variables: dict[str, PyTree], data: ImageSet, indices: jax.Array) -> PyTree:
    """Gradient of the mean loss with respect to the masks; at masks of one, this is weight * gradient of the weight."""

    def loss(masks: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        inputs = normalize(images, data.mean, data.std)
        cross_entropy, _ = step.cross_entropy(recipe, {**variables, "masks": masks}, inputs, labels)
        return cross_entropy

    def compute(carry: None, images: jax.Array, labels: jax.Array) -> tuple[None, PyTree]:
        return carry, jax.grad(loss)(variables["masks"], images, labels)

    _, gradient = mean_over_parts(recipe.part_size, compute, None, data.images[indices], data.labels[indices])
    return gradient
