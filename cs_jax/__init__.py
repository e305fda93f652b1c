"""Continuous Sparsification in JAX: sparse networks from masks that are learned together with the weights.

`sparsify` and the masked layers multiply the weights of Flax modules by the arrays in the "masks" collection. Pure
functions turn scores and a temperature into masks. `continuous_sparsification` is an optax transformation for the
training loop of any JAX library. `save_ticket` and `load_ticket` store tickets. `python -m cs_jax train` runs a whole
search with rounds, rewinding and retraining. Masks for Flax NNX are in `cs_jax.nnx`, which `import cs_jax` does not
import.
"""
# ruff: noqa: E402

import signal
import sys

# `python -m cs_jax` imports this package, and with it JAX, before __main__.py. As in train.py, Ctrl-C ends the process
# at once until libraries are loaded. __main__.py then restores Python's handler. While Python looks for the module to
# run, sys.argv[0] is "-m", and sys.orig_argv has the name of the module just before the arguments. Other imports of
# this package change no handler.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)] in ("cs_jax", "-mcs_jax")
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from cs_jax import models
from cs_jax.core.describe import describe
from cs_jax.core.groups import NM, Axes, Block, Head
from cs_jax.core.masks import density, hard_mask, init_scores, mask_penalty, prune_scores, soft_mask
from cs_jax.core.rules import Rule, select
from cs_jax.core.schedules import temperature
from cs_jax.core.selection import Selection
from cs_jax.core.target_density import CollapsedLayerWarning, DensityWarning, UnfinishedSearchWarning
from cs_jax.core.trees import apply_masks
from cs_jax.core.version import __version__ as __version__
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
from cs_jax.layers.sparsify import sparsify
from cs_jax.optim.rounds import freeze_ticket, next_round, rewind, ticket_masks
from cs_jax.optim.state import SparsificationState, current_masks
from cs_jax.optim.transformation import continuous_sparsification, masked_params
from cs_jax.tickets.ticket import LoadedTicket, TicketError, load_ticket, save_ticket

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
