"""What a run is asked to do: one frozen dataclass, and its presets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cs_jax.core.arrays import DTYPES
from cs_jax.core.errors import ConfigError, in_words, one_of
from cs_jax.core.masks import MIN_INIT_VALUE
from cs_jax.core.settings import flag, is_finite, is_positive
from cs_jax.data.images import AUGMENTATIONS
from cs_jax.methods import METHODS, NONE, RETRAININGS
from cs_jax.methods.controls import CONTROLS, DENSE
from cs_jax.models import MODELS, has_field

DEFAULT_MULTIPLE = 8
"""Channels: what hardware computes fast."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Search a sparse ticket, rewind it, retrain it, and report; with Continuous Sparsification or another method.

    Defaults of the class are the authors' CIFAR-10 experiment.

    Raises:
        ConfigError: a value is out of range; checks that need the data follow when it is loaded.
    """

    preset: Annotated[str, tyro.conf.Suppress] = "cifar10"
    """Preset that the other fields started from; names the default run directory."""

    method: str = "cs"
    """How the ticket is found: cs (Continuous Sparsification), imp and imp-c (iterative magnitude pruning, with and
    without rewinding between rounds), iss (stochastic masks), gmp (gradual magnitude pruning), magnitude and random
    (in one shot), snip, supermask and supermask-iss (masks over frozen weights), or dense (no pruning)."""

    after: str | None = None
    """What follows the search: rewind (train the ticket from early weights), finetune (train on, at the last learning
    rate), lr-rewind (train on, with the learning rate from its start) or none; None is rewind, for a supermask none."""

    controls: tuple[str, ...] = ()
    """Networks to train beside the ticket, as long and with the same batches: dense, reinit (the ticket's masks, other
    initial weights), shuffled (its masks shuffled in each layer), random (drawn with its density over all layers)."""

    dataset: str = "cifar10"
    """Data set: digits (comes with scikit-learn), or a TensorFlow Datasets name of images with `image` and `label`."""

    image_size: int | None = None
    """Side of the square, in pixels, that streamed images are cut to; None leaves those that all have one shape."""

    stream: bool = False
    """Read images from their files as they are wanted, for a set that does not fit on the device; those of no fixed
    shape always are."""

    loader_threads: int | None = None
    """Threads that read and decode streamed images; None is one for a core, 16 at most."""

    data_dir: Path | None = None
    """Folder of prepared TensorFlow Datasets; None is $TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    model: str = "resnet20"
    """Network: resnet20, 32 or 56 (for CIFAR-10), resnet8 or 6 (small ones), resnet50 (224x224 images), vgg16, conv2,
    conv4, conv6, vit_tiny or lenet300100."""

    val_set_size: int = 5000
    """Training examples set aside for validation, in all; drawn evenly over classes as far as they last; 0 for none."""

    max_train_examples: int | None = None
    """Train on at most so many of the examples that validation leaves, drawn with the seed; None is all."""

    augment: str = "flip-crop"
    """Augmentation: none, crop (4 black pixels around, random crop), flip-crop (half mirrored, then crop), or of
    streamed images resized-crop (a random part, resized, half mirrored)."""

    batch_size: int = 128
    """Examples per step; the last batch of an epoch may be smaller."""

    accumulate: int = 1
    """Parts that a batch is computed in, one after another, for the memory of one; divides --batch-size. Gradients are
    averaged for one update; BatchNorm sees each part by itself."""

    remat: bool = False
    """Keep the inputs of a network's blocks alone for the backward pass, and compute all else again there: less memory,
    more time."""

    dtype: str = "float32"
    """What the network computes in: float32 or bfloat16. Weights, their momentum, BatchNorm statistics, masks, logits
    and the loss are float32 in both."""

    score_dtype: str = "float32"
    """What mask scores and their momentum are stored in: float32 or bfloat16, for half the memory; their updates are
    then rounded at random, so that small ones count."""

    epochs: int = 85
    """Epochs in each search round, and again in the ticket's retraining."""

    rounds: int = 2
    """Search rounds; more rounds prune further."""

    rewind_epoch: int = 2
    """Epoch of round 0 at whose start the weights are kept that the ticket is rewound to; 0 is initialisation."""

    lr: float = 0.1
    """Learning rate of the weights at each round's start (SGD with Nesterov momentum 0.9)."""

    score_lr: float | None = None
    """Learning rate of the mask scores at each round's start; higher hardens them sooner. None is that of --lr."""

    lr_schedule: tuple[int, ...] = (56, 71)
    """Epochs of a round from which both learning rates drop, increasing; those after the last epoch do nothing."""

    lr_drops: tuple[float, ...] = (0.1, 0.1)
    """Factors of the drops, one for each epoch of --lr-schedule; if that alone is given, the preset's last for each."""

    decay: float = 1e-4
    """L2 weight decay of all weights, BatchNorm and biases included; scores do not decay."""

    lmbda: float = 1e-8
    """Weight of the penalty on the sum of all masks (lambda in the paper); higher keeps fewer weights."""

    final_temp: float = 200.0
    """Temperature of a round's last epoch, at least 1, which is that of the first; higher makes masks harder."""

    mask_initial_value: float = 0.0
    """Initial mask score (s0 in the paper), usefully -0.3 to 0.3: the dial for density; higher keeps more weights."""

    target_density: float | None = None
    """Share of maskable weights that the ticket keeps, exactly, above 0 and at most 1; None leaves it to the dial."""

    granularity: Literal["weight", "channel"] = "weight"
    """What a score stands for: weight, each maskable one, or channel, all weights of a channel or of an attention head,
    so that the ticket can be made a smaller dense network."""

    target_multiply_adds: float | None = None
    """Share of the dense network's multiply-adds that the ticket takes at most, above 0 and at most 1, once it is made
    smaller; with --granularity channel, in place of --target-density."""

    channel_multiple: int = DEFAULT_MULTIPLE
    """With --target-multiply-adds: a layer computes with a multiple of this many channels, where the whole layer does;
    hardware is faster with them. 1 is any number."""

    scope: Literal["global", "layer"] = "global"
    """Where weights compete for the density: over all layers (global), or in each, which then all have it (layer)."""

    prune_rate: float | None = None
    """Share of the weights left that a round of imp or imp-c prunes, above 0 and below 1, where no --target-density
    says it; None is 0.2."""

    allow_empty_layers: bool = False
    """Let --target-density leave a layer without any weight; otherwise each keeps one at least."""

    reset: Literal["paper", "released"] = "paper"
    """Between rounds: paper (pruned weights stay pruned) or released (as the authors' script: they can come back)."""

    seed: int = 0
    """Seed of all randomness, 0 to 4294967295: initial weights, validation split, shuffling, augmentation."""

    out: Path | None = None
    """Run directory; None is runs/PRESET-seedSEED, or runs/PRESET-METHOD-seedSEED but for cs. One that holds
    this very run goes on where it stopped."""

    keep: int = 3
    """Checkpoints to keep, the newest; the weights to rewind to are kept besides."""

    checkpoint_steps: int = 100
    """Steps between checkpoints inside an epoch, on an accelerator a hundred at least; its end may have one too."""

    data_parallel: int | None = None
    """Devices that share the examples of each batch, which has to divide evenly over them; None is 1, or all devices
    where several processes run together. Every step is the same to rounding on any number."""

    model_parallel: int = 1
    """Devices that share each large array of weights, with its scores and momentum, for networks too large for one."""

    report: bool = True
    """Write report.html and its plots at the end."""

    checkpoint_seconds: float = 10.0
    """Least seconds between two checkpoints; the end of a round or of a training always has one."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "rounds",
            "batch_size",
            "accumulate",
            "keep",
            "checkpoint_steps",
            "model_parallel",
            "channel_multiple",
        ):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_train_examples", "image_size", "loader_threads", "data_parallel"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")
        divides = self.batch_size % self.accumulate == 0
        self._check("accumulate", divides, f"a divisor of --batch-size {self.batch_size}")
        self._check("val_set_size", self.val_set_size >= 0, "0 or more")
        self._check("seed", 0 <= self.seed < 2**32, "0 to 4294967295")
        self._check("lr", is_positive(self.lr), "a finite number above 0")
        self._check("score_lr", self.score_lr is None or is_positive(self.score_lr), "a finite number above 0")
        for name in ("decay", "lmbda", "checkpoint_seconds"):
            value = getattr(self, name)
            self._check(name, is_finite(value) and value >= 0, "a finite number of at least 0")
        self._check("final_temp", is_finite(self.final_temp) and self.final_temp >= 1, "a finite number >= 1")
        self._check(
            "mask_initial_value",
            is_finite(self.mask_initial_value) and self.mask_initial_value >= MIN_INIT_VALUE,
            f"a finite number of at least {MIN_INIT_VALUE:g}",
        )
        for name in ("target_density", "target_multiply_adds"):
            target = getattr(self, name)
            self._check(name, target is None or 0 < target <= 1, "a share above 0 and at most 1")
        inside = f"0 to {self.epochs - 1}, inside a round of {self.epochs} epochs"
        searches = self.method not in METHODS or METHODS[self.method].searches
        self._check("rewind_epoch", 0 <= self.rewind_epoch < self.epochs or not searches, inside)
        self._check_schedule()
        self._check_choice("model", MODELS)
        lacks = f"none beside --model {self.model}, which has no field"
        self._check("remat", not self.remat or has_field(self.model, "remat"), f"{lacks} remat")
        self._check_choice("dtype", DTYPES)
        self._check("dtype", DTYPES[self.dtype] is None or has_field(self.model, "dtype"), f"{lacks} dtype")
        self._check_choice("score_dtype", DTYPES)
        self._check_choice("augment", AUGMENTATIONS)
        self._check_choice("reset", ("paper", "released"))
        self._check_choice("scope", ("global", "layer"))
        self._check_choice("method", METHODS)
        self._check_choice("granularity", ("weight", "channel"))
        self._check_granularity()
        self._check_method()

    def _check_method(self) -> None:
        found_by = METHODS[self.method]
        if self.after is not None:
            self._check_choice("after", RETRAININGS)
            wanted = f"{' or '.join(found_by.retrainings)} with --method {self.method}, {found_by.why_these}"
            self._check("after", self.after in found_by.retrainings, wanted)
        wants, target = found_by.wants_target, self.target
        named = f"--method {self.method}"
        either = ", or --target-multiply-adds" if self.granularity == "channel" else ""
        wanted = f"a share above 0 and at most 1{either}, for {named}"
        self._check("target_density", target is not None or not wants, wanted)
        prunes = wants is not False
        self._check("target_density", target is None or prunes, f"none beside {named}, which prunes nothing")
        rate = self.prune_rate
        self._check("prune_rate", rate is None or 0 < rate < 1, "a share above 0 and below 1")
        takers = " or ".join(other for other, method in METHODS.items() if method.takes_rate)
        self._check("prune_rate", rate is None or found_by.takes_rate, f"none, or --method {takers}")
        beside = self.target_flag
        self._check("prune_rate", rate is None or target is None, f"none beside {beside} {target}")
        for control in self.controls:
            if control not in CONTROLS:
                raise ConfigError(f"--controls: got {control!r}, wanted {one_of(control, CONTROLS)}")
        self._check("controls", len(set(self.controls)) == len(self.controls), "each of them once")
        others = [control for control in self.controls if control != DENSE]
        self._check("controls", not others or self.method != DENSE, "none beside --method dense, which has no masks")
        if others and self.retraining == NONE:
            raise ConfigError(
                f"--controls: got {' '.join(others)}, wanted dense alone where no retraining follows the search, which "
                "they would be trained as"
            )

    def _check_granularity(self) -> None:
        by_channel, share = self.granularity == "channel", self.target_multiply_adds
        self._check("target_multiply_adds", share is None or by_channel, "none, or --granularity channel beside it")
        is_default = self.channel_multiple == DEFAULT_MULTIPLE
        self._check("channel_multiple", is_default or share is not None, "none, or --target-multiply-adds beside it")
        both = share is not None and self.target_density is not None
        self._check("target_multiply_adds", not both, f"none beside --target-density {self.target_density}")
        if not by_channel:
            return
        takers = [name for name, method in METHODS.items() if method.takes_channels]
        if self.method not in takers:
            raise ConfigError(f"--granularity: got channel beside --method {self.method}, wanted {' or '.join(takers)}")
        self._check("allow_empty_layers", not self.allow_empty_layers, "none beside --granularity channel")
        only = share is None or self.scope == "global"
        self._check("scope", only, "global beside --target-multiply-adds, which layers have together")
        if "random" in self.controls:
            raise ConfigError(
                "--controls: got random beside --granularity channel, wanted shuffled, which draws channels in layers"
            )

    def _check_schedule(self) -> None:
        boundaries, drops = self.lr_schedule, self.lr_drops
        increasing = all(early < late for early, late in zip(boundaries, boundaries[1:], strict=False))
        self._check("lr_schedule", increasing and min(boundaries, default=0) >= 0, "increasing epochs, from 0")
        self._check("lr_drops", all(map(is_positive, drops)), "finite numbers above 0")
        as_many = f"{len(boundaries)} of them, as many epochs as --lr-schedule has"
        self._check("lr_drops", len(drops) == len(boundaries), as_many)

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{flag(name)}: got {value!r}, wanted {one_of(value, choices)}")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise ConfigError(f"{flag(name)}: got {in_words(value)}, wanted {wanted}")

    @property
    def retraining(self) -> str:
        """What follows the search, of `methods.RETRAININGS`."""
        return self.after or METHODS[self.method].retrainings[0]

    @property
    def target(self) -> float | None:
        """Share that the search is held to, of weights or of multiply-adds; None without a target."""
        return self.target_density if self.target_multiply_adds is None else self.target_multiply_adds

    @property
    def target_flag(self) -> str:
        """The flag that `target` is from, or would be."""
        return "--target-density" if self.target_multiply_adds is None else "--target-multiply-adds"

    @property
    def search_rounds(self) -> int:
        """Rounds of the search; 0 where masks are found before any training."""
        return self.rounds if METHODS[self.method].searches else 0

    @property
    def retrainings(self) -> tuple[str, ...]:
        """Phases after the search: the ticket's retraining, where it has one, and the controls."""
        return (*(() if self.retraining == NONE else (TICKET,)), *self.trained_controls)

    @property
    def trained_controls(self) -> tuple[str, ...]:
        """Controls that are trained: with the dense network as the method, itself, none."""
        return () if self.method == DENSE else self.controls

    @property
    def unused(self) -> tuple[str, ...]:
        """Settings that the method makes no use of."""
        method = METHODS[self.method]
        return (
            *(() if method.learns_masks else ("score_lr", "score_dtype", "lmbda", "mask_initial_value")),
            *(() if method.anneals else ("final_temp", "reset")),
            *(() if method.searches else ("rounds", "rewind_epoch")),
            *(() if method.wants_target is not False else ("scope", "allow_empty_layers")),
        )

    @property
    def run_directory(self) -> Path:
        """Where the run's files go."""
        name = self.preset if self.method == "cs" else f"{self.preset}-{self.method}"
        return (self.out or Path("runs") / f"{name}-seed{self.seed}").expanduser()


SEARCH, TICKET = "search", "ticket"
