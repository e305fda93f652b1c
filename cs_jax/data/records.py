"""Files of a prepared split: random access to encoded examples, and error messages that name a damaged file."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cs_jax.core.errors import ConfigError

OTHER_FILES = 256
"""Files and sockets that a process may open in addition to its data."""

REPAIR = (
    "repair the file, or remove the data set and prepare it again; then the same command resumes an interrupted run "
    "from its last checkpoint"
)


class Shard(NamedTuple):
    """One file of a split."""

    path: Path
    examples: int  # number of examples in the file


@dataclass(frozen=True, eq=False)
class Records:
    """Encoded images and labels of a prepared split, with random access.

    Attributes:
        source: sequence of dictionaries with "image" (encoded bytes) and "label".
        dataset: name and version of the data set.
        split: name of the split.
        shards: files of the split, in order.
        num_classes: labels are 0 to `num_classes - 1`.
        image_shape: (height, width, channels) of every image; height and width are None if images differ.
    """

    source: Any
    dataset: str
    split: str
    shards: tuple[Shard, ...]
    num_classes: int
    image_shape: tuple[int | None, int | None, int]

    def __len__(self) -> int:
        return sum(shard.examples for shard in self.shards)

    def read(self, index: int) -> tuple[bytes, int]:
        """Encoded image and label of one example.

        Raises:
            ConfigError: the file cannot be read, or the example is damaged.
        """
        try:
            record = self.source[index]
        except Exception as error:
            raise self.unreadable(index, reason_of(error)) from error
        if not record["image"] or record["label"] is None:  # result of reading beyond the end of a truncated file
            raise self.unreadable(index, "the file no longer contains it")
        if not 0 <= record["label"] < self.num_classes:
            raise self.unreadable(index, f"label {record['label']} is not 0 to {self.num_classes - 1}")
        return record["image"], int(record["label"])

    def check(self) -> None:
        """Open every file and read its last example. Open files stay readable, even if they are removed.

        Raises:
            ConfigError: a file is missing or truncated; the message names the file.
        """
        last = [int(end) - 1 for end, shard in zip(self._ends(), self.shards, strict=True) if shard.examples]
        with ThreadPoolExecutor(16) as workers:
            list(workers.map(self.read, last))

    def unreadable(self, index: int, reason: str) -> ConfigError:
        """Error for an example that cannot be used; names the file."""
        path = self.shards[int(np.searchsorted(self._ends(), index, side="right"))].path
        return ConfigError(
            f"{path}: example {index} of {self.dataset}'s {self.split} split cannot be read ({reason}); {REPAIR}"
        )

    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.examples for shard in self.shards])


def allow_open_files(count: int) -> None:
    """Raise the process's limit of open files, often 1,024 by default, so that `count` more files can be opened.

    Raises:
        ConfigError: the system's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES + len(os.listdir("/dev/fd"))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(
            f"ulimit -n {hard}: must be at least {wanted}, because the data set has {count} files; raise the hard limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def reason_of(error: Exception) -> str:
    """Type and message of an error, in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
