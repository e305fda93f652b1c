"""Runs that go on from a checkpoint to the same bits, and checkpoints that are not as they were written."""

import contextlib
import dataclasses
import errno
import gc
import json
import math
import os
import shutil
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small

from cs_jax.core.errors import ConfigError
from cs_jax.experiment import search
from cs_jax.experiment.config import SEARCH, TICKET, Config
from cs_jax.experiment.progress import EpochRecord, Observer, Observers, Progress
from cs_jax.experiment.search import NonFiniteLossError
from cs_jax.experiment.storage import checkpoint_integrity, checkpoint_layout, checkpoints
from cs_jax.experiment.storage.checkpoint_integrity import CheckpointError
from cs_jax.experiment.storage.checkpoint_reader import DamagedCheckpointWarning
from cs_jax.experiment.storage.checkpoint_writer import CheckpointWriter
from cs_jax.experiment.storage.checkpoints import Checkpoints
from cs_jax.methods.controls import DENSE
from cs_jax.training import compiled
from cs_jax.training.problem import Problem
from cs_jax.training.step import Recipe

CONFIG = dataclasses.replace(
    small.SEARCH,
    lr_schedule=(1,),
    lr_drops=(0.1,),
    target_density=0.3,
    checkpoint_steps=1,
    checkpoint_seconds=0.0,
)
STEPS = 3
"""In an epoch of 48 images."""


class Stop(Exception):
    pass


class StopAt(Observer):
    """Stops a run after so many steps and batches of evaluation, over all phases."""

    def __init__(self, moment: int | None = None) -> None:
        self.moments, self._moment = 0, moment

    def on_steps(self, progress: Progress, total: int) -> None:
        self.on_batch()

    def on_batch(self) -> None:
        self.moments += 1
        if self.moments == self._moment:
            raise Stop


class Records(Observer):
    def __init__(self) -> None:
        self.records: list[EpochRecord] = []

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self.records.append(record._replace(seconds=0.0, images_per_second=0.0))


def run(config: Config, problem: Problem, progress: Progress | None, observer: Observer) -> Any:
    """What is left of a search and a retraining: the ticket, and the trained state."""
    progress = progress or search.begin_search(search.init_state(config, problem))
    if progress.phase == SEARCH:
        ticket, round_ends = search.search_ticket(config, problem, progress, observer)
        progress = search.begin_retraining(problem, ticket, round_ends=round_ends)
    snapshot = progress.snapshot
    state = search.retrain(config, problem, progress, observer)
    return jax.device_get((tuple(snapshot or ()), state, [end._replace(seconds=0.0) for end in progress.round_ends]))


def same(a: Any, b: Any) -> bool:
    plain = [(snapshot, state) for snapshot, state, _ in (a, b)]
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), *plain)
    ends = [[end._replace(images_per_second=0.0) for end in result[2]] for result in (a, b)]
    return all(jax.tree.leaves(equal)) and ends[0] == ends[1]


def stopped_at(config: Config, problem: Problem, folder: Path, moment: int, *others: Observer) -> None:
    with Checkpoints(config, problem, folder) as saved:
        with pytest.raises(Stop):
            run(config, problem, saved.restore(), Observers(*others, saved, StopAt(moment)))
        saved.save_latest()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cs_jax.UnfinishedSearchWarning")
@pytest.mark.parametrize("reset", ["paper", "released"])
def test_a_run_stopped_at_a_step_or_evaluation_ends_with_the_same_bits(
    problem: Problem, tmp_path: Path, reset: Any
) -> None:
    config = dataclasses.replace(CONFIG, reset=reset)
    records, count = Records(), StopAt()
    whole = run(config, problem, None, Observers(records, count))
    assert count.moments == 3 * CONFIG.epochs * STEPS + (4 * 2 + 2) * STEPS  # soft and hard accuracy, 3 batches each
    moments = range(1, count.moments + 1, 5) if reset == "paper" else (17, 30, count.moments)
    for moment in moments:
        folder, resumed = tmp_path / str(moment), Records()
        stopped_at(config, problem, folder, moment, before := Records())
        with Checkpoints(config, problem, folder) as saved:
            progress = saved.restore()
            assert progress is not None and progress.epochs_done(config) == len(before.records)
            assert same(run(config, problem, progress, Observers(resumed, saved)), whole), moment
        assert before.records + resumed.records == records.records


