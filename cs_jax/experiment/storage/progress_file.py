"""The JSON file of a checkpoint, and the shapes of the arrays beside it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.experiment import search
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.progress import Progress
from cs_jax.methods import METHODS
from cs_jax.methods.base import first_scores
from cs_jax.training import step
from cs_jax.training.problem import Problem
from cs_jax.training.step import TrainState


def leaf_shapes(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of every array of a tree, by its name."""
    leaves = trees.leaves_by_path(tree)
    return {trees.name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def abstract_state(config: Config, problem: Problem, phase: str) -> TrainState:
    """Shapes and dtypes of the state in a phase."""

    def make() -> TrainState:
        state = search.fixed_state(problem, problem.init_ticket())
        if phase != SEARCH or not METHODS[config.method].learns_masks:
            return state
        scores = first_scores(config, state.masks, state.channels)
        return step.init_state(problem.recipe, state.params, state.batch_stats, scores=scores, masks={})

    return jax.eval_shape(make)


def progress_to_json(progress: Progress, snapshot: str | None) -> dict[str, Any]:
    fields = progress._asdict()
    del fields["state"], fields["figures"]
    ends = [record._asdict() for record in progress.round_ends]
    return fields | {"snapshot": snapshot, "round_ends": ends, "kept": progress.kept is not None}


def packed_like(mask: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((-(-mask.size // 8),), jnp.uint8)
