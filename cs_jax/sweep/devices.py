"""Where the workers of a sweep compute: one accelerator each, or a share of the processor's cores."""

import json
import os
import subprocess
import sys

from cs_jax.core.errors import ConfigError
from cs_jax.sweep.scheduler import Device

_PROBE = "import jax, json; print(json.dumps([jax.default_backend(), jax.local_device_count()]))"

MEMORY_SHARE = 0.9
"""Of a GPU's memory that the workers on it may take together."""


def find_devices(jobs: int | None, runs: int) -> list[Device]:
    """A place for each of so many workers, not more than there are runs.

    Args:
        jobs: workers; None is one for each GPU, or for each core where there is none. A TPU, which one process holds
            as a whole, has one.
        runs: that are to be done.

    Raises:
        ConfigError: JAX finds no device here, or cannot be shared so.
    """
    backend, devices = _probe_jax()
    if backend == "gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        count = min(jobs or devices, runs)
        return [_on_gpu(visible[number % devices], -(-count // devices)) for number in range(count)]
    if backend != "cpu":
        if jobs not in (None, 1):
            raise ConfigError(
                f"--jobs: got {jobs}, wanted 1 on a {backend.upper()}, which one process holds as a whole"
            )
        return [Device((), {}, accelerator=True)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = min(jobs or len(cores) or os.cpu_count() or 1, runs)
    if count > len(cores):
        return [Device((), {})] * count
    return [Device(tuple(cores[number::count]), {}) for number in range(count)]


def _on_gpu(device: str, workers: int) -> Device:
    shared = {} if workers == 1 else {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY_SHARE / workers:.2f}"}
    return Device((), {"CUDA_VISIBLE_DEVICES": device, **shared}, accelerator=True)


def _probe_jax() -> tuple[str, int]:
    """Backend and number of devices, found by another process: this one is not to hold any."""
    result = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"JAX finds no device here: {reason}")
    backend, devices = json.loads(result.stdout.splitlines()[-1])
    return backend, devices
