"""Steps and evaluations of several runs in one compiled call: states are stacked along a leading axis of runs."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from cs_jax.data.images import ImageSet
from cs_jax.training import step as training_step
from cs_jax.training.compiled import forward
from cs_jax.training.step import Recipe, StepInputs, StepMetrics, TrainState


class _Stack:
    """States of several runs, stacked along a leading axis of runs."""

    def __init__(self, states: TrainState, size: int) -> None:
        self.states, self.size = states, size  # size: number of runs

    @functools.cached_property
    def kind(self) -> Hashable:
        """Result of the function `kind` for the state of each run."""
        leaves, structure = jax.tree.flatten(self.states)
        return structure, tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)

    def rows(self) -> list[TrainState]:
        """States of the runs, in order; their arrays stay in the stack until a field is read."""
        return [_Row.of(self, number) for number in range(self.size)]


class _Row(TrainState):
    """State of one run in a stack. Its arrays are copied out of the stack when a field is first read.

    Usually no field is read, because the whole stack is passed to the next call.
    """

    @classmethod
    def of(cls, stack: _Stack, number: int) -> "_Row":
        row = object.__new__(cls)  # without the fields, so that `__getattr__` is called for them
        row.__dict__["source"] = (stack, number)
        return row

    def __getattr__(self, name: str) -> Any:
        if name not in _FIELDS or "source" not in self.__dict__:
            raise AttributeError(name)
        stack, number = self.__dict__["source"]
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(stack.states)):
            raise RuntimeError("this state was deleted: a later step has reused its arrays")
        taken = _take_row(stack.states, number)
        self.__dict__.update({field: getattr(taken, field) for field in _FIELDS})
        return self.__dict__[name]


_FIELDS = [field.name for field in dataclasses.fields(TrainState)]


def _source(state: TrainState) -> tuple[_Stack, int] | None:
    """Stack and row number of a state; None for a state that is not in a stack."""
    return state.__dict__.get("source") if isinstance(state, _Row) else None


def plain(state: TrainState) -> TrainState:
    """Copy of a state as a `TrainState` outside of a stack, so that compiled functions are not traced again."""
    return TrainState(**{name: getattr(state, name) for name in _FIELDS})


def _stacked(states: Sequence[TrainState]) -> _Stack:
    """Stack of states. States that are all rows of one stack, in order, give this stack."""
    first = _source(states[0])
    if first is not None:
        stack, _ = first
        if [*map(_source, states)] == [(stack, number) for number in range(stack.size)]:
            return stack
    return _Stack(_stack_states(*map(plain, states)), len(states))


def state_kind(state: TrainState) -> Hashable:
    """Result of the function `kind` for a state; does not read the arrays of a row."""
    source = _source(state)
    return kind(plain(state)) if source is None else source[0].kind


def kind(tree: PyTree) -> Hashable:
    """Structure, shapes and dtypes of a tree: trees of the same kind can be stacked."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def example_kind(data: ImageSet) -> Hashable:
    """Shape and dtypes of one example: batches of data sets of the same kind can be stacked."""
    return data.images.shape[1:], data.images.dtype, data.mean.dtype


def equal(a: ImageSet, b: ImageSet) -> bool:
    """True if two data sets have the same examples, in the same order."""
    if a is b or kind(a) != kind(b):
        return a is b
    return bool(_all_equal(a, b))


def _distinct(sets: Sequence[ImageSet]) -> tuple[tuple[int, ...], tuple[ImageSet, ...]]:
    """For each run, the index of its data set in the second result: the data sets without repetitions."""
    found = {id(data): data for data in sets}
    places = list(found)
    return tuple(places.index(id(data)) for data in sets), tuple(found.values())


class _Inputs(struct.PyTreeNode):
    """`StepInputs` of several runs. A data set that runs share is passed once."""

    sets: tuple[ImageSet, ...]  # distinct data sets
    indices: Any  # (runs, batch); for several steps a list with an array of (steps, batch) for each run
    keys: Any  # a list with one PRNG key for each run; an array of keys once stacked
    hypers: Any  # a list with the hyperparameters of each run; scalars become (runs,) arrays once stacked
    which: tuple[int, ...] = struct.field(pytree_node=False)  # for each run, index of its data set in `sets`; static

    @classmethod
    def of(cls, inputs: Sequence[StepInputs], indices: Any) -> "_Inputs":
        sets, _, keys, hypers = map(list, zip(*inputs, strict=True))
        which, distinct = _distinct(sets)
        return cls(distinct, indices, keys, hypers, which)

    def stacked(self) -> "_Inputs":
        """Keys and hyperparameters with a leading axis of runs; called inside a compiled function."""
        return self.replace(keys=jnp.stack(self.keys), hypers=_stack(self.hypers))


