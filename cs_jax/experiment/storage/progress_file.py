"""Content of a checkpoint: a `Progress` as JSON values and arrays, and the shapes of the arrays for reading."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.experiment import search
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.metrics import step_figures
from cs_jax.experiment.progress import EpochRecord, Progress
from cs_jax.methods import METHODS
from cs_jax.methods.base import first_scores
from cs_jax.training import step
from cs_jax.training.problem import Problem, Snapshot
from cs_jax.training.step import StepMetrics, TrainState


def progress_to_json(progress: Progress, snapshot: str | None) -> dict[str, Any]:
    """A `Progress` as JSON values, without its arrays.

    Args:
        progress: progress to save.
        snapshot: hash of the snapshot's file SHA256SUMS; None without a snapshot.
    """
    fields = progress._asdict()
    del fields["state"], fields["figures"], fields["packed_masks"]
    ends = [record._asdict() for record in progress.round_ends]
    return fields | {"snapshot": snapshot, "round_ends": ends, "kept": progress.packed_masks is not None}


def progress_from_json(stored: Mapping[str, Any], arrays: Mapping[str, PyTree], snapshot: Snapshot | None) -> Progress:
    """Inverse of `progress_to_json` and `arrays_of`: the `Progress`, from JSON values, arrays and snapshot."""
    return Progress(
        phase=stored["phase"],
        round=stored["round"],
        epoch=stored["epoch"],
        step=stored["step"],
        state=arrays["state"],
        snapshot=snapshot,
        round_ends=tuple(EpochRecord(**record) for record in stored["round_ends"]),
        figures=(arrays["figures"],) if stored["step"] else (),
        seconds=stored["seconds"],
        packed_masks=arrays.get("kept"),
    )


def arrays_of(progress: Progress) -> dict[str, PyTree]:
    """Arrays of a `Progress`, without its snapshot; waits for steps that are still running."""
    arrays: dict[str, PyTree] = {"state": progress.state}
    if progress.figures:
        arrays["figures"] = step_figures(progress)
    if progress.packed_masks is not None:
        arrays["kept"] = progress.packed_masks
    return arrays


def abstract_arrays(config: Config, problem: Problem, stored: Mapping[str, Any]) -> dict[str, PyTree]:
    """Shapes and dtypes of the result of `arrays_of`, from the result of `progress_to_json`."""
    state = abstract_state(config, problem, stored["phase"])
    arrays: dict[str, PyTree] = {"state": state}
    if stored["step"]:
        arrays["figures"] = jax.eval_shape(lambda: StepMetrics(*[jnp.zeros(stored["step"])] * 2))
    if stored["kept"]:
        expand = functools.partial(step.expand, state.channels)
        arrays["kept"] = jax.tree.map(_packed_like, state.masks or jax.eval_shape(expand, state.scores))
    return arrays


def abstract_state(config: Config, problem: Problem, phase: str) -> TrainState:
    """Shapes and dtypes of the train state in a phase."""

    def make() -> TrainState:
        state = search.fixed_state(problem, problem.init_ticket())
        if phase != SEARCH or not METHODS[config.method].learns_masks:
            return state
        scores = first_scores(config, state.masks, state.channels)
        return step.init_state(problem.recipe, state.params, state.batch_stats, scores=scores, masks={})

    return jax.eval_shape(make)


def leaf_shapes(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of every array of a tree, by name, for example "float32[4]"."""
    leaves = trees.leaves_by_path(tree)
    return {trees.name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _packed_like(mask: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a mask as packed bits, eight entries per byte."""
    return jax.ShapeDtypeStruct((-(-mask.size // 8),), jnp.uint8)
