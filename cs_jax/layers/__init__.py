"""Masked Linen layers, and sparse forms of any Linen module.

This package is for Linen modules that more than one network uses: layers that multiply weights by masks, and layers
that replace Flax layers (BatchNorm as in PyTorch, convolution that trains fast on a CPU). Layers do not use scores,
temperatures or rounds. Whole networks are in `models`, and NNX modules in `cs_jax.nnx`.
"""

from cs_jax.layers.masked import (
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

__all__ = [
    "Masked",
    "MaskedConv",
    "MaskedConvLocal",
    "MaskedConvTranspose",
    "MaskedDense",
    "MaskedDenseGeneral",
    "MaskedEinsum",
    "MaskedEmbed",
    "SpectralNorm",
    "WeightNorm",
]
