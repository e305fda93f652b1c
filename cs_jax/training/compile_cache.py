"""Compiled programs that outlast a process, so that the next run of the same networks begins at once."""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
"""JAX's own variable for the folder."""


def keep_programs() -> None:
    """Lets JAX keep what it compiles in the user's cache folder, unless `VARIABLE` says where, or JAX is told not to.

    Nothing happens where that folder cannot be written. Each kind of processor has a folder of its own, because a
    program that was compiled for one may crash on another.
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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small ones are many
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def processor() -> str:
    """The same for processors with the same instructions."""
    about = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(about.encode()).hexdigest()[:12]
