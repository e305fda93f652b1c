"""Files of a sweep directory: names, the stored spec, and the reasons of failed runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from cs_jax.core import files
from cs_jax.core.errors import ConfigError
from cs_jax.experiment.storage import config_file, directory_checks, paths, run_directory
from cs_jax.sweep.spec import PlannedRun, Spec, make_spec

SPEC_FILE = "sweep.json"
RUNS_FOLDER = "runs"
LOGS_FOLDER = "logs"
LOCK_FILE = "sweep.lock"
FAILURES_FILE = "failures.json"
"""File with the reasons of failed runs, by run name. An entry is removed when the run succeeds."""


def folder_of(directory: Path, run: PlannedRun) -> Path:
    """Directory of one run inside the directory of the sweep."""
    return directory / RUNS_FOLDER / run.name


def is_done(directory: Path, run: PlannedRun) -> bool:
    """True if a run has finished, which means that its summary.json exists.

    Raises:
        ConfigError: summary.json is damaged.
    """
    return run_directory.read_summary(folder_of(directory, run)) is not None


def check_same_spec(directory: Path, spec: Spec) -> None:
    """Raises if a directory belongs to another sweep; accepts a new directory and a sweep of the same spec.

    The settings of failed runs, and of runs without a directory, may change, and these runs may be missing from the
    spec.

    Raises:
        ConfigError: the directory contains a run with other settings or without an entry in the spec; is not empty and
            not a sweep directory; is a file; or its stored spec cannot be read.
    """
    path = directory / SPEC_FILE
    if not path.exists():
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"--out {directory}: is a file; choose a directory")
        if directory.exists() and not all(map(_is_leftover, directory.iterdir())):
            raise ConfigError(f"--out {directory}: not empty and not a sweep directory; choose an empty or new one")
        return
    failures = read_failures(directory)
    for run, difference in changed_runs(directory, spec):
        if run.name not in failures and directory_checks.holds_run(folder_of(directory, run)):
            raise ConfigError(
                f"--out {directory}: belongs to another sweep: {run.name} {difference}; choose another directory"
            )


def changed_runs(directory: Path, spec: Spec) -> Iterator[tuple[PlannedRun, str]]:
    """Runs of the stored spec that the new spec omits or changes, each with a text that describes the difference."""
    path = directory / SPEC_FILE
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    stored = make_spec(spec.name, content, str(path))
    configs = {run.name: run.config for run in spec.runs}
    for run in stored.runs:
        if run.name not in configs:
            yield run, "is missing from the spec"
            continue
        before, now = (config_file.to_json(config) for config in (run.config, configs[run.name]))
        differences = config_file.differences(before, now)
        if differences:
            yield run, f"has {differences}"


def read_failures(directory: Path) -> dict[str, str]:
    """Reasons of failed runs, by run name; empty if the file is missing or damaged."""
    try:
        found = json.loads((directory / FAILURES_FILE).read_text())
        return {str(name): str(reason) for name, reason in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def record_failure(directory: Path, run: PlannedRun, reason: str) -> None:
    """Stores the reason of a failure; "" removes the entry of the run."""
    before = read_failures(directory)
    after = {name: reason for name, reason in {**before, run.name: reason}.items() if reason}
    if after != before:
        files.write_whole(directory / FAILURES_FILE, (json.dumps(after, indent=2) + "\n").encode())


def _is_leftover(path: Path) -> bool:
    """True for a lock or temporary file, which may exist before the spec is written."""
    return path.name == LOCK_FILE or files.is_temporary(path)


def delete_checkpoints(directory: Path, run: PlannedRun) -> None:
    """Deletes the checkpoints of a finished run."""
    shutil.rmtree(folder_of(directory, run) / paths.CHECKPOINTS_FOLDER, ignore_errors=True)
