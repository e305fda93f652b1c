"""Directory of a run: locked and written during the run. Resuming a run removes the metrics after its checkpoint."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from cs_jax.core import files
from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import Lock
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.experiment.storage import config_file
from cs_jax.experiment.storage.directory_checks import holds_run
from cs_jax.experiment.storage.paths import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    CONTROLS_FILE,
    LOCK_FILE,
    MASKS_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    SUMMARY_FILE,
    TICKET_FILE,
)
from cs_jax.experiment.storage.round_files import MasksFile, ScoresFile
from cs_jax.experiment.storage.versions import cores, versions
from cs_jax.methods import METHODS
from cs_jax.tickets.ticket import TicketError, load_ticket, save_ticket
from cs_jax.training import processes


@contextlib.contextmanager
def open_run_directory(config: Config, *, new: bool) -> Iterator["RunDirectory"]:
    """Context manager: the run directory of a config, locked for this process.

    Args:
        config: settings of the run.
        new: True to start a run in an empty or new directory, False to use the directory of an existing run.

    Raises:
        ConfigError: the directory or a file in it cannot be created, the directory is not visible to every process, or
            another process uses it or has just started a run there.
    """
    with contextlib.ExitStack() as stack:
        processes.from_leader(lambda: _enter(config.run_directory, stack, new=new))
        path = config.run_directory
        if processes.agree(0 if path.is_dir() else 1):
            stack.close()
            if new and processes.is_leader():
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise ConfigError(f"--out {path}: not visible to every process; choose a directory that all hosts share")
        yield RunDirectory(config) if processes.is_leader() else FollowerRunDirectory(config)


def _enter(path: Path, stack: contextlib.ExitStack, *, new: bool) -> None:
    """Creates and locks a run directory, and deletes the temporary files of a killed process."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be created: {error.strerror}; choose another directory") from error
    stack.enter_context(Lock(path / LOCK_FILE))
    if new and holds_run(path):
        raise ConfigError(f"--out {path}: another process has just started a run there; choose another directory")
    for entry in filter(files.is_temporary, path.iterdir()):
        entry.unlink()


def list_files(path: Path) -> list[str]:
    """Names of the files and folders in a run directory, without the lock."""
    return sorted(entry.name for entry in path.glob("[!.]*") if entry.name != LOCK_FILE)