@pytest.mark.filterwarnings("ignore::cs_jax.UnfinishedSearchWarning")
def test_a_resumed_run_uses_the_programs_of_a_new_one(problem: Problem, tmp_path: Path) -> None:
    stopped_at(CONFIG, problem, tmp_path, 5)
    run(CONFIG, problem, None, Observer())
    before = compiled.compiled_step._cache_size()
    with Checkpoints(CONFIG, problem, tmp_path) as saved:
        run(CONFIG, problem, saved.restore(), Observer())
    assert compiled.compiled_step._cache_size() == before


@pytest.mark.slow
@pytest.mark.parametrize("score_dtype", ["float32", "bfloat16"])
def test_without_a_target_it_goes_on_too_and_after_many_stops(
    problem: Problem, tmp_path: Path, score_dtype: str
) -> None:
    config = dataclasses.replace(CONFIG, target_density=None, score_dtype=score_dtype)
    whole = run(config, problem, None, Observer())
    for _ in range(6):
        stopped_at(config, problem, tmp_path, 7)
    with Checkpoints(config, problem, tmp_path) as saved:
        assert same(run(config, problem, saved.restore(), saved), whole)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_the_snapshot_besides(problem: Problem, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, keep=2, target_density=None)
    with Checkpoints(config, problem, tmp_path) as saved:
        run(config, problem, None, saved)
        assert saved.save_latest()
    assert names(tmp_path)[-2:] == ["00006-000000", "snapshot"] and len(names(tmp_path)) == 3
    assert names(tmp_path / "00006-000000") == ["SHA256SUMS", "arrays", "progress.json"]
    check = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "snapshot", check=False)
    assert check.returncode == 0


def test_between_two_checkpoints_is_the_time_that_was_asked_for_but_a_phase_ends_with_one(
    problem: Problem, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, keep=99, checkpoint_seconds=1e6, target_density=None)
    with Checkpoints(config, problem, tmp_path) as saved:
        run(config, problem, None, saved)
    assert names(tmp_path) == ["00002-000000", "00004-000000", "00006-000000", "snapshot"]


class WaitingWriter(CheckpointWriter):
    """Waits for every save, so that no later save is skipped because one is running."""

    def start(self, *arguments: Any) -> None:
        super().start(*arguments)
        self.wait()


