"""Saves and restores the checkpoints of a run."""

import json
import time
from pathlib import Path
from types import TracebackType

import orbax.checkpoint as ocp

from cs_jax.experiment import search
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.experiment.storage.checkpoint_integrity import CheckpointError, file_hash, quiet_logs
from cs_jax.experiment.storage.checkpoint_layout import CHECKSUMS, checkpoint_name, snapshot_path
from cs_jax.experiment.storage.checkpoint_reader import CheckpointReader
from cs_jax.experiment.storage.checkpoint_writer import CheckpointWriter
from cs_jax.experiment.storage.progress_file import arrays_of, progress_to_json
from cs_jax.training import processes
from cs_jax.training.problem import Problem

MAX_WAIT = 0.02
"""Largest share of the training time that may be spent waiting for checkpoints inside a phase."""


class Checkpoints(Observer):
    """Saves the checkpoints of a run in the background, and restores the newest one.

    Context manager; waits at its end for a running save.

    Args:
        config: gives the intervals between checkpoints and the number of checkpoints to keep.
        problem: model and data.
        folder: folder of the checkpoints; created with the first checkpoint.
        metrics: metrics.jsonl, which must be on the disk before a checkpoint is complete; None for no file.

    Attributes:
        waited: seconds that the training has waited for checkpoints.

    Raises:
        CheckpointError: from any method, if a save failed, for example because the disk is full.
    """

    def __init__(self, config: Config, problem: Problem, folder: Path, metrics: Path | None = None) -> None:
        self._config, self._folder = config, folder
        self._latest: Progress | None = None
        self._saved = ""
        self.waited = 0.0
        self._next = time.monotonic() + config.checkpoint_seconds
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._reader = CheckpointReader(config, problem, folder, self._orbax)
        self._writer = CheckpointWriter(folder, self._orbax, keep=config.keep, metrics=metrics)

    def __enter__(self) -> "Checkpoints":
        quiet_logs.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error, closing may fail for the same reason. Orbax may also log later, so logs stay silenced.
        try:
            self._writer.close()
            self._orbax.close()
        except OSError:
            if error is None:
                raise
        if error is None:
            quiet_logs.end()

    def on_steps(self, progress: Progress, total: int) -> None:
        self._latest = progress
        steps, before = self._config.checkpoint_steps, progress.step - progress.figures[-1].loss.size
        if progress.step // steps > before // steps and progress.step < total and self._is_due():
            search.check_finite(progress)
            self._save(progress)

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self._latest = progress
        if self._is_due():
            self._save(progress)

    def on_phase_end(self, progress: Progress) -> None:
        self._latest = progress
        self._save(progress)

    def save_latest(self) -> bool:
        """Saves the current progress and waits until it is on the disk. Returns False if there is no checkpoint.

        Raises:
            NonFiniteLossError: loss, weights or scores are not finite; nothing was saved.
        """
        if self._latest is not None:
            search.check_finite(self._latest)
            self._save(self._latest)
        self._wait()
        return bool(self._saved)

    def restore(self) -> Progress | None:
        """Progress of the newest intact checkpoint; None if there are no checkpoints.

        Damaged checkpoints are deleted if an earlier checkpoint is intact.

        Raises:
            ConfigError: all checkpoints are damaged, or the checkpoint belongs to another network.

        Warns:
            DamagedCheckpointWarning: the newest checkpoint is damaged; an earlier checkpoint is used.
        """
        name = processes.from_leader(self._reader.choose)
        if name is None:
            return None
        self._saved = name
        return self._reader.read(name)

    def _is_due(self) -> bool:
        busy = self._writer.is_busy
        if not busy:
            self._wait()  # raises the error of a failed save
        is_due = not busy and time.monotonic() >= self._next
        return bool(processes.agree(int(is_due and processes.is_leader())))

    def _save(self, progress: Progress) -> None:
        name = checkpoint_name(self._config, progress)
        if name == self._saved:
            return
        started = time.monotonic()
        self._wait()
        snapshot = self._save_snapshot(progress)
        about = json.dumps(progress_to_json(progress, snapshot), indent=2) + "\n"
        self._writer.start(name, arrays_of(progress), about)
        self._saved = name
        seconds = time.monotonic() - started
        self.waited += seconds
        self._next = started + max(self._config.checkpoint_seconds, seconds / MAX_WAIT)

    def _save_snapshot(self, progress: Progress) -> str | None:
        """Hash of the snapshot's file SHA256SUMS; None without a snapshot. Saves the snapshot if it is not saved."""
        if progress.snapshot is None:
            return None
        path = snapshot_path(self._config, self._folder, progress.phase)
        if not processes.from_leader(path.exists):
            self._writer.start(path.name, progress.snapshot._asdict())
            self._wait()
        return processes.from_leader(lambda: file_hash(path / CHECKSUMS))

    def _wait(self) -> None:
        try:
            self._writer.wait()
        except CheckpointError:
            self._saved = ""
            raise