def take_step(
    recipe: Recipe, states: Sequence[TrainState], inputs: Sequence[StepInputs]
) -> list[tuple[TrainState, StepMetrics]]:
    """`Executor.take_step` of several runs; states are donated."""
    stack = _stacked(states)
    together = _Inputs.of(inputs, np.stack([one.indices for one in inputs]))
    after, metrics = _compiled_step(recipe, stack.states, together)
    return [*zip(_Stack(after, stack.size).rows(), metrics, strict=True)]


def take_steps(
    recipe: Recipe, states: Sequence[TrainState], inputs: Sequence[StepInputs], steps: Sequence[range]
) -> list[tuple[TrainState, StepMetrics]]:
    """`Executor.take_steps` of several runs, all with the same steps; states are donated."""
    stack, first, count = _stacked(states), steps[0].start, len(steps[0])
    together = _Inputs.of(inputs, [one.indices for one in inputs])
    after, metrics = _compiled_steps(recipe, stack.states, together, first, count)
    metrics = jax.tree.map(lambda figure: figure[:count], metrics)
    return [*zip(_Stack(after, stack.size).rows(), metrics, strict=True)]


def classify(
    model: nn.Module, variables: Sequence[PyTree], sets: Sequence[ImageSet], batches: Sequence[np.ndarray]
) -> list[Array]:
    """`Executor.classify` of several runs."""
    which, distinct = _distinct(sets)
    return _compiled_forward(model, which, variables, distinct, np.stack(batches))


def classify_all(
    model: nn.Module, variables: Sequence[PyTree], sets: Sequence[ImageSet], batches: Sequence[np.ndarray]
) -> list[Array]:
    """`Executor.classify_all` of several runs."""
    which, distinct = _distinct(sets)
    return _compiled_forward_all(model, which, variables, distinct, np.stack(batches))


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _gather(which: tuple[int, ...], sets: Sequence[ImageSet], indices: Int[Array, "runs batch"]) -> ImageSet:
    """Batches of all runs, with a leading axis of runs."""
    pairs = [(sets[place], own) for place, own in zip(which, indices, strict=True)]
    return _stack([data.replace(images=data.images[own], labels=data.labels[own]) for data, own in pairs])


def _step(recipe: Recipe, states: TrainState, inputs: _Inputs) -> tuple[TrainState, StepMetrics]:
    """One step of each run, from stacked inputs with indices of shape (runs, batch)."""
    batches, all_of_it = _gather(inputs.which, inputs.sets, inputs.indices), jnp.arange(inputs.indices.shape[1])
    axes = StepInputs(data=0, indices=None, key=0, hyper=0)  # pyright: ignore[reportArgumentType]
    step = jax.vmap(functools.partial(training_step.step, recipe), in_axes=(0, axes))
    return step(states, StepInputs(batches, all_of_it, inputs.keys, inputs.hypers))


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


@functools.partial(jax.jit, static_argnames="recipe", donate_argnames="states")
def _compiled_step(recipe: Recipe, states: TrainState, inputs: _Inputs) -> tuple[TrainState, list[StepMetrics]]:
    states, metrics = _step(recipe, states, inputs.stacked())
    return states, _unstack(metrics, len(inputs.which))


@functools.partial(jax.jit, static_argnames="recipe", donate_argnames="states")
def _compiled_steps(
    recipe: Recipe, states: TrainState, inputs: _Inputs, first: Int[Array, ""], count: Int[Array, ""]
) -> tuple[TrainState, list[StepMetrics]]:
    """`count` steps of each run, from step `first`. Loss terms after `count` steps are 0."""
    batches, stacked = jnp.stack(inputs.indices), inputs.stacked()

    def step(index: Array, states: TrainState) -> tuple[TrainState, StepMetrics]:
        return _step(recipe, states, stacked.replace(indices=batches[:, first + index]))

    def body(index: Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
        states, figures = carry
        states, metrics = step(index, states)
        return states, jax.tree.map(lambda figure, value: figure.at[index].set(value), figures, metrics)

    _, metrics = jax.eval_shape(step, jnp.zeros((), int), states)
    num_steps = batches.shape[1]
    figures = jax.tree.map(lambda figure: jnp.zeros((num_steps, *figure.shape), figure.dtype), metrics)
    states, figures = lax.fori_loop(0, count, body, (states, figures))
    return states, _unstack(figures, len(inputs.which), axis=1)


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
