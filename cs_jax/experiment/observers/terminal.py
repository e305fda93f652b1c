"""Terminal output of a run: a progress bar on a terminal, plain lines elsewhere, and tables of results."""

import contextlib
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from cs_jax.core.errors import CsJaxWarning
from cs_jax.experiment.progress import EpochRecord, Observer, Progress

REFRESH_SECONDS = 0.5

_HEADER = "phase     epoch     loss      lr   temp  density  val soft  val hard  seconds"


class Terminal(Console):
    """Console that raises BrokenPipeError if the reader has ended, as with `| head`. Rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_line(terminal: Console, line: str) -> None:
    """Prints a line without markup, highlighting or wrapping."""
    terminal.print(line, markup=False, highlight=False, soft_wrap=True)


_shown_by_thread: dict[int, Callable[..., None]] = {}
"""Function that prints the warnings of a thread, by thread id. The main thread prints all other warnings."""


@contextlib.contextmanager
def warnings_as_lines(console: Console) -> Iterator[None]:
    """Context in which warnings are printed as lines.

    A warning that names layers is printed only if it names a new layer. All other warnings of this package are printed
    every time. Outside the main thread, the context prints the warnings of the current thread only, and the main thread
    must be in this context too.
    """
    seen_layers: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        layers = getattr(message, "layers", ())
        if not layers or not seen_layers.issuperset(layers):
            console.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)
        seen_layers.update(layers)

    thread = threading.get_ident()
    if thread != threading.main_thread().ident:
        _shown_by_thread[thread] = show
        try:
            yield
        finally:
            del _shown_by_thread[thread]
        return

    def dispatch(*warning: Any, **options: Any) -> None:
        _shown_by_thread.get(threading.get_ident(), show)(*warning, **options)

    with warnings.catch_warnings():  # changes the whole process
        warnings.simplefilter("always", CsJaxWarning)
        warnings.filterwarnings("ignore", "Corrupt EXIF data")  # the pixels are not affected
        warnings.showwarning = dispatch
        yield


def progress_bars(console: Console, *, width: int) -> bars.Progress:
    """Progress bars with elapsed and remaining time. Shown on a terminal only, and removed at the end."""
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=width),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        refresh_per_second=1 / REFRESH_SECONDS,
        transient=True,
    )


class ProgressDisplay(Observer):
    """Prints a line for each epoch and, on a terminal, a progress bar with the current step.

    Context manager; removes the bar at the end.

    Args:
        console: where the lines and the bar are printed.
        total_epochs: int > 0, number of epochs of all phases.
        epochs_done: int >= 0, epochs that earlier processes have done.
        labels: printed in place of the phase names, in the order of the phases; later phases are printed by name.
    """

    def __init__(
        self, console: Console, *, total_epochs: int, epochs_done: int = 0, labels: Sequence[str] = ()
    ) -> None:
        self._console, self._done = console, epochs_done
        self._labels, self._label = iter(labels), ""
        self._next_refresh = 0.0
        self._bar = progress_bars(console, width=16)
        self._task = self._bar.add_task("starting", total=total_epochs)

    def __enter__(self) -> "ProgressDisplay":
        self._print(_HEADER)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_phase_start(self, progress: Progress) -> None:
        self._label = next(self._labels, progress.phase_name())
        if not self._bar.tasks[0].completed:  # the speed of earlier processes does not predict the time left
            self._bar.reset(self._task, completed=self._done)

    def on_steps(self, progress: Progress, total: int) -> None:
        if self._bar.disable or time.monotonic() < self._next_refresh:
            return
        loss = np.asarray(progress.figures[-2:][0].loss).flat[-1]  # previous call: the last call may still run
        self._next_refresh = time.monotonic() + REFRESH_SECONDS
        description = f"{self._label} epoch {progress.epoch} step {progress.step}/{total} loss {loss:.4f}"
        self._bar.update(self._task, completed=self._done + progress.step / total, description=description)

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        temperature = "-" if record.temperature is None else f"{record.temperature:.1f}"
        self._print(
            f"{self._label:<9} {record.epoch:>5} {record.loss:>8.4f} {record.learning_rate:>7g} "
            f"{temperature:>6} {record.density:>8.2%} {percent(record.soft_accuracy):>9} "
            f"{percent(record.hard_accuracy):>9} {record.seconds:>8.1f}"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def print_result(console: Console, summary: dict[str, Any]) -> None:
    """Prints tables of the search rounds and of the trained networks: ticket, dense network and controls.

    Args:
        console: output.
        summary: content of summary.json.
    """
    rounds = _table("Search", "round", "density", "val soft", "val hard")
    for record in summary["search"]:
        accuracies = (percent(record["soft_accuracy"]), percent(record["hard_accuracy"]))
        rounds.add_row(str(record["round"]), f"{record['density']:.2%}", *accuracies)
    networks = _table("Result", "network", "epochs", "weights kept", "density", "val", "test")
    ticket, dense = summary["ticket"], summary["dense"]
    trained = {"dense": dense} if dense is not None else {}
    for name, network in {**trained, "ticket": ticket, **summary["controls"]}.items():
        networks.add_row(name, *_network_row(network))
    for table in (rounds, networks) if summary["search"] else (networks,):
        console.print(table, width=max(60, console.width), crop=False)
    if "multiply_adds" in ticket:
        shrunk, dense_count = ticket["multiply_adds"], ticket["dense_multiply_adds"]
        line = f"The shrunk ticket computes {shrunk:,} of {dense_count:,} multiply-adds ({shrunk / dense_count:.2%})."
        console.print(line, highlight=False, soft_wrap=True)
    if ticket["density"] == 0:
        settings = "--target-density or, without a target, a higher --mask-initial-value or --score-lr"
        console.print(f"The ticket is empty: no maskable weight is left. Use a higher {settings}.", soft_wrap=True)


def print_tickets(console: Console, summaries: Sequence[dict[str, Any]]) -> None:
    """Prints a table of tickets with different seeds: a row for each ticket, then mean and standard deviation.

    Args:
        console: output.
        summaries: content of each run's summary.json.
    """
    table = _table("Tickets", "seed", "density", "test", "dense test")
    rows = [
        (
            summary["ticket"]["density"],
            summary["ticket"]["test_accuracy"],
            (summary["dense"] or {}).get("test_accuracy"),
        )
        for summary in summaries
    ]
    for summary, row in zip(summaries, rows, strict=True):
        table.add_row(str(summary["seed"]), *map(percent, row))
    columns = [*zip(*rows, strict=True)]
    if len(rows) > 1:
        table.add_section()
        for name, measure in (("mean", statistics.mean), ("deviation", statistics.stdev)):
            table.add_row(name, *(percent(None if None in column else measure(column)) for column in columns))
    console.print(table, width=max(60, console.width), crop=False)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(first, title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for header in others:
        table.add_column(header, justify="right")
    return table


def _network_row(network: dict[str, Any]) -> list[str]:
    return [
        f"{network['epochs']:,}",
        f"{network['num_weights']:,}",
        f"{network['density']:.2%}",
        percent(network["val_accuracy"]),
        percent(network["test_accuracy"]),
    ]


def percent(share: float | None) -> str:
    """A share as a percentage with two decimals; "-" for None."""
    return "-" if share is None else f"{share:.2%}"
