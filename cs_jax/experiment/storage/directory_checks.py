"""Checks of a run directory before a run starts or is resumed."""

import os
from pathlib import Path

from cs_jax.core import files
from cs_jax.core.errors import ConfigError
from cs_jax.core.settings import flag
from cs_jax.experiment.config import Config
from cs_jax.experiment.storage import config_file
from cs_jax.experiment.storage.paths import CONFIG_FILE, LOCK_FILE, LOG_FILE, METRICS_FILE, SCORES_FILE


def holds_run(path: Path) -> bool:
    """True if a run was started in a directory."""
    return os.path.exists(path / CONFIG_FILE)  # Path.exists raises an error if the name is too long


def check_same_config(config: Config) -> None:
    """Raises if the run directory belongs to a run with other settings.

    Raises:
        ConfigError: settings that affect the result differ, config.json cannot be read, or another version wrote it.
    """
    path = config.run_directory
    stored, current = config_file.read_stored(path, "--out"), config_file.to_json(config)
    if stored.keys() != current.keys():
        raise ConfigError(f"--out {path}: another version of cs_jax wrote its {CONFIG_FILE}; choose another --out")
    differences = config_file.differences(stored, current, flag)
    if differences:
        raise ConfigError(
            f"--out {path}: holds a run with other settings: {differences}; choose another --out, "
            f"or resume the run with only --resume {path}"
        )


def check_free(config: Config) -> None:
    """Raises if a directory cannot become a run directory. Writes nothing.

    Raises:
        ConfigError: the path is not empty, is a file, or cannot be written.
    """
    path = config.run_directory
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {path}: is a file; choose a directory")
        if path.is_dir() and not all(map(_is_leftover, path.iterdir())):
            raise ConfigError(f"--out {path}: not empty and not a run directory; choose an empty or new one")
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be used: {error.strerror}; choose another directory") from error
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ConfigError(f"--out {path}: cannot be created: {nearest} is not a writable directory; choose another")


def _is_leftover(path: Path) -> bool:
    """True for files of a process that was killed before its run had started."""
    return path.name in (LOCK_FILE, LOG_FILE, METRICS_FILE, SCORES_FILE) or files.is_temporary(path)
