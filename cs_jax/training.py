"""Train state, one optimizer step, an epoch of them, and evaluation.

A compiled step is built from a `Recipe`, which is static and hashable: equal recipes share compiled code. What
changes while training (`Hyperparams`) is traced, so a round compiles once per batch shape.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, UInt8

from cs_jax import masks
from cs_jax.images import AUGMENTATIONS, ImageSet, normalize

PyTree = Any

STEPS_PER_CALL = 100
"""Steps that an accelerator takes in one call: many, to leave it alone, and few enough to hear a signal between."""


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


@dataclass(frozen=True)
class Recipe:
    """What a compiled step is built from, fixed for a phase.

    Attributes:
        model: Linen module of masked layers, called with images and `train`.
        augment: name in `images.AUGMENTATIONS`.
        momentum: of both optimizers (Nesterov), dimensionless.
        decay: L2 factor added to the gradient of every weight, BatchNorm and biases included, before momentum.
        step_masks: a step's masks from scores, hyperparameters and a PRNG key of its own.
        moves_weights: whether a step updates the weights, or the scores alone.
    """

    model: nn.Module
    augment: str = "none"
    momentum: float = 0.9
    decay: float = 1e-4
    step_masks: Callable[[PyTree, Hyperparams, Array], PyTree] = soft_masks
    moves_weights: bool = True


class TrainState(struct.PyTreeNode):
    """Everything that one step changes or needs, apart from data and hyperparameters."""

    step: Int[Array, ""]  # updates done in this phase; seeds each step's augmentation
    params: PyTree
    batch_stats: PyTree  # {} for a model without BatchNorm
    scores: PyTree  # {} where the masks are fixed
    masks: PyTree  # the fixed masks; {} where they are learned from scores
    weight_momentum: optax.OptState
    score_momentum: optax.OptState


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


def init_variables(recipe: Recipe, key: Array, image_shape: tuple[int, ...]) -> dict[str, PyTree]:
    """Fresh "params", "batch_stats" ({} where there are none) and "masks" (ones) of the recipe's model.

    Args:
        recipe: its model is initialised.
        key: PRNG key.
        image_shape: (height, width, channels).
    """
    init = _init if isinstance(key, Tracer) else _compiled_init(jax.default_backend())
    variables = init(recipe.model, key, image_shape)
    return {collection: variables.get(collection, {}) for collection in ("params", "batch_stats", "masks")}


def _init(model: nn.Module, key: Array, image_shape: tuple[int, ...]) -> PyTree:
    return model.init(key, jnp.zeros((1, *image_shape)), train=False)


@functools.cache
def _compiled_init(backend: str) -> Callable[[nn.Module, Array, tuple[int, ...]], PyTree]:
    """`_init`, compiled: for a CPU fast rather than well, as it runs once and drawing numbers compiles slowly there."""
    options = {"xla_backend_optimization_level": 0} if backend == "cpu" else None
    return jax.jit(_init, static_argnames=("model", "image_shape"), compiler_options=options)


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
    )


def cross_entropy(
    recipe: Recipe,
    variables: dict[str, PyTree],
    inputs: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
) -> tuple[Float[Array, ""], PyTree]:
    """Mean cross-entropy of the network in training mode, and the new "batch_stats"."""
    logits, updates = recipe.model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    logits = masks.at_least_float32(logits)
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
    step_masks = recipe.step_masks(scores, hyper, key) if scores else state.masks
    variables = {"params": params, "batch_stats": state.batch_stats, "masks": step_masks}
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

    Scores are updated where the state has some; fixed masks stay as they are. Augmentation and masks are drawn from
    `key` and the state's step number, so any step can be repeated alone.
    """
    images = AUGMENTATIONS[recipe.augment](jax.random.fold_in(key, state.step), data.images[indices])
    inputs = normalize(images, data.mean, data.std)
    mask_key = jax.random.fold_in(jax.random.fold_in(key, MASK_DRAWS), state.step)
    differentiate = jax.grad(functools.partial(loss_fn, recipe), argnums=(0, 1), has_aux=True)
    gradients, (metrics, batch_stats) = differentiate(
        state.params, state.scores, state, inputs, data.labels[indices], mask_key, hyper
    )
    weight_gradient, score_gradient = gradients
    if recipe.moves_weights:
        weights, momentum = weight_direction(recipe).update(weight_gradient, state.weight_momentum, state.params)
        params = _descend(state.params, weights, hyper.learning_rate)
        state = state.replace(params=params, weight_momentum=momentum)
    scores, score_momentum = score_direction(recipe).update(score_gradient, state.score_momentum)
    state = state.replace(
        step=state.step + 1,
        batch_stats=batch_stats,
        scores=_descend(state.scores, scores, hyper.score_learning_rate),
        score_momentum=score_momentum,
    )
    return state, metrics


