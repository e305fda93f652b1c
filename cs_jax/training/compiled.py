"""Compiled functions for a single run: training steps, forward passes and BatchNorm statistics."""

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
from cs_jax.training.step import Recipe, StepInputs, StepMetrics, TrainState


def _steps(
    recipe: Recipe, state: TrainState, inputs: StepInputs, bounds: tuple[Int[Array, ""], Int[Array, ""]]
) -> tuple[TrainState, StepMetrics]:
    """State after several steps in one compiled call, and loss terms of all steps, which are 0 outside the bounds.

    The bounds are traced, so all calls of an epoch use the same compiled function.

    Args:
        recipe: static.
        state: donated.
        inputs: `indices` has one row for each step of the epoch.
        bounds: first step, and the step before which the call stops.
    """
    batches = inputs.indices

    def body(index: Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
        state, figures = carry
        state, metrics = step.step(recipe, state, inputs._replace(indices=batches[index]))
        return state, jax.tree.map(lambda figure, value: figure.at[index].set(value), figures, metrics)

    _, metrics = jax.eval_shape(lambda: step.step(recipe, state, inputs._replace(indices=batches[0])))
    figures = jax.tree.map(lambda figure: jnp.zeros(len(batches), figure.dtype), metrics)
    return lax.fori_loop(*bounds, body, (state, figures))


def compiled(recipe: Recipe, mesh_layout: MeshLayout | None = None, state: TrainState | None = None) -> tuple[Any, Any]:
    """Compiled forms of one step (`step.step`) and of several steps in one call (`_steps`).

    Args:
        recipe: recipe of the calls; `in_order` selects compiler options.
        mesh_layout: layout on several devices; None is the default device.
        state: a state or its shapes, required with a mesh layout; gives the shardings of the output state.
    """
    is_ordered = recipe.in_order and jax.default_backend() == "cpu"
    if mesh_layout is None:
        return _compiled(None, is_ordered)
    leaves, structure = jax.tree.flatten(state)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return _compiled((mesh_layout, structure, shapes), is_ordered)


@functools.cache
def _compiled(placed: tuple[MeshLayout, Any, tuple[Any, ...]] | None, is_ordered: bool) -> tuple[Any, Any]:
    """Compiled forms for one mesh layout and one set of state shapes.

    XLA's CPU compiler removes optimization barriers early and then merges equal computations, which needs more memory.
    With `is_ordered` the pass that removes the barriers is disabled.
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
    """Logits of one batch of images, in evaluation mode, in float32 or wider."""
    logits = model.apply(variables, normalize(images, mean, std), train=False)
    assert isinstance(logits, Array)
    return at_least_float32(logits)


@functools.partial(jax.jit, static_argnames="model")
def forward_all(model: nn.Module, variables: PyTree, data: ImageSet, batches: Int[Array, "steps batch"]) -> Array:
    """Logits of several batches in one call: (steps, batch, classes)."""
    return lax.map(lambda batch: forward(model, variables, data.images[batch], data.mean, data.std), batches)


@functools.partial(jax.jit, static_argnames="model")
def update_statistics(model: nn.Module, variables: PyTree, data: ImageSet, batch: Int[Array, " batch"]) -> PyTree:
    """The "batch_stats" of `variables` after one forward pass of a batch in training mode."""
    inputs = normalize(data.images[batch], data.mean, data.std)
    _, updates = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]


@jax.jit
def count_right(logits: Array, labels: Array) -> Array:
    """Number of examples whose largest logit is at their label."""
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)
