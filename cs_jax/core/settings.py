"""Names of flags and checks of numbers, shared by all config classes."""

import numpy as np


def flag(name: str) -> str:
    """A field's flag: `--batch-size` of `batch_size`."""
    return "--" + name.replace("_", "-")


def is_finite(value: float) -> bool:
    """Whether a number is finite in float32, in which the network computes."""
    return abs(value) <= float(np.finfo(np.float32).max)


def is_positive(value: float) -> bool:
    return is_finite(value) and value >= float(np.finfo(np.float32).tiny)
