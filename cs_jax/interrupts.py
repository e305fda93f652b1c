"""Ctrl-C that is not lost."""

import os
import signal
import threading
from types import FrameType, TracebackType

from cs_jax.search import Observer
from cs_jax.training import StepMetrics, TrainState

EXIT_CODE = 130  # 128 + SIGINT, as a shell has it


class Interrupts(Observer):
    """Raises KeyboardInterrupt on SIGINT, and again at the next step if that was swallowed; a second SIGINT exits.

    Python raises the exception wherever it is, which may be inside a callback of a library that lets none through.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)

    def on_steps(self, done: int, total: int, state: TrainState, metrics: StepMetrics) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(EXIT_CODE)
        self._asked = True
        raise KeyboardInterrupt
