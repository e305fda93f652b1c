"""Programs of several runs at once: states with a leading axis of runs, and what is computed for all of them."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from cs_jax.data.images import ImageSet
from cs_jax.training import step as training_step
from cs_jax.training.compiled import forward
from cs_jax.training.step import Hyperparams, Recipe, StepMetrics, TrainState


class _Stack:
    """States of several runs with a leading axis of runs."""

    def __init__(self, states: TrainState, size: int) -> None:
        self.states, self.size = states, size

    @functools.cached_property
    def kind(self) -> Hashable:
        """Of each of its states."""
        leaves, structure = jax.tree.flatten(self.states)
        return structure, tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)

    def rows(self) -> list[TrainState]:
        """A state for each run, which takes the place of its own one."""
        return [_Row.of(self, number) for number in range(self.size)]


class _Row(TrainState):
    """A run's state in a stack, which is taken out of it where somebody looks.

    Most are never looked at, because the whole stack goes into the next call.
    """

    @classmethod
    def of(cls, stack: _Stack, number: int) -> "_Row":
        row = object.__new__(cls)  # without its fields
        row.__dict__["source"] = (stack, number)
        return row

    def __getattr__(self, name: str) -> Any:  # asked for what is not there, or not yet
        if name not in _FIELDS or "source" not in self.__dict__:
            raise AttributeError(name)
        stack, number = self.__dict__["source"]
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(stack.states)):
            raise RuntimeError("this state was deleted: a step that came later has taken its arrays")
        taken = _take_row(stack.states, number)
        self.__dict__.update({field: getattr(taken, field) for field in _FIELDS})
        return self.__dict__[name]


_FIELDS = [field.name for field in dataclasses.fields(TrainState)]


def _source(state: TrainState) -> tuple[_Stack, int] | None:
    """The stack that a state is a row of, and which one; None for others."""
    return state.__dict__.get("source") if isinstance(state, _Row) else None


def plain(state: TrainState) -> TrainState:
    """A state of no stack, which compiled functions take for the same as others."""
    return TrainState(**{name: getattr(state, name) for name in _FIELDS})


def _stacked(states: Sequence[TrainState]) -> _Stack:
    """States as a stack: the one that they are the rows of, if it has no others."""
    first = _source(states[0])
    if first is not None:
        stack, _ = first
        if [*map(_source, states)] == [(stack, number) for number in range(stack.size)]:
            return stack
    return _Stack(_stack_states(*map(plain, states)), len(states))


def state_kind(state: TrainState) -> Hashable:
    source = _source(state)
    return kind(plain(state)) if source is None else source[0].kind


def kind(tree: PyTree) -> Hashable:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def example_kind(data: ImageSet) -> Hashable:
    return data.images.shape[1:], data.images.dtype, data.mean.dtype


def equal(a: ImageSet, b: ImageSet) -> bool:
    """Whether two data sets are the same, example by example."""
    if a is b or kind(a) != kind(b):
        return a is b
    return bool(_all_equal(a, b))


def _distinct(sets: Sequence[ImageSet]) -> tuple[tuple[int, ...], tuple[ImageSet, ...]]:
    """For each run which data set is its own, and each data set once."""
    found = {id(data): data for data in sets}
    places = list(found)
    return tuple(places.index(id(data)) for data in sets), tuple(found.values())


def take_step(
    recipe: Recipe,
    states: Sequence[TrainState],
    sets: Sequence[ImageSet],
    indices: Sequence[np.ndarray],
    keys: Sequence[Array],
    hypers: Sequence[Hyperparams],
) -> list[tuple[TrainState, StepMetrics]]:
    stack, (which, distinct) = _stacked(states), _distinct(sets)
    after, metrics = _compiled_step(recipe, which, stack.states, distinct, np.stack(indices), keys, hypers)
    return [*zip(_Stack(after, stack.size).rows(), metrics, strict=True)]


def take_steps(
    recipe: Recipe,
    states: Sequence[TrainState],
    sets: Sequence[ImageSet],
    batches: Sequence[Array],
    firsts: Sequence[int],
    counts: Sequence[int],
    keys: Sequence[Array],
    hypers: Sequence[Hyperparams],
) -> list[tuple[TrainState, StepMetrics]]:
    stack, (which, distinct), count = _stacked(states), _distinct(sets), counts[0]
    after, metrics = _compiled_steps(recipe, which, stack.states, distinct, batches, firsts[0], count, keys, hypers)
    metrics = jax.tree.map(lambda figure: figure[:count], metrics)
    return [*zip(_Stack(after, stack.size).rows(), metrics, strict=True)]


def classify(
    model: nn.Module, variables: Sequence[PyTree], sets: Sequence[ImageSet], batches: Sequence[np.ndarray]
) -> list[Array]:
    which, distinct = _distinct(sets)
    return _compiled_forward(model, which, variables, distinct, np.stack(batches))


def classify_all(
    model: nn.Module, variables: Sequence[PyTree], sets: Sequence[ImageSet], batches: Sequence[np.ndarray]
) -> list[Array]:
    which, distinct = _distinct(sets)
    return _compiled_forward_all(model, which, variables, distinct, np.stack(batches))


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _gather(which: tuple[int, ...], sets: Sequence[ImageSet], indices: Int[Array, "runs batch"]) -> ImageSet:
    """The batch of each run, with a leading axis of runs."""
    pairs = [(sets[place], own) for place, own in zip(which, indices, strict=True)]
    return _stack([data.replace(images=data.images[own], labels=data.labels[own]) for data, own in pairs])


def _step(
    recipe: Recipe,
    which: tuple[int, ...],
    states: TrainState,
    sets: Sequence[ImageSet],
    indices: Int[Array, "runs batch"],
    keys: Array,
    hypers: Hyperparams,
) -> tuple[TrainState, StepMetrics]:
    batches, all_of_it = _gather(which, sets, indices), jnp.arange(indices.shape[1])
    step = jax.vmap(functools.partial(training_step.step, recipe), in_axes=(0, 0, None, 0, 0))
    return step(states, batches, all_of_it, keys, hypers)


def _forward(
    model: nn.Module,
    which: tuple[int, ...],
    variables: PyTree,
    sets: Sequence[ImageSet],
    indices: Int[Array, "runs batch"],
) -> Float[Array, "runs batch classes"]:
    batches = _gather(which, sets, indices)
    return jax.vmap(functools.partial(forward, model))(variables, batches.images, batches.mean, batches.std)


def _unstack(tree: PyTree, size: int, axis: int = 0) -> list[PyTree]:
    def at(number: int) -> PyTree:
        return jax.tree.map(lambda leaf: lax.index_in_dim(leaf, number, axis, keepdims=False), tree)

    return [at(number) for number in range(size)]


@functools.partial(jax.jit, static_argnames=("recipe", "which"), donate_argnames="states")
def _compiled_step(
    recipe: Recipe,
    which: tuple[int, ...],
    states: TrainState,
    sets: Sequence[ImageSet],
    indices: Int[Array, "runs batch"],
    keys: Sequence[Array],
    hypers: Sequence[Hyperparams],
) -> tuple[TrainState, list[StepMetrics]]:
    states, metrics = _step(recipe, which, states, sets, indices, jnp.stack(keys), _stack(hypers))
    return states, _unstack(metrics, len(which))


@functools.partial(jax.jit, static_argnames=("recipe", "which"), donate_argnames="states")
def _compiled_steps(
    recipe: Recipe,
    which: tuple[int, ...],
    states: TrainState,
    sets: Sequence[ImageSet],
    batches: Sequence[Int[Array, "steps batch"]],
    first: Int[Array, ""],
    count: Int[Array, ""],
    keys: Sequence[Array],
    hypers: Sequence[Hyperparams],
) -> tuple[TrainState, list[StepMetrics]]:
    """So many steps of each run, from a first one. Figures are 0 beyond."""
    own = (jnp.stack(batches), jnp.stack(keys), _stack(hypers))

    def step(index: Array, states: TrainState) -> tuple[TrainState, StepMetrics]:
        orders, keys, hypers = own
        return _step(recipe, which, states, sets, orders[:, first + index], keys, hypers)

    def body(index: Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
        states, figures = carry
        states, metrics = step(index, states)
        return states, jax.tree.map(lambda figure, value: figure.at[index].set(value), figures, metrics)

    _, metrics = jax.eval_shape(step, jnp.zeros((), int), states)
    figures = jax.tree.map(lambda figure: jnp.zeros((len(batches[0]), *figure.shape), figure.dtype), metrics)
    states, figures = lax.fori_loop(0, count, body, (states, figures))
    return states, _unstack(figures, len(which), axis=1)


@functools.partial(jax.jit, static_argnames=("model", "which"))
def _compiled_forward(
    model: nn.Module,
    which: tuple[int, ...],
    variables: Sequence[PyTree],
    sets: Sequence[ImageSet],
    indices: Int[Array, "runs batch"],
) -> list[Array]:
    return _unstack(_forward(model, which, _stack(variables), sets, indices), len(which))


@functools.partial(jax.jit, static_argnames=("model", "which"))
def _compiled_forward_all(
    model: nn.Module,
    which: tuple[int, ...],
    variables: Sequence[PyTree],
    sets: Sequence[ImageSet],
    indices: Int[Array, "runs steps batch"],
) -> list[Array]:
    stack = _stack(variables)
    logits = lax.map(lambda batch: _forward(model, which, stack, sets, batch), indices.swapaxes(0, 1))
    return _unstack(logits, len(which), axis=1)


@jax.jit
def _stack_states(*states: TrainState) -> TrainState:
    return _stack(states)


@jax.jit
def _take_row(states: TrainState, number: Int[Array, ""]) -> TrainState:
    return jax.tree.map(lambda leaf: leaf[number], states)


@jax.jit
def _all_equal(a: ImageSet, b: ImageSet) -> Array:
    return jnp.array(jax.tree.leaves(jax.tree.map(jnp.array_equal, a, b))).all()
