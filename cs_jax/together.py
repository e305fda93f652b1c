"""Runs that share a device: where several want the same computed, with their own numbers, one program does it for all.

Each run lives its whole life in a thread of its own, and knows nothing of the others. One of them is awake at a time.
It goes on until its executor wants something computed, and sleeps until everybody has come to such a point; so what
runs do on the host never happens at once. What they want is then computed for those that have fallen behind in their
epochs, or are about to evaluate, and the others wait: runs that began apart meet, and stay together.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from cs_jax import training
from cs_jax.executor import Executor, forward
from cs_jax.images import ImageSet
from cs_jax.training import Hyperparams, Recipe, StepMetrics, TrainState

PyTree = Any
Result = TypeVar("Result")

EVALUATION = -1
"""Place of an evaluation: before the steps of an epoch, so that all have evaluated before the next one begins."""


@dataclass(eq=False)
class _Call:
    """Something that a run wants computed, and what came of it."""

    run: int  # its number
    place: int  # in an epoch: its first step
    program: Callable[..., list[Any]]  # computes calls of one kind at once
    kind: Hashable
    alone: Callable[[], Any]
    static: Any  # recipe or model
    own: tuple[Any, ...]
    is_done: bool = False
    answer: Any = None
    error: Exception | None = None


class Together:
    """Runs several lives at once, each with an executor that takes its calls together with those of the others."""

    def __init__(self) -> None:
        self._awake = threading.Condition()  # held by the run that is awake
        self._present = 0  # runs that have not ended
        self._calls: list[_Call] = []  # that wait, one of a run at most
        self._sets: dict[int, tuple[ImageSet, ImageSet]] = {}  # those seen, by id, each with the first equal one

    def run(self, lives: Sequence[Callable[[Executor], Result]]) -> list[Result | BaseException]:
        """What every life has returned or raised, once all have ended. One that raises does not end the others."""
        ends: list[Any] = [None] * len(lives)

        def live(number: int) -> None:
            with self._awake:
                try:
                    ends[number] = lives[number](_Member(self, number))
                except BaseException as error:  # for whoever has asked for all
                    ends[number] = error
                finally:
                    self._present -= 1
                    self._compute()

        self._present = len(lives)
        threads = [threading.Thread(target=live, args=(number,), daemon=True) for number in range(len(lives))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ends

    def ask(self, call: _Call) -> Any:
        """What a call gives, once everybody has come to one."""
        self._calls.append(call)
        self._compute()
        while not call.is_done:
            self._awake.wait()
        if call.error is not None:
            raise call.error
        return call.answer

    def shared(self, data: ImageSet) -> ImageSet:
        """The first data set seen that equals this one: the program is given one of them."""
        if id(data) not in self._sets:
            firsts = [first for seen, first in self._sets.values() if seen is first]
            found = next((first for first in firsts if _equal(first, data)), data)
            self._sets[id(data)] = (data, found)  # which keeps it, so that no other gets its id
        return self._sets[id(data)][1]

    def _compute(self) -> None:
        """Computes what is next, if nobody who is present is still on the way."""
        if len(self._calls) < self._present or not self._calls:
            return
        place = min(call.place for call in self._calls)
        groups: dict[Hashable, list[_Call]] = {}
        for call in sorted(self._calls, key=lambda call: call.run):
            if call.place == place:
                groups.setdefault((call.program, call.kind), []).append(call)
        self._calls = [call for call in self._calls if call.place != place]
        for calls in groups.values():
            _answer(calls)
        self._awake.notify_all()


def _answer(calls: Sequence[_Call]) -> None:
    """Computes calls of one kind; what goes wrong is for all that have asked."""
    try:
        one = calls[0]
        each = zip(*(call.own for call in calls), strict=True)
        answers = [one.alone()] if len(calls) == 1 else one.program(one.static, *each)
        for call, answer in zip(calls, answers, strict=True):
            call.answer = answer
    except Exception as error:
        for call in calls:
            call.error = error
    for call in calls:
        call.is_done = True


class _Member(Executor):
    """The executor of one run among others."""

    def __init__(self, together: Together, number: int) -> None:
        super().__init__()
        self._together, self._number = together, number

    def take_steps(
        self,
        recipe: Recipe,
        state: TrainState,
        data: ImageSet,
        batches: Int[Array, "steps batch"],
        first: int,
        stop: int,
        key: Array,
        hyper: Hyperparams,
    ) -> tuple[TrainState, StepMetrics]:
        def alone() -> tuple[TrainState, StepMetrics]:
            return Executor().take_steps(recipe, _plain(state), data, batches, first, stop, key, hyper)

        count = stop - first
        own = (state, self._together.shared(data), batches, first, count, key, hyper)
        kind = (recipe, _state_kind(state), _example_kind(data), batches.shape, count)
        return self._ask(first, _take_steps, kind, alone, recipe, own)

    def take_step(
        self,
        recipe: Recipe,
        state: TrainState,
        data: ImageSet,
        indices: Int[np.ndarray, " batch"],
        step: int,
        key: Array,
        hyper: Hyperparams,
    ) -> tuple[TrainState, StepMetrics]:
        def alone() -> tuple[TrainState, StepMetrics]:
            return Executor().take_step(recipe, _plain(state), data, indices, step, key, hyper)

        own = (state, self._together.shared(data), indices, key, hyper)
        kind = (recipe, _state_kind(state), _example_kind(data), indices.shape)
        return self._ask(step, _take_step, kind, alone, recipe, own)

    def classify(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batch: Int[np.ndarray, " batch"]
    ) -> Float[Array, "batch classes"]:
        alone = functools.partial(super().classify, model, variables, data, batch)
        own = (variables, self._together.shared(data), batch)
        kind = (model, _kind(variables), _example_kind(data), batch.shape)
        return self._ask(EVALUATION, _classify, kind, alone, model, own)

    def classify_all(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batches: Int[np.ndarray, "steps batch"]
    ) -> Float[Array, "steps batch classes"]:
        alone = functools.partial(super().classify_all, model, variables, data, batches)
        own = (variables, self._together.shared(data), batches)
        kind = (model, _kind(variables), _example_kind(data), batches.shape)
        return self._ask(EVALUATION, _classify_all, kind, alone, model, own)

    def _ask(
        self, place: int, program: Callable[..., list[Any]], kind: Hashable, alone: Callable[[], Any], *content: Any
    ) -> Any:
        return self._together.ask(_Call(self._number, place, program, kind, alone, *content))


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


def _plain(state: TrainState) -> TrainState:
    """A state of no stack, which compiled functions take for the same as others."""
    return TrainState(**{name: getattr(state, name) for name in _FIELDS})


def _stacked(states: Sequence[TrainState]) -> _Stack:
    """States as a stack: the one that they are the rows of, if it has no others."""
    first = _source(states[0])
    if first is not None:
        stack, _ = first
        if [*map(_source, states)] == [(stack, number) for number in range(stack.size)]:
            return stack
    return _Stack(_stack_states(*map(_plain, states)), len(states))


def _state_kind(state: TrainState) -> Hashable:
    source = _source(state)
    return _kind(_plain(state)) if source is None else source[0].kind


def _kind(tree: PyTree) -> Hashable:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _example_kind(data: ImageSet) -> Hashable:
    return data.images.shape[1:], data.images.dtype, data.mean.dtype


def _equal(a: ImageSet, b: ImageSet) -> bool:
    """Whether two data sets are the same, example by example."""
    if a is b or _kind(a) != _kind(b):
        return a is b
    return bool(_all_equal(a, b))


def _distinct(sets: Sequence[ImageSet]) -> tuple[tuple[int, ...], tuple[ImageSet, ...]]:
    """For each run which data set is its own, and each data set once."""
    found = {id(data): data for data in sets}
    places = list(found)
    return tuple(places.index(id(data)) for data in sets), tuple(found.values())


def _take_step(
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


def _take_steps(
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
    after, metrics = _compiled_steps(
        recipe, which, stack.states, distinct, batches, np.asarray(firsts), count, keys, hypers
    )
    metrics = jax.tree.map(lambda figure: figure[:count], metrics)
    return [*zip(_Stack(after, stack.size).rows(), metrics, strict=True)]


def _classify(
    model: nn.Module, variables: Sequence[PyTree], sets: Sequence[ImageSet], batches: Sequence[np.ndarray]
) -> list[Array]:
    which, distinct = _distinct(sets)
    return _compiled_forward(model, which, variables, distinct, np.stack(batches))


def _classify_all(
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
    step = jax.vmap(functools.partial(training.step, recipe), in_axes=(0, 0, None, 0, 0))
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
    firsts: Int[Array, " runs"],
    count: Int[Array, ""],
    keys: Sequence[Array],
    hypers: Sequence[Hyperparams],
) -> tuple[TrainState, list[StepMetrics]]:
    """So many steps of each run, from its own first one. Figures are 0 beyond."""
    own = (jnp.stack(batches), jnp.stack(keys), _stack(hypers))

    def step(index: Array, states: TrainState) -> tuple[TrainState, StepMetrics]:
        orders, keys, hypers = own
        indices = jax.vmap(lambda order, first: order[first + index])(orders, firsts)
        return _step(recipe, which, states, sets, indices, keys, hypers)

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
