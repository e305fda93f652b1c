"""What a method is: the moments of a search at which it has a say."""

import math
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import PyTree

from cs_jax.core import masks, rules, target_density
from cs_jax.core.arrays import DTYPES
from cs_jax.core.selection import Selection
from cs_jax.methods import target_multiply_adds
from cs_jax.models.channels import Channels
from cs_jax.training.problem import Snapshot
from cs_jax.training.step import Hyperparams, Recipe, TrainState

if TYPE_CHECKING:  # the config checks the name of its method
    from cs_jax.experiment.config import Config
    from cs_jax.training.problem import Problem

REWIND, FINETUNE, LR_REWIND, NONE = "rewind", "finetune", "lr-rewind", "none"

RETRAININGS = (REWIND, FINETUNE, LR_REWIND, NONE)
"""What can follow a search: training from early weights, on from the trained ones at the last learning rate, on from
the trained ones with the learning rate from its start (Renda et al., 2020, arXiv:2003.02389), or nothing."""

_UNSCALED = 80.0
"""Initial value whose sigmoid is 1 in every float type."""


class Method:
    """How masks come about. This one keeps every weight; others say what they do otherwise.

    A method has no state: what it changes is in the train state, whose `scores` are trained, where there are some, and
    whose `masks` are fixed between two of its moments. The moments are, in order, `begin` before the first step,
    `recipe` for what a step computes with and what it moves, `end_epoch` after the steps of an epoch and before its
    evaluation, `begin_round` between two rounds, and `ticket_masks` after the last.

    Attributes:
        retrainings: of `RETRAININGS`, which make sense; the first is the default.
        why_these: alone, where not all do, as a clause about the method.
        wants_target: whether a target density is needed (True), taken (None) or has no meaning (False).
        takes_channels: whether a score can stand for a channel.
        takes_rate: whether a prune rate can stand in for the target density.
        searches: whether there are rounds; otherwise masks are found before any training.
        learns_masks: whether a step trains scores; otherwise masks are fixed in it, and there is no penalty.
        anneals: whether masks have a temperature.
        says_of_rounds: what a reader has to know of the densities and accuracies at their ends.
        says_of_scores: what they decide, where there are some.
        cuts_at_zero: whether the weights with scores above 0 are those that are kept.
    """

    retrainings: ClassVar[tuple[str, ...]] = RETRAININGS
    why_these: ClassVar[str] = "which the others make no sense with"
    wants_target: ClassVar[bool | None] = None
    takes_channels: ClassVar[bool] = False
    takes_rate: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    learns_masks: ClassVar[bool] = False
    anneals: ClassVar[bool] = False
    says_of_rounds: ClassVar[str] = (
        "A round's weights are pruned at the end of its last epoch, and their accuracy is that of the network as it "
        "then stands: BatchNorm's averages are those of the network before, and nothing has been trained since."
    )
    says_of_scores: ClassVar[str] = "A weight is kept where its score is above 0 (dotted line)."
    cuts_at_zero: ClassVar[bool] = True

    def density(self, config: "Config", round: int) -> float | None:
        """Density that a round ends with; None where that is left to the search.

        With a target of multiply-adds, their share: what the config's target is a share of.
        """
        del round
        return config.target

    def recipe(self, recipe: Recipe) -> Recipe:
        """What a step of the search is built from: which masks it computes with, and whether it moves the weights."""
        return recipe

    def begin(self, config: "Config", problem: "Problem", variables: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Scores and masks before the first step; {} for those that there are none of.

        Args:
            config: what is asked.
            problem: recipe, data and keys.
            variables: the fresh network, with masks of one.
        """
        del config, problem
        return {}, variables["masks"]

    def end_epoch(self, config: "Config", state: TrainState, round: int, epoch: int) -> TrainState:
        """State after an epoch's steps, before it is evaluated."""
        del config, round, epoch
        return state

    def begin_round(
        self, config: "Config", problem: "Problem", state: TrainState, snapshot: Snapshot | None
    ) -> TrainState:
        """State before a round's first step, from that at the end of the one before; steps are counted anew."""
        del config, problem, snapshot
        return state

    def soft_masks(self, state: TrainState, hyper: Hyperparams) -> PyTree | None:
        """Masks that a search's figures are taken with beside hard ones, traced; None where there are no others."""
        del state, hyper
        return None

    def hard_masks(self, state: TrainState, hyper: Hyperparams) -> PyTree:
        """Masks of now, traced: 0, or `mask_scale`."""
        del hyper
        return state.masks

    def ticket_masks(self, config: "Config", state: TrainState) -> PyTree:
        """Masks of the ticket, at the search's end."""
        del config
        return state.masks

    def mask_scale(self, config: "Config") -> float:
        """What a kept weight is multiplied by."""
        del config
        return 1.0


class AtInitialization(Method):
    """A method that finds its masks before any training: the ticket is the initial network, and trains from there."""

    retrainings = (REWIND,)
    why_these = "which has no search to go on from"
    searches = False


def round_density(config: "Config", round: int) -> float | None:
    """`Method.density` where each round keeps the same share of what is left; None without a target."""
    target = config.target
    return None if target is None else target_density.round_density(target, round, config.rounds)


def selection(config: "Config", masks: PyTree, density: float | None, channels: Channels | None = None) -> Selection:
    """Every masked array, and how many weights may be kept at a density.

    Args:
        config: its scope, over all arrays or in each, and whether one may become empty.
        masks: arrays of the masked weights' shapes.
        density: in (0, 1]; None for no budget.
        channels: what scores stand for; None is a weight each.

    Raises:
        ValueError: the density cannot be met by these arrays.
    """
    return rules.with_budgets(
        rules.by_entry(masks) if channels is None else channels.selection,
        target_density=density,
        per_layer=config.scope == "layer",
        allow_empty_layers=config.allow_empty_layers,
    )


def first_scores(config: "Config", some_masks: PyTree, channels: Channels | None) -> PyTree:
    """Scores before the first step, for masks of these shapes, in the config's dtype."""
    like = some_masks if channels is None else channels.first_entries(some_masks)
    return masks.init_scores(like, config.mask_initial_value, dtype=DTYPES[config.score_dtype])


def track_target(config: "Config", state: TrainState, round: int) -> PyTree:
    """Scores of a state, shifted to what the config's target wants in a round; as they are without one."""
    if config.target_multiply_adds is not None:
        assert state.channels is not None
        share = target_density.round_density(config.target_multiply_adds, round, config.rounds)
        return target_multiply_adds.track_target(state.channels, state.scores, share)
    if config.target_density is None:
        return state.scores
    chosen = selection(config, state.scores, config.target_density, state.channels)
    return target_density.track_density(chosen, state.scores, round, config.rounds)


def ticket_of(
    config: "Config",
    scores: PyTree,
    target: float | None,
    channels: Channels | None,
    *,
    init_value: float,
    least: float = -math.inf,
) -> PyTree:
    """Masks of the highest scores, just as many as a target has, or of those above 0; see `budget.ticket_masks`.

    Args:
        config: scope and empty layers, and what the target is a share of.
        scores: of weights or channels, not traced.
        target: in (0, 1]; None for those above 0.
        channels: what scores stand for; None is a weight each. Each layer keeps one at least.
        init_value: the scores' initial value, which fixes the masks' scale.
        least: channels whose scores are below it are kept by reservation alone.

    Warns:
        CollapsedLayerWarning: an array keeps nothing, or its highest score alone, by reservation.
    """
    if channels is not None and (target is None or config.target_multiply_adds is not None):
        multiple = config.channel_multiple
        scores, target = target_multiply_adds.keep_highest(channels, scores, target, multiple, least=least), None
    return target_density.ticket_masks(selection(config, scores, target, channels), scores, init_value=init_value)


def keep_highest(config: "Config", ranks: PyTree, density: float, channels: Channels | None = None) -> PyTree:
    """Masks of 1 for the highest ranks, just as many as a density has, and of 0 for the others.

    Of equal ranks the first ones are kept, in the order of the arrays' names and of entries. Each array keeps one at
    least, unless the config allows empty ones.

    Args:
        config: scope and empty layers, and whether the density is a share of multiply-adds.
        ranks: finite numbers of the masked weights' shapes, or one for each channel; below 0 for those that are pruned.
        density: in (0, 1].
        channels: those that are ranked; None where weights are.

    Warns:
        CollapsedLayerWarning: an array keeps nothing, or its one reserved weight alone.
    """
    return ticket_of(config, ranks, density, channels, init_value=_UNSCALED, least=0.0)
