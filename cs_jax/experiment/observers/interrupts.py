"""Signals that stop a run: SIGINT, SIGTERM and SIGHUP end the run after a step, where its state can be saved."""

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
"""Steps between two checks in a run of several processes. A check waits for all processes and their devices."""

MESSAGE_DELAY = 1.0
"""Seconds from a signal to the message that the run is stopping; a run that ends earlier prints no message."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)
        self.hint = ""  # appended to the message: how to resume

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as in a shell: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class Interrupts(Observer):
    """Raises `Stopped` on SIGINT, SIGTERM and SIGHUP: at once, or inside `held` after the current step.

    A SIGINT after another signal ends the process at once.
    Outside `held`, Python can raise the exception in a callback of a library, which may ignore exceptions. `Stopped` is
    then raised again after the next step.

    Args:
        main: the `Interrupts` of the main thread, for a run in another thread: only the main thread receives signals.
            This object then raises the signals that `main` has received.
    """

    def __init__(self, main: "Interrupts | None" = None) -> None:
        self._main = main
        self._received: int | None = None
        self._held = False
        self._installed = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._installed = True
            numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
            self._read_fd, write_fd = os.pipe()
            os.set_blocking(write_fd, False)
            self._wakeup_before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
            self._write_fd = write_fd
            os.register_at_fork(after_in_child=lambda: _reset_wakeup_fd(write_fd))
            threading.Thread(target=_exit_on_second_sigint, args=(self._read_fd,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._installed:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._write_fd)  # ends the thread
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Context in which signals raise only between compiled calls, where the state of the run is consistent."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def on_steps(self, progress: Progress, total: int) -> None:
        if not processes.are_several() or progress.step % AGREE_STEPS == 0 or progress.step == total:
            self.check()

    def on_batch(self) -> None:
        if not processes.are_several():  # several processes agree at steps only; evaluations are short
            self.check()

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self.check()

    def on_phase_end(self, progress: Progress) -> None:
        self.check()

    def check(self) -> None:
        """Raises `Stopped` if this process, or another process of the run, has received a signal."""
        if self._main is not None:
            self._main.check()
        number = processes.agree(self._received or 0)
        if number:
            raise Stopped(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        if not self._held:
            raise Stopped(self._received)


def _reset_wakeup_fd(write_fd: int) -> None:
    """Disconnects a forked child from the pipe: Ctrl-C in a terminal also reaches the child, but must count once."""
    current = signal.set_wakeup_fd(-1)
    if current not in (write_fd, -1):
        signal.set_wakeup_fd(current)


def _exit_on_second_sigint(read_fd: int) -> None:
    """Thread that ends the process at a SIGINT after another signal, even while the main thread waits for a device.

    Python's signal handlers run only after this wait. The wakeup pipe receives the number of the signal at once.
    """
    received, is_message_printed = b"", False
    while True:
        if received and not is_message_printed and not select.select([read_fd], [], [], MESSAGE_DELAY)[0]:
            is_message_printed = True
            _print_error(b"stopping after this step or compilation; press Ctrl-C again to end at once without saving\n")
        part = os.read(read_fd, 16)
        if not part:
            break
        received += bytes(number for number in part if number in SIGNALS)
        if signal.SIGINT in received[1:]:
            _print_error(b"ended at once; run the same command to resume from the last checkpoint\n")
            os._exit(128 + signal.SIGINT)
    os.close(read_fd)


def _print_error(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, line)
