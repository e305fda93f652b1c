"""What a person sees of a sweep: a bar for all of it and one for each run under way, or a line for each that ends."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from cs_jax.console import percent, progress_bars
from cs_jax.pareto import (
    ABSENT,
    LEVEL,
    RETRAINED,
    Cell,
    budgets,
    has_no_spread,
    is_reference,
    references,
    shown_epochs,
    shown_p,
    shown_target,
)
from cs_jax.sweep.scheduler import Watcher
from cs_jax.sweep.spec import Planned

LABEL = 32  # letters of a run beside its bar
NARROWEST = 6  # letters of a method's name in a line of the table
UNBOUNDED = 10_000  # columns, more than any table has


def print_cells(console: Console, cells: Sequence[Cell]) -> None:
    """The table of a sweep, in percent, 80 columns wide with names of usual length: what is in its file, less costs and
    intervals; then what its words mean, and which networks were not trained for as long as what they stand beside.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("network", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "density", "test %", "epochs", "points", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        target = shown_target(cell.target, cell.dial, "{:.4g}".format)
        table.add_row(cell.method, cell.control or "ticket", target, str(cell.n), *_figures(cell, cells))
    _fit(table, console, max(len(cell.method) for cell in cells))
    console.print(table, crop=False)
    console.print()
    for line in _legend(cells):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _fit(table: Table, console: Console, longest: int) -> None:
    """Breaks names of methods where the console is too narrow. Beyond that the table is wider: nothing is cut off."""
    natural = console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum
    names = max(longest, NARROWEST)
    table.columns[0].width = max(NARROWEST, names - max(0, natural - console.width))
    table.width = natural - names + table.columns[0].width


def _figures(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    """Density, accuracy, epochs, difference and p of a row."""
    density = f"{cell.density:.2%}"
    if cell.density_deviation:
        density = f"{100 * cell.density:.2f}±{cell.density_deviation:.2%}"  # in few letters
    spread = "" if cell.deviation is None else f" ± {100 * cell.deviation:.2f}"
    figures = [density, f"{100 * cell.accuracy:.2f}{spread}", f"{cell.epochs:,.6g}"]
    if is_reference(cell, cells):
        return [*figures, "ref.", ""]
    points = ABSENT if cell.difference is None else f"{100 * cell.difference:+.2f}"
    mark = "*" if cell.p_adjusted is not None and cell.p_adjusted < LEVEL else ""
    return [*figures, points, "no spread" if has_no_spread(cell) else shown_p(cell.p_adjusted) + mark]


def _legend(cells: Sequence[Cell]) -> Iterator[str]:
    """What the words and signs of the table mean, of those that are in it."""
    beside = [f"beside {method} (ref.) at the same target" for method in references(cells)]
    if any(cell.beside and cell.control for cell in cells):
        beside.append("of a control, beside the ticket")
    yield "test %: accuracy; ± is the standard deviation of a sample. epochs: search and retraining."
    if not beside:
        return
    yield f"points: of test accuracy, {'; '.join(beside)}."
    alone = " no spread: all differences are the same." if any(map(has_no_spread, cells)) else ""
    yield f"p: of a paired t-test over two seeds at least, adjusted by Holm; * below {LEVEL:g}.{alone}"
    if budgets(cells, False):
        unequal = [cell for cell in cells if cell.control is None and "(" in shown_epochs(cell, cells)]
        told = dict.fromkeys(f"{cell.method} {shown_epochs(cell, cells)}" for cell in unequal)
        yield f"Not trained for as many epochs as what they stand beside: {', '.join(told)}."
    if budgets(cells, True):
        yield RETRAINED


class SweepDisplay(Watcher):
    """Shows how far a sweep is. A context manager, so that the bars are gone at the end.

    Args:
        console: where it is shown; without a terminal, lines alone.
        total: runs of the whole grid.
        waiting: those that are to be done.
    """

    def __init__(self, console: Console, total: int, waiting: list[Planned]) -> None:
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

    def on_start(self, worker: int, run: Planned) -> None:
        self._tasks[run.name] = self._bars.add_task(f"{_label(run)} compiles", total=run.epochs)

    def on_back(self, worker: int, run: Planned) -> None:
        self._bars.remove_task(self._tasks.pop(run.name))

    def on_epoch(self, worker: int, run: Planned, epoch: int) -> None:
        if run.name not in self._done:  # what an earlier sweep did says nothing of the time left
            self._bars.reset(self._tasks[run.name], completed=epoch - 1, description=_label(run))
            self._leave_out(epoch - 1)
        self._bars.advance(self._whole, epoch - self._done.get(run.name, epoch - 1))
        self._bars.update(self._tasks[run.name], completed=epoch)
        self._done[run.name] = epoch

    def on_end(self, worker: int, run: Planned, ticket: Mapping[str, Any] | None, failure: str) -> None:
        self._leave_out(run.epochs - self._done.get(run.name, 0))
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
        self._console.print(f"stops as soon as {runs} under way can be saved", highlight=False)

    def _leave_out(self, epochs: int) -> None:
        """Epochs that this sweep will not train."""
        self._epochs -= epochs
        self._bars.update(self._whole, total=self._epochs)

    def _describe(self) -> None:
        self._bars.update(self._whole, description=f"{self._ended} of {self._total} runs")


def _label(run: Planned) -> str:
    """A run's name beside its bar, cut in front where it is long."""
    return run.name if len(run.name) <= LABEL else "…" + run.name[1 - LABEL :]
