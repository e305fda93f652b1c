"""Settings and fixtures that several test modules share."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cs_jax.images import ImageSet
from cs_jax.models import LeNet300100
from cs_jax.search import Problem
from cs_jax.training import Recipe

jax.config.update("jax_numpy_rank_promotion", "raise")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_platforms", "cpu")  # the tests count one call a step, and float64 parity
jax.config.update("jax_num_cpu_devices", 8)  # simulated ones, for the tests of several

# Processes that the tests start keep their programs for each other, and leave the user's alone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module() -> Iterator[None]:
    """A module's programs end with it: each takes some of the memory maps, of which a process has 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX's 64-bit mode, for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def synthetic() -> ImageSet:
    """37 grey 6x6 images of four classes that a linear layer can tell apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(37) % 4
    images = rng.integers(0, 60, (37, 6, 6, 1))
    images[np.arange(37), labels] += 150
    return ImageSet(
        images=jnp.asarray(images, jnp.uint8),
        labels=jnp.asarray(labels, jnp.int32),
        mean=jnp.array([60.0]),
        std=jnp.array([60.0]),
    )


@pytest.fixture
def lenet() -> Recipe:
    return Recipe(LeNet300100(num_classes=4), augment="flip-crop", decay=1e-3)


@pytest.fixture
def problem(lenet: Recipe, synthetic: ImageSet) -> Problem:
    return Problem(lenet, synthetic, validation=synthetic, key=jax.random.key(3))