def _descend(values: PyTree, direction: PyTree, rate: Float[Array, ""]) -> PyTree:
    return optax.apply_updates(values, jax.tree.map(lambda change: -rate * change, direction))


compiled_step = jax.jit(step, static_argnames="recipe", donate_argnames="state")


@functools.partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def compiled_steps(
    recipe: Recipe,
    state: TrainState,
    data: ImageSet,
    batches: Int[Array, "steps batch"],
    first: Int[Array, ""],
    stop: Int[Array, ""],
    key: Array,
    hyper: Hyperparams,
) -> tuple[TrainState, StepMetrics]:
    """The steps from `first` to before `stop` as one compiled call. Figures are 0 for all other steps.

    One program serves every call of an epoch, wherever it begins.
    """

    def body(index: Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
        state, figures = carry
        state, metrics = step(recipe, state, data, batches[index], key, hyper)
        return state, jax.tree.map(lambda figure, value: figure.at[index].set(value), figures, metrics)

    _, metrics = jax.eval_shape(lambda: step(recipe, state, data, batches[0], key, hyper))
    figures = jax.tree.map(lambda figure: jnp.zeros(len(batches), figure.dtype), metrics)
    return lax.fori_loop(first, stop, body, (state, figures))


def train_epoch(
    recipe: Recipe,
    state: TrainState,
    data: ImageSet,
    order: Int[Array, " examples"] | np.ndarray,
    key: Array,
    hyper: Hyperparams,
    *,
    batch_size: int,
    first_step: int = 0,
) -> Iterator[tuple[int, TrainState, StepMetrics]]:
    """The steps of one pass over `order`, each example once, a compiled call at a time.

    On an accelerator a call takes `STEPS_PER_CALL` steps. On the CPU it takes one, because XLA computes the weight
    gradient of a convolution 10 to 100 times slower inside a loop there (jax-ml/jax#12868). No more than two calls
    are under way at a time, so a signal is heard between them.

    Args:
        recipe: what the step is built from.
        state: donated, not to be used again.
        data: training images.
        order: indices into `data`, on the device or the host; the last batch is smaller where the batch size does
            not divide their number.
        key: PRNG key of the phase.
        hyper: scalars, constant through the epoch.
        batch_size: examples per step.
        first_step: steps of this epoch that the state has done already.

    Yields:
        After every call: the steps done in this epoch, the state, which is donated to the next call (copy what is to
        be kept), and the figures of the call's steps, which may not have been computed yet; those of the call
        before have.
    """
    host_order = np.asarray(order)
    num_steps = -(-order.size // batch_size)
    full = order.size // batch_size if jax.default_backend() != "cpu" else 0
    batches = jnp.asarray(host_order[: full * batch_size].reshape(full, batch_size)) if first_step < full else None
    metrics = None
    for done in _call_ends(first_step, full, num_steps):
        before = metrics
        if done <= full:
            state, metrics = compiled_steps(recipe, state, data, batches, first_step, done, key, hyper)
            metrics = jax.tree.map(lambda figure, first=first_step, done=done: figure[first:done], metrics)
        else:
            indices = host_order[first_step * batch_size : done * batch_size]
            state, metrics = compiled_step(recipe, state, data, indices, key, hyper)
        jax.block_until_ready(before)
        yield done, state, metrics
        first_step = done


def _call_ends(first_step: int, full: int, num_steps: int) -> Iterator[int]:
    """Steps done after each call: several a call up to `full`, where batches are whole, then one a call."""
    step = first_step
    while step < num_steps:
        step = min(step - step % STEPS_PER_CALL + STEPS_PER_CALL, full) if step < full else step + 1
        yield step


@functools.partial(jax.jit, static_argnames="model")
def _forward(model: nn.Module, variables: PyTree, images: UInt8[Array, "..."], mean: Array, std: Array) -> Array:
    logits = model.apply(variables, normalize(images, mean, std), train=False)
    assert isinstance(logits, Array)
    return masks.at_least_float32(logits)


@functools.partial(jax.jit, static_argnames="model")
def _forward_all(model: nn.Module, variables: PyTree, data: ImageSet, batches: Int[Array, "steps batch"]) -> Array:
    return lax.map(lambda batch: _forward(model, variables, data.images[batch], data.mean, data.std), batches)


def predict(
    model: nn.Module,
    variables: PyTree,
    data: ImageSet,
    *,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Float[Array, "examples classes"]:
    """Logits of every example of `data`, in order, in evaluation mode.

    Args:
        model: Linen module, called with `train=False`.
        variables: "params", "batch_stats" and "masks".
        data: images to classify.
        batch_size: examples per call; the last batch is filled up with copies of an example, which are dropped.
        on_batch: called before every compiled call; may raise to leave.
    """
    n = len(data)
    batch_size = min(batch_size, n)
    indices = np.minimum(np.arange(-(-n // batch_size) * batch_size), n - 1).reshape(-1, batch_size)
    if jax.default_backend() == "cpu":
        logits = []
        for batch in indices:
            on_batch()
            logits.append(_forward(model, variables, data.images[batch], data.mean, data.std))
        return jnp.concatenate(logits)[:n]
    on_batch()
    logits = _forward_all(model, variables, data, jnp.asarray(indices))
    return logits.reshape(-1, logits.shape[-1])[:n]


def estimate_statistics(
    model: nn.Module, params: PyTree, batch_stats: PyTree, masks: PyTree, data: ImageSet, *, batch_size: int
) -> PyTree:
    """BatchNorm statistics after one pass over `data` in training mode, with weights that stay as they are.

    In one random order that is always the same, because running averages count the last batches most and stored data
    may be sorted; without augmentation, and in whole batches. After k batches, momentum**k of the start is left.

    Args:
        model: Linen module, called with images and `train`.
        params: weights.
        batch_stats: to start from; {} is returned as it is.
        masks: of the weights.
        data: images, in general those that the weights were trained on.
        batch_size: images per call.
    """
    if not jax.tree.leaves(batch_stats):
        return batch_stats
    batch_size = min(batch_size, len(data))
    order = np.random.default_rng(0).permutation(len(data))
    for batch in order[: len(data) // batch_size * batch_size].reshape(-1, batch_size):
        batch_stats = _see_batch(model, params, batch_stats, masks, data, batch)
    return batch_stats


@functools.partial(jax.jit, static_argnames="model")
def _see_batch(
    model: nn.Module, params: PyTree, batch_stats: PyTree, masks: PyTree, data: ImageSet, batch: Int[Array, " batch"]
) -> PyTree:
    """Statistics after one batch in training mode."""
    variables = {"params": params, "batch_stats": batch_stats, "masks": masks}
    inputs = normalize(data.images[batch], data.mean, data.std)
    _, updates = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]


def share_right(logits: Float[Array, "examples classes"], data: ImageSet) -> float:
    """Share of `data` that logits classify right, in [0, 1], counted exactly."""
    return int(_count_right(logits, data.labels)) / len(data)


@jax.jit
def _count_right(logits: Array, labels: Array) -> Array:
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)
