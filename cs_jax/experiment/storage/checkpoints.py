"""Checkpoints: what a run saves to go on later, when it does, and how it is trusted again.

    checkpoints/snapshot/       the weights to rewind to, once they are taken
    checkpoints/start/          those that the ticket's retraining begins with, where they are others
    checkpoints/00003-000200/   3 epochs and 200 steps done, over all phases
        arrays/                 Orbax: state, masks of the last epoch, and figures of the epoch's steps so far
        progress.json           where the run stands
        SHA256SUMS              of every file, as `sha256sum` writes it

A checkpoint is written under another name and renamed when it is whole. It is read only if every byte of it is as it
was written.
"""

import functools
import json
import os
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from cs_jax.core import files
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError, CsJaxWarning
from cs_jax.experiment import search
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.metrics import step_figures
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.experiment.storage.checkpoint_integrity import (
    ARRAYS,
    CHECKSUMS,
    PARTIAL,
    PROGRESS,
    CheckpointError,
    check_free_space,
    checksums,
    file_hash,
    find_damage,
    quiet_logs,
    save_error,
)
from cs_jax.experiment.storage.progress_file import abstract_state, leaf_shapes, packed_like, progress_to_json
from cs_jax.methods import REWIND
from cs_jax.training import processes, step
from cs_jax.training.problem import Problem, Snapshot
from cs_jax.training.step import StepMetrics

SNAPSHOT, START = "snapshot", "start"

MAX_WAIT = 0.02
"""Share of its time that training may wait for checkpoints inside a phase."""


class DamagedCheckpointWarning(CsJaxWarning):
    """A checkpoint is not as it was written, and an earlier one is used."""


