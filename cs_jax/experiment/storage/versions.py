"""Versions of the libraries and the number of cores that a run used."""

import importlib.metadata
import os
import platform

import jax

from cs_jax.core.version import __version__


def cores() -> dict[str, str]:
    """How many cores a run on a CPU has, which decides in which order sums are added; {} on an accelerator."""
    if jax.default_backend() != "cpu":
        return {}
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {"cores": str(len(usable))}


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, and the kind of device it runs on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
    return {
        "cs_jax": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
    }
