"""Settings and fixtures that several test modules share."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX's 64-bit mode, for one test."""
    with jax.enable_x64(True):
        yield
