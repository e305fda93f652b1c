"""Runs that share a device: where several want the same computed, with their own numbers, one program does it for all.

Each run lives its whole life in a thread of its own, and knows nothing of the others. One of them is awake at a time.
It goes on until its executor wants something computed, and sleeps until everybody has come to such a point; so what
runs do on the host never happens at once. What they want is then computed for those that have fallen behind in their
epochs, or are about to evaluate, and the others wait: runs that began apart meet, and stay together.
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
from cs_jax.training.step import Hyperparams, Recipe, StepMetrics, TrainState

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
            found = next((first for first in firsts if batched_states.equal(first, data)), data)
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
            return Executor().take_steps(recipe, batched_states.plain(state), data, batches, first, stop, key, hyper)

        count = stop - first
        own = (state, self._together.shared(data), batches, first, count, key, hyper)
        kind = (recipe, batched_states.state_kind(state), batched_states.example_kind(data), batches.shape, count)
        return self._ask(first, batched_states.take_steps, kind, alone, recipe, own)

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
            return Executor().take_step(recipe, batched_states.plain(state), data, indices, step, key, hyper)

        own = (state, self._together.shared(data), indices, key, hyper)
        kind = (recipe, batched_states.state_kind(state), batched_states.example_kind(data), indices.shape)
        return self._ask(step, batched_states.take_step, kind, alone, recipe, own)

    def classify(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batch: Int[np.ndarray, " batch"]
    ) -> Float[Array, "batch classes"]:
        alone = functools.partial(super().classify, model, variables, data, batch)
        own = (variables, self._together.shared(data), batch)
        kind = (model, batched_states.kind(variables), batched_states.example_kind(data), batch.shape)
        return self._ask(EVALUATION, batched_states.classify, kind, alone, model, own)

    def classify_all(
        self, model: nn.Module, variables: PyTree, data: ImageSet, batches: Int[np.ndarray, "steps batch"]
    ) -> Float[Array, "steps batch classes"]:
        alone = functools.partial(super().classify_all, model, variables, data, batches)
        own = (variables, self._together.shared(data), batches)
        kind = (model, batched_states.kind(variables), batched_states.example_kind(data), batches.shape)
        return self._ask(EVALUATION, batched_states.classify_all, kind, alone, model, own)

    def _ask(
        self, place: int, program: Callable[..., list[Any]], kind: Hashable, alone: Callable[[], Any], *content: Any
    ) -> Any:
        return self._together.ask(_Call(self._number, place, program, kind, alone, *content))
