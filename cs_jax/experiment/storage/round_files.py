"""Files with an entry per search round: histograms of scores, and hard masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from cs_jax.core import files, trees
from cs_jax.core.arrays import on_host
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import Progress
from cs_jax.experiment.storage.paths import MASKS_FILE, SCORES_FILE
from cs_jax.experiment.storage.score_histograms import SCORE_EDGES, score_counts


class ScoresFile:
    """scores.json: histograms of the scores at the start and end of each round.

    Args:
        directory: run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / SCORES_FILE

    def clear(self) -> None:
        """Writes the file without rounds."""
        self._write([])

    def num_rounds(self) -> int:
        """Number of rounds in the file; 0 if the file cannot be read."""
        return len(self._read())

    def add(self, config: Config, progress: Progress, when: str) -> None:
        """Adds histograms to a round, and removes later rounds, which an earlier process has written.

        A score that is shared by several weights is counted once for each weight.

        Args:
            config: settings of the run.
            progress: progress at the start or end of the round.
            when: "start" or "end".
        """
        rounds = self._read()
        number = progress.number(config)
        weights = trees.leaves_by_path(progress.state.params)
        entry: dict[str, Any] = {"round": number} if when == "start" else rounds[number]
        entry[when] = {
            trees.name(path): (score_counts(scores) * (weights[path].size // scores.size)).tolist()
            for path, scores in trees.leaves_by_path(progress.state.scores).items()
        }
        self._write([*rounds[:number], entry])

    def _read(self) -> list[dict[str, Any]]:
        """Entries of the rounds; [] if the file cannot be read."""
        try:
            rounds = json.loads(self._path.read_text())["rounds"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return rounds if isinstance(rounds, list) and all(isinstance(entry, dict) for entry in rounds) else []

    def _write(self, rounds: list[dict[str, Any]]) -> None:
        content = {"edges": SCORE_EDGES.tolist(), "rounds": rounds}
        files.write_whole(self._path, (json.dumps(content, indent=2) + "\n").encode())


class MasksFile:
    """masks.safetensors: packed bits of the hard masks at the end of each round, named "ROUND/LAYER".

    Args:
        directory: run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / MASKS_FILE

    def rounds(self) -> set[str]:
        """Numbers of the rounds in the file, as strings; empty if the file cannot be read."""
        return {name.partition("/")[0] for name in self._read()}

    def add(self, config: Config, progress: Progress) -> None:
        """Adds the masks at the end of a round."""
        number = progress.number(config)
        arrays = self._read() if number else {}
        masks = trees.leaves_by_path(progress.packed_masks)
        arrays |= {f"{number}/{trees.name(path)}": on_host(bits) for path, bits in masks.items()}
        files.write_whole(self._path, safetensors.numpy.save(arrays))

    def _read(self) -> dict[str, np.ndarray]:
        try:
            return safetensors.numpy.load_file(self._path)
        except (OSError, safetensors.SafetensorError):
            return {}
