"""Runs that share one program: each ends as if it ran alone; and the commands that start them."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import linen as nn

import train
from cs_jax.commands import parser
from cs_jax.data.images import ImageSet
from cs_jax.experiment import search
from cs_jax.experiment.config import Config
from cs_jax.experiment.observers.interrupts import Stopped
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.experiment.search import NonFiniteLossError
from cs_jax.experiment.storage import config_file, run_directory
from cs_jax.experiment.storage.paths import LOG_FILE, TICKET_FILE
from cs_jax.layers.masked import MaskedConv, MaskedDense
from cs_jax.methods.controls import DENSE
from cs_jax.models import BatchNorm
from cs_jax.sweep import autotune, storage
from cs_jax.sweep.autotune import Trial
from cs_jax.sweep.devices import Device
from cs_jax.sweep.scheduler import SweepObserver, run_sweep
from cs_jax.sweep.spec import PlannedRun, make_spec
from cs_jax.sweep.tickets import Job, run_jobs
from cs_jax.tickets.ticket import load_ticket
from cs_jax.training import compiled as compiled_programs
from cs_jax.training import executor
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem
from cs_jax.training.shared_device import Together
from cs_jax.training.step import Recipe, TrainState

PATIENCE = 120
"""Seconds after which runs that wait for each other are taken for dead."""


class TinyDense(nn.Module):
    """A masked classifier alone."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return MaskedDense(4)(images.reshape(len(images), -1))


class TinyConv(nn.Module):
    """A convolution with BatchNorm, and a classifier."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        maps = MaskedConv(3, (3, 3))(images)
        maps = nn.relu(BatchNorm(use_running_average=not train)(maps))
        return MaskedDense(4)(maps.mean(axis=(1, 2)))


@pytest.fixture
def doubled() -> Iterator[None]:
    """JAX's 64-bit mode in all threads."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=["cpu", "gpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backend whose form of calls is used on the CPU: one step or several per call."""
    monkeypatch.setattr(executor, "STEPS_PER_CALL", 2)
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


class Life(NamedTuple):
    """A search and its ticket's retraining."""

    config: Config
    problem: Problem
    observer: Observer = Observer()
    progress: Progress | None = None  # an earlier one's end

    def live(self, steps_taken_by: Executor) -> tuple[Any, TrainState]:
        """Masks of the ticket, and the state after its training."""
        problem = dataclasses.replace(self.problem, executor=steps_taken_by)
        progress = self.progress or search.begin_search(search.init_state(self.config, problem))
        ticket, ends = search.search_ticket(self.config, problem, progress, self.observer)
        begun = search.begin_retraining(problem, ticket, round_ends=ends)
        return ticket.masks, search.retrain(self.config, problem, begun, self.observer)


