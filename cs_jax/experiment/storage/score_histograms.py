"""Histograms of mask scores, with the same bins for every run."""

import jax
import numpy as np

from cs_jax.core.arrays import on_host

_MAGNITUDES = np.logspace(-4, 4, 65)
SCORE_EDGES = np.concatenate([-_MAGNITUDES[::-1], [0.0], _MAGNITUDES])
"""Edges of the histogram bins: 0, and positive and negative edges from 1e-4 to 1e4, eight per decade."""


def score_counts(scores: jax.Array) -> np.ndarray:
    """Number of scores in each bin, (edges - 1,) integers. A bin includes its upper edge.

    Scores beyond the outer edges count in the outer bins, so the number of scores above 0 is exact.
    """
    values = np.clip(-on_host(scores).astype(np.float64).ravel(), -SCORE_EDGES[-1], SCORE_EDGES[-1])
    counts, _ = np.histogram(values, bins=-SCORE_EDGES[::-1])  # mirrored, because NumPy's bins include the lower edge
    return counts[::-1]