class Checkpoints(Observer):
    """Saves a run's progress in the background as it goes on.

    A context manager: at its end no save is under way.

    Args:
        config: how many are kept, and when they are saved.
        problem: model and data.
        folder: where they are; made with the first.
        metrics: the file with a line for every epoch that is done, which has to be on the disk before a checkpoint is.

    Attributes:
        waited: seconds that training has waited for them.

    Raises:
        CheckpointError: from any method, where a save failed: the disk is full, for instance.
    """

    def __init__(self, config: Config, problem: Problem, folder: Path, metrics: Path | None = None) -> None:
        self._config, self._problem, self._folder, self._metrics = config, problem, folder, metrics
        self._latest: Progress | None = None
        self._saved = ""
        self.waited = 0.0
        self._next = time.monotonic() + config.checkpoint_seconds
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        quiet_logs.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error, which tells enough, closing may fail by the same cause, and loggers and hook hear more later.
        try:
            self._finish()
            self._worker.shutdown()
            self._orbax.close()
        except OSError:
            if error is None:
                raise
        if error is None:
            quiet_logs.end()

    def on_steps(self, progress: Progress, total: int) -> None:
        self._latest = progress
        steps, before = self._config.checkpoint_steps, progress.step - progress.figures[-1].loss.size
        if progress.step // steps > before // steps and progress.step < total and self._due():
            search.check_finite(progress)
            self._save(progress)

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self._latest = progress
        if self._due():
            self._save(progress)

    def on_phase_end(self, progress: Progress) -> None:
        self._latest = progress
        self._save(progress)

    def save_latest(self) -> bool:
        """Saves where the run stands now, and waits for it. Whether there is a checkpoint to go on from.

        Raises:
            NonFiniteLossError: it is not worth saving.
        """
        if self._latest is not None:
            search.check_finite(self._latest)
            self._save(self._latest)
        self._finish()
        return bool(self._saved)

    def restore(self) -> Progress | None:
        """Where the newest checkpoint that is whole stood; None where there is none at all.

        What is damaged is told and removed if an earlier checkpoint can be used.

        Raises:
            ConfigError: there are checkpoints, but none can be used.

        Warns:
            DamagedCheckpointWarning: an earlier one than the newest is used.
        """
        name = processes.from_leader(self._choose)
        if name is None:
            return None
        self._saved = name
        return self._read(self._folder / name)

    def _choose(self) -> str | None:
        """The newest checkpoint that is whole; all that cannot be used beside it is removed."""
        for partial in self._folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(partial)
        damages: dict[Path, str] = {}
        newest = self._newest(damages)
        if newest is None and damages:
            path, reason = next(iter(damages.items()))
            raise ConfigError(
                f"{self._folder.parent}: has no checkpoint that can be used ({path.name}: {reason}): "
                f"remove {self._folder} to start anew"
            )
        for path, reason in damages.items():
            message = f"checkpoint {path.name} is damaged ({reason}): going on from {newest and newest.name}"
            warnings.warn(message, DamagedCheckpointWarning, stacklevel=4)
            shutil.rmtree(path)
        about = json.loads((newest / PROGRESS).read_text()) if newest else {"phase": SEARCH, "snapshot": None}
        if about["phase"] == SEARCH:  # what comes later is made again
            shutil.rmtree(self._folder / START, ignore_errors=True)
            if about["snapshot"] is None:
                shutil.rmtree(self._folder / SNAPSHOT, ignore_errors=True)
        return newest.name if newest else None

    def _newest(self, damages: dict[Path, str]) -> Path | None:
        """The newest checkpoint that is whole; what is wrong with those that are newer goes into `damages`."""
        for path in reversed(self._all()):
            damage = find_damage(path) or self._snapshot_damage(path)
            if damage is None:
                return path
            damages[path] = damage
        return None

    def _all(self) -> list[Path]:
        """All that have their name, the newest last."""
        found = [path for path in self._folder.glob("[0-9]*-[0-9]*") if path.suffix != PARTIAL]
        return sorted(found, key=lambda path: [int(number) for number in path.name.split("-")])

    def _due(self) -> bool:
        if self._pending is not None and self._pending.done():
            self._finish()
        is_due = self._pending is None and time.monotonic() >= self._next
        return bool(processes.agree(int(is_due and processes.is_leader())))

    def _save(self, progress: Progress) -> None:
        name = f"{progress.epochs_done(self._config):05d}-{progress.step:06d}"
        if name == self._saved:
            return
        started = time.monotonic()
        self._finish()
        snapshot = self._save_snapshot(progress)
        tree: dict[str, PyTree] = {"state": progress.state}
        if progress.figures:
            tree["figures"] = step_figures(progress)
        if progress.packed_masks is not None:
            tree["kept"] = progress.packed_masks
        about = json.dumps(progress_to_json(progress, snapshot), indent=2) + "\n"
        self._start(tree, self._folder / name, about)
        self._saved = name
        took = time.monotonic() - started
        self.waited += took
        self._next = started + max(self._config.checkpoint_seconds, took / MAX_WAIT)

    def _save_snapshot(self, progress: Progress) -> str | None:
        """Hash of the snapshot's checkpoint, which is made where it is not there yet."""
        if progress.snapshot is None:
            return None
        path = self._snapshot_path(progress.phase)
        if not processes.from_leader(path.exists):
            self._start(progress.snapshot._asdict(), path, "")
            self._finish()
        return processes.from_leader(lambda: file_hash(path / CHECKSUMS))

    def _snapshot_path(self, phase: str) -> Path:
        """Where the snapshot of a phase is: a search and a ticket rewound have the same."""
        rewinds = phase == SEARCH or self._config.retraining == REWIND
        return self._folder / (SNAPSHOT if rewinds else START)

    def _start(self, tree: PyTree, path: Path, about: str) -> None:
        """Begins to save in the background; arrays have left the device when this returns."""
        partial = path.with_name(path.name + PARTIAL)
        try:
            if processes.is_leader():
                shutil.rmtree(partial, ignore_errors=True)
                self._folder.mkdir(exist_ok=True)
                check_free_space(self._folder, tree)
            self._orbax.save((partial / ARRAYS).absolute(), args=ocp.args.StandardSave(tree))  # pyright: ignore
        except Exception as error:
            raise save_error(partial, error) from error
        self._pending = self._worker.submit(self._commit, partial, path, about)

    def _commit(self, partial: Path, path: Path, about: str) -> None:
        """Waits for the arrays, writes the rest, and gives the checkpoint its name."""
        try:
            self._orbax.wait_until_finished()
            if not processes.is_leader():
                return
            if about:
                (partial / PROGRESS).write_text(about)
            (partial / CHECKSUMS).write_text(checksums(partial))
            files.sync_below(partial)
            if self._metrics is not None:
                files.sync(self._metrics)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
            files.sync(self._folder)
            for old in self._all()[: -self._config.keep]:
                shutil.rmtree(old)
        except Exception as error:
            raise save_error(partial, error) from error

    def _finish(self) -> None:
        """Waits for the save that is under way, and raises what it failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except CheckpointError:
                self._saved = ""
                raise

    def _snapshot_damage(self, path: Path) -> str | None:
        about = json.loads((path / PROGRESS).read_text())
        wanted, snapshot = about["snapshot"], self._snapshot_path(about["phase"])
        if wanted is None:
            return None
        damage = find_damage(snapshot)
        if damage is None and file_hash(snapshot / CHECKSUMS) != wanted:
            damage = "of another run"
        return damage and f"its {snapshot.name}: {damage}"

    def _read(self, path: Path) -> Progress:
        about = json.loads((path / PROGRESS).read_text())
        state = abstract_state(self._config, self._problem, about["phase"])
        tree: dict[str, PyTree] = {"state": state}
        if about["step"]:
            tree["figures"] = jax.eval_shape(lambda: StepMetrics(*[jnp.zeros(about["step"])] * 2))
        if about["kept"]:
            spread = functools.partial(step.expand, state.channels)
            tree["kept"] = jax.tree.map(packed_like, state.masks or jax.eval_shape(spread, state.scores))
        arrays = self._read_arrays(path, tree)
        snapshot = None
        if about["snapshot"] is not None:
            like = Snapshot(state.params, state.batch_stats)
            snapshot = Snapshot(**on_host(self._read_arrays(self._snapshot_path(about["phase"]), like._asdict())))
        return Progress(
            phase=about["phase"],
            round=about["round"],
            epoch=about["epoch"],
            step=about["step"],
            state=arrays["state"],
            snapshot=snapshot,
            round_ends=tuple(EpochRecord(**record) for record in about["round_ends"]),
            figures=(arrays["figures"],) if about["step"] else (),
            seconds=about["seconds"],
            packed_masks=arrays.get("kept"),
        )

    def _read_arrays(self, path: Path, like: PyTree) -> PyTree:
        reason = self._find_mismatch(path, like)
        if reason:  # before Orbax reads: what it has begun to read goes on when it fails, and says so later
            raise ConfigError(f"{self._folder.parent}: its checkpoint {path.name} is of another network: {reason}")
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            self._problem.executor.shardings(like),
        )
        return self._orbax.restore((path / ARRAYS).absolute(), args=ocp.args.StandardRestore(placed))  # pyright: ignore

    def _find_mismatch(self, path: Path, like: PyTree) -> str | None:
        """The first array that was saved with another shape or dtype than in `like`, or in one of the two alone."""
        stored = self._orbax.metadata((path / ARRAYS).absolute()).item_metadata.tree  # pyright: ignore
        found, wanted = leaf_shapes(stored), leaf_shapes(like)
        wrong = next((name for name in found | wanted if found.get(name) != wanted.get(name)), None)
        return wrong and f"{wrong} is {found.get(wrong, 'missing')}, not {wanted.get(wrong, 'expected')}"
