"""The public names: what `cs_jax` exports, and the modules that users import."""

import importlib

import pytest

import cs_jax

NAMES = """
    Axes Block CollapsedLayerWarning DensityWarning Head LoadedTicket Masked MaskedConv MaskedConvLocal
    MaskedConvTranspose MaskedDense MaskedDenseGeneral MaskedEinsum MaskedEmbed NM Rule Selection SparsificationState
    SpectralNorm TicketError UnfinishedSearchWarning WeightNorm apply_masks continuous_sparsification current_masks
    density describe freeze_ticket hard_mask init_scores load_ticket mask_penalty masked_params models next_round
    prune_scores rewind save_ticket select soft_mask sparsify temperature ticket_masks
"""


def test_the_package_exports_these_names_and_no_others() -> None:
    assert cs_jax.__all__ == NAMES.split()
    assert all(hasattr(cs_jax, name) for name in cs_jax.__all__)


@pytest.mark.parametrize(
    "module, name",
    [
        ("cs_jax", "__version__"),
        ("cs_jax.layers", "MaskedDense"),
        ("cs_jax.methods", "METHODS"),
        ("cs_jax.models", "MODELS"),
        ("cs_jax.nnx", "sparsify"),
    ],
)
def test_public_modules_can_be_imported_by_these_paths(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)
