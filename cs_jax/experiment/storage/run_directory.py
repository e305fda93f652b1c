"""A run on disk: every file name, and what is written when."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from cs_jax.core import files, trees
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import Lock
from cs_jax.core.settings import flag
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.experiment.storage import config_file
from cs_jax.experiment.storage.paths import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    CONTROLS_FILE,
    LOCK_FILE,
    LOG_FILE,
    MASKS_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    SUMMARY_FILE,
    TICKET_FILE,
)
from cs_jax.experiment.storage.score_histograms import SCORE_EDGES, score_counts
from cs_jax.experiment.storage.versions import cores, versions
from cs_jax.methods import METHODS
from cs_jax.tickets.ticket import TicketError, load_ticket, save_ticket
from cs_jax.training import processes


def holds_run(path: Path) -> bool:
    """Whether a run has begun in a directory."""
    return os.path.exists(path / CONFIG_FILE)  # pathlib's raises on names that are too long


def check_same_config(config: Config) -> None:
    """Refuses to go on with the run in a config's directory if it was asked for something else.

    Raises:
        ConfigError: which flags differ, or what is wrong with the directory.
    """
    path = config.run_directory
    stored, asked = config_file.read_stored(path, "--out"), config_file.to_json(config)
    if stored.keys() != asked.keys():
        raise ConfigError(f"{path}: its {CONFIG_FILE} has other settings: made by another version; give another --out")
    differences = config_file.differences(stored, asked, flag)
    if differences:
        raise ConfigError(
            f"{path}: holds a run with other settings: {differences}; give another --out, or "
            f"--resume {path} alone to go on with it"
        )


def check_free(config: Config) -> None:
    """Refuses, before any work is done, a directory that no run can begin in; makes nothing.

    Raises:
        ConfigError: it exists and is not empty, is no folder, or cannot be written.
    """
    path = config.run_directory
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out: got {path}, which is a file, wanted a folder")
        if path.is_dir() and not all(_is_left_over(entry) for entry in path.iterdir()):
            raise ConfigError(
                f"--out: got {path}, which is not empty and holds no run, wanted an empty or new folder: "
                "give another --out"
            )
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise ConfigError(f"--out: got {path}, which cannot be used: {error.strerror}") from error
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ConfigError(f"--out: got {path}, which cannot be made: {nearest} is no folder that can be written")


def _is_left_over(path: Path) -> bool:
    """Whether a process that was killed before its run had begun can have made this."""
    return path.name in (LOCK_FILE, LOG_FILE, METRICS_FILE, SCORES_FILE) or files.is_temporary(path)


@contextlib.contextmanager
def open_run_directory(config: Config, *, new: bool) -> Iterator["RunDirectory"]:
    """A run's directory, locked for this process: an empty one to begin in, or that of a run to go on with.

    Raises:
        ConfigError: the directory or a file in it cannot be made, or another process writes to it.
    """
    with contextlib.ExitStack() as stack:
        processes.from_leader(lambda: _enter(config.run_directory, stack, new=new))
        path = config.run_directory
        if processes.agree(0 if path.is_dir() else 1):
            stack.close()
            if new and processes.is_leader():
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise ConfigError(f"--out: got {path}, which not every process sees, wanted a folder that all hosts share")
        yield RunDirectory(config) if processes.is_leader() else FollowerRunDirectory(config)


def _enter(path: Path, stack: contextlib.ExitStack, *, new: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: got {path}, which cannot be made: {error.strerror}") from error
    stack.enter_context(Lock(path / LOCK_FILE))
    if new and holds_run(path):
        raise ConfigError(f"--out: got {path}, where another process has just begun a run")
    for entry in filter(files.is_temporary, path.iterdir()):
        entry.unlink()


def list_files(path: Path) -> list[str]:
    """Names of the files and folders in a run directory, without the lock."""
    return sorted(entry.name for entry in path.glob("[!.]*") if entry.name != LOCK_FILE)


class RunDirectory(Observer):
    """Writes a run's files as it goes on.

    config.json is there from the start; metrics.jsonl grows by a line an epoch, scores.json by the histograms of a
    round; the ticket, what it predicts and summary.json come last.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.path = config.run_directory

    def begin(self, fingerprint: str) -> None:
        """Writes what is known before the first step.

        Args:
            fingerprint: of the data.

        Raises:
            ConfigError: it cannot be written.
        """
        asked = {**config_file.to_json(self._config), "data": fingerprint, "versions": versions() | cores()}
        try:
            (self.path / METRICS_FILE).write_bytes(b"")
            self._write_rounds([])
            self._write_json(CONFIG_FILE, asked)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}") from error

    def check_same_data(self, fingerprint: str) -> dict[str, tuple[str, str]]:
        """Versions that differ from those that the run began with, as (what it began with, what this is).

        Raises:
            ConfigError: these are not the data that it began with.
        """
        began = json.loads((self.path / CONFIG_FILE).read_text())
        if began["data"] != fingerprint:
            raise ConfigError(
                f"--data-dir: got other examples of {self._config.dataset} than {self.path} began with, wanted the same"
            )
        now = versions() | cores()
        return {
            name: (began["versions"].get(name, "none"), now[name])
            for name in now
            if began["versions"].get(name) != now[name]
        }

    def truncate_to(self, progress: Progress | None) -> None:
        """Takes back what was written after a checkpoint: those epochs come again.

        Raises:
            ConfigError: metrics.jsonl lacks epochs that are done.
        """
        wanted = 0 if progress is None else progress.epochs_done(self._config)
        path = self.path / METRICS_FILE
        text = path.read_bytes() if path.exists() else b""
        lines = text.splitlines(keepends=True)[:wanted]
        if len(lines) < wanted or not all(map(_is_record, lines)):
            raise ConfigError(
                f"{self.path}: its {METRICS_FILE} is damaged: it lacks some of the {wanted} epochs done; "
                f"remove {CHECKPOINTS_FOLDER} there to start anew"
            )
        with open(path, "ab") as file:
            file.truncate(sum(map(len, lines)))
        if progress is None:
            self._write_rounds([])
        elif METHODS[self._config.method].learns_masks and len(self._rounds()) <= (progress.round or 0):
            raise ConfigError(
                f"{self.path}: its {SCORES_FILE} lacks rounds that are done; remove {CHECKPOINTS_FOLDER} there to "
                "start anew"
            )

        self._check_other_files(progress)

    def _check_other_files(self, progress: Progress | None) -> None:
        """Refuses files that lack what phases before have found, which nothing could make again."""
        if progress is None:
            return
        lacking = []
        again = progress.round if progress.epoch == self._config.epochs else None  # whose masks are written once more
        found = {name.partition("/")[0] for name in self._read_masks()}
        if any(str(number) not in found for number in range(len(progress.round_ends)) if number != again):
            lacking.append(MASKS_FILE)
        if progress.phase in self._config.trained_controls:
            done = self._config.trained_controls[: self._config.trained_controls.index(progress.phase)]
            lacking += [CONTROLS_FILE for name in done if name not in self.read_controls()]
        if lacking:
            raise ConfigError(
                f"{self.path}: its {lacking[0]} lacks what has been found before; remove {CHECKPOINTS_FOLDER} there to "
                "start anew"
            )

    def on_phase_start(self, progress: Progress) -> None:
        if progress.state.scores and progress.epoch == progress.step == 0:
            self._add_scores(progress, "start")

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        with open(self.path / METRICS_FILE, "a") as file:
            file.write(json.dumps(record._asdict()) + "\n")

    def on_phase_end(self, progress: Progress) -> None:
        if progress.round is not None:
            self._add_masks(progress)
        if progress.state.scores:
            self._add_scores(progress, "end")

    def _add_scores(self, progress: Progress, when: str) -> None:
        """Adds the histograms of a round's start or end, in place of what a process that ended has left of it.

        They count weights: a score that stands for several counts as often.
        """
        rounds = self._rounds()
        number = progress.number(self._config)
        weights = trees.leaves_by_path(progress.state.params)
        entry: dict[str, Any] = {"round": number} if when == "start" else rounds[number]
        entry[when] = {
            trees.name(path): (score_counts(scores) * (weights[path].size // scores.size)).tolist()
            for path, scores in trees.leaves_by_path(progress.state.scores).items()
        }
        self._write_rounds([*rounds[:number], entry])

    def _add_masks(self, progress: Progress) -> None:
        """Adds the masks that a round has ended with, after those of the rounds before it."""
        number = progress.number(self._config)
        arrays = self._read_masks() if number else {}
        found = trees.leaves_by_path(progress.packed_masks)
        arrays |= {f"{number}/{trees.name(leaf)}": on_host(bits) for leaf, bits in found.items()}
        files.write_whole(self.path / MASKS_FILE, safetensors.numpy.save(arrays))

    def _read_masks(self) -> dict[str, np.ndarray]:
        """Packed masks of the rounds so far, by round and name; nothing where they cannot be read."""
        try:
            return safetensors.numpy.load_file(self.path / MASKS_FILE)
        except (OSError, safetensors.SafetensorError):
            return {}

    def _rounds(self) -> list[dict[str, Any]]:
        """What scores.json has of each round; nothing where it cannot be read."""
        try:
            rounds = json.loads((self.path / SCORES_FILE).read_text())["rounds"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return rounds if isinstance(rounds, list) and all(isinstance(entry, dict) for entry in rounds) else []

    def _write_rounds(self, rounds: list[dict[str, Any]]) -> None:
        self._write_json(SCORES_FILE, {"edges": SCORE_EDGES.tolist(), "rounds": rounds})

    def seconds(self, *phases: str) -> float:
        """Training and validation, over the epochs in metrics.jsonl of some phases, or of all where none is named."""
        epochs = map(json.loads, (self.path / METRICS_FILE).read_text().splitlines())
        return sum(epoch["seconds"] for epoch in epochs if not phases or epoch["phase"] in phases)

    def write_ticket(self, **content: Any) -> None:
        """Writes the ticket: the keywords of `save_ticket`."""
        save_ticket(self.path / TICKET_FILE, **content)

    def write_predictions(self, arrays: Mapping[str, np.ndarray]) -> None:
        files.write_whole(self.path / PREDICTIONS_FILE, safetensors.numpy.save(dict(arrays)))

    def read_controls(self) -> dict[str, Any]:
        """What `write_controls` wrote; {} where it cannot be read."""
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
    """The directory of a run as those processes have it that do not lead: they read the ticket, and write nothing."""

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
    """The result of the finished run in a directory; None while it is not finished.

    Raises:
        ConfigError: it, or the ticket, is damaged; says how to make it again.
    """
    try:
        summary = json.loads((path / SUMMARY_FILE).read_text())
        if not {"search", "ticket", "dense"} <= summary.keys():
            raise ValueError("it lacks results")
        load_ticket(path / TICKET_FILE)
    except FileNotFoundError:
        return None
    except (TicketError, ValueError, AttributeError) as error:
        made_again = f"remove {path / SUMMARY_FILE}, and the same command makes the end again from its last checkpoint"
        what = error if isinstance(error, TicketError) else f"{path}: its {SUMMARY_FILE} is damaged"
        raise ConfigError(f"{what}; {made_again}") from error
    return summary
