"""Histograms of mask scores, with the same bins for every run."""

import jax
import numpy as np

from cs_jax.core.arrays import on_host

_MAGNITUDES = np.logspace(-4, 4, 65)
SCORE_EDGES = np.concatenate([-_MAGNITUDES[::-1], [0.0], _MAGNITUDES])
"""Edges of the histograms of scores: eight a decade on either side of 0, so that runs can be compared."""


def score_counts(scores: jax.Array) -> np.ndarray:
    """How many scores lie between two neighbours of `SCORE_EDGES`, the upper one included; (edges - 1,) integers.

    Scores beyond the outer edges count in the outer bins, so those above 0 are counted to the one.
    """
    values = np.clip(-on_host(scores).astype(np.float64).ravel(), -SCORE_EDGES[-1], SCORE_EDGES[-1])
    counts, _ = np.histogram(values, bins=-SCORE_EDGES[::-1])  # NumPy's bins include the lower edge: mirrored
    return counts[::-1]
