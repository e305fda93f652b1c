"""Continuous Sparsification in JAX: sparse networks from masks that are learned together with the weights.

Masked layers multiply their kernels by what they find in the "masks" collection; pure functions turn scores and a
temperature into masks; `search` runs the rounds.
"""

from cs_jax import models
from cs_jax.budget import CollapsedLayerWarning, DensityWarning, UnfinishedSearchWarning
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
from cs_jax.optim import continuous_sparsification, masked_params
from cs_jax.rounds import freeze_ticket, next_round, rewind, ticket_masks
from cs_jax.rules import Rule, describe, select
from cs_jax.schedules import temperature
from cs_jax.selection import Selection
from cs_jax.sparsify import sparsify
from cs_jax.state import SparsificationState, current_masks
from cs_jax.ticket import LoadedTicket, TicketError, load_ticket, save_ticket
from cs_jax.trees import apply_masks

__version__ = "0.1.0"

__all__ = [
    "Axes",
    "Block",
    "CollapsedLayerWarning",
    "DensityWarning",
    "Head",
    "LoadedTicket",
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
    "SparsificationState",
    "SpectralNorm",
    "TicketError",
    "UnfinishedSearchWarning",
    "WeightNorm",
    "apply_masks",
    "continuous_sparsification",
    "current_masks",
    "density",
    "describe",
    "freeze_ticket",
    "hard_mask",
    "init_scores",
    "load_ticket",
    "mask_penalty",
    "masked_params",
    "models",
    "next_round",
    "prune_scores",
    "rewind",
    "save_ticket",
    "select",
    "soft_mask",
    "sparsify",
    "temperature",
    "ticket_masks",
]
