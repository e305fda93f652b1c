"""Versions of the libraries and the number of cores that a run used."""

import importlib.metadata
import os
import platform

import jax

from cs_jax.core.version import __version__


def cores() -> dict[str, str]:
    """Number of CPU cores of a run, which affects the order of sums; {} on an accelerator."""
    if jax.default_backend() != "cpu":
        return {}
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {"cores": str(len(usable))}


def versions() -> dict[str, str]:
    """Versions of the libraries that affect the numbers of a run, and the kind of its device."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
    return {
        "cs_jax": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
    }
