"""Settings and fixtures that several test modules share."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cs_jax.data.images import ImageSet
from cs_jax.models import LeNet300100
from cs_jax.training import compile_cache
from cs_jax.training.problem import Problem
from cs_jax.training.step import Recipe

jax.config.update("jax_numpy_rank_promotion", "raise")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_platforms", "cpu")  # the tests count one call a step, and float64 parity
jax.config.update("jax_num_cpu_devices", 8)  # simulated ones, for the tests of several

# Compiled programs are kept from one run of the tests to the next, in a folder for each JAX version and kind of
# processor. JAX reads its folder from an environment variable, which the processes that tests start inherit.
KIND = f"jax-{jax.__version__}-{compile_cache.processor()}"
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs" / KIND
os.environ.setdefault(compile_cache.VARIABLE, str(PROGRAMS))
jax.config.update("jax_compilation_cache_dir", os.environ[compile_cache.VARIABLE])
for name in ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"):
    os.environ[name.upper()] = "0"
    jax.config.update(name, 0)

# Nothing is read from the user's own cache, or written there.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def selects_tests(config: pytest.Config) -> bool:
    """True where the command line selects tests: with -k, a file or a test id."""
    words = [word.partition("::")[0] for word in config.invocation_params.args]
    return bool(config.option.keyword) or any(word.endswith(".py") for word in words)


def pytest_configure(config: pytest.Config) -> None:
    """Runs slow tests that the command line selects, unless its -m says otherwise."""
    is_worker = hasattr(config, "workerinput")  # has the options of the process that started it
    expressions = [word for word in config.invocation_params.args if word.startswith("-m")]
    if not is_worker and selects_tests(config) and not expressions:
        config.option.markexpr = ""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process, without workers, for a few selected tests; otherwise one worker per core."""
    return 0 if selects_tests(config) else None


OPTIMIZED = {"commands", "end_to_end", "golden", "sweep", "tests", "training"}
"""Folders whose tests compile as in a user's program: they are about rounding, memory, or runs in other processes."""


@pytest.fixture(autouse=True, scope="module")
def compiled_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles faster and optimizes less outside OPTIMIZED, and frees compiled programs after each module.

    Compiled programs use memory maps, of which a process has 65,530.
    """
    jax.config.update("jax_disable_most_optimizations", request.path.parent.name not in OPTIMIZED)
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX's 64-bit mode, for one test."""
    with jax.enable_x64(True):
        yield


def four_classes(count: int) -> ImageSet:
    """Grey 6x6 images of four classes that a linear layer can tell apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 4
    images = rng.integers(0, 60, (count, 6, 6, 1))
    images[np.arange(count), labels] += 150
    return ImageSet(
        images=jnp.asarray(images, jnp.uint8),
        labels=jnp.asarray(labels, jnp.int32),
        mean=jnp.array([60.0]),
        std=jnp.array([60.0]),
    )


@pytest.fixture
def synthetic() -> ImageSet:
    """37 images: the last batch of an epoch is a smaller one."""
    return four_classes(37)


@pytest.fixture
def lenet() -> Recipe:
    return Recipe(LeNet300100(num_classes=4), augment="flip-crop", decay=1e-3)


@pytest.fixture
def problem(lenet: Recipe) -> Problem:
    """Epochs of three batches of 16: a step is compiled once."""
    images = four_classes(48)
    return Problem(lenet, images, validation=images, key=jax.random.key(3))
