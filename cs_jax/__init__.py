"""Continuous Sparsification in JAX: sparse networks from masks that are learned together with the weights.

Masked layers multiply their kernels by what they find in the "masks" collection; pure functions turn scores and a
temperature into masks; `search` runs the rounds.
"""

from cs_jax import models
from cs_jax.groups import NM, Axes, Block, Head
from cs_jax.layers import (
    Masked,
    MaskedConv,
    MaskedConvLocal,
    MaskedConvTranspose,
    MaskedDense,
    MaskedDenseGeneral,
    MaskedEinsum,
    MaskedEmbed,
    SpectralNorm,
    WeightNorm,
)
from cs_jax.masks import (
    density,
    hard_mask,
    init_scores,
    mask_penalty,
    prune_scores,
    soft_mask,
)
from cs_jax.rules import Rule, describe, select
from cs_jax.schedules import temperature
from cs_jax.selection import Selection
from cs_jax.trees import apply_masks

__version__ = "0.1.0"

__all__ = [
    "Axes",
    "Block",
    "Head",
    "Masked",
    "MaskedConv",
    "MaskedConvLocal",
    "MaskedConvTranspose",
    "MaskedDense",
    "MaskedDenseGeneral",
    "MaskedEinsum",
    "MaskedEmbed",
    "NM",
    "Rule",
    "Selection",
    "SpectralNorm",
    "WeightNorm",
    "apply_masks",
    "density",
    "describe",
    "hard_mask",
    "init_scores",
    "mask_penalty",
    "models",
    "prune_scores",
    "select",
    "soft_mask",
    "temperature",
]
