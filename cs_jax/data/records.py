"""Files of a prepared split: encoded examples at random access, and what is said where one is damaged."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cs_jax.core.errors import ConfigError

OTHER_FILES = 256
"""Files and sockets that a process may come to have open beside its data."""

REPAIR = (
    "repair it, or remove the data set there and prepare it again; a run that has begun goes on from its last "
    "checkpoint, with the same command"
)


class Shard(NamedTuple):
    """A file of a split."""

    path: Path
    examples: int


@dataclass(frozen=True, eq=False)
class Records:
    """Encoded images and labels of a prepared split, at random access.

    Attributes:
        source: by index, a dictionary of "image" (encoded) and "label".
        dataset: its name and version.
        split: its name.
        shards: its files, in order.
        num_classes: labels are 0 to one less.
    """

    source: Any
    dataset: str
    split: str
    shards: tuple[Shard, ...]
    num_classes: int

    def __len__(self) -> int:
        return sum(shard.examples for shard in self.shards)

    def read(self, index: int) -> tuple[bytes, int]:
        """An example's encoded image and its label.

        Raises:
            ConfigError: its file cannot be read, or is damaged there.
        """
        try:
            record = self.source[index]
        except Exception as error:
            raise self.unreadable(index, reason_of(error)) from error
        if not record["image"] or record["label"] is None:  # what is read beyond the end of a file that was cut short
            raise self.unreadable(index, "the file has lost it")
        if not 0 <= record["label"] < self.num_classes:
            raise self.unreadable(index, f"label {record['label']}, wanted 0 to {self.num_classes - 1}")
        return record["image"], int(record["label"])

    def check(self) -> None:
        """Opens every file and reads its last example. What is open can be read on, even if it is removed.

        Raises:
            ConfigError: one is missing or cut short; says which.
        """
        last = [int(end) - 1 for end, shard in zip(self._ends(), self.shards, strict=True) if shard.examples]
        with ThreadPoolExecutor(16) as workers:
            list(workers.map(self.read, last))

    def unreadable(self, index: int, reason: str) -> ConfigError:
        """What is raised for an example that cannot be used."""
        path = self.shards[int(np.searchsorted(self._ends(), index, side="right"))].path
        return ConfigError(
            f"{path}: example {index} of {self.dataset}'s {self.split} split cannot be read ({reason}): {REPAIR}"
        )

    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.examples for shard in self.shards])


def allow_open_files(count: int) -> None:
    """Lets the process open so many files more; systems often allow 1,024 in all unless they are asked.

    Raises:
        ConfigError: it cannot be allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES + len(os.listdir("/dev/fd"))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(f"ulimit -n: got {hard} open files at most, wanted {wanted}: the data set has {count}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