@pytest.mark.parametrize(
    "steps, inside", [(1, ["000001", "000002"]), (2, ["000002"]), (3, []), (99, [])], ids=["1", "2", "3", "99"]
)
def test_checkpoint_steps_are_the_steps_inside_an_epoch(
    problem: Problem, tmp_path: Path, steps: int, inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MAX_WAIT", math.inf)
    monkeypatch.setattr(checkpoints, "CheckpointWriter", WaitingWriter)
    config = dataclasses.replace(CONFIG, keep=99, checkpoint_steps=steps, rounds=1, target_density=None)
    with Checkpoints(config, problem, tmp_path) as saved:
        run(config, problem, None, saved)
    ends = [f"{epoch:05d}-000000" for epoch in range(1, 5)]
    assert names(tmp_path) == sorted(ends + [f"{epoch:05d}-{step}" for epoch in range(4) for step in inside]) + [
        "snapshot"
    ]


class SlowWriter(CheckpointWriter):
    def start(self, *arguments: Any) -> None:
        time.sleep(0.5)
        super().start(*arguments)


@pytest.mark.slow
def test_saves_that_take_long_come_less_often(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait of 0.5 s is allowed once in 25 s: after the first save, only the ends of phases are saved."""
    monkeypatch.setattr(checkpoints, "CheckpointWriter", SlowWriter)
    config = dataclasses.replace(CONFIG, keep=99, target_density=None)
    with Checkpoints(config, problem, tmp_path) as saved:
        run(config, problem, None, saved)
    assert names(tmp_path) == ["00000-000001", "00002-000000", "00004-000000", "00006-000000", "snapshot"]
    assert saved.waited >= 2.0


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for name in ("00002-1000000", "00002-999900", "100000-000001", "99999-000001", "00002-999901.partial"):
        (tmp_path / name).mkdir()
    found = [path.name for path in checkpoint_layout.list_checkpoints(tmp_path)]
    assert found == ["00002-999900", "00002-1000000", "99999-000001", "100000-000001"]


def test_the_dense_network_goes_on_too_and_the_tickets_checkpoints_stay_whole(problem: Problem, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, controls=(DENSE,))
    with Checkpoints(config, problem, tmp_path) as saved, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(config, problem, None, saved)
    dense = problem.init_ticket()
    start = search.begin_retraining(problem, dense, phase=DENSE)
    whole = search.retrain(config, problem, start, Observer())
    with Checkpoints(config, problem, tmp_path) as saved:
        saved.restore()
        with pytest.raises(Stop):
            start = search.begin_retraining(problem, dense, phase=DENSE)
            search.retrain(config, problem, start, Observers(saved, StopAt(2)))
        saved.save_latest()
    with Checkpoints(config, problem, tmp_path) as saved:
        progress = saved.restore()
        assert progress is not None and (progress.phase, progress.snapshot) == (DENSE, None)
        resumed = search.retrain(config, problem, progress, Observer())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), resumed, whole))
    for newest in ("00006-000001", "00006-000002"):
        (tmp_path / newest / "SHA256SUMS").unlink()
    with Checkpoints(config, problem, tmp_path) as saved, pytest.warns(DamagedCheckpointWarning, match="00006-000000$"):
        progress = saved.restore()
    assert progress is not None and progress.phase == TICKET and progress.snapshot is not None


@pytest.fixture
def folder(problem: Problem, tmp_path: Path) -> Path:
    """Checkpoints after one and after two steps of the search's second epoch, and a snapshot."""
    for moment in (10, 1):
        stopped_at(dataclasses.replace(CONFIG, keep=2), problem, tmp_path / "checkpoints", moment)
    assert names(tmp_path / "checkpoints") == ["00001-000001", "00001-000002", "snapshot"]
    return tmp_path / "checkpoints"


def every_tenth_byte_changed(path: Path) -> list[bytes]:
    data = path.read_bytes()
    changed = []
    for position in range(0, len(data), max(10, len(data) // 40 // 10 * 10)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position // 10 % 8)
        changed += [bytes(flipped), data[:position]]
    return changed


def test_a_checkpoint_with_any_change_is_found_and_the_one_before_is_used(problem: Problem, folder: Path) -> None:
    newest = folder / "00001-000002"
    for path in [path for path in newest.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for changed in every_tenth_byte_changed(path):
            path.write_bytes(changed)
            assert checkpoint_integrity.find_damage(newest) is not None, (path, len(changed))
        path.unlink()
        assert checkpoint_integrity.find_damage(newest) is not None, path
        path.write_bytes(original)
    (newest / "more").write_text("")
    assert checkpoint_integrity.find_damage(newest) == "more has changed"
    (newest / "more").unlink()
    assert checkpoint_integrity.find_damage(newest) is None


def test_a_damaged_checkpoint_is_told_and_removed_and_an_earlier_one_is_used(problem: Problem, folder: Path) -> None:
    (folder / "00001-000002" / "progress.json").write_text("{}")
    (folder / "00001-000003.partial").mkdir()
    told = r"checkpoint 00001-000002 is damaged \(progress.json has changed\); resuming from 00001-000001$"
    with Checkpoints(CONFIG, problem, folder) as saved, pytest.warns(DamagedCheckpointWarning, match=told):
        progress = saved.restore()
    assert progress is not None and (progress.epoch, progress.step) == (1, 1)
    assert names(folder)[-2:] == ["00001-000001", "snapshot"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: [(path / "SHA256SUMS").unlink() for path in folder.iterdir()], "SHA256SUMS is missing"),
        (lambda folder: shutil.rmtree(folder / "snapshot"), "its snapshot: SHA256SUMS is missing"),
        (lambda folder: (folder / "snapshot" / "x").touch(), "its snapshot: x has changed"),
    ],
)
def test_where_no_checkpoint_is_whole_nothing_is_touched(
    damage: Any, message: str, problem: Problem, folder: Path
) -> None:
    damage(folder)
    before = names(folder)
    with Checkpoints(CONFIG, problem, folder) as saved, pytest.raises(ConfigError, match=message):
        saved.restore()
    assert names(folder) == before


def test_a_snapshot_of_another_run_is_refused(problem: Problem, folder: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(problem, key=jax.random.key(9))
    stopped_at(CONFIG, other, tmp_path / "other", 10)
    shutil.rmtree(folder / "snapshot")
    shutil.copytree(tmp_path / "other" / "snapshot", folder / "snapshot")
    told = r"\(00001-000002: its snapshot: belongs to another run\); remove \S+ to start from scratch$"
    with Checkpoints(CONFIG, problem, folder) as saved, pytest.raises(ConfigError, match=told):
        saved.restore()


def test_a_checkpoint_of_another_network_is_refused(problem: Problem, folder: Path, lenet: Recipe) -> None:
    wider = dataclasses.replace(problem, recipe=dataclasses.replace(lenet, model=lenet.model.clone(num_classes=5)))
    told = (
        r"checkpoint 00001-000002 belongs to another network \(\S+/bias is float32\[4\], must be float32\[5\]\); choose"
    )
    with Checkpoints(CONFIG, wider, folder) as saved, pytest.raises(ConfigError, match=told):
        saved.restore()


def test_nothing_that_is_not_finite_is_saved(problem: Problem, tmp_path: Path) -> None:
    """The first loss is fine; what the step makes of the weights is not."""
    config = dataclasses.replace(CONFIG, lr=3e38)
    problem = dataclasses.replace(problem, recipe=dataclasses.replace(problem.recipe, decay=100.0))
    with Checkpoints(config, problem, tmp_path / "checkpoints") as saved:
        with pytest.raises(NonFiniteLossError, match="in round 0, epoch 0"):
            run(config, problem, None, saved)
        with pytest.raises(NonFiniteLossError):
            saved.save_latest()
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a save that breaks off
@pytest.mark.parametrize("disk_tells", [True, False])
def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    problem: Problem, small_disk: Path, disk_tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not disk_tells:  # as with a quota
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1e9, 0, 1e9))  # pyright: ignore
    whole = run(CONFIG, problem, None, Observer())
    filler, folder = small_disk / "filler", small_disk / "checkpoints"
    config = dataclasses.replace(CONFIG, keep=1)
    stopped_at(config, problem, folder, 13)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(1024))
    told = "^checkpoint 0000[12]-00000.: cannot be saved: No space left on device; earlier checkpoints are complete$"
    with pytest.raises(CheckpointError, match=told), Checkpoints(config, problem, folder) as saved:
        run(config, problem, saved.restore(), saved)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    filler.unlink()
    with Checkpoints(config, problem, folder) as saved:
        assert same(run(config, problem, saved.restore(), saved), whole)
    gc.collect()  # files that the failed save left open, while their warnings are let pass


def test_a_file_that_cannot_be_read_is_damage_too(
    problem: Problem, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: Path) -> str:
        if file.name == "progress.json" and file.parent.name == "00001-000002":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return read(file)

    read = checkpoint_integrity.file_hash
    monkeypatch.setattr(checkpoint_integrity, "file_hash", broken)
    told = r"00001-000002 is damaged \(progress.json cannot be read: Input/output error\); resuming from 00001-000001$"
    with Checkpoints(CONFIG, problem, folder) as saved, pytest.warns(DamagedCheckpointWarning, match=told):
        saved.restore()


def test_progress_json_says_where_the_run_stands(folder: Path) -> None:
    about = json.loads((folder / "00001-000002" / "progress.json").read_text())
    assert (about["phase"], about["round"], about["epoch"], about["step"]) == ("search", 0, 1, 2)
    assert about["round_ends"] == [] and len(about["snapshot"]) == 64