def live(*lives: Any) -> list[Any]:
    """Results of lives that run together; fails if they wait for each other forever."""
    ends: list[Any] = []
    waiting = threading.Thread(target=lambda: ends.extend(Together().run(lives)), daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
    assert not waiting.is_alive()
    return ends


def check_same(end: Any, alone: Any) -> None:
    """Equal masks, and weights and the rest to rounding."""
    assert not isinstance(end, BaseException), end
    jax.tree.map(np.testing.assert_array_equal, end[0], alone[0])
    for field in dataclasses.fields(TrainState):
        of_both = (getattr(state, field.name) for state in (end[1], alone[1]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), *of_both)


def lives_of(images: ImageSet, *changes: dict[str, Any], **options: Any) -> list[Life]:
    """Lives on the same images, with separate keys and different settings."""
    constants = {"mean": images.mean.astype(float), "std": images.std.astype(float)}
    images = images.replace(**constants)
    recipe = Recipe(**{"model": TinyDense(), "decay": 1e-3, **options})
    return [
        Life(dataclasses.replace(small.SEARCH, **change), Problem(recipe, images, images, jax.random.key(number)))
        for number, change in enumerate(changes)
    ]


DIFFERENT = ({"mask_initial_value": -0.5}, {"lr": 0.1, "final_temp": 20.0}, {"lmbda": 1e-3, "score_lr": 1.0})
"""The first has empty masks for a while, which are not evaluated."""


@pytest.mark.filterwarnings("ignore::cs_jax.CollapsedLayerWarning")
@pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)], indirect=True)
def test_runs_end_together_as_alone(
    doubled: None, backend: str, synthetic: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = synthetic.replace(images=synthetic.images[:32], labels=synthetic.labels[:32])  # batches: less to compile
    lives = lives_of(whole, *DIFFERENT, model=TinyConv(), augment="flip-crop")
    alone = [life.live(Executor()) for life in lives]

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a step or evaluation of one run")

    for name in ("compiled", "forward", "forward_all"):
        monkeypatch.setattr(compiled_programs, name, refuse)
    for end, expected in zip(live(*(life.live for life in lives)), alone, strict=True):
        check_same(end, expected)


@pytest.mark.slow
def test_runs_of_other_methods_lengths_and_data_end_together_as_alone(doubled: None, synthetic: ImageSet) -> None:
    changes = ({}, {"method": "imp"}, {"method": "random", "target_density": 0.5}, {"epochs": 3}, {})
    lives = lives_of(synthetic, *changes)
    train = lives[-1].problem.train
    fewer = train.replace(images=train.images[:30], labels=train.labels[:30])
    lives[-1] = lives[-1]._replace(problem=dataclasses.replace(lives[-1].problem, train=fewer))
    alone = [life.live(Executor()) for life in lives]
    for end, expected in zip(live(*(life.live for life in lives)), alone, strict=True):
        check_same(end, expected)


class Ends(Observer):
    """Ends a run inside an epoch, and keeps a copy of its progress."""

    def __init__(self, error: BaseException, step: int = 2, epoch: int = 1) -> None:
        self._error, self._moment = error, (epoch, step)
        self.progress: Progress | None = None

    def on_steps(self, progress: Progress, total: int) -> None:
        if (progress.epoch, progress.step) == self._moment:
            copied = jax.tree.map(jnp.copy, {f.name: getattr(progress.state, f.name) for f in FIELDS})
            self.progress = progress._replace(state=TrainState(**copied))
            raise self._error


FIELDS = dataclasses.fields(TrainState)


@pytest.mark.slow
def test_a_run_that_goes_on_inside_of_an_epoch_meets_fresh_ones(
    doubled: None, backend: str, synthetic: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh runs wait at its position in the epoch; it runs alone while its ticket is trained and the others search."""
    lives = lives_of(synthetic, *DIFFERENT)
    alone = [life.live(Executor()) for life in lives]
    ends = Ends(Stopped(signal.SIGTERM))
    with pytest.raises(Stopped):
        lives[1]._replace(observer=ends).live(Executor())
    lives[1] = lives[1]._replace(progress=ends.progress)
    calls_alone: list[str] = []
    compiled = compiled_programs.compiled

    def noted(*given: Any) -> tuple[Any, Any]:
        step, steps = compiled(*given)
        return (
            lambda *arguments: (calls_alone.append("step"), step(*arguments))[1],
            lambda *arguments: (calls_alone.append("steps"), steps(*arguments))[1],
        )

    monkeypatch.setattr(compiled_programs, "compiled", noted)
    for end, expected in zip(live(*(life.live for life in lives)), alone, strict=True):
        check_same(end, expected)
    assert calls_alone == {"cpu": ["step"] * 3, "gpu": ["steps", "step"]}[backend]


@pytest.mark.slow
def test_one_that_fails_and_one_that_is_stopped_leave_the_others_alone(doubled: None, synthetic: ImageSet) -> None:
    lives = lives_of(synthetic, {"lr": 1e30}, *DIFFERENT)
    stop = Ends(Stopped(signal.SIGTERM))
    expected = [life.live(Executor()) for life in lives[2:]]
    whole = lives[1].live(Executor())
    lives[1] = lives[1]._replace(observer=stop)
    failed, stopped, *others = live(*(life.live for life in lives))
    assert isinstance(failed, NonFiniteLossError) and "round 0, epoch 0" in str(failed)
    assert isinstance(stopped, Stopped)
    for end, alone in zip(others, expected, strict=True):
        check_same(end, alone)
    check_same(lives[1]._replace(observer=Observer(), progress=stop.progress).live(Executor()), whole)


def test_runs_that_end_at_once_or_wait_keep_nobody(synthetic: ImageSet) -> None:
    def fail(steps_taken_by: Executor) -> None:
        raise KeyError("at once")

    def wait(steps_taken_by: Executor) -> str:
        time.sleep(0.2)
        return "done"

    (life,) = lives_of(synthetic, {})
    ends = live(fail, life.live, lambda steps_taken_by: 3, wait, fail)
    assert [type(end) for end in ends] == [KeyError, tuple, int, str, KeyError]
    assert live() == []


def test_what_cannot_be_computed_fails_where_it_was_asked_for(synthetic: ImageSet) -> None:
    def predict(steps_taken_by: Executor) -> Any:
        return steps_taken_by.predict(TinyDense(), {"params": {}, "masks": {}}, synthetic, batch_size=37)

    (life,) = lives_of(synthetic, {})
    *failed, end = live(predict, predict, life.live)
    assert all("Dense_0" in str(error) for error in failed) and isinstance(end, tuple)


class Copies(Observer):
    """Copies of the state after every call."""

    def __init__(self) -> None:
        self.states: list[Progress] = []
        self.seen: list[Any] = []

    def on_steps(self, progress: Progress, total: int) -> None:
        self.states.append(progress)
        if progress.step % 2:  # of others nothing is taken out of the stack
            self.seen.append(np.array(jax.tree.leaves(progress.state.params)[0]))

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self.seen.append(record.loss)


def test_observers_see_the_states_between_calls_which_are_donated_then(doubled: None, synthetic: ImageSet) -> None:
    lives = lives_of(synthetic, *DIFFERENT)
    seen = []
    for life in lives:
        seen.append(Copies())
        life._replace(observer=seen[-1]).live(Executor())
    together = [Copies() for _ in lives]
    live(*(life._replace(observer=copies).live for life, copies in zip(lives, together, strict=True)))
    for ours, theirs in zip(together, seen, strict=True):
        assert len(ours.seen) == len(theirs.seen)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours.seen, theirs.seen)
    with pytest.raises(RuntimeError, match="deleted"):
        _ = together[0].states[1].state.params


def test_equal_data_are_one(synthetic: ImageSet) -> None:
    together, again = Together(), jax.tree.map(jnp.copy, synthetic)
    other = synthetic.replace(labels=synthetic.labels.at[3].set(0))
    assert together.shared(synthetic) is together.shared(again) is synthetic
    assert together.shared(other) is other
    assert together.shared(synthetic.replace(images=synthetic.images[:5])) is not synthetic


def test_runs_share_programs_unless_they_differ_in_what_is_built_in() -> None:
    def program(**changes: Any) -> dict[str, Any]:
        return config_file.of_program(dataclasses.replace(small.SEARCH, **changes))

    numbers = {"seed": 3, "lr": 0.3, "lmbda": 0.0, "final_temp": 9.0, "target_density": 0.5, "mask_initial_value": 0.3}
    assert program() == program(**numbers, out=Path("x"), report=False, after="rewind")
    for built_in in ({"decay": 0.0}, {"batch_size": 3}, {"epochs": 9}, {"controls": (DENSE,)}, {"method": "imp"}):
        assert program() != program(**built_in)


def test_how_many_at_once_is_as_asked_or_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    several_alike = [small.SEARCH] * 5
    assert autotune.choose_run_count(several_alike, 3) == (3, "3 runs in one program, as set by --tickets")
    assert autotune.choose_run_count(several_alike, 9) == (5, "5 runs in one program, as set by --tickets")
    assert autotune.choose_run_count(several_alike, 1) == (1, "one after another")
    assert (
        autotune.choose_run_count(several_alike[:1], 9) == autotune.choose_run_count(several_alike[:1], None) == (1, "")
    )
    assert autotune.choose_run_count(several_alike, None) == (1, "one after another, the default on a CPU")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for at_once, count, told in (
        (0.0125, 5, "in one program: a step of 5 runs takes 12.5 ms in one program, 20 ms one after another"),
        (0.0212, 1, "one after another: a step of 5 runs takes 21.2 ms in one program, 20 ms one after another"),
        (float("inf"), 1, "one after another: too little memory for 5 runs in one program"),
    ):
        monkeypatch.setattr(autotune, "_trials", {})
        monkeypatch.setattr(autotune, "measure", lambda settings, runs, at_once=at_once: Trial(runs, at_once, 0.02))
        assert autotune.choose_run_count(several_alike, None) == (count, told)
        monkeypatch.setattr(autotune, "measure", None)  # once is enough
        others = [dataclasses.replace(settings, lr=0.3, seed=7) for settings in several_alike]
        assert autotune.choose_run_count(others, None)[0] == count
        with pytest.raises(TypeError):  # another number of runs, or another method, is another question
            autotune.choose_run_count(several_alike[1:], None)
        with pytest.raises(TypeError):
            autotune.choose_run_count([dataclasses.replace(settings, method="imp") for settings in several_alike], None)


@pytest.mark.slow
def test_a_trial_times_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parser.parse([*QUICK, "--batch-size", "400"])
    began = time.perf_counter()
    found = autotune.measure(settings, 2)
    assert found.runs == 2 and 0 < found.batched < time.perf_counter() - began > found.sequential > 0


QUICK = "--model lenet300100 --rounds 1 --epochs 2 --rewind-epoch 1 --lr-schedule 1 --lr-drops 0.1 --no-report".split()


def job(path: Path, *words: str) -> Job:
    settings = parser.parse([*QUICK, "--controls", "--checkpoint-seconds", "0", *words, "--out", str(path)])
    path.parent.mkdir(exist_ok=True)
    return Job(path.name, settings, path.parent / f"{path.name}.txt")


def weights(path: Path) -> dict[str, Any]:
    return load_ticket(path / TICKET_FILE).variables


@pytest.mark.slow
def test_runs_that_sigterm_stops_go_on_to_the_end_that_they_had_had(doubled: None, tmp_path: Path) -> None:
    def jobs(folder: str) -> list[Job]:
        return [job(tmp_path / folder / str(seed), "--seed", str(seed), "--lr", f"0.0{seed + 1}") for seed in range(2)]

    told: list[Any] = []
    run_jobs(jobs("whole"), lambda name, **event: told.append((name, *event)))
    assert sorted(told) == [(name, what) for name in "01" for what in ("done", *["epoch"] * 4)]

    def kill(name: str, **event: Any) -> None:
        if event == {"epoch": 2} and name == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        run_jobs(jobs("stopped"), kill)
    assert signal.getsignal(signal.SIGTERM) is before
    for seed in range(2):
        assert list((tmp_path / "stopped" / str(seed) / "checkpoints").glob("0*"))
        assert not (tmp_path / "stopped" / str(seed) / "summary.json").exists()
    run_jobs(jobs("stopped"), lambda name, **event: None)
    for seed in range(2):
        assert "resuming " in (tmp_path / "stopped" / f"{seed}.txt").read_text()
        ours, theirs = (weights(tmp_path / folder / str(seed)) for folder in ("stopped", "whole"))
        jax.tree.map(np.testing.assert_array_equal, ours["masks"], theirs["masks"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours, theirs)


@pytest.mark.slow
def test_warnings_of_runs_at_once_are_in_their_own_logs(tmp_path: Path) -> None:
    quiet, warned = job(tmp_path / "runs" / "quiet"), job(tmp_path / "runs" / "warned", "--mask-initial-value", "-30")
    run_jobs([quiet, warned], lambda name, **event: None, "2 runs, for a reason")
    assert "warning: " not in quiet.log.read_text()
    assert "warning: round 0 left no weight" in warned.log.read_text()
    assert all(run.log.read_text().startswith("2 runs, for a reason\n") for run in (quiet, warned))


SPEC = {
    "methods": ["imp", "wild"],
    "densities": [0.1],
    "seeds": [0, 1],
    "settings": {
        "model": "lenet300100",
        "rounds": 1,
        "epochs": 6,  # so that the worker has not finished when it is killed
        "max_train_examples": 640,
        "rewind_epoch": 1,
        "lr_schedule": [1],
        "lr_drops": [0.1],
        "checkpoint_seconds": 0.0,
    },
    "method": {"wild": {"method": "imp", "lr": 1e30}},
}
NAMES = ["imp-density0.1-seed0", "imp-density0.1-seed1", "wild-density0.1-seed0", "wild-density0.1-seed1"]


class Notes(SweepObserver):
    """Records events, and kills the worker at an epoch of a run."""

    def __init__(self, directory: Path, kill_at: tuple[str, int] | None = None) -> None:
        self._directory, self._kill_at = directory, kill_at
        self.happened: list[tuple[str, int, str]] = []

    def on_start(self, worker: int, run: PlannedRun) -> None:
        self.happened.append(("start", worker, run.name))

    def on_requeue(self, worker: int, run: PlannedRun) -> None:
        self.happened.append(("back", worker, run.name))

    def on_epoch(self, worker: int, run: PlannedRun, epoch: int) -> None:
        if (run.name, epoch) == self._kill_at:
            lock = storage.folder_of(self._directory, run) / "run.lock"
            os.kill(json.loads(lock.read_text())["process"], signal.SIGKILL)

    def on_end(self, worker: int, run: PlannedRun, ticket: Any, failure: str) -> None:
        self.happened.append(("done" if ticket else "failed", worker, run.name))


@pytest.fixture
def on_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.slow
def test_a_sweep_whose_worker_takes_several_at_once_is_killed_fails_and_goes_on(
    tmp_path: Path, on_cores: None, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec("many", SPEC)
    killed = Notes(tmp_path, kill_at=(NAMES[1], 2))
    failures = run_sweep(spec, tmp_path, [Device((), {})], killed, tickets=8)
    assert killed.happened[:4] == [("start", 0, name) for name in NAMES]
    assert failures.keys() == set(NAMES)
    assert all("exit code -9" in failures[name] for name in NAMES[:2])
    again = Notes(tmp_path)
    failures = run_sweep(spec, tmp_path, [Device((), {})], again, tickets=3)
    assert again.happened[:3] == [("start", 0, name) for name in NAMES[:3]]
    assert sorted(again.happened[3:6]) == [("done", 0, NAMES[0]), ("done", 0, NAMES[1]), ("failed", 0, NAMES[2])]
    assert again.happened[6:] == [("start", 0, NAMES[3]), ("failed", 0, NAMES[3])]
    assert failures.keys() == set(NAMES[2:]) and all("loss is" in reason for reason in failures.values())
    for name in NAMES[:2]:
        log = (tmp_path / "logs" / f"{name}.txt").read_text()
        assert all(f"{count} runs in one program, as set by --tickets\n" in log for count in (4, 3))
        assert "resuming search 0 at epoch " in log
        assert run_directory.read_summary(tmp_path / "runs" / name) is not None


@pytest.mark.slow
def test_a_worker_gives_back_what_it_is_slower_with(tmp_path: Path, on_cores: None) -> None:
    """This host has no accelerator. Places share the waiting runs."""
    spec = make_spec("many", {**SPEC, "methods": ["imp"], "method": {}, "seeds": [0, 1, 2]})
    notes = Notes(tmp_path)
    assert run_sweep(spec, tmp_path, [Device((), {}, accelerator=True)], notes) == {}
    of_first = [what for what, _, name in notes.happened if name == "imp-density0.1-seed0"]
    of_last = [what for what, _, name in notes.happened if name == "imp-density0.1-seed2"]
    assert of_first == ["start", "done"]
    assert of_last == ["start", "back", "start", "back", "start", "done"]


@pytest.mark.slow
def test_tickets_of_one_command_are_those_of_their_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [*QUICK, "--seed", "4"]
    assert train.main([*asked, "--tickets", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("one after another, the default on a CPU\n1 of 2  digits-seed4: density ")
    folders = [tmp_path / "runs" / f"digits-seed{seed}" for seed in (4, 5)]
    assert sorted((tmp_path / "runs").iterdir()) == folders
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    for seed, summary in zip((4, 5), summaries, strict=True):
        row = [summary["ticket"]["density"], summary["ticket"]["test_accuracy"], summary["dense"]["test_accuracy"]]
        assert [str(seed), *(f"{share:.2%}" for share in row)] in [line.split() for line in shown.splitlines()]
    mean = (summaries[0]["ticket"]["density"] + summaries[1]["ticket"]["density"]) / 2
    assert ["mean", f"{mean:.2%}"] in [line.split()[:2] for line in shown.splitlines()]
    assert all("resuming" not in (folder / LOG_FILE).read_text() for folder in folders)
    assert train.main([*asked, "--out", "alone"]) == 0
    assert (tmp_path / "alone" / TICKET_FILE).read_bytes() == (folders[0] / TICKET_FILE).read_bytes()
    capsys.readouterr()
    shutil.rmtree(folders[0])
    before = (folders[1] / TICKET_FILE).stat().st_mtime_ns
    assert train.main([*asked, "--tickets", "2"]) == 0
    assert "2 of 2  digits-seed4: density " in capsys.readouterr().out
    assert (folders[1] / TICKET_FILE).stat().st_mtime_ns == before


@pytest.mark.slow
def test_tickets_of_one_command_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(autotune, "choose_run_count", lambda settings, tickets: (2, "2 at once"))
    out = tmp_path / "out"
    assert train.main([*QUICK, "--controls", "--tickets", "3", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["digits-seed0", "digits-seed1", "digits-seed2"]
    assert (out / "digits-seed1" / LOG_FILE).read_text().startswith("2 at once\nphase ")
    assert train.main([*QUICK, "--tickets", "2", "--seed", "7", "--lr", "1e30", "--controls", "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("train.py: error: 2 of 2 tickets failed, first digits-seed7: loss is ")
    assert told.endswith(f"; see {out / 'digits-seed7' / LOG_FILE}\n") and told.count("\n") == 1


@pytest.mark.parametrize(
    "words, told",
    [
        (["--tickets", "0"], "--tickets 0: must be at least 1"),
        (["--tickets=-1"], "--tickets -1: must be at least 1"),
        (["--tickets", "auto"], "--tickets auto: must be a whole number"),
        (["--tickets"], "--tickets: expected one argument"),
        (
            ["--tickets", "2", "--resume", "there"],
            "--tickets 2: excludes --resume; repeat the command that",
        ),
        (["--tickets", "2", "--seed", "4294967295"], "--tickets 2: must be at most 1 with --seed 4294967295"),
        (["--tickets", "2", "--val-set-size", "9999"], "--val-set-size 9999: must be less than 1437, the number "),
        (["--tickets", "2", "--out", "file"], "--out file/digits-seed0: cannot be created: "),
        (
            ["--tickets", "2", "--out", "run"],
            "--out run: is a run directory; choose a parent directory for --tickets 2",
        ),
        (["--tickets", "2", "--out", "full"], "--out full/digits-seed1: not empty and not a run directory"),
    ],
)
def test_tickets_that_cannot_be_searched_are_refused_in_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full" / "digits-seed1").mkdir(parents=True)
    (tmp_path / "full" / "digits-seed1" / "thesis.txt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*QUICK, *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"train.py: error: {told}") and shown.err.count("\n") == 1 and shown.out == ""
    assert sorted(tmp_path.rglob("*")) == before