class RunDirectory(Observer):
    """Writes the files of a run.

    config.json is written at the start. metrics.jsonl gets a line per epoch. scores.json and masks.safetensors get an
    entry per round. The ticket, its predictions and summary.json are written last.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.path = config.run_directory
        self._scores, self._masks = ScoresFile(self.path), MasksFile(self.path)

    def begin(self, fingerprint: str) -> None:
        """Writes config.json, an empty metrics.jsonl, and a scores.json without rounds.

        Args:
            fingerprint: hash of the data.

        Raises:
            ConfigError: a file cannot be written.
        """
        stored = {**config_file.to_json(self._config), "data": fingerprint, "versions": versions() | cores()}
        try:
            (self.path / METRICS_FILE).write_bytes(b"")
            self._scores.clear()
            self._write_json(CONFIG_FILE, stored)
        except OSError as error:
            message = f"--out {self.path}: cannot be written: {error.strerror}; choose another directory"
            raise ConfigError(message) from error

    def check_same_data(self, fingerprint: str) -> dict[str, tuple[str, str]]:
        """Checks that the data is the same as at the start of the run.

        Args:
            fingerprint: hash of the data.

        Returns:
            Versions that have changed since the start, by name, as (version at the start, version now).

        Raises:
            ConfigError: the data differs.
        """
        stored = json.loads((self.path / CONFIG_FILE).read_text())
        if stored["data"] != fingerprint:
            dataset = self._config.dataset
            raise ConfigError(
                f"--dataset {dataset}: its examples differ from the examples at the start of {self.path}; "
                "use --data-dir with the same data"
            )
        before, now = stored["versions"], versions() | cores()
        return {name: (before.get(name, "none"), now[name]) for name in now if before.get(name) != now[name]}

    def truncate_to(self, progress: Progress | None) -> None:
        """Removes metrics of epochs after a checkpoint, because these epochs are trained again; checks the other files.

        Args:
            progress: progress of the checkpoint; None removes the metrics of all epochs, and all score histograms.

        Raises:
            ConfigError: a file lacks finished epochs, rounds or controls, which cannot be written again.
        """
        self._truncate_metrics(0 if progress is None else progress.epochs_done(self._config))
        if progress is None:
            self._scores.clear()
            return
        if METHODS[self._config.method].learns_masks and self._scores.num_rounds() <= (progress.round or 0):
            raise self._lacks(f"its {SCORES_FILE} lacks finished rounds")
        self._check_other_files(progress)

    def _truncate_metrics(self, epochs: int) -> None:
        """Keeps the first `epochs` lines of metrics.jsonl."""
        path = self.path / METRICS_FILE
        text = path.read_bytes() if path.exists() else b""
        lines = text.splitlines(keepends=True)[:epochs]
        if len(lines) < epochs or not all(map(_is_record, lines)):
            raise self._lacks(f"its {METRICS_FILE} is damaged: not all {epochs} finished epochs have a valid line")
        with open(path, "ab") as file:
            file.truncate(sum(map(len, lines)))

    def _check_other_files(self, progress: Progress) -> None:
        """Checks that masks and controls of finished phases are in their files."""
        # If the checkpoint is at the end of a round, resuming writes the masks of this round again.
        rewritten = progress.round if progress.epoch == self._config.epochs else None
        stored = self._masks.rounds()
        if any(str(number) not in stored for number in range(len(progress.round_ends)) if number != rewritten):
            raise self._lacks(f"its {MASKS_FILE} lacks finished rounds")
        names = self._config.trained_controls
        done = names[: names.index(progress.phase)] if progress.phase in names else ()
        if not set(done) <= self.read_controls().keys():
            raise self._lacks(f"its {CONTROLS_FILE} lacks finished controls")

    def _lacks(self, fault: str) -> ConfigError:
        return ConfigError(f"--out {self.path}: {fault}; remove {self.path / CHECKPOINTS_FOLDER} to start from scratch")

    def on_phase_start(self, progress: Progress) -> None:
        if progress.state.scores and progress.epoch == progress.step == 0:
            self._scores.add(self._config, progress, "start")

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        with open(self.path / METRICS_FILE, "a") as file:
            file.write(json.dumps(record._asdict()) + "\n")

    def on_phase_end(self, progress: Progress) -> None:
        if progress.round is not None:
            self._masks.add(self._config, progress)
        if progress.state.scores:
            self._scores.add(self._config, progress, "end")

    def seconds(self, *phases: str) -> float:
        """Seconds of training and validation in metrics.jsonl, summed over the given phases; by default over all."""
        epochs = map(json.loads, (self.path / METRICS_FILE).read_text().splitlines())
        return sum(epoch["seconds"] for epoch in epochs if not phases or epoch["phase"] in phases)

    def write_ticket(self, **content: Any) -> None:
        """Writes the ticket; takes the keyword arguments of `save_ticket`."""
        save_ticket(self.path / TICKET_FILE, **content)

    def write_predictions(self, arrays: Mapping[str, np.ndarray]) -> None:
        files.write_whole(self.path / PREDICTIONS_FILE, safetensors.numpy.save(dict(arrays)))

    def read_controls(self) -> dict[str, Any]:
        """Results of the controls, by name of the control; {} if the file cannot be read."""
        try:
            results = json.loads((self.path / CONTROLS_FILE).read_text())
        except (OSError, ValueError):
            return {}
        return results if isinstance(results, dict) else {}

    def write_controls(self, results: Mapping[str, Any]) -> None:
        self._write_json(CONTROLS_FILE, results)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write_json(SUMMARY_FILE, summary)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        files.write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())


class FollowerRunDirectory(RunDirectory):
    """Run directory in processes other than the leader: methods for results read and write nothing.

    Only the leader may call `begin`, `truncate_to`, `check_same_data` and the methods of `Observer`.
    """

    def seconds(self, *phases: str) -> float:
        del phases
        return 0.0

    def read_controls(self) -> dict[str, Any]:
        return {}

    def write_controls(self, results: Mapping[str, Any]) -> None:
        del results

    def write_predictions(self, arrays: Mapping[str, np.ndarray]) -> None:
        del arrays

    def write_ticket(self, **content: Any) -> None:
        del content

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        del summary


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line).keys() == set(EpochRecord._fields)
    except (ValueError, AttributeError):
        return False


def read_summary(path: Path) -> dict[str, Any] | None:
    """Content of summary.json in a run directory; None if the run is not finished.

    Raises:
        ConfigError: summary.json or the ticket is damaged.
    """
    try:
        summary = json.loads((path / SUMMARY_FILE).read_text())
        if not {"search", "ticket", "dense"} <= summary.keys():
            raise ValueError("results are missing")
        load_ticket(path / TICKET_FILE)
    except FileNotFoundError:
        return None
    except (TicketError, ValueError, AttributeError) as error:
        fault = error if isinstance(error, TicketError) else f"{path}: its {SUMMARY_FILE} is damaged"
        advice = f"remove {path / SUMMARY_FILE} and run the same command to resume from the last checkpoint"
        raise ConfigError(f"{fault}; {advice}") from error
    return summary
