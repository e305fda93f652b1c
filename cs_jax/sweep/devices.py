"""Devices of a sweep's workers: an accelerator, or a share of the CPU cores, for each worker."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

from cs_jax.core.errors import ConfigError

_PROBE = "import jax, json; print(json.dumps([jax.default_backend(), jax.local_device_count()]))"

MEMORY_SHARE = 0.9
"""Share of a GPU's memory for all workers on the GPU together, if there are several."""


class Device(NamedTuple):
    """Device of one worker."""

    cores: tuple[int, ...]  # CPU cores to which the worker is pinned; empty means all
    environment: dict[str, str]  # environment variables that hide other devices from the worker
    accelerator: bool = False  # True for a GPU or TPU, on which several runs in one program may be faster


def find_devices(jobs: int | None, runs: int) -> list[Device]:
    """A device for each worker, at most one worker per run.

    Args:
        jobs: number of workers, at least 1. None means one for each GPU, or one for each core if there is no GPU.
            On a TPU, None means one and more are an error, because one process holds all TPU devices of a host.
        runs: number of unfinished runs, at least 1.

    Raises:
        ConfigError: JAX finds no device, or `jobs` is above 1 on a TPU.
    """
    backend, count = _probe_jax()
    if backend == "gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        workers = min(jobs or count, runs)
        return [_on_gpu(visible[number % count], -(-workers // count)) for number in range(workers)]
    if backend != "cpu":
        if jobs not in (None, 1):
            raise ConfigError(f"--jobs {jobs}: must be 1 on a {backend.upper()}, because one process holds all devices")
        return [Device((), {}, accelerator=True)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    workers = min(jobs or len(cores) or os.cpu_count() or 1, runs)
    if workers > len(cores):
        return [Device((), {})] * workers
    return [Device(tuple(cores[number::workers]), {}) for number in range(workers)]


def _on_gpu(device: str, workers: int) -> Device:
    memory = {} if workers == 1 else {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY_SHARE / workers:.2f}"}
    return Device((), {"CUDA_VISIBLE_DEVICES": device, **memory}, accelerator=True)


def _probe_jax() -> tuple[str, int]:
    """JAX's backend and number of devices, found by another process so that this process does not hold the devices."""
    result = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"JAX finds no device: {reason}")
    backend, count = json.loads(result.stdout.splitlines()[-1])
    return backend, count
