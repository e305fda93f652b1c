"""Parameter objects: config, problem, observer, data and directory of a search or of a whole experiment."""

from dataclasses import dataclass, field

from cs_jax.data.load import Data
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import Observer
from cs_jax.experiment.storage.run_directory import RunDirectory
from cs_jax.training.problem import Problem


@dataclass(frozen=True)
class Search:
    """Config, problem and observer of a search or retraining."""

    config: Config
    problem: Problem  # model, training and validation data, PRNG key
    observer: Observer = field(default_factory=Observer)  # receives the events of the run


@dataclass(frozen=True)
class Experiment(Search):
    """A search with the retraining and the controls, the test set, and the run directory."""

    data: Data = field(kw_only=True)
    directory: RunDirectory = field(kw_only=True)
