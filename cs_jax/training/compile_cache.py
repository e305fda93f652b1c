"""Compilation cache on disk, so that later runs of the same networks start without compiling."""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
"""JAX's environment variable for the folder."""


def keep_programs() -> None:
    """Enable JAX's compilation cache in the user's cache folder, unless `VARIABLE` is set.

    Does nothing if the folder cannot be written. Each kind of processor has a separate folder, because code that was
    compiled for one kind of processor may crash on another kind.
    """
    if VARIABLE in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cs_jax" / "programs" / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # there are many small functions
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def processor() -> str:
    """Hash of architecture and instruction set: equal for processors that can run the same compiled code."""
    about = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(about.encode()).hexdigest()[:12]
