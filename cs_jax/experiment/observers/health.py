"""Warnings at the end of a round if a search by Continuous Sparsification goes wrong.

Earlier warnings would be false alarms: with an initial score of 0 or less, every hard mask is empty in the first epochs
of a round, and soft and hard accuracy agree only after the temperature has risen.
"""

import warnings
from collections.abc import Sequence

from cs_jax.core.errors import CsJaxWarning
from cs_jax.core.target_density import CollapsedLayerWarning, UnfinishedSearchWarning
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.methods import METHODS

ACCURACY_GAP = 0.02
"""Smallest difference between soft and hard validation accuracy at the end of a round that causes a warning.

On the digits, with seeds 0 to 5, the difference is at most 0.011 with the preset's final temperature of 200, and at
least 0.88 after round 0 with a final temperature of 50, 20 or 5."""


class StuckDensityWarning(CsJaxWarning):
    """A round left no weight at all, or pruned almost none. `layers` names all maskable arrays if no weight is left."""

    def __init__(self, message: str, layers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.layers = layers


class Health(Observer):
    """Warns at the end of a search round and recommends other settings.

    Each warning is given once in a run; for empty layers, once for each layer. After the last round,
    `search.search_ticket` warns about empty layers of the ticket, and with a target also about soft masks.

    Args:
        config: settings of the run.
        validation_examples: size of the validation set; 0 without a validation set.

    Warns:
        StuckDensityWarning: no weight is left; or, without a target, density is above 0.99 or changed by less than 1%.
        CollapsedLayerWarning: a layer has no weight left, while other layers do.
        UnfinishedSearchWarning: validation accuracy with soft and with hard masks differs by more than `ACCURACY_GAP`,
            and by more than two examples.
    """

    def __init__(self, config: Config, validation_examples: int) -> None:
        self._config = config
        self._validation_examples = validation_examples
        self._was_resumed_at_end = False

    def on_phase_start(self, progress: Progress) -> None:
        # the process that saved this checkpoint has already given the warnings of this round
        self._was_resumed_at_end = progress.epoch == self._config.epochs

    def on_phase_end(self, progress: Progress) -> None:
        anneals = METHODS[self._config.method].anneals
        if progress.phase != SEARCH or self._was_resumed_at_end or not anneals:
            return
        is_last = len(progress.round_ends) == self._config.rounds
        if is_last and self._config.target is not None:
            return
        self._warn_of_stuck_density(progress.round_ends)
        self._warn_of_soft_masks(progress.round_ends)
        if not is_last:
            self._warn_of_empty_layers(progress.round_ends)

    def _warn_of_stuck_density(self, ends: Sequence[EpochRecord]) -> None:
        has_target = self._config.target is not None
        pairs = zip((None, *ends), ends, strict=False)
        *before, problem = (_stuck_density(previous, end, has_target=has_target) for previous, end in pairs)
        if problem is not None and problem not in before:
            layers = tuple(ends[-1].layer_density) if ends[-1].density == 0 else ()
            warnings.warn(StuckDensityWarning(f"round {len(ends) - 1} {problem}", layers), stacklevel=3)

    def _warn_of_soft_masks(self, ends: Sequence[EpochRecord]) -> None:
        *before, has_gap = map(self._has_gap, ends)
        if has_gap and not any(before):
            soft, hard = ends[-1].soft_accuracy, ends[-1].hard_accuracy
            message = (
                f"round {len(ends) - 1} left masks that have not hardened: validation accuracy is {soft:.2%} with soft "
                f"masks and {hard:.2%} with hard masks; use more --epochs, or a higher --score-lr or --final-temp"
            )
            warnings.warn(message, UnfinishedSearchWarning, stacklevel=3)

    def _has_gap(self, end: EpochRecord) -> bool:
        if end.soft_accuracy is None or end.hard_accuracy is None:
            return False
        examples = round(abs(end.soft_accuracy - end.hard_accuracy) * self._validation_examples)
        return examples > max(2, ACCURACY_GAP * self._validation_examples)

    def _warn_of_empty_layers(self, ends: Sequence[EpochRecord]) -> None:
        *before, empty = map(_empty_layers, ends)
        new = [name for name in empty if not any(name in names for names in before)]
        if new:
            message = f"round {len(ends) - 1} left no weight in {', '.join(new)}; use {self._advice_for_empty_layers()}"
            warnings.warn(CollapsedLayerWarning(message, tuple(new)), stacklevel=3)

    def _advice_for_empty_layers(self) -> str:
        if self._config.target is None:
            return "a higher --mask-initial-value, a lower --lmbda, or --target-density, which empties no layer"
        if self._config.allow_empty_layers:
            return "a higher --target-density, or omit --allow-empty-layers"
        return f"a higher {self._config.target_flag}"


def _stuck_density(previous: EpochRecord | None, end: EpochRecord, *, has_target: bool) -> str | None:
    """Problem and advice if a round left no weight or pruned almost none; None for a normal round."""
    if end.density == 0:
        if has_target:
            return "left no weight: scores have hardly changed; use a higher --score-lr or more --epochs"
        return (
            "left no weight: no score is above 0; use a higher --mask-initial-value, --score-lr or --final-temp, "
            "a lower --lmbda, or --target-density"
        )
    if has_target:
        return None
    if end.density > 0.99:
        problem = "nothing: every score is" if end.density == 1 else "almost nothing: most scores are"
        return (
            f"pruned {problem} above 0; use a lower --mask-initial-value, "
            "a higher --score-lr or --lmbda, or --target-density"
        )
    if previous is not None and abs(end.density - previous.density) < 0.01 * previous.density:
        return "changed the density by less than 1%; use fewer --rounds, or a higher --score-lr or --lmbda"
    return None


def _empty_layers(end: EpochRecord) -> list[str]:
    """Layers without a weight; none if the whole network is empty."""
    return [name for name, density in end.layer_density.items() if density == 0] if end.density > 0 else []
