"""The parts of a search and of a whole experiment that functions need together."""

from dataclasses import dataclass, field

from cs_jax.data.load import Data
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import Observer
from cs_jax.experiment.storage.run_directory import RunDirectory
from cs_jax.training.problem import Problem


@dataclass(frozen=True)
class Search:
    """A search or retraining."""

    config: Config
    problem: Problem  # model, training and validation data, PRNG key
    observer: Observer = field(default_factory=Observer)  # called at every phase, step and epoch


@dataclass(frozen=True)
class Experiment(Search):
    """A search, its retraining and controls, with the test set and the directory for the results."""

    data: Data = field(kw_only=True)
    directory: RunDirectory = field(kw_only=True)
