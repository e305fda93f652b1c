"""Train state and one optimizer step.

A step is built from a `Recipe`, which is static and hashable: equal recipes share compiled code. State and
`StepInputs`, including hyperparameters, are traced, so a round compiles the step once per batch shape.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    """Scalars that may change from epoch to epoch; all traced."""

    temperature: Float[Array, ""]  # multiplies the scores
    init_value: Float[Array, ""]  # initial value of the scores; fixes the scale of the masks
    learning_rate: Float[Array, ""]  # of the weights
    score_learning_rate: Float[Array, ""]
    penalty_weight: Float[Array, ""]  # lambda in the paper


def soft_masks(scores: PyTree, hyper: Hyperparams, key: Array) -> PyTree:
    """Masks of Continuous Sparsification. The masks are deterministic: `key` is unused."""
    del key
    return masks.soft_mask(scores, hyper.temperature, init_value=hyper.init_value)


MASK_DRAWS = 2**31 - 1
"""Number folded into a phase's key for drawing masks; larger than any step number."""

ROUNDING_DRAWS = MASK_DRAWS - 1
"""Number folded into a phase's key for rounding scores and their momentum; larger than any step number."""


@dataclass(frozen=True)
class Recipe:
    """Static part of a compiled step; constant within a phase.

    Attributes:
        model: Linen module of masked layers, called with images and `train`.
        augment: name in `images.AUGMENTATIONS`.
        momentum: momentum of both optimizers (Nesterov), dimensionless.
        decay: L2 factor. decay * weight is added to every gradient, including BatchNorm and biases, before momentum.
        step_masks: function of scores, hyperparameters and a PRNG key that returns the masks of one step, in the shapes
            of the scores.
        moves_weights: True if a step updates weights and scores, False if it updates scores only.
        part_size: maximum number of examples whose gradient is computed at once. A larger batch is computed in several
            parts, one after another, for one update. BatchNorm normalises each part separately, and the running
            averages are updated part by part. None computes the whole batch at once.
        in_order: makes the CPU compiler keep the order of operations that saves memory; no effect on other devices.
            Needed with a part size, with `nn.remat` in the model, or with scores in bfloat16. Costs no time, and the
            results are bit-identical.
        channels: channels whose weights share a score; None gives each weight a separate score.
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
    """Arrays that a step updates, and the fixed masks."""

    step: Int[Array, ""]  # updates done in this phase; seeds the augmentation of the step
    params: PyTree
    batch_stats: PyTree  # {} for a model without BatchNorm
    scores: PyTree  # {} where the masks are fixed
    masks: PyTree  # the fixed masks; {} where masks are learned from scores
    weight_momentum: optax.OptState
    score_momentum: optax.OptState
    channels: Channels | None = struct.field(pytree_node=False)  # no default, so that `_Row.__getattr__` is called

    @property
    def wide_scores(self) -> PyTree:
        """Scores in float32 or wider, so that the masks are not narrower than the weights that they multiply."""
        return widen(self.scores)


class StepInputs(NamedTuple):
    """Inputs of one step, or of several steps in one compiled call, in addition to recipe and state; all traced."""

    data: ImageSet  # images from which batches are taken
    indices: Int[Array, "*steps batch"] | np.ndarray  # examples of the batch, or one row for each step's batch
    key: Array  # PRNG key of the phase
    hyper: Hyperparams


class LossInputs(NamedTuple):
    """One batch for the loss function, augmented and normalised, and the PRNG key of the masks."""

    images: Float[Array, "batch height width channels"]
    labels: Int[Array, " batch"]
    key: Array  # PRNG key of the step's masks
    hyper: Hyperparams


class StepMetrics(NamedTuple):
    """Loss terms of one step, or of several steps with a leading axis."""

    cross_entropy: Float[Array, "*steps"]  # mean over the batch
    penalty: Float[Array, "*steps"]  # already weighted: loss = cross-entropy + penalty

    @property
    def loss(self) -> Float[Array, "*steps"]:
        return self.cross_entropy + self.penalty


def weight_direction(recipe: Recipe) -> optax.GradientTransformation:
    """Update direction of the weights, before the learning rate: Nesterov momentum of gradient plus decay."""
    return optax.chain(optax.add_decayed_weights(recipe.decay), score_direction(recipe))


def score_direction(recipe: Recipe) -> optax.GradientTransformation:
    """Update direction of the scores, before the learning rate: Nesterov momentum, without decay."""
    return optax.trace(recipe.momentum, nesterov=True)


def init_variables(
    recipe: Recipe, key: Array, image_shape: tuple[int, ...], *, place: Callable[[PyTree], PyTree] | None = None
) -> dict[str, PyTree]:
    """Initialise "params", "batch_stats" ({} without BatchNorm) and "masks" (ones) of the recipe's model.

    If the recipe has channels, only arrays with scores have masks.

    Args:
        recipe: gives the model and the channels.
        key: PRNG key.
        image_shape: (height, width, channels).
        place: function from array shapes to shardings; None puts all arrays on the default device.
    """
    if isinstance(key, Tracer):
        return _init(recipe.model, recipe.channels, image_shape, key)
    return _compiled_init(recipe.model, recipe.channels, image_shape, place, jax.default_backend())(key)


@functools.cache
def _compiled_init(
    model: nn.Module,
    channels: Channels | None,
    image_shape: tuple[int, ...],
    place: Callable[[PyTree], PyTree] | None,
    platform: str,
) -> Callable[[Array], dict[str, PyTree]]:
    """Compiled `_init`, cached for other keys."""
    init = functools.partial(_init, model, channels, image_shape)
    # No optimization on a CPU: the compiled function runs once, and random number generation compiles slowly there.
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
    shardings = place and place(jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, out_shardings=shardings, compiler_options=options)


def _init(model: nn.Module, channels: Channels | None, image_shape: tuple[int, ...], key: Array) -> dict[str, PyTree]:
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    found = {collection: variables.get(collection, {}) for collection in ("params", "batch_stats", "masks")}
    return found if channels is None else {**found, "masks": channels.only_scored(found["masks"])}


def init_state(recipe: Recipe, params: PyTree, batch_stats: PyTree, *, scores: PyTree, masks: PyTree) -> TrainState:
    """State before the first step, with zero momentum. Either `scores` (learned) or `masks` (fixed) is {}."""
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
    """Masks in the shapes of the weights: the value of a channel, repeated over its weights; else `values`."""
    return values if channels is None else channels.selection.expand(values)


def network(channels: Channels | None, params: PyTree, batch_stats: PyTree, masks: PyTree) -> dict[str, PyTree]:
    """Variables for `model.apply`: "params", "batch_stats" and "masks". Masks of arrays without scores are ones.

    Args:
        channels: channels whose weights share a score; None gives each weight a separate score.
        params: weights.
        batch_stats: {} for a model without BatchNorm.
        masks: masks of the arrays with scores, in the shapes of the weights.
    """
    whole = masks if channels is None else channels.complete(masks, params)
    return {"params": params, "batch_stats": batch_stats, "masks": whole}


def cross_entropy(
    recipe: Recipe,
    variables: dict[str, PyTree],
    inputs: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
) -> tuple[Float[Array, ""], PyTree]:
    """Mean cross-entropy over a batch in training mode, and the updated "batch_stats"."""
    logits, updates = recipe.model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    logits = at_least_float32(logits)
    mean = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return mean, updates.get("batch_stats", {})


def loss_fn(
    recipe: Recipe, params: PyTree, scores: PyTree, state: TrainState, inputs: LossInputs
) -> tuple[Float[Array, ""], tuple[StepMetrics, PyTree]]:
    """Mean cross-entropy plus penalty, as a function of weights and scores.

    Args:
        recipe: model and mask function.
        params: weights, used in place of `state.params`.
        scores: used in place of `state.scores`; {} uses `state.masks`.
        state: gives "batch_stats" and fixed masks.
        inputs: the batch.

    Returns:
        The loss, and as auxiliary output its terms and the updated "batch_stats".
    """
    images, labels, key, hyper = inputs
    step_masks = expand(recipe.channels, recipe.step_masks(scores, hyper, key)) if scores else state.masks
    variables = network(recipe.channels, params, state.batch_stats, step_masks)
    mean, batch_stats = cross_entropy(recipe, variables, images, labels)
    metrics = StepMetrics(mean, penalty=hyper.penalty_weight * masks.mask_penalty(step_masks))
    return metrics.loss, (metrics, batch_stats)


def step(recipe: Recipe, state: TrainState, inputs: StepInputs) -> tuple[TrainState, StepMetrics]:
    """State after one update of weights and scores on one batch, and the loss terms of the step.

    Scores are updated if the state has scores; fixed masks do not change. Augmentation, masks and the rounding of
    narrow scores are drawn from the key and the state's step number, so any single step can be repeated exactly.
    """
    data, indices, key, hyper = inputs
    images = AUGMENTATIONS[recipe.augment](jax.random.fold_in(key, state.step), data.images[indices])
    mask_key, rounding_key = (
        jax.random.fold_in(jax.random.fold_in(key, purpose), state.step) for purpose in (MASK_DRAWS, ROUNDING_DRAWS)
    )
    wide_scores, wide_momentum = state.wide_scores, widen(state.score_momentum)
    differentiate = jax.grad(functools.partial(loss_fn, recipe), argnums=(0, 1), has_aux=True)

    def compute(batch_stats: PyTree, images: Array, labels: Array) -> tuple[PyTree, PyTree]:
        part = LossInputs(normalize(images, data.mean, data.std), labels, mask_key, hyper)
        before = state.replace(batch_stats=batch_stats)
        gradients, (metrics, after) = differentiate(state.params, wide_scores, before, part)
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
