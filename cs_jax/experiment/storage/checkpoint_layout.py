"""Names of checkpoints, and of the files in them.

checkpoints/snapshot/       weights and BatchNorm state for the rewind
checkpoints/start/          initial weights of the ticket's retraining, if they are not the snapshot
checkpoints/00003-000200/   after 3 epochs, counted over all phases, and 200 steps
    arrays/                 Orbax: train state, packed masks of the last epoch, metrics of the current epoch's steps
    progress.json           phase, epoch and step, and metrics of finished rounds
    SHA256SUMS              checksums of all other files, in the format of `sha256sum`
"""

from pathlib import Path

from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.progress import Progress
from cs_jax.methods import REWIND

ARRAYS, PROGRESS, CHECKSUMS = "arrays", "progress.json", "SHA256SUMS"
SNAPSHOT, START = "snapshot", "start"
PARTIAL = ".partial"
"""Suffix of a checkpoint that is still being written."""


def checkpoint_name(config: Config, progress: Progress) -> str:
    """Name of the checkpoint of a progress, "EPOCHS-STEPS": epochs over all phases, and steps of the current epoch."""
    return f"{progress.epochs_done(config):05d}-{progress.step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first, without snapshots and partial checkpoints."""
    found = [path for path in folder.glob("[0-9]*-[0-9]*") if path.suffix != PARTIAL]
    return sorted(found, key=lambda path: [int(number) for number in path.name.split("-")])


def snapshot_path(config: Config, folder: Path, phase: str) -> Path:
    """Folder of the snapshot of a phase. A ticket that is rewound shares the snapshot of the search."""
    rewinds = phase == SEARCH or config.retraining == REWIND
    return folder / (SNAPSHOT if rewinds else START)
