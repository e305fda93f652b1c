"""Position of a run, metrics of an epoch, and the observers of a run."""

from typing import NamedTuple

from jaxtyping import PyTree

from cs_jax.experiment.config import Config
from cs_jax.training.problem import Snapshot
from cs_jax.training.step import StepMetrics, TrainState


class EpochRecord(NamedTuple):
    """Metrics of one epoch; one line of metrics.jsonl. None where a metric is not defined."""

    phase: str  # search, ticket or a control
    round: int | None  # round of the search, from 0
    epoch: int  # epoch in the round or phase, from 0
    temperature: float | None  # of the soft masks; search only, and only if the method anneals
    learning_rate: float  # of the weights
    loss: float  # mean over the epoch's training examples, penalty included
    penalty: float  # weighted mask penalty, mean over the epoch's training examples
    density: float  # of the hard masks, in [0, 1]
    layer_density: dict[str, float]  # of each masked array, by name, in [0, 1]
    flip_rate: float | None  # share of hard mask entries that changed since the previous epoch; search only
    soft_accuracy: float | None  # validation accuracy with soft masks, in [0, 1]; search only
    hard_accuracy: float | None  # validation accuracy with hard masks, in [0, 1]; None while the hard masks are empty
    images_per_second: float  # in the training steps only
    seconds: float  # training and evaluation


class Progress(NamedTuple):
    """Position of a run, with everything needed to resume it; the content of a checkpoint."""

    phase: str  # search, ticket or a control
    round: int | None  # round of the search, from 0
    epoch: int  # finished epochs of this round or phase
    step: int  # finished steps of the current epoch; all its steps during its evaluation
    state: TrainState  # donated to the next step
    snapshot: (
        Snapshot | None
    )  # search: for the rewind, None before it is taken; ticket: initial weights; controls: None
    round_ends: tuple[EpochRecord, ...] = ()  # last epoch of every finished round
    figures: tuple[StepMetrics, ...] = ()  # loss and penalty of the current epoch's steps, one entry per compiled call
    seconds: float = 0.0  # duration of the current epoch's steps
    packed_masks: PyTree = None  # search: hard masks of the last epoch, one bit per entry; None before, and later

    def phase_name(self) -> str:
        """The phase and round, for example "search 0" or "ticket"."""
        return self.phase if self.round is None else f"{self.phase} {self.round}"

    def number(self, config: Config) -> int:
        """Number of the phase, from 0: rounds of the search first, then the ticket, then the controls."""
        return config.search_rounds + config.retrainings.index(self.phase) if self.round is None else self.round

    def epochs_done(self, config: Config) -> int:
        """Number of finished epochs in all phases."""
        return self.number(config) * config.epochs + self.epoch


def total_epochs(config: Config) -> int:
    """Number of epochs of a whole run: search rounds, the ticket's retraining and controls."""
    return config.epochs * (config.search_rounds + len(config.retrainings))


class Observer:
    """Base class of observers, whose methods are called during a run. By default they do nothing.

    An exception that a method raises ends the run. `progress.state` is donated to the next step: copy the arrays that
    are needed after the call.
    """

    def on_phase_start(self, progress: Progress) -> None:
        """Called before the first epoch of a search round, the ticket or a control, and when a phase is resumed."""

    def on_steps(self, progress: Progress, total: int) -> None:
        """Called after every compiled call.

        Args:
            progress: `progress.step` steps of the epoch are done. The last of `progress.figures` may still be running
                on the device: reading it waits.
            total: number of steps in the epoch.
        """

    def on_batch(self) -> None:
        """Called between the batches of an evaluation, so that an observer can stop the run there."""

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        """Called after an epoch and its evaluation."""

    def on_phase_end(self, progress: Progress) -> None:
        """Called after the last epoch of a phase, before any reset; again if a run is resumed at this point."""


class Observers(Observer):
    """Several observers as one; each method calls them in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_phase_start(self, progress: Progress) -> None:
        for observer in self._observers:
            observer.on_phase_start(progress)

    def on_steps(self, progress: Progress, total: int) -> None:
        for observer in self._observers:
            observer.on_steps(progress, total)

    def on_batch(self) -> None:
        for observer in self._observers:
            observer.on_batch()

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        for observer in self._observers:
            observer.on_epoch_end(record, progress)

    def on_phase_end(self, progress: Progress) -> None:
        for observer in self._observers:
            observer.on_phase_end(progress)
