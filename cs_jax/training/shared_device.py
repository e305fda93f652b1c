"""Runs that share a device: computations of the same kind are done for several runs in one compiled call.

Each run has a thread and is independent of the other runs. Only one thread is active at a time. A thread runs until its
executor submits a computation. It then waits until every run has submitted a computation. Host work of different runs
therefore never overlaps. The computations with the earliest place in an epoch are then done, evaluations first, while
the other runs wait. Runs that started at different times therefore reach the same place, and stay together.
"""

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from cs_jax.data.images import ImageSet
from cs_jax.training import batched_states
from cs_jax.training.executor import Executor
from cs_jax.training.step import Recipe, StepInputs, StepMetrics, TrainState

Result = TypeVar("Result")

EVALUATION = -1
"""Place of an evaluation in an epoch: before all steps, so that every run evaluates before a new epoch starts."""


@dataclass(eq=False)
class _Call:
    """Computation that a run has submitted, and its result."""

    run: int  # number of the run
    place: int  # place in the epoch: number of its first step, or `EVALUATION`
    program: Callable[..., list[Any]]  # does several calls of the same kind in one compiled call
    kind: Hashable  # calls with equal `program` and `kind` can be done together
    alone: Callable[[], Any]  # does only this call
    static: Any  # recipe or model
    own: tuple[Any, ...]  # arguments of this run
    is_done: bool = False
    result: Any = None
    error: Exception | None = None


class Together:
    """Runs functions in threads, each with an executor that shares compiled calls with the other executors."""

    def __init__(self) -> None:
        self._active = threading.Condition()  # held by the thread that is active
        self._present = 0  # number of runs that have not ended
        self._calls: list[_Call] = []  # submitted and not done, at most one call per run
        self._sets: dict[int, tuple[ImageSet, ImageSet]] = {}  # data sets by id, each with the first equal data set

    def run(self, lives: Sequence[Callable[[Executor], Result]]) -> list[Result | BaseException]:
        """Result or exception of every run, after all runs have ended. An exception in a run ends only this run.

        Args:
            lives: one function for each run, called with the executor of the run.
        """
        ends: list[Any] = [None] * len(lives)

        def live(number: int) -> None:
            with self._active:
                try:
                    ends[number] = lives[number](_Member(self, number))
                except BaseException as error:  # returned to the caller
                    ends[number] = error
                finally:
                    self._present -= 1
                    self._do_next()

        self._present = len(lives)
        threads = [threading.Thread(target=live, args=(number,), daemon=True) for number in range(len(lives))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ends

    def compute(self, call: _Call) -> Any:
        """Result of a call; returns after every run has submitted a call or ended."""
        self._calls.append(call)
        self._do_next()
        while not call.is_done:
            self._active.wait()
        if call.error is not None:
            raise call.error
        return call.result

    def shared(self, data: ImageSet) -> ImageSet:
        """The first known data set with equal examples, so that a compiled call receives equal data only once."""
        if id(data) not in self._sets:
            firsts = [first for seen, first in self._sets.values() if seen is first]
            found = next((first for first in firsts if batched_states.equal(first, data)), data)
            self._sets[id(data)] = (data, found)  # a reference, so that the id stays unique
        return self._sets[id(data)][1]

    def _do_next(self) -> None:
        """Do the calls with the earliest place, if every run that has not ended has submitted a call."""
        if len(self._calls) < self._present or not self._calls:
            return
        place = min(call.place for call in self._calls)
        groups: dict[Hashable, list[_Call]] = {}
        for call in sorted(self._calls, key=lambda call: call.run):
            if call.place == place:
                groups.setdefault((call.program, call.kind), []).append(call)
        self._calls = [call for call in self._calls if call.place != place]
        for calls in groups.values():
            _do(calls)
        self._active.notify_all()


def _do(calls: Sequence[_Call]) -> None:
    """Do calls of one kind; an exception is stored in all of these calls."""
    try:
        one = calls[0]
        each = zip(*(call.own for call in calls), strict=True)
        results = [one.alone()] if len(calls) == 1 else one.program(one.static, *each)
        for call, result in zip(calls, results, strict=True):
            call.result = result
    except Exception as error:
        for call in calls:
            call.error = error
    for call in calls:
        call.is_done = True


class _Member(Executor):
    """Executor of one run of a `Together`."""

    def __init__(self, together: Together, number: int) -> None:
        super().__init__()
        self._together, self._number = together, number

    def take_steps(
        self, recipe: Recipe, state: TrainState, inputs: StepInputs, steps: range
    ) -> tuple[TrainState, StepMetrics]:
        def alone() -> tuple[TrainState, StepMetrics]:
            return Executor().take_steps(recipe, batched_states.plain(state), inputs, steps)

        own = (state, self._with_shared_data(inputs), steps)
        kind = (*self._kind(recipe, state, inputs), len(steps))
        return self._submit(steps.start, batched_states.take_steps, kind, alone, recipe, own)

    def take_step(
        self, recipe: Recipe, state: TrainState, inputs: StepInputs, step: int
    ) -> tuple[TrainState, StepMetrics]:
        def alone() -> tuple[TrainState, StepMetrics]:
            return Executor().take_step(recipe, batched_states.plain(state), inputs, step)

        own = (state, self._with_shared_data(inputs))
        return self._submit(step, batched_states.take_step, self._kind(recipe, state, inputs), alone, recipe, own)

    def classify(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batch: Int[np.ndarray, " batch"]
    ) -> Float[Array, "batch classes"]:
        alone = functools.partial(super().classify, model, variables, data, batch)
        own = (variables, self._together.shared(data), batch)
        kind = (model, batched_states.kind(variables), batched_states.example_kind(data), batch.shape)
        return self._submit(EVALUATION, batched_states.classify, kind, alone, model, own)

    def classify_all(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batches: Int[np.ndarray, "steps batch"]
    ) -> Float[Array, "steps batch classes"]:
        alone = functools.partial(super().classify_all, model, variables, data, batches)
        own = (variables, self._together.shared(data), batches)
        kind = (model, batched_states.kind(variables), batched_states.example_kind(data), batches.shape)
        return self._submit(EVALUATION, batched_states.classify_all, kind, alone, model, own)

    def _with_shared_data(self, inputs: StepInputs) -> StepInputs:
        return inputs._replace(data=self._together.shared(inputs.data))

    def _kind(self, recipe: Recipe, state: TrainState, inputs: StepInputs) -> tuple[Hashable, ...]:
        examples = batched_states.example_kind(inputs.data)
        return recipe, batched_states.state_kind(state), examples, inputs.indices.shape

    def _submit(
        self, place: int, program: Callable[..., list[Any]], kind: Hashable, alone: Callable[[], Any], *content: Any
    ) -> Any:
        return self._together.compute(_Call(self._number, place, program, kind, alone, *content))
