"""Progress of a sweep on the terminal: bars for the sweep and the active runs, and a line for each ended run."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console

from cs_jax.experiment.observers.terminal import percent, progress_bars
from cs_jax.sweep.scheduler import SweepObserver
from cs_jax.sweep.spec import PlannedRun

LABEL_WIDTH = 32  # characters of a run's name next to its bar


class SweepDisplay(SweepObserver):
    """Shows the progress of a sweep. As a context manager, removes the bars at the end.

    Args:
        console: output; only lines are printed if the output is not a terminal.
        total: number of runs in the grid.
        waiting: unfinished runs.
    """

    def __init__(self, console: Console, total: int, waiting: list[PlannedRun]) -> None:
        self._console, self._total, self._ended = console, total, total - len(waiting)
        self._bars = progress_bars(console, width=24)
        self._epochs = sum(run.epochs for run in waiting)
        self._whole = self._bars.add_task("", total=self._epochs)
        self._tasks: dict[str, bars.TaskID] = {}
        self._done: dict[str, int] = {}
        self._describe()

    def __enter__(self) -> "SweepDisplay":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def on_start(self, worker: int, run: PlannedRun) -> None:
        self._tasks[run.name] = self._bars.add_task(f"{_label(run)} compiling", total=run.epochs)

    def on_requeue(self, worker: int, run: PlannedRun) -> None:
        self._bars.remove_task(self._tasks.pop(run.name))

    def on_epoch(self, worker: int, run: PlannedRun, epoch: int) -> None:
        if run.name not in self._done:  # epochs trained before a resume must not count for the remaining time
            self._bars.reset(self._tasks[run.name], completed=epoch - 1, description=_label(run))
            self._subtract(epoch - 1)
        self._bars.advance(self._whole, epoch - self._done.get(run.name, epoch - 1))
        self._bars.update(self._tasks[run.name], completed=epoch)
        self._done[run.name] = epoch

    def on_end(self, worker: int, run: PlannedRun, ticket: Mapping[str, Any] | None, failure: str) -> None:
        self._subtract(run.epochs - self._done.get(run.name, 0))
        self._bars.remove_task(self._tasks.pop(run.name))
        self._ended += 1
        self._describe()
        if ticket is None:
            result = f"failed: {failure}"
        else:
            result = f"density {ticket['density']:.2%}, test {percent(ticket['test_accuracy'])}"
        line = f"{self._ended} of {self._total}  {run.name}: {result}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_stop(self, running: int) -> None:
        self._bars.stop()
        runs = "1 run" if running == 1 else f"{running} runs"
        self._console.print(f"saving {runs}, then stopping", highlight=False)

    def _subtract(self, epochs: int) -> None:
        """Removes epochs that this sweep will not train from the total."""
        self._epochs -= epochs
        self._bars.update(self._whole, total=self._epochs)

    def _describe(self) -> None:
        self._bars.update(self._whole, description=f"{self._ended} of {self._total} runs")


def _label(run: PlannedRun) -> str:
    """Name of the run; the start of a long name is cut off."""
    return run.name if len(run.name) <= LABEL_WIDTH else "…" + run.name[1 - LABEL_WIDTH :]
