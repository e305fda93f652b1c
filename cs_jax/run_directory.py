"""A run on disk: every file name, and what is written when."""

import importlib.metadata
import json
import os
import platform
from typing import Any

import jax

import cs_jax
from cs_jax import config as config_module
from cs_jax.config import Config, ConfigError
from cs_jax.search import EpochRecord, Observer
from cs_jax.training import TrainState

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


def check_free(config: Config) -> None:
    """Refuses, before any work is done, a run directory that cannot be used; makes nothing.

    Raises:
        ConfigError: it exists and is not empty, is no folder, or cannot be written.
    """
    path = config.run_directory
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out: got {path}, which is a file, wanted a folder")
        if path.is_dir() and any(path.iterdir()):
            raise ConfigError(
                f"--out: got {path}, which is not empty, wanted an empty or new folder: "
                "give another --out, or remove it"
            )
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise ConfigError(f"--out: got {path}, which cannot be used: {error.strerror}") from error
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ConfigError(f"--out: got {path}, which cannot be made: {nearest} is no folder that can be written")


class RunDirectory(Observer):
    """Writes a run's files as it goes on: config.json at once, a line of metrics.jsonl an epoch, summary.json last.

    Raises:
        ConfigError: the directory or a file in it cannot be made.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.run_directory
        asked = {**config_module.to_json(config), "versions": versions()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_json(CONFIG_FILE, asked)
            (self.path / METRICS_FILE).touch()
        except OSError as error:
            raise ConfigError(f"--out: got {self.path}, which cannot be written: {error.strerror}") from error

    def on_epoch_end(self, record: EpochRecord, state: TrainState) -> None:
        with open(self.path / METRICS_FILE, "a") as file:
            file.write(json.dumps(record._asdict()) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_json(SUMMARY_FILE, summary)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, and the kind of device it runs on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "cs_jax": cs_jax.__version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
    }
