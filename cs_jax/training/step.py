"""Train state and one optimizer step.

A step is built from a `Recipe`, which is static and hashable: equal recipes share compiled code. What changes while
training (`Hyperparams`) is traced, so a round compiles once per batch shape.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from cs_jax.core import masks
from cs_jax.core.arrays import at_least_float32, narrow_like, widen
from cs_jax.data.images import AUGMENTATIONS, ImageSet, normalize
from cs_jax.models.channels import Channels
from cs_jax.training.accumulation import mean_over_parts


class Hyperparams(NamedTuple):
    """What may change from epoch to epoch: traced scalars."""

    temperature: Float[Array, ""]  # multiplies the scores
    init_value: Float[Array, ""]  # the scores' initial value, which fixes the masks' scale
    learning_rate: Float[Array, ""]  # of the weights
    score_learning_rate: Float[Array, ""]
    penalty_weight: Float[Array, ""]  # lambda in the paper


def soft_masks(scores: PyTree, hyper: Hyperparams, key: Array) -> PyTree:
    """Masks of Continuous Sparsification, which draws nothing from `key`."""
    del key
    return masks.soft_mask(scores, hyper.temperature, init_value=hyper.init_value)


MASK_DRAWS = 2**31 - 1
"""Folded into a phase's key for the masks that steps draw: a number that no step has."""

ROUNDING_DRAWS = MASK_DRAWS - 1
"""Likewise for the rounding of scores and their momentum."""


@dataclass(frozen=True)
class Recipe:
    """What a compiled step is built from, fixed for a phase.

    Attributes:
        model: Linen module of masked layers, called with images and `train`.
        augment: name in `images.AUGMENTATIONS`.
        momentum: of both optimizers (Nesterov), dimensionless.
        decay: L2 factor added to the gradient of every weight, BatchNorm and biases included, before momentum.
        step_masks: a step's masks, in the scores' shapes, from scores, hyperparameters and a PRNG key of its own.
        moves_weights: whether a step updates the weights, or the scores alone.
        part_size: examples whose gradient is computed at once; a larger batch is computed in parts, one after another,
            for one update. BatchNorm normalises every part by itself, and its running averages take them in turn.
            None is the whole batch.
        in_order: whether compilers are kept to the order in which a step saves memory: with a part size, with
            `nn.remat` in the model, or with scores in bfloat16. It costs nothing, and does not change a bit.
        channels: what scores stand for; None is a weight each.
    """

    model: nn.Module
    augment: str = "none"
    momentum: float = 0.9
    decay: float = 1e-4
    step_masks: Callable[[PyTree, Hyperparams, Array], PyTree] = soft_masks
    moves_weights: bool = True
    part_size: int | None = None
    in_order: bool = False
    channels: Channels | None = None


class TrainState(struct.PyTreeNode):
    """Everything that one step changes or needs, apart from data and hyperparameters."""

    step: Int[Array, ""]  # updates done in this phase; seeds each step's augmentation
    params: PyTree
    batch_stats: PyTree  # {} for a model without BatchNorm
    scores: PyTree  # {} where the masks are fixed
    masks: PyTree  # the fixed masks; {} where they are learned from scores
    weight_momentum: optax.OptState
    score_momentum: optax.OptState
    channels: Channels | None = struct.field(pytree_node=False)  # the recipe's; no default, for rows of stacks

    @property
    def wide_scores(self) -> PyTree:
        """Scores as masks are made of them, in float32 at least: masks are no narrower than what they multiply."""
        return widen(self.scores)


class StepMetrics(NamedTuple):
    """Figures of one step, or with a leading axis of several."""

    cross_entropy: Float[Array, "*steps"]  # mean over the batch
    penalty: Float[Array, "*steps"]  # weighted: what is added to the cross-entropy to make the loss

    @property
    def loss(self) -> Float[Array, "*steps"]:
        return self.cross_entropy + self.penalty


def weight_direction(recipe: Recipe) -> optax.GradientTransformation:
    """Nesterov momentum of the gradient plus decay: what the learning rate multiplies."""
    return optax.chain(optax.add_decayed_weights(recipe.decay), score_direction(recipe))


def score_direction(recipe: Recipe) -> optax.GradientTransformation:
    """Nesterov momentum alone: scores do not decay."""
    return optax.trace(recipe.momentum, nesterov=True)


def init_variables(
    recipe: Recipe, key: Array, image_shape: tuple[int, ...], *, place: Callable[[PyTree], PyTree] | None = None
) -> dict[str, PyTree]:
    """Fresh "params", "batch_stats" ({} where there are none) and "masks" (ones) of the recipe's model.

    With channels, masks are those of the arrays alone that are scored.

    Args:
        recipe: its model is initialised.
        key: PRNG key.
        image_shape: (height, width, channels).
        place: shardings of the arrays, from their shapes; None is the default device.
    """
    init = functools.partial(_init, recipe, image_shape)
    if isinstance(key, Tracer):
        return init(key)
    # For a CPU compiled fast rather than well: it runs once, and drawing numbers compiles slowly there.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = place and place(jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)


