"""Interface of data sources: a function that opens a data set and returns its splits."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from cs_jax.data.records import Records
from cs_jax.data.split import Split


@dataclass(frozen=True)
class Examples:
    """Splits of one data set.

    Attributes:
        splits: in the requested order; all in memory, or all in record files, to be streamed.
        classes: names of the classes; labels are indices into them.
    """

    splits: tuple[Split, ...] | tuple[Records, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A source of data sets.

    Attributes:
        opened: function of a config and names of splits, "train" or "test", that returns a context manager. The context
            yields the examples of these splits; record files can be read while the context is open. Raises ConfigError
            if the data set is unknown, missing, damaged or not suitable.
        can_stream: True if `opened` may yield record files. If False, settings for streaming raise a ConfigError.
    """

    opened: Callable[..., AbstractContextManager[Examples]]
    can_stream: bool = False
