"""Config of one run: settings of data, training and pruning method, and the files of the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cs_jax.core.errors import ConfigError, one_of
from cs_jax.core.settings import COUNT, FILES, at_least, flag
from cs_jax.data.config import DataConfig
from cs_jax.methods import METHODS, NONE, RETRAININGS, Method
from cs_jax.methods.config import DEFAULT_MULTIPLE, MethodConfig
from cs_jax.methods.controls import CONTROLS, DENSE
from cs_jax.models import MODELS, has_field

SEARCH, TICKET = "search", "ticket"
"""Names of phases. Each control is a phase too, with the name of the control."""


CHOICES = {"method": METHODS, "model": MODELS}
"""Values of the fields that name an entry of a registry; `--help` lists them."""


@dataclass(frozen=True, kw_only=True)
class Config(DataConfig, MethodConfig):
    """Search for a sparse ticket, by default with Continuous Sparsification; rewind it, retrain it and write a report.

    The default values are the authors' CIFAR-10 experiment.

    Raises:
        ConfigError: a value is out of range, or excludes another value. `prepare` checks the config against the data.
    """

    preset: Annotated[str, FILES] = "cifar10"
    """Preset that gave the defaults of the other settings; part of the name of the default run directory."""

    method: str = "cs"
    """Pruning method: cs (Continuous Sparsification), imp and imp-c (iterative magnitude pruning, with and without
    rewinding between rounds), iss (stochastic masks), gmp (gradual magnitude pruning), magnitude and random (one-shot),
    snip, supermask and supermask-iss (masks over frozen weights), or dense (no pruning)."""

    after: str | None = None
    """Training after the search: rewind (train the ticket from early weights), finetune (continue from the trained
    weights, at the last learning rate), lr-rewind (continue from the trained weights, with the whole learning rate
    schedule) or none (no training). Without this flag, supermasks use none, and all other methods use rewind."""

    controls: tuple[str, ...] = ()
    """Networks to train for comparison, with the epochs and batches of the ticket: dense, reinit (the ticket's masks,
    new initial weights), shuffled (the ticket's masks, shuffled in each layer), random (random masks with the ticket's
    density over all layers)."""

    model: str = "resnet20"
    """Network: resnet20, resnet32 and resnet56 are for CIFAR-10, resnet50 for images of 224x224 pixels."""

    out: Annotated[Path | None, FILES] = None
    """Run directory; None is runs/PRESET-seedSEED, or runs/PRESET-METHOD-seedSEED for methods other than cs. If
    the directory has a run with the same settings, this run is resumed."""

    keep: Annotated[int, FILES, COUNT] = 3
    """Number of newest checkpoints to keep; the snapshot for the rewind is kept in addition."""

    checkpoint_steps: Annotated[int, FILES, COUNT] = 100
    """Minimum number of steps between two checkpoints inside an epoch. On an accelerator, at least 100 steps, unless
    images are streamed. A checkpoint can also be saved at the end of an epoch."""

    report: Annotated[bool, FILES] = True
    """Write report.html and its plots at the end."""

    checkpoint_seconds: Annotated[float, FILES, at_least(0)] = 10.0
    """Minimum seconds between two checkpoints. A checkpoint is always saved at the end of a round, of the ticket's
    retraining and of each control."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            self._check_choice(name, choices)
        if METHODS[self.method].searches:
            inside = f"must be 0 to {self.epochs - 1}, because a round has {self.epochs} epochs"
            self._check("rewind_epoch", 0 <= self.rewind_epoch < self.epochs, inside)
        for name, default in (("remat", False), ("dtype", "float32")):
            works = getattr(self, name) == default or has_field(self.model, name)
            self._check(name, works, f"not supported by --model {self.model}; omit {flag(name)}")
        self._check_granularity()
        self._check_method()
        self._check_controls()

    def _check_method(self) -> None:
        method, named = METHODS[self.method], f"--method {self.method}"
        if self.after is not None:
            self._check_choice("after", RETRAININGS)
            allowed = " or ".join(method.retrainings)
            rule = f"{named} allows {allowed} only, because {method.why_these_retrainings}"
            self._check("after", self.after in method.retrainings, rule)
        either = " or --target-multiply-adds" if self.granularity == "channel" else ""
        needed = f"required by {named}; give a share above 0 and at most 1{either}"
        self._check("target_density", self.target is not None or not method.wants_target, needed)
        prunes = method.wants_target is not False
        self._check("target_density", self.target is None or prunes, f"{named} prunes nothing; omit {self.target_flag}")
        takers = " or ".join(name for name, other in METHODS.items() if other.takes_rate)
        self._check("prune_rate", self.prune_rate is None or method.takes_rate, f"requires --method {takers}")
        both = self.prune_rate is not None and self.target is not None
        self._check("prune_rate", not both, f"excludes {self.target_flag} {self.target}; give one of them")

    def _check_controls(self) -> None:
        for control in self.controls:
            if control not in CONTROLS:
                raise ConfigError(f"--controls {control}: must be {one_of(control, CONTROLS)}")
        self._check("controls", len(set(self.controls)) == len(self.controls), "must name each control once")
        others = [control for control in self.controls if control != DENSE]
        self._check("controls", not others or self.method != DENSE, "--method dense has no masks; omit --controls")
        if others and self.retraining == NONE:
            named = " ".join(others)
            raise ConfigError(f"--controls {named}: requires a retraining after the search; use --controls dense")
        if "random" in self.controls and self.granularity == "channel":
            raise ConfigError("--controls random: not possible with --granularity channel; use shuffled")

    def _check_granularity(self) -> None:
        by_channel, share = self.granularity == "channel", self.target_multiply_adds
        self._check("target_multiply_adds", share is None or by_channel, "requires --granularity channel")
        is_default = self.channel_multiple == DEFAULT_MULTIPLE
        self._check("channel_multiple", is_default or share is not None, "requires --target-multiply-adds")
        both = share is not None and self.target_density is not None
        rule = f"excludes --target-density {self.target_density}; give one of them"
        self._check("target_multiply_adds", not both, rule)
        if not by_channel:
            return
        takers = [name for name, method in METHODS.items() if method.takes_channels]
        self._check("granularity", self.method in takers, f"requires --method {' or '.join(takers)}")
        self._check("allow_empty_layers", not self.allow_empty_layers, "not possible with --granularity channel")
        only = share is None or self.scope == "global"
        self._check("scope", only, "not possible with --target-multiply-adds, which all layers share; use global")

    @property
    def pruning_method(self) -> Method:
        """The method, built from these settings."""
        return METHODS[self.method](self)

    @property
    def retraining(self) -> str:
        """Training after the search, one of `methods.RETRAININGS`."""
        return self.after or METHODS[self.method].retrainings[0]

    @property
    def search_rounds(self) -> int:
        """Rounds of the search; 0 where the method selects masks before any training."""
        return self.rounds if METHODS[self.method].searches else 0

    @property
    def retrainings(self) -> tuple[str, ...]:
        """Phases after the search: the ticket's retraining, if it has one, then the controls."""
        return (*(() if self.retraining == NONE else (TICKET,)), *self.trained_controls)

    @property
    def trained_controls(self) -> tuple[str, ...]:
        """Controls that are trained; none with --method dense, whose ticket is the dense network."""
        return () if self.method == DENSE else self.controls

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the settings that the method ignores."""
        method = METHODS[self.method]
        return (
            *(() if method.learns_masks else ("score_lr", "score_dtype", "lmbda", "mask_initial_value")),
            *(() if method.anneals else ("final_temp", "reset")),
            *(() if method.searches else ("rounds", "rewind_epoch")),
            *(() if method.wants_target is not False else ("scope", "allow_empty_layers")),
        )

    @property
    def run_directory(self) -> Path:
        """Directory of the run's files."""
        name = self.preset if self.method == "cs" else f"{self.preset}-{self.method}"
        return (self.out or Path("runs") / f"{name}-seed{self.seed}").expanduser()
