"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, and the table at the end."""

from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cs_jax.config import Config
from cs_jax.search import DENSE, SEARCH, TICKET, EpochRecord, Observer
from cs_jax.training import TrainState


class ProgressDisplay(Observer):
    """Shows how far a run is and its newest figures. A context manager, so that the bar is gone at the end."""

    def __init__(self, config: Config, console: Console) -> None:
        self._config = config
        self._console = console
        self._title = ""
        self._epoch = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=config.epochs * (config.rounds + 1 + config.dense))

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_phase_start(self, phase: str, round: int | None, state: TrainState) -> None:
        self._title = {SEARCH: f"search round {round}", TICKET: "ticket", DENSE: "dense"}[phase]
        self._epoch = 0

    def on_steps(self, done: int, total: int, state: TrainState) -> None:
        description = f"{self._title}, epoch {self._epoch}, step {done}/{total}"
        self._bar.update(self._task, description=description)

    def on_epoch_end(self, record: EpochRecord, state: TrainState) -> None:
        self._epoch = record.epoch + 1
        self._bar.advance(self._task)
        self._console.print(f"{self._title:<14}  {_describe_epoch(record)}", highlight=False, soft_wrap=True)


def _describe_epoch(record: EpochRecord) -> str:
    figures = [f"epoch {record.epoch:2d}", f"loss {record.loss:.4f}", f"lr {record.learning_rate:<6g}"]
    if record.phase == SEARCH:
        figures += [f"temp {record.temperature:5.1f}", f"density {record.density:7.2%}"]
        figures += [f"val soft {_percent(record.soft_accuracy)} hard {_percent(record.hard_accuracy)}"]
    else:
        figures += [f"val {_percent(record.hard_accuracy)}"]
    return "  ".join([*figures, f"{record.seconds:.1f} s"])


def result_table(summary: dict[str, Any]) -> Group:
    """What each round did, and the ticket beside the dense network where that was trained."""
    rounds = Table(
        "round", "density", "val soft", "val hard", title="Search", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for record in summary["search"]:
        rounds.add_row(
            str(record["round"]),
            f"{record['density']:.2%}",
            _percent(record["soft_accuracy"]),
            _percent(record["hard_accuracy"]),
        )
    networks = Table(
        "network", "weights kept", "density", "val", "test", title="Result", box=box.SIMPLE_HEAD, title_justify="left"
    )
    ticket, dense = summary["ticket"], summary["dense"]
    if dense is not None:
        networks.add_row("dense", *_network_row(dense["num_weights"], 1.0, dense))
    networks.add_row("ticket", *_network_row(ticket["num_weights"], ticket["density"], ticket))
    return Group(rounds, networks)


def _network_row(num_weights: int, density: float, accuracies: dict[str, Any]) -> list[str]:
    return [
        f"{num_weights:,}",
        f"{density:.2%}",
        _percent(accuracies["val_accuracy"]),
        _percent(accuracies["test_accuracy"]),
    ]


def _percent(share: float | None) -> str:
    return "      -" if share is None else f"{share:7.2%}"
