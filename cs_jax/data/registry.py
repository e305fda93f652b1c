"""Sources of data sets by the name of the data set (`--dataset`)."""

import functools

from cs_jax.data import digits, tfds
from cs_jax.data.source import Source

SOURCES: dict[str, Source] = {
    "digits": Source(digits.opened),
}
"""Sources by name of the data set; `FALLBACK` reads every other name."""

FALLBACK = Source(functools.partial(tfds.opened, other_names=tuple(SOURCES)), can_stream=True)
"""Source of every other name: TensorFlow Datasets."""


def source_of(dataset: str) -> Source:
    """Source of a data set, by the name in `Config.dataset`."""
    return SOURCES.get(dataset, FALLBACK)
