"""Settings of training: batches, precision, epochs, learning rates, devices."""

from dataclasses import dataclass
from typing import Annotated

from cs_jax.core.arrays import DTYPES
from cs_jax.core.settings import COUNT, DEVICES, POSITIVE, RUNTIME, Settings, at_least


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """Settings for all training: search rounds, retraining and controls."""

    batch_size: Annotated[int, COUNT] = 128
    """Examples per step; the last batch of an epoch may be smaller."""

    accumulate: Annotated[int, COUNT] = 1
    """Number of parts in which a batch is computed, one after another, to save memory; must divide --batch-size.
    Gradients are averaged over the parts for one update; BatchNorm normalizes each part separately."""

    remat: bool = False
    """Keep only the inputs of the network's blocks for the backward pass and recompute the rest: less memory, more
    time."""

    dtype: str = "float32"
    """Data type in which the network computes: float32 or bfloat16. Weights, momentum of the weights, BatchNorm
    statistics, masks, logits and the loss are always float32."""

    epochs: Annotated[int, COUNT] = 85
    """Epochs in each search round, and again in the ticket's retraining."""

    lr: Annotated[float, RUNTIME, POSITIVE] = 0.1
    """Learning rate of the weights at the start of each round (SGD with Nesterov momentum 0.9)."""

    lr_schedule: Annotated[tuple[int, ...], RUNTIME] = (56, 71)
    """Epochs of a round, increasing, at which the learning rates of weights and scores drop. Epochs after the end of
    the round have no effect."""

    lr_drops: Annotated[tuple[float, ...], RUNTIME] = (0.1, 0.1)
    """Factors of the drops, one for each epoch of --lr-schedule. If only --lr-schedule is given, each drop has the
    preset's last factor."""

    decay: Annotated[float, at_least(0)] = 1e-4
    """L2 weight decay of all weights, including BatchNorm and biases; scores do not decay."""

    data_parallel: Annotated[int | None, DEVICES, COUNT] = None
    """Number of devices that share the examples of each batch; must divide --batch-size. None is 1; in a run with
    several processes, None uses all devices. The number changes the results only by rounding."""

    model_parallel: Annotated[int, DEVICES, COUNT] = 1
    """Number of devices that share each large weight array with its scores and momentum, for networks that do not fit
    on one device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.batch_size % self.accumulate == 0
        self._check("accumulate", divides, f"must divide --batch-size {self.batch_size}")
        self._check_choice("dtype", DTYPES)
        self._check_schedule()

    def _check_schedule(self) -> None:
        steps = zip((-1, *self.lr_schedule), self.lr_schedule, strict=False)
        increasing = all(early < late for early, late in steps)
        self._check("lr_schedule", increasing, "must be increasing epochs from 0")
        self._check("lr_drops", all(map(POSITIVE.holds, self.lr_drops)), "must be finite numbers above 0")
        count = len(self.lr_schedule)
        self._check("lr_drops", len(self.lr_drops) == count, f"must be {count} factors, one per epoch of --lr-schedule")
