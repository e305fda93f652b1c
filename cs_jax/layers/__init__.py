"""Masked Linen layers, and any Linen module made sparse."""

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
