"""Ctrl-C and SIGTERM that are not lost, and end a run where it can be saved."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.training import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

AGREE_STEPS = 10
"""Steps between two looks of several processes, which wait for each other there, and for their devices."""

PATIENCE = 1.0
"""Seconds after which a person is told that the signal was heard."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)
        self.hint = ""  # how to go on, once that is known

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as a shell has it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class Interrupts(Observer):
    """Raises `Stopped` on SIGINT, SIGTERM and SIGHUP; while a run is `held`, at its next step instead.

    A second signal, if it is SIGINT, ends the process at once.
    Elsewhere Python raises the exception wherever it is, which may be inside a callback of a library that lets none
    through; then it comes again at the next step.

    Args:
        of_all: of the main thread, which waits for several runs in threads of their own; this is one run's, and raises
            what that has heard. Signals come to the main thread alone.
    """

    def __init__(self, of_all: "Interrupts | None" = None) -> None:
        self._of_all = of_all
        self._asked: int | None = None
        self._held = False
        self._installed = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._installed = True
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as with nohup
            self._before = {number: signal.signal(number, self._handle) for number in heard}
            self._read_fd, write_fd = os.pipe()
            os.set_blocking(write_fd, False)
            self._wakeup_before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
            self._write_fd = write_fd
            os.register_at_fork(after_in_child=lambda: _forget(write_fd))
            threading.Thread(target=_exit_at_the_second, args=(self._read_fd,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._installed:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._write_fd)  # which ends the thread
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals are answered at steps and batches alone, where the run's state is whole."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def on_steps(self, progress: Progress, total: int) -> None:
        if not processes.are_several() or progress.step % AGREE_STEPS == 0 or progress.step == total:
            self.check()

    def on_batch(self) -> None:
        if not processes.are_several():  # which agree at steps: an evaluation is short
            self.check()

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self.check()

    def on_phase_end(self, progress: Progress) -> None:
        self.check()

    def check(self) -> None:
        """Raises `Stopped` if a signal came, to this process or to another of the run."""
        if self._of_all is not None:
            self._of_all.check()
        asked = processes.agree(self._asked or 0)
        if asked:
            raise Stopped(asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or number
        if not self._held:
            raise Stopped(self._asked)


def _forget(write_fd: int) -> None:
    """In a forked child, which a terminal's Ctrl-C reaches too: it is not to be heard twice."""
    current = signal.set_wakeup_fd(-1)
    if current not in (write_fd, -1):
        signal.set_wakeup_fd(current)


def _exit_at_the_second(ears: int) -> None:
    """Ends the process at a SIGINT that follows another signal, even while the main thread waits for a computation.

    Python's own handlers run only once that is done; the wakeup pipe has a byte, the signal's number, at once.
    """
    heard, told = b"", False
    while True:
        if heard and not told and not select.select([ears], [], [], PATIENCE)[0]:
            told = True
            _tell(b"stopping as soon as this step or compilation is done; Ctrl-C again ends at once, unsaved\n")
        part = os.read(ears, 16)
        if not part:
            break
        heard += bytes(number for number in part if number in SIGNALS)
        if signal.SIGINT in heard[1:]:
            _tell(b"ended at once; the same command goes on from the last checkpoint\n")
            os._exit(128 + signal.SIGINT)
    os.close(ears)


def _tell(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, line)
