"""Chooses the newest intact checkpoint, and restores it."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError, CsJaxWarning
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.progress import Progress
from cs_jax.experiment.storage.checkpoint_integrity import file_hash, find_damage
from cs_jax.experiment.storage.checkpoint_layout import (
    ARRAYS,
    CHECKSUMS,
    PARTIAL,
    PROGRESS,
    SNAPSHOT,
    START,
    list_checkpoints,
    snapshot_path,
)
from cs_jax.experiment.storage.progress_file import abstract_arrays, leaf_shapes, progress_from_json
from cs_jax.training.problem import Problem, Snapshot


class DamagedCheckpointWarning(CsJaxWarning):
    """A checkpoint is damaged; the run resumes from an earlier checkpoint."""


class CheckpointReader:
    """Chooses and restores checkpoints. A checkpoint is used only if all its files match their checksums.

    Args:
        config: settings of the run.
        problem: model and data; its executor places the arrays on devices.
        folder: folder of the checkpoints; may be missing.
        orbax: reads the arrays.
    """

    def __init__(self, config: Config, problem: Problem, folder: Path, orbax: ocp.AsyncCheckpointer) -> None:
        self._config, self._problem, self._folder, self._orbax = config, problem, folder, orbax

    def choose(self) -> str | None:
        """Name of the newest intact checkpoint; None if there are no checkpoints.

        Deletes partial and damaged checkpoints, and snapshots that are newer than the chosen checkpoint.

        Raises:
            ConfigError: all checkpoints are damaged; nothing was deleted except partial checkpoints.

        Warns:
            DamagedCheckpointWarning: for every damaged checkpoint that is newer than the chosen checkpoint.
        """
        for partial in self._folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(partial)
        newest, damages = self._find_newest()
        if newest is None and damages:
            path, reason = next(iter(damages.items()))
            raise ConfigError(
                f"--out {self._folder.parent}: no usable checkpoint ({path.name}: {reason}); "
                f"remove {self._folder} to start from scratch"
            )
        for path, reason in damages.items():
            message = f"checkpoint {path.name} is damaged ({reason}); resuming from {newest and newest.name}"
            warnings.warn(message, DamagedCheckpointWarning, stacklevel=4)
            shutil.rmtree(path)
        stored = json.loads((newest / PROGRESS).read_text()) if newest else {"phase": SEARCH, "snapshot": None}
        if stored["phase"] == SEARCH:  # newer snapshots: the run writes them again
            shutil.rmtree(self._folder / START, ignore_errors=True)
            if stored["snapshot"] is None:
                shutil.rmtree(self._folder / SNAPSHOT, ignore_errors=True)
        return newest.name if newest else None

    def read(self, name: str) -> Progress:
        """Progress that is stored in a checkpoint. All processes of the run must call this.

        Raises:
            ConfigError: the checkpoint belongs to another network.
        """
        path = self._folder / name
        stored = json.loads((path / PROGRESS).read_text())
        abstract = abstract_arrays(self._config, self._problem, stored)
        arrays = self._read_arrays(path, abstract)
        snapshot = None
        if stored["snapshot"] is not None:
            like = Snapshot(abstract["state"].params, abstract["state"].batch_stats)
            snapshot = Snapshot(**on_host(self._read_arrays(self._snapshot_path(stored["phase"]), like._asdict())))
        return progress_from_json(stored, arrays, snapshot)

    def _find_newest(self) -> tuple[Path | None, dict[Path, str]]:
        """The newest intact checkpoint, and the damage of each newer one."""
        damages: dict[Path, str] = {}
        for path in reversed(list_checkpoints(self._folder)):
            damage = find_damage(path) or self._find_snapshot_damage(path)
            if damage is None:
                return path, damages
            damages[path] = damage
        return None, damages

    def _find_snapshot_damage(self, path: Path) -> str | None:
        """Damage of the snapshot that an intact checkpoint needs; None if the snapshot is intact or not needed."""
        stored = json.loads((path / PROGRESS).read_text())
        expected, snapshot = stored["snapshot"], self._snapshot_path(stored["phase"])
        if expected is None:
            return None
        damage = find_damage(snapshot)
        if damage is None and file_hash(snapshot / CHECKSUMS) != expected:
            damage = "belongs to another run"
        return damage and f"its {snapshot.name}: {damage}"

    def _snapshot_path(self, phase: str) -> Path:
        return snapshot_path(self._config, self._folder, phase)

    def _read_arrays(self, path: Path, like: PyTree) -> PyTree:
        mismatch = self._find_mismatch(path, like)
        if mismatch:  # checked first: after a failed read, Orbax continues in the background and logs errors later
            raise ConfigError(
                f"--out {self._folder.parent}: checkpoint {path.name} belongs to another network ({mismatch}); "
                f"choose another --out, or remove {self._folder} to start from scratch"
            )
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            self._problem.executor.shardings(like),
        )
        arrays = self._orbax.restore((path / ARRAYS).absolute(), args=ocp.args.StandardRestore(placed))  # pyright: ignore
        if self._problem.executor.mesh_layout is None:  # not bound to a device, as in a new run: no retracing
            arrays = jax.tree.map(jnp.array, on_host(arrays))
        return arrays

    def _find_mismatch(self, path: Path, like: PyTree) -> str | None:
        """The first array whose stored shape or dtype differs from `like`, or that only one of the two has."""
        stored = self._orbax.metadata((path / ARRAYS).absolute()).item_metadata.tree  # pyright: ignore
        found, expected = leaf_shapes(stored), leaf_shapes(like)
        wrong = next((name for name in found | expected if found.get(name) != expected.get(name)), None)
        return wrong and f"{wrong} is {found.get(wrong, 'missing')}, must be {expected.get(wrong, 'absent')}"
