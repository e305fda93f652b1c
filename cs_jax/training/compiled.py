"""What devices run: steps and evaluations as compiled functions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Int, PyTree, UInt8

from cs_jax.core.arrays import at_least_float32
from cs_jax.data.images import ImageSet, normalize
from cs_jax.training import step
from cs_jax.training.mesh import MeshLayout
from cs_jax.training.step import Hyperparams, Recipe, StepMetrics, TrainState


def _steps(
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
        state, metrics = step.step(recipe, state, data, batches[index], key, hyper)
        return state, jax.tree.map(lambda figure, value: figure.at[index].set(value), figures, metrics)

    _, metrics = jax.eval_shape(lambda: step.step(recipe, state, data, batches[0], key, hyper))
    figures = jax.tree.map(lambda figure: jnp.zeros(len(batches), figure.dtype), metrics)
    return lax.fori_loop(first, stop, body, (state, figures))


def compiled(recipe: Recipe, layout: MeshLayout | None = None, state: TrainState | None = None) -> tuple[Any, Any]:
    """`training.step` and several such steps in one call, each compiled.

    Args:
        recipe: what they are built from.
        layout: of several devices; None is the default device.
        state: with a layout, what comes out is where it came in.
    """
    is_ordered = recipe.in_order and jax.default_backend() == "cpu"
    if layout is None:
        return _compiled(None, is_ordered)
    leaves, structure = jax.tree.flatten(state)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return _compiled((layout, structure, shapes), is_ordered)


@functools.cache
def _compiled(placed: tuple[MeshLayout, Any, tuple[Any, ...]] | None, is_ordered: bool) -> tuple[Any, Any]:
    """Programs for a state of these shapes in a layout.

    Where steps have an order that saves memory, a CPU's compiler has to be told: it drops the barriers of the order
    early on, and then computes nothing twice, for more memory.
    """
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if is_ordered else None
    jit = functools.partial(_jit, compiler_options=options)
    if placed is not None:
        layout, structure, shapes = placed
        jit = functools.partial(jit, out_shardings=(layout.state(structure.unflatten(shapes)), layout.whole))
    return jit(step.step), jit(_steps)


_jit = functools.partial(jax.jit, static_argnames="recipe", donate_argnames="state")

compiled_step, compiled_steps = _compiled(None, False)


@functools.partial(jax.jit, static_argnames="model")
def forward(model: nn.Module, variables: PyTree, images: UInt8[Array, "..."], mean: Array, std: Array) -> Array:
    """Logits of a batch of images, in evaluation mode."""
    logits = model.apply(variables, normalize(images, mean, std), train=False)
    assert isinstance(logits, Array)
    return at_least_float32(logits)


@functools.partial(jax.jit, static_argnames="model")
def forward_all(model: nn.Module, variables: PyTree, data: ImageSet, batches: Int[Array, "steps batch"]) -> Array:
    return lax.map(lambda batch: forward(model, variables, data.images[batch], data.mean, data.std), batches)


@functools.partial(jax.jit, static_argnames="model")
def see_batch(
    model: nn.Module, params: PyTree, batch_stats: PyTree, masks: PyTree, data: ImageSet, batch: Int[Array, " batch"]
) -> PyTree:
    """Statistics after one batch in training mode."""
    variables = {"params": params, "batch_stats": batch_stats, "masks": masks}
    inputs = normalize(data.images[batch], data.mean, data.std)
    _, updates = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]


@jax.jit
def count_right(logits: Array, labels: Array) -> Array:
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)
