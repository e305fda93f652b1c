"""The pruning-method interface: hooks that the search calls at fixed points, and helpers that several methods share."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import PyTree

from cs_jax.core import masks, rules, target_density
from cs_jax.core.arrays import DTYPES
from cs_jax.core.selection import Selection
from cs_jax.methods import target_multiply_adds
from cs_jax.methods.config import MethodConfig
from cs_jax.models.channels import Channels
from cs_jax.training.problem import Problem, Snapshot
from cs_jax.training.step import Hyperparams, Recipe, TrainState

REWIND, FINETUNE, LR_REWIND, NONE = "rewind", "finetune", "lr-rewind", "none"

RETRAININGS = (REWIND, FINETUNE, LR_REWIND, NONE)
"""Kinds of training that can follow a search. rewind starts from early weights. finetune and lr-rewind start from the
trained weights: finetune uses the last learning rate, lr-rewind the whole learning rate schedule (Renda et al., 2020,
arXiv:2003.02389). none means no training."""

_UNSCALED = 80.0
"""Initial value whose sigmoid is 1 in every float type, so that masks are 0 or 1."""


@dataclass(frozen=True)
class Method:
    """A pruning method, built from the config of a run. This base class keeps every weight.

    A method has no state. Its hooks return a changed train state. Training steps change the `scores` of the state; only
    hooks change its `masks`. The search calls the hooks in this order: `begin` before the first step; `recipe` to build
    the training step; `end_epoch` after the steps of each epoch, before its evaluation; `begin_round` between two
    rounds; `ticket_masks` after the last round. `soft_masks` and `hard_masks` are static, because compiled functions
    call them and must not depend on a config.

    Attributes:
        config: settings of the run.
        retrainings: allowed members of `RETRAININGS`; the first is the default.
        why_these_retrainings: clause for an error message, the reason why other retrainings are refused.
        wants_target: whether a target density is required (True), optional (None) or refused (False).
        takes_channels: whether one score per channel is supported.
        takes_rate: whether a prune rate can replace the target density.
        searches: whether the search has rounds; otherwise masks are selected before any training.
        learns_masks: whether steps train scores; otherwise masks are fixed during a step, and there is no penalty.
        anneals: whether masks have a temperature.
        remark_on_rounds: sentence for reports about the densities and accuracies at the end of rounds.
        remark_on_scores: sentence for reports about the meaning of scores.
        cuts_at_zero: whether a weight is kept exactly if its score is above 0.
    """

    config: MethodConfig

    retrainings: ClassVar[tuple[str, ...]] = RETRAININGS
    why_these_retrainings: ClassVar[str] = "other retrainings have no meaning for this method"
    wants_target: ClassVar[bool | None] = None
    takes_channels: ClassVar[bool] = False
    takes_rate: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    learns_masks: ClassVar[bool] = False
    anneals: ClassVar[bool] = False
    remark_on_rounds: ClassVar[str] = (
        "Weights are pruned at the end of a round's last epoch. The accuracy is measured right after pruning, with the "
        "BatchNorm averages of the unpruned network."
    )
    remark_on_scores: ClassVar[str] = "A weight is kept if its score is above 0 (dotted line)."
    cuts_at_zero: ClassVar[bool] = True

    def density(self, round: int) -> float | None:
        """Density at the end of a round; None if the search decides the density.

        With a target of multiply-adds, the share of multiply-adds.
        """
        del round
        return self.config.target

    def recipe(self, recipe: Recipe) -> Recipe:
        """Recipe of the search's training step: how masks are made, and whether weights are trained."""
        return recipe

    def begin(self, problem: Problem, variables: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Scores and fixed masks before the first step; {} for scores or masks that the method does not use.

        Args:
            problem: recipe, data and PRNG keys.
            variables: the initial network, with masks of one.
        """
        del problem
        return {}, variables["masks"]

    def end_epoch(self, state: TrainState, round: int, epoch: int) -> TrainState:
        """State after the steps of an epoch, before its evaluation."""
        del round, epoch
        return state

    def begin_round(self, problem: Problem, state: TrainState, snapshot: Snapshot | None) -> TrainState:
        """State before the first step of a round, from the state at the end of the previous round."""
        del problem, snapshot
        return state

    @staticmethod
    def soft_masks(state: TrainState, hyper: Hyperparams) -> PyTree | None:
        """Soft masks for the evaluation of a search epoch, traced; None if masks are hard in training too."""
        del state, hyper
        return None

    @staticmethod
    def hard_masks(state: TrainState, hyper: Hyperparams) -> PyTree:
        """Current hard masks, traced; entries are 0 or `mask_scale`."""
        del hyper
        return state.masks

    def ticket_masks(self, state: TrainState) -> PyTree:
        """Masks of the ticket, at the end of the search."""
        return state.masks

    def mask_scale(self) -> float:
        """Mask value of a kept weight."""
        return 1.0


class AtInitialization(Method):
    """A method that selects masks before any training; the ticket is trained from the initial weights."""

    retrainings = (REWIND,)
    why_these_retrainings = "there is no search to continue from"
    searches = False


def round_density(config: MethodConfig, round: int) -> float | None:
    """Density after a round, if each round keeps the same share of the remaining weights; None without a target."""
    target = config.target
    return None if target is None else target_density.round_density(target, round, config.rounds)


def selection(
    config: MethodConfig, masks: PyTree, density: float | None, channels: Channels | None = None
) -> Selection:
    """Selection of every masked array, with the number of weights to keep at a density.

    Args:
        config: sets the scope, and whether a layer may become empty.
        masks: arrays with the shapes of the masked weights.
        density: share in (0, 1]; None for no budget.
        channels: groups of weights that share one score; None for one score per weight.

    Raises:
        ValueError: the arrays cannot have this density.
    """
    return rules.with_budgets(
        rules.by_entry(masks) if channels is None else channels.selection,
        target_density=density,
        per_layer=config.scope == "layer",
        allow_empty_layers=config.allow_empty_layers,
    )


def first_scores(config: MethodConfig, some_masks: PyTree, channels: Channels | None) -> PyTree:
    """Scores before the first step, for masks with these shapes, in the dtype that the config sets."""
    like = some_masks if channels is None else channels.first_entries(some_masks)
    return masks.init_scores(like, config.mask_initial_value, dtype=DTYPES[config.score_dtype])


def track_target(config: MethodConfig, state: TrainState, round: int) -> PyTree:
    """Scores of a state, shifted to the round's share of the config's target; unchanged without a target."""
    if config.target_multiply_adds is not None:
        assert state.channels is not None
        share = target_density.round_density(config.target_multiply_adds, round, config.rounds)
        return target_multiply_adds.track_target(state.channels, state.scores, share)
    if config.target_density is None:
        return state.scores
    chosen = selection(config, state.scores, config.target_density, state.channels)
    return target_density.track_density(chosen, state.scores, round, config.rounds)


def ticket_of(
    config: MethodConfig, scores: PyTree, target: float | None, channels: Channels | None, init_value: float | None
) -> PyTree:
    """Masks that keep the highest scores, in the exact number that the target requires, or all scores above 0.

    Args:
        config: sets the scope, whether layers may become empty, and whether the target is a share of multiply-adds.
        scores: of weights or channels, not traced.
        target: share in (0, 1]; None keeps the scores above 0.
        channels: groups of weights that share one score, at least one kept per layer; None for one score per weight.
        init_value: initial value of the scores, which fixes the scale of the masks. None for ranks in place of scores:
            masks are then 0 or 1, and a channel with a rank below 0 is kept only if its layer would be empty.

    Warns:
        CollapsedLayerWarning: an array keeps no weight, or only the weight that is reserved for the array.
    """
    if channels is not None and (target is None or config.target_multiply_adds is not None):
        least = {} if init_value is not None else {"least": 0.0}
        scores = target_multiply_adds.keep_highest(channels, scores, target, config.channel_multiple, **least)
        target = None
    init_value = _UNSCALED if init_value is None else init_value
    return target_density.ticket_masks(selection(config, scores, target, channels), scores, init_value=init_value)


def keep_highest(config: MethodConfig, ranks: PyTree, density: float, channels: Channels | None = None) -> PyTree:
    """Masks: 1 for the highest ranks, in the exact number that the density requires, and 0 for all other ranks.

    Among equal ranks the first are kept, in the order of array names and of entries. Each array keeps at least one
    rank, unless the config allows empty layers.

    Args:
        config: sets the scope, whether layers may become empty, and whether the density is a share of multiply-adds.
        ranks: finite numbers with the shapes of the masked weights, or one per channel; below 0 for pruned entries.
        density: share in (0, 1].
        channels: groups of weights that are ranked together; None ranks single weights.

    Warns:
        CollapsedLayerWarning: an array keeps no weight, or only the weight that is reserved for the array.
    """
    return ticket_of(config, ranks, density, channels, init_value=None)