def _init(recipe: Recipe, image_shape: tuple[int, ...], key: Array) -> dict[str, PyTree]:
    variables = recipe.model.init(key, jnp.zeros((1, *image_shape)), train=False)
    found = {collection: variables.get(collection, {}) for collection in ("params", "batch_stats", "masks")}
    return found if recipe.channels is None else {**found, "masks": recipe.channels.only_scored(found["masks"])}


def init_state(recipe: Recipe, params: PyTree, batch_stats: PyTree, *, scores: PyTree, masks: PyTree) -> TrainState:
    """State before the first step, momentum at zero. One of `scores` (learned) and `masks` (fixed) is {}."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        scores=scores,
        masks=masks,
        weight_momentum=weight_direction(recipe).init(params),
        score_momentum=score_direction(recipe).init(scores),
        channels=recipe.channels,
    )


def expand(channels: Channels | None, values: PyTree) -> PyTree:
    """Masks of the weights' shapes, from values of what scores stand for; themselves where that is a weight each."""
    return values if channels is None else channels.selection.expand(values)


def network(channels: Channels | None, params: PyTree, batch_stats: PyTree, masks: PyTree) -> dict[str, PyTree]:
    """The variables that a model is applied with: masks of ones too, for arrays of it that have no scores.

    Args:
        channels: what scores stand for; None is a weight each.
        params: weights.
        batch_stats: {} for a model without BatchNorm.
        masks: of what is scored, of the weights' shapes.
    """
    whole = masks if channels is None else channels.complete(masks, params)
    return {"params": params, "batch_stats": batch_stats, "masks": whole}


def cross_entropy(
    recipe: Recipe,
    variables: dict[str, PyTree],
    inputs: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
) -> tuple[Float[Array, ""], PyTree]:
    """Mean cross-entropy of the network in training mode, and the new "batch_stats"."""
    logits, updates = recipe.model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    logits = at_least_float32(logits)
    mean = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return mean, updates.get("batch_stats", {})


def loss_fn(
    recipe: Recipe,
    params: PyTree,
    scores: PyTree,
    state: TrainState,
    inputs: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    key: Array,
    hyper: Hyperparams,
) -> tuple[Float[Array, ""], tuple[StepMetrics, PyTree]]:
    """Mean cross-entropy plus penalty of `params` and `scores` (or of the state's fixed masks where those are {}).

    Returns:
        The loss, and with it the step's figures and the new "batch_stats".
    """
    step_masks = expand(recipe.channels, recipe.step_masks(scores, hyper, key)) if scores else state.masks
    variables = network(recipe.channels, params, state.batch_stats, step_masks)
    mean, batch_stats = cross_entropy(recipe, variables, inputs, labels)
    metrics = StepMetrics(mean, penalty=hyper.penalty_weight * masks.mask_penalty(step_masks))
    return metrics.loss, (metrics, batch_stats)


def step(
    recipe: Recipe,
    state: TrainState,
    data: ImageSet,
    indices: Int[Array, " batch"],
    key: Array,
    hyper: Hyperparams,
) -> tuple[TrainState, StepMetrics]:
    """State after one update of weights and scores on the examples `indices` of `data`, and the step's figures.

    Scores are updated where the state has some; fixed masks stay as they are. Augmentation, masks and the rounding of
    narrow scores are drawn from `key` and the state's step number, so any step can be repeated alone.
    """
    images = AUGMENTATIONS[recipe.augment](jax.random.fold_in(key, state.step), data.images[indices])
    mask_key, rounding_key = (
        jax.random.fold_in(jax.random.fold_in(key, purpose), state.step) for purpose in (MASK_DRAWS, ROUNDING_DRAWS)
    )
    wide_scores, wide_momentum = state.wide_scores, widen(state.score_momentum)
    differentiate = jax.grad(functools.partial(loss_fn, recipe), argnums=(0, 1), has_aux=True)

    def compute(batch_stats: PyTree, images: Array, labels: Array) -> tuple[PyTree, PyTree]:
        inputs = normalize(images, data.mean, data.std)
        before = state.replace(batch_stats=batch_stats)
        gradients, (metrics, after) = differentiate(state.params, wide_scores, before, inputs, labels, mask_key, hyper)
        return after, (gradients, metrics)

    batch_stats, (gradients, metrics) = mean_over_parts(
        recipe.part_size, compute, state.batch_stats, images, data.labels[indices]
    )
    weight_gradient, score_gradient = gradients
    if recipe.moves_weights:
        weights, momentum = weight_direction(recipe).update(weight_gradient, state.weight_momentum, state.params)
        params = _descend(state.params, weights, hyper.learning_rate)
        state = state.replace(params=params, weight_momentum=momentum)
    direction, score_momentum = score_direction(recipe).update(score_gradient, wide_momentum)
    scores = _descend(wide_scores, direction, hyper.score_learning_rate)
    scores, score_momentum = narrow_like(rounding_key, (scores, score_momentum), (state.scores, state.score_momentum))
    state = state.replace(step=state.step + 1, batch_stats=batch_stats, scores=scores, score_momentum=score_momentum)
    return state, metrics


def _descend(values: PyTree, direction: PyTree, rate: Float[Array, ""]) -> PyTree:
    return optax.apply_updates(values, jax.tree.map(lambda change: -rate * change, direction))
