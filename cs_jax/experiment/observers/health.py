"""Signs that a search by Continuous Sparsification goes wrong, told while there is time to stop it.

That is at the end of a round, not of an epoch: with an initial score of 0 or less every hard mask is empty in a round's
first epochs, and soft and hard accuracy meet only once the temperature has risen.
"""

import warnings
from collections.abc import Sequence

from cs_jax.core.errors import CsJaxWarning
from cs_jax.core.target_density import CollapsedLayerWarning, UnfinishedSearchWarning
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.methods import METHODS

ACCURACY_GAP = 0.02
"""Between soft and hard validation accuracy at a round's end, that is told: on the digits it is at most 0.011 with the
preset, over seeds 0 to 5, and 0.88 or more after round 0 where the final temperature is 50, 20 or 5 in place of 200."""


class StuckDensityWarning(CsJaxWarning):
    """A round ended without a weight, or pruned next to none; `layers` are those without."""

    def __init__(self, message: str, layers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.layers = layers


class Health(Observer):
    """Warns at the end of a search round, and says what to change. Each sign is told once in a run, resumed or not.

    What is to be told of the ticket itself, after the last round, is left to `search.search_ticket`: layers without
    weights, and under a target density everything.

    Args:
        config: of the run.
        validation_examples: that accuracies are counted over; 0 without.

    Warns:
        StuckDensityWarning: no weight is left, or none was pruned, by this round or at all.
        CollapsedLayerWarning: layers have no weight left, while others have.
        UnfinishedSearchWarning: soft and hard masks differ in accuracy, by more than two examples.
    """

    def __init__(self, config: Config, validation_examples: int) -> None:
        self._config = config
        self._validation_examples = validation_examples
        self._told_before = False

    def on_phase_start(self, progress: Progress) -> None:
        self._told_before = progress.epoch == self._config.epochs  # by the process that saved the round's end

    def on_phase_end(self, progress: Progress) -> None:
        is_continuous = METHODS[self._config.method].anneals
        if progress.phase != SEARCH or self._told_before or not is_continuous:
            return
        is_last = len(progress.round_ends) == self._config.rounds
        if is_last and self._config.target is not None:
            return
        self._tell_stuck_density(progress.round_ends)
        self._tell_gap(progress.round_ends)
        if not is_last:
            self._tell_empty_layers(progress.round_ends)

    def _tell_stuck_density(self, ends: Sequence[EpochRecord]) -> None:
        held = self._config.target is not None
        pairs = zip((None, *ends), ends, strict=False)
        *before, sign = (_stuck_density(previous, end, held=held) for previous, end in pairs)
        if sign is not None and sign not in before:
            layers = tuple(ends[-1].layer_density) if ends[-1].density == 0 else ()
            warnings.warn(StuckDensityWarning(f"round {len(ends) - 1} {sign}", layers), stacklevel=3)

    def _tell_gap(self, ends: Sequence[EpochRecord]) -> None:
        *before, is_open = map(self._has_gap, ends)
        if is_open and not any(before):
            soft, hard = ends[-1].soft_accuracy, ends[-1].hard_accuracy
            _warn(
                f"round {len(ends) - 1} ended with masks that have not hardened, as validation accuracy is {soft:.2%} "
                f"with soft ones and {hard:.2%} with hard ones: "
                "wanted more --epochs, or a higher --score-lr or --final-temp",
                UnfinishedSearchWarning,
            )

    def _has_gap(self, end: EpochRecord) -> bool:
        if end.soft_accuracy is None or end.hard_accuracy is None:
            return False
        examples = round(abs(end.soft_accuracy - end.hard_accuracy) * self._validation_examples)
        return examples > max(2, ACCURACY_GAP * self._validation_examples)

    def _tell_empty_layers(self, ends: Sequence[EpochRecord]) -> None:
        *before, empty = map(_empty_layers, ends)
        new = [name for name in empty if not any(name in names for names in before)]
        if new:
            message = f"round {len(ends) - 1} left no weight in {', '.join(new)}: wanted {self._fuller_layers()}"
            warnings.warn(CollapsedLayerWarning(message, tuple(new)), stacklevel=3)

    def _fuller_layers(self) -> str:
        if self._config.target is None:
            return "a higher --mask-initial-value, a lower --lmbda, or a --target-density, which empties no layer"
        if self._config.allow_empty_layers:
            return "a higher --target-density, or no --allow-empty-layers"
        return f"a higher {self._config.target_flag}"


def _stuck_density(previous: EpochRecord | None, end: EpochRecord, *, held: bool) -> str | None:
    """What a round did and what to change, where it left no weight or pruned none; None where it did well."""
    if end.density == 0:
        if held:
            return "left no weight, its scores having hardly moved: wanted a higher --score-lr or more --epochs"
        return (
            "left no weight, no score being above 0: wanted a higher --mask-initial-value, --score-lr or --final-temp, "
            "a lower --lmbda, or a --target-density"
        )
    if held:
        return None
    if end.density > 0.99:
        nothing = "nothing, every score" if end.density == 1 else "next to nothing, most scores"
        return (
            f"pruned {nothing} being above 0: wanted a lower --mask-initial-value, "
            "a higher --score-lr or --lmbda, or a --target-density"
        )
    if previous is not None and abs(end.density - previous.density) < 0.01 * previous.density:
        return "pruned nothing more: wanted fewer --rounds, or a higher --score-lr or --lmbda"
    return None


def _empty_layers(end: EpochRecord) -> list[str]:
    """Layers without a weight, in a network that has some."""
    return [name for name, density in end.layer_density.items() if density == 0] if end.density > 0 else []


def _warn(message: str, category: type[Warning]) -> None:
    warnings.warn(message, category, stacklevel=4)
