"""Reads arrays that the authors' code produced, and gives the tolerances of comparisons with them.

The files hold layers (`layer_*.npz`), single steps of the ResNet-20 (`resnet_step_*.npz`) and whole miniature searches
(`search_*.npz`). They lie in the folder that CS_JAX_REFERENCE names, by default tests/golden/data.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax.data.images import ImageSet
from cs_jax.models import ResNet20
from cs_jax.training.step import Recipe, TrainState

FOLDER = Path(os.environ.get("CS_JAX_REFERENCE") or Path(__file__).parents[1] / "golden" / "data")
MEAN, STD = np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7])

# Tolerances of the largest difference over the largest magnitude, for a search without chaos. The file of a chaotic
# search has the sensitivity of each figure to a perturbation of 1e-14 or another order of summation. Other code cannot
# come closer than a multiple of that sensitivity.
TOLERANCES = {"after_step1": 1e-10, "after_step2": 1e-9, "checkpoint": 1e-9, "round0": 1e-8, "later": 1e-7}
MULTIPLE_OF_SENSITIVITY = 100.0


def files(pattern: str) -> list[Path]:
    """Reference files of one kind; the folder may lack a kind, but must not be empty."""
    assert list(FOLDER.glob("*.npz")), f"no reference files in {FOLDER}"
    return sorted(FOLDER.glob(pattern))


def searches() -> tuple[list[Path], list[Path]]:
    """Searches in float64, and in float32."""
    found = files("search_*.npz")
    single = [path for path in found if load(path)["after_step1/values"].dtype == np.float32]
    return [path for path in found if path not in single], single


def load(name: str | Path) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name, allow_pickle=False) as arrays:
        return dict(arrays)


def recipe(dtype: Any, num_classes: int = 10, decay: float = 1e-4) -> Recipe:
    return Recipe(ResNet20(num_classes=num_classes, dtype=dtype, param_dtype=dtype), augment="none", decay=decay)


def images(data: dict[str, np.ndarray], dtype: Any, prefix: str = "") -> ImageSet:
    pixels, labels = data[f"{prefix}images"], data[f"{prefix}labels"]
    constants = (jnp.asarray(MEAN, dtype), jnp.asarray(STD, dtype))
    return ImageSet(jnp.asarray(pixels), jnp.asarray(labels, jnp.int32), *constants)


def tree(arrays: dict[str, np.ndarray], leaves: tuple[str, ...], dtype: Any) -> dict[str, Any]:
    """Nested dict, with Flax's names, of the reference arrays whose last name is in `leaves`."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *modules, leaf = name.split("/")
        if leaf in leaves:
            node = nested
            for module in ("_".join(modules[:2]), *modules[2:]) if modules[0].startswith("stage") else modules:
                node = node.setdefault(module, {})
            node["kernel" if leaf == "scores" else leaf] = jnp.asarray(array, dtype)
    return nested


def names(nested: dict[str, Any], rename: str | None = None) -> dict[str, np.ndarray]:
    """Inverse of `tree`: reference name -> array; `rename` replaces the last part of each name."""
    flat = {}
    for path, array in jax.tree.leaves_with_path(nested):
        name = "/".join(key.key for key in path).replace("_block", "/block")
        flat[name if rename is None else f"{name.rpartition('/')[0]}/{rename}"] = np.array(array)
    return flat


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    return names(state.params) | names(state.batch_stats) | names(state.scores, "scores")


def momentum_arrays(state: TrainState) -> dict[str, np.ndarray]:
    weight_trace = state.weight_momentum[1].trace
    return names(weight_trace) | names(state.score_momentum.trace, "scores")


def distance(ours: Any, theirs: Any) -> float:
    """Largest difference over largest magnitude of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    largest = np.max(np.abs(theirs), initial=0.0)
    return float(np.max(np.abs(ours - theirs), initial=0.0) / (largest or 1.0))


def summary(array: np.ndarray) -> np.ndarray:
    flat = array.astype(np.float64).ravel()
    cosine = np.cos(np.arange(flat.size))
    return np.array([flat.sum(), np.abs(flat).sum(), np.sqrt((flat**2).sum()), (flat * cosine).sum()])


def assert_tensors(
    ours: dict[str, np.ndarray], index: dict[str, np.ndarray], values: np.ndarray, tolerances: np.ndarray
) -> None:
    """Every tensor of ours agrees, within its tolerance, with the values that the index places for it."""
    assert ours.keys() <= set(index["names"])
    for i, name in enumerate(index["names"]):
        if name in ours:
            theirs = values[index["offset"][i] : index["offset"][i + 1]]
            error = distance(ours[name].ravel()[:: index["stride"][i]], theirs)
            assert error <= tolerances[i], f"{name} differs by {error:.2e}, tolerance {tolerances[i]:.0e}"


def assert_summaries(
    ours: dict[str, np.ndarray], index: dict[str, np.ndarray], sums: np.ndarray, tolerances: np.ndarray
) -> None:
    """Four sums over each whole tensor agree: an error of the tolerance times the root mean square passes per entry."""
    assert ours.keys() <= set(index["names"])
    for name, theirs, tolerance in zip(index["names"], sums, tolerances, strict=True):
        if name in ours:
            scale = theirs[2] * np.sqrt(ours[name].size) or 1.0
            error = np.max(np.abs(summary(ours[name]) - theirs)) / scale
            assert error <= tolerance, f"sums of {name} differ by {error:.2e} of their scale, tolerance {tolerance:.0e}"


def index(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key: arrays[f"{prefix}/{key}"] for key in ("names", "shapes", "stride", "offset")}


def tolerance(arrays: dict[str, np.ndarray], figure: str, least: float) -> np.ndarray:
    """Tolerance of a figure of a search, of the shape in which its sensitivity is stored."""
    runs = [arrays[key] for run in ("perturb1e-14", "reordered") if (key := f"sens_{run}/{figure}") in arrays]
    return np.maximum(least, MULTIPLE_OF_SENSITIVITY * np.max(runs, axis=0)) if runs else np.asarray(least)
