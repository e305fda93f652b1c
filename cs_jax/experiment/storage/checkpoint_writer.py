"""Writing of checkpoints in the background."""

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import orbax.checkpoint as ocp
from jaxtyping import PyTree

from cs_jax.core import files
from cs_jax.experiment.storage.checkpoint_integrity import check_free_space, checksums, save_error
from cs_jax.experiment.storage.checkpoint_layout import ARRAYS, CHECKSUMS, PARTIAL, PROGRESS, list_checkpoints
from cs_jax.training import processes


class CheckpointWriter:
    """Saves one checkpoint at a time. A checkpoint has a temporary name until it is complete.

    Args:
        folder: folder of the checkpoints; created with the first checkpoint.
        orbax: writes the arrays.
        keep: number of newest checkpoints that are not deleted.
        metrics: file that must be on the disk before a checkpoint is complete; None for no file.
    """

    def __init__(self, folder: Path, orbax: ocp.AsyncCheckpointer, *, keep: int, metrics: Path | None) -> None:
        self._folder, self._orbax, self._keep, self._metrics = folder, orbax, keep, metrics
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    def start(self, name: str, tree: PyTree, about: str = "") -> None:
        """Starts to save a checkpoint; when this returns, all arrays are copied to the host.

        Args:
            name: name of the checkpoint.
            tree: arrays of the checkpoint.
            about: content of progress.json; "" writes no such file.

        Raises:
            CheckpointError: the save failed at its start, for example because the disk is full.
        """
        path = self._folder / name
        partial = path.with_name(path.name + PARTIAL)
        try:
            if processes.is_leader():
                shutil.rmtree(partial, ignore_errors=True)
                self._folder.mkdir(exist_ok=True)
                check_free_space(self._folder, tree)
            self._orbax.save((partial / ARRAYS).absolute(), args=ocp.args.StandardSave(tree))  # pyright: ignore
        except Exception as error:
            raise save_error(partial, error) from error
        self._pending = self._thread.submit(self._commit, partial, path, about)

    def wait(self) -> None:
        """Waits until no checkpoint is being written.

        Raises:
            CheckpointError: the save failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does, and ends the thread."""
        self.wait()
        self._thread.shutdown()

    def _commit(self, partial: Path, path: Path, about: str) -> None:
        """Waits for the arrays, writes the other files, renames the checkpoint, and deletes old checkpoints."""
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
            for old in list_checkpoints(self._folder)[: -self._keep]:
                shutil.rmtree(old)
        except Exception as error:
            raise save_error(partial, error) from error
