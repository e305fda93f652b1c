"""Progress of a run, metrics of an epoch, and the interface of observers."""

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
    layer_density: dict[str, float]  # of each maskable array, by name, in [0, 1]
    flip_rate: float | None  # share of hard mask entries that changed since the previous epoch; search only
    soft_accuracy: float | None  # validation accuracy with soft masks, in [0, 1]; search only
    hard_accuracy: float | None  # validation accuracy with hard masks, in [0, 1]; None while the hard masks are empty
    images_per_second: float  # in the training steps only
    seconds: float  # training and evaluation


class Progress(NamedTuple):
    """Content of a checkpoint: phase, epoch, step, train state, and everything else needed to resume a run."""

    phase: str  # search, ticket or a control
    round: int | None  # round of the search, from 0
    epoch: int  # finished epochs of this round or phase
    step: int  # finished steps of the current epoch; all its steps during its evaluation
    state: TrainState  # donated to the next step
    snapshot: Snapshot | None  # search: for the rewind (None at first); ticket: initial weights; controls: None
    round_ends: tuple[EpochRecord, ...] = ()  # last epoch of every finished round
    figures: tuple[StepMetrics, ...] = ()  # loss terms of the current epoch's steps, one entry per compiled call
    seconds: float = 0.0  # duration of the current epoch's steps
    packed_masks: PyTree = None  # search: hard masks after the last epoch, one bit per entry; otherwise None

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
    """Base class of observers: methods that are called during a run, and that do nothing by default.

    If a method raises an exception, the run ends. `progress.state` is donated to the next step: copy the arrays that
    are needed after the call.
    """

    def on_phase_start(self, progress: Progress) -> None:
        """Called before the first epoch of a search round, the ticket or a control, and when a phase is resumed."""

    def on_steps(self, progress: Progress, total: int) -> None:
        """Called after every compiled call.

        Args:
            progress: `progress.step` is the number of done steps of the epoch. The device may still be computing the
                last entry of `progress.figures`; reading this entry waits.
            total: number of steps in the epoch.
        """

    def on_batch(self) -> None:
        """Called before every compiled call of an evaluation, so that an observer can stop the run there."""

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        """Called after an epoch and its evaluation."""

    def on_phase_end(self, progress: Progress) -> None:
        """Called after the last epoch of a phase, before a reset of scores; again if a run is resumed at this point."""


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
