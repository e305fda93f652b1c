"""Where a run stands, what it reports, and who is told."""

from typing import NamedTuple

from jaxtyping import PyTree

from cs_jax.experiment.config import Config
from cs_jax.training.problem import Snapshot
from cs_jax.training.step import StepMetrics, TrainState


class EpochRecord(NamedTuple):
    """What is reported of an epoch, at its end; one line of metrics.jsonl. None where a figure has no meaning."""

    phase: str  # search, ticket or a control
    round: int | None  # of the search, from 0
    epoch: int  # inside the round or phase, from 0
    temperature: float | None  # of the search's masks, where the method learns them
    learning_rate: float  # of the weights
    loss: float  # mean over the epoch's examples, penalty included
    penalty: float  # weighted, mean over the epoch's examples
    density: float  # of the hard masks
    layer_density: dict[str, float]  # of each masked array, by name
    flip_rate: float | None  # share of the hard masks that differ from those an epoch before; search alone
    soft_accuracy: float | None  # on the validation set, with the masks of this epoch; search alone
    hard_accuracy: float | None  # on the validation set, with hard masks; None while the search's are empty
    images_per_second: float  # in the steps alone
    seconds: float  # training and evaluation


class Progress(NamedTuple):
    """Where a run stands, with all that decides how it goes on: what is saved to go on later."""

    phase: str  # search, ticket or a control
    round: int | None  # of the search, from 0
    epoch: int  # epochs of this round or phase that are done
    step: int  # steps done of the epoch after those; all of them while it is evaluated
    state: TrainState  # donated to the next step
    snapshot: Snapshot | None  # to rewind to, or what the ticket's retraining began with; None before, and in controls
    round_ends: tuple[EpochRecord, ...] = ()  # the last epoch of every round that is done
    figures: tuple[StepMetrics, ...] = ()  # of the epoch's steps so far
    seconds: float = 0.0  # that they took
    kept: PyTree = None  # hard masks of the search's last epoch, as packed bits; None before there are any, and later

    def phase_name(self) -> str:
        """The phase in words: "search 0", "ticket"."""
        return self.phase if self.round is None else f"{self.phase} {self.round}"

    def number(self, config: Config) -> int:
        """Of the phase, counted from 0: the rounds, the ticket, the controls."""
        return config.search_rounds + config.retrainings.index(self.phase) if self.round is None else self.round

    def epochs_done(self, config: Config) -> int:
        """Over all phases."""
        return self.number(config) * config.epochs + self.epoch


class Observer:
    """What wants to know how a run goes on. Every method may be left out; what one raises ends the run.

    The state inside a progress is donated to the next step: copy what is to be kept beyond a call.
    """

    def on_phase_start(self, progress: Progress) -> None:
        """Before the first epoch of a search round, of the ticket or of a control, or where it is resumed."""

    def on_steps(self, progress: Progress, total: int) -> None:
        """After every compiled call: `progress.step` of the epoch's `total` steps are done.

        The newest of `progress.figures` may not have been computed yet; to read it is to wait.
        """

    def on_batch(self) -> None:
        """Between the batches of an evaluation: a moment to stop at, and nothing else has changed."""

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        """After an epoch and its evaluation."""

    def on_phase_end(self, progress: Progress) -> None:
        """After the last epoch, before any reset; again where a run goes on from just there."""


class Observers(Observer):
    """Several observers as one, told in order."""

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
