"""Settings of pruning methods: rounds, scores, temperature, target."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cs_jax.core.arrays import DTYPES
from cs_jax.core.masks import MIN_INIT_VALUE
from cs_jax.core.settings import COUNT, OPEN_SHARE, POSITIVE, RUNTIME, SHARE, at_least
from cs_jax.training.config import TrainingConfig

DEFAULT_MULTIPLE = 8
"""Multiple of channels that hardware computes fast."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(TrainingConfig):
    """Settings that pruning methods and controls read."""

    rounds: Annotated[int, COUNT] = 2
    """Search rounds; more rounds prune further."""

    rewind_epoch: int = 2
    """The ticket is rewound to the weights at the start of this epoch of round 0; 0 means the initial weights."""

    score_lr: Annotated[float | None, RUNTIME, POSITIVE] = None
    """Learning rate of the mask scores at the start of each round; higher hardens masks sooner. None means --lr."""

    score_dtype: str = "float32"
    """Type of the stored mask scores and their momentum: float32, or bfloat16 for half the memory. bfloat16 scores are
    rounded at random, so that small updates are not lost."""

    lmbda: Annotated[float, RUNTIME, at_least(0)] = 1e-8
    """Weight of the penalty on the sum of all masks (lambda in the paper); higher keeps fewer weights."""

    final_temp: Annotated[float, RUNTIME, at_least(1)] = 200.0
    """Temperature in a round's last epoch; the first epoch has temperature 1. Higher makes masks harder."""

    mask_initial_value: Annotated[float, RUNTIME, at_least(MIN_INIT_VALUE)] = 0.0
    """Initial mask score (s0 in the paper), usually -0.3 to 0.3; controls the density: higher keeps more weights."""

    target_density: Annotated[float | None, RUNTIME, SHARE] = None
    """Share of maskable weights that the ticket keeps, exactly; None leaves the density to --mask-initial-value."""

    granularity: Literal["weight", "channel"] = "weight"
    """Unit that one score keeps or prunes: weight (one maskable weight) or channel (all weights of a channel or
    attention head, so that the ticket can be shrunk to a smaller dense network)."""

    target_multiply_adds: Annotated[float | None, RUNTIME, SHARE] = None
    """Largest share of the dense network's multiply-adds that the shrunk ticket computes; requires --granularity
    channel, and replaces --target-density."""

    channel_multiple: Annotated[int, RUNTIME, COUNT] = DEFAULT_MULTIPLE
    """With --target-multiply-adds: each layer keeps a multiple of this number of channels, if its full number is a
    multiple, because hardware is faster with such numbers. 1 allows any number."""

    scope: Literal["global", "layer"] = "global"
    """Where weights compete for the target density: over all layers (global), or in each layer separately (layer)."""

    prune_rate: Annotated[float | None, RUNTIME, OPEN_SHARE] = None
    """Share of the remaining weights that a round of imp or imp-c prunes, without --target-density; None means 0.2."""

    allow_empty_layers: bool = False
    """Let --target-density remove all weights of a layer; otherwise each layer keeps at least one weight."""

    reset: Literal["paper", "released"] = "paper"
    """Score reset between rounds: paper (pruned weights stay pruned) or released (as in the authors' script, where
    pruned weights can come back)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("score_dtype", DTYPES)

    @property
    def target(self) -> float | None:
        """Target share of weights or of multiply-adds, in (0, 1]; None without a target."""
        return self.target_density if self.target_multiply_adds is None else self.target_multiply_adds

    @property
    def target_flag(self) -> str:
        """The flag that sets `target`."""
        return "--target-density" if self.target_multiply_adds is None else "--target-multiply-adds"
