"""Sweeps: valid and refused specs, runs on several workers, signals, and printed output."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kill_sweep
import pytest
from rich.console import Console
from rich.text import Text

from cs_jax import commands
from cs_jax.core.errors import ConfigError
from cs_jax.core.lock import Lock
from cs_jax.experiment.config import Config
from cs_jax.experiment.presets import PRESETS
from cs_jax.experiment.storage import run_directory
from cs_jax.experiment.storage.config_file import to_json
from cs_jax.experiment.storage.paths import TICKET_FILE
from cs_jax.sweep import devices as sweep_devices
from cs_jax.sweep import storage
from cs_jax.sweep.devices import Device, find_devices
from cs_jax.sweep.display import SweepDisplay
from cs_jax.sweep.scheduler import SweepObserver, run_sweep
from cs_jax.sweep.spec import PlannedRun, Spec, make_spec, read_spec

QUICK = """
[settings]
model = "lenet300100"
rounds = 1
epochs = 2
rewind_epoch = 1
lr_schedule = [1]
lr_drops = [0.1]
"""

FOUR = 'methods = ["imp", "random"]\ndensities = [0.1]\nseeds = [0, 1]\n' + QUICK
"""Four runs of seconds."""

TROUBLE = (
    'methods = ["wild", "slow", "random"]\ndensities = [0.1]\nseeds = [0]\n'
    + QUICK
    + '[method.wild]\nmethod = "imp"\nlr = 1e30\n'
    + '[method.slow]\nmethod = "imp"\nepochs = 20\ncheckpoint_seconds = 0.0\n'
)
"""A run that fails, a run that is long enough to be killed, and another run."""

ANYWHERE = Device((), {})


@pytest.fixture(scope="module", autouse=True)
def on_cores() -> Any:
    """Workers, like the tests, leave accelerators alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `quick.toml`, and its finished sweep in `out`."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "quick.toml").write_text(FOUR)
    assert commands.main(["sweep", str(folder / "quick.toml"), "--out", str(folder / "out"), "--jobs", "2"]) == 0
    return folder


@pytest.fixture
def copied(swept: Path, tmp_path: Path) -> Path:
    """Copy of that folder, which a test may change."""
    return Path(shutil.copytree(swept, tmp_path / "copied"))


def sweep(spec: Path, *words: str) -> int:
    return commands.main(["sweep", str(spec), "--out", str(spec.parent / "out"), *words])


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "out" / "runs").rglob("*"))}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def grid(**content: Any) -> Spec:
    return make_spec("grid", {"methods": ["cs"], "seeds": [0], **content})


def test_a_grid_has_each_method_at_each_density_with_each_seed() -> None:
    spec = grid(methods=["cs", "imp"], densities=[0.5, 0.02], seeds=[0, 7], settings={"epochs": 20, "lr": 1})
    assert [run.name for run in spec.runs] == [
        "cs-density0.5-seed0",
        "cs-density0.5-seed7",
        "cs-density0.02-seed0",
        "cs-density0.02-seed7",
        "imp-density0.5-seed0",
        "imp-density0.5-seed7",
        "imp-density0.02-seed0",
        "imp-density0.02-seed7",
    ]
    made = [(run.variant, run.config.method, run.config.target_density, run.config.seed) for run in spec.runs]
    assert made[2] == ("cs", "cs", 0.02, 0) and made[5] == ("imp", "imp", 0.5, 7)
    digits = {name: getattr(PRESETS["digits"], name) for name in Config.__dataclass_fields__}
    own = {"method": "imp", "target_density": 0.02, "seed": 7, "epochs": 20, "lr": 1, "keep": 1}
    assert spec.runs[7].config == Config(**{**digits, **own, "controls": (), "report": False})
    assert (spec.name, spec.reference) == ("grid", "imp")


def test_methods_without_a_density_have_one_run_a_seed() -> None:
    runs = grid(methods=["dense", "random"], densities=[0.5, 0.1], seeds=[1, 2]).runs
    assert [run.name for run in runs[:3]] == ["dense-seed1", "dense-seed2", "random-density0.5-seed1"]
    assert len(runs) == 6 and runs[0].config.target_density is None


def test_an_initial_score_that_is_no_axis_is_a_setting_like_others() -> None:
    runs = grid(methods=["cs"], densities=[0.5], settings={"mask_initial_value": 0.2}).runs
    assert (runs[0].config.target_density, runs[0].config.mask_initial_value, runs[0].initial_score) == (0.5, 0.2, None)
    assert grid(methods=["gmp"], settings={"target_density": 0.3}).runs[0].config.target_density == 0.3


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples" / "sweeps").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_specs_among_the_examples_can_be_used(path: Path) -> None:
    assert read_spec(path).runs


def test_initial_scores_are_for_methods_that_learn_masks() -> None:
    runs = grid(methods=["cs", "imp"], initial_scores=[-0.1, 0, 0.25]).runs
    assert [(run.name, run.initial_score, run.config.mask_initial_value) for run in runs] == [
        ("cs-score-0.1-seed0", -0.1, -0.1),
        ("cs-score0-seed0", 0.0, 0.0),
        ("cs-score0.25-seed0", 0.25, 0.25),
        ("imp-seed0", None, -0.03),
    ]


def test_a_method_may_come_twice_under_names_of_its_own() -> None:
    tables = {"long": {"method": "imp", "epochs": 30}, "cs": {"controls": ["reinit"]}}
    spec = grid(methods=["long", "cs", "imp"], method=tables, reference="long", settings={"epochs": 20})
    assert [(run.variant, run.config.method, run.config.epochs) for run in spec.runs] == [
        ("long", "imp", 30),
        ("cs", "cs", 20),
        ("imp", "imp", 20),
    ]
    assert [run.config.controls for run in spec.runs] == [(), ("reinit",), ()]
    assert [run.epochs for run in spec.runs] == [90, 80, 60]  # two rounds, the ticket, and cs has a control
    assert spec.reference == "long"


def test_settings_in_a_methods_table_that_the_method_ignores_are_listed() -> None:
    tables = {"imp": {"lmbda": 1e-5, "epochs": 20, "final_temp": 50}, "cs": {"lmbda": 0}, "many": {"method": "snip"}}
    tables["many"]["rounds"] = 3
    settings = {"score_lr": 0.5, "target_density": 0.1}
    spec = grid(methods=["imp", "cs", "many"], method=tables, settings=settings)
    assert spec.ignored_settings() == [
        "--method imp ignores lmbda, final_temp in [method.imp]",
        "--method snip ignores rounds in [method.many]",
    ]
    assert grid(methods=["imp", "cs"], settings={"lmbda": 0.1}).ignored_settings() == []


def test_the_name_of_the_file_is_the_sweeps(tmp_path: Path) -> None:
    spec = read_spec(written(tmp_path / "a.b.toml", FOUR))
    assert spec.name == "a.b" and len(spec.runs) == 4
    assert spec == make_spec("a.b", tomllib.loads(FOUR))


BASE = 'methods = ["cs", "imp"]\nseeds = [0]\n'


@pytest.mark.parametrize(
    "text, told",
    [
        (BASE + "method = 3", "method 3: must be an object"),
        (BASE + "density = [0.1]", "density: unknown key; must be one of preset, * (did you mean densities?)"),
        (BASE + "[settings]\nepoch = 3", "[settings] epoch: unknown key; must be one of * (did you mean epochs?)"),
        (BASE + "[settings]\nlr-schedule = []", "[settings] lr-schedule: unknown key; * (did you mean lr_schedule?)"),
        (BASE + "[method.cs]\nround = 1", "[method.cs] round: unknown key; must be one of * (did you mean rounds?)"),
        (
            BASE + "[method.impc]\nrounds = 1",
            "[method.impc]: not in methods (did you mean imp?); add impc to methods or remove the table",
        ),
        (
            BASE + "[method.gmp]\nrounds = 1",
            "[method.gmp]: not in methods; add gmp to methods or remove the table",
        ),
        (BASE + "[method]\ncs = 3", "method.cs 3: must be an object"),
        (BASE + "settings = 3", "settings 3: must be an object"),
        (BASE + "[settings]\nseed = 3", "[settings] seed: not allowed in a table; list seeds above the tables"),
        (
            "densities = [0.5]\n" + BASE + "[settings]\ntarget_density = 0.1",
            "[settings] target_density: not allowed in a table; densities lists its values",
        ),
        (BASE + "[method.cs]\nout = 'here'", "[method.cs] out: not allowed in a table; give --out to the command"),
        (
            "initial_scores = [0.0]\n" + BASE + "[method.cs]\nmask_initial_value = 0.1",
            "[method.cs] mask_initial_value: not allowed in a table; initial_scores lists its values",
        ),
        (
            BASE + "[settings]\nmethod = 'imp'",
            "[settings] method: not allowed in a table; list methods above the tables",
        ),
        (BASE + "preset = 'digit'", "preset 'digit': must be one of digits, * (did you mean digits?)"),
        (BASE + "preset = ['digits']", "preset ['digits']: must be text"),
        (BASE + "[method.cs]\nmethod = ['imp']", "[method.cs] method ['imp']: must be one of *"),
        (BASE + "reference = 'random'", "reference 'random': must be one of cs, imp"),
        (BASE + "reference = ''", "reference '': must be one of cs, imp"),
        (BASE + "reference = 3", "reference 3: must be text"),
        ("methods = ['csx']\nseeds = [0]", "methods 'csx': must be one of *; or set method in a table [method.csx]"),
        ("methods = ['a b']\nseeds = [0]", "methods 'a b': only letters, digits, '-', '_', '+' and '.' are allowed"),
        ("methods = ['../cs']\nseeds = [0]", "methods '../cs': only letters, *"),
        ("methods = 'cs'\nseeds = [0]", "methods 'cs': must be a list"),
        ("methods = [1]\nseeds = [0]", "methods[0] 1: must be text"),
        ("methods = ['cs', 'cs']\nseeds = [0]", "methods 'cs': listed more than once; list each value once"),
        ("methods = []\nseeds = [0]", "methods []: must be a list of length >= 1"),
        ("seeds = [0]", "methods: missing"),
        ("methods = ['cs']", "seeds: missing"),
        ("methods = ['cs']\nseeds = []", "seeds []: must be a list of length >= 1"),
        ("methods = ['cs']\nseeds = 3", "seeds 3: must be a list"),
        ("methods = ['cs']\nseeds = [0.5]", "seeds[0] 0.5: must be a whole number"),
        ("methods = ['cs']\nseeds = [true]", "seeds[0] True: must be a whole number"),
        ("methods = ['cs']\nseeds = [1, 1]", "seeds 1: listed more than once; list each value once"),
        ("methods = ['cs']\nseeds = [-1]", "seeds[0] -1: must be a whole number >= 0"),
        ("methods = ['cs']\nseeds = [4294967296]", "seeds[0] 4294967296: must be a whole number <= 4294967295"),
        (BASE + "densities = [0.0]", "densities[0] 0.0: must be a number > 0.0"),
        (BASE + "densities = [0.1, 1.5]", "densities[1] 1.5: must be a number <= 1.0"),
        (BASE + "densities = [nan]", "densities[0] nan: must be a number > 0.0"),
        (BASE + "densities = ['0.1']", "densities[0] '0.1': must be a number"),
        (BASE + "densities = [1, 1.0]", "densities 1.0: listed more than once; list each value once"),
        (BASE + "densities = []", "densities []: must be a list of length >= 1"),
        (
            BASE + "densities = [0.12345678, 0.12345679]",
            "densities: 2 runs have the name cs-density0.123457-seed0; use values that differ in the first six digits",
        ),
        (
            BASE + "densities = [0.1]\ninitial_scores = [0.1]",
            "initial_scores: cannot be combined with densities; remove one of them",
        ),
        (
            "methods = ['imp', 'gmp']\nseeds = [0]\ninitial_scores = [0.1, 0.2]\n[settings]\ntarget_density = 0.1",
            "initial_scores: not used by imp, gmp; "
            "add a method that learns masks, one of cs, iss, supermask, supermask-iss",
        ),
        (BASE + "initial_scores = [inf]", "initial_scores[0] inf: must be a number < *"),
        (BASE + "initial_scores = [nan]", "initial_scores[0] nan: must be a number > -*"),
        (BASE + "[settings]\nepochs = 'x'", "cs-seed0: settings: epochs 'x': must be a whole number"),
        (BASE + "[settings]\nepochs = 0", "cs-seed0: --epochs 0: must be at least 1"),
        (BASE + "[method.imp]\ncontrols = 'x'", "imp-seed0: settings: controls 'x': must be a list"),
        (
            "methods = ['cs', 'supermask']\nseeds = [3]\n[settings]\nafter = 'finetune'",
            "supermask-seed3: --after finetune: --method supermask allows none only, because its weights are frozen",
        ),
        (
            "methods = ['imp', 'gmp']\nseeds = [0]",
            "gmp-seed0: --target-density: required by --method gmp; give a share above 0 and at most 1",
        ),
        (BASE + "[settings", "not valid TOML: *"),
        ("methods = ['cs']\nmethods = ['imp']", "not valid TOML: Cannot overwrite a value (at *"),
    ],
)
def test_a_spec_that_cannot_be_used_is_refused_in_one_line(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grid.toml").write_text(text)
    assert commands.main(["sweep", "grid.toml"]) == 2
    line = one_line(capsys)
    place = 0
    for part in f"python -m cs_jax sweep: error: grid.toml: {told}".split("*"):
        assert part in line[place:], line
        place = line.index(part, place) + len(part)
    assert told.endswith("*") or place == len(line) - 1, line
    assert [path.name for path in tmp_path.iterdir()] == ["grid.toml"]


@pytest.mark.parametrize(
    "words, told",
    [
        (["nowhere.toml"], "nowhere.toml: cannot be read: No such file or directory"),
        (["."], ".: cannot be read: Is a directory"),
        (["latin.toml"], "latin.toml: not valid TOML: 'utf-8' codec can't decode byte 0xe9"),
        (["good.toml", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["good.toml", "--jobs", "two"], "argument --jobs: invalid int value: 'two'"),
        (["good.toml", "--tickets", "0"], "--tickets 0: must be auto or a whole number of at least 1"),
        (["good.toml", "--tickets", "all"], "--tickets all: must be auto or a whole number of at least 1"),
        (["good.toml", "--job"], "argument --jobs: expected one argument"),
        ([], "the following arguments are required: SPEC"),
        (["good.toml", "--out", "full"], "--out full: not empty and not a sweep directory; choose an empty or new one"),
        (["good.toml", "--out", "good.toml"], "--out good.toml: is a file; choose a directory"),
        (["huge.toml"], "--val-set-size 99999: must be less than 1437, "),
    ],
)
def test_words_that_cannot_be_used_are_refused_in_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.toml").write_text(FOUR)
    Path("huge.toml").write_text(FOUR + "val_set_size = 99999\n")
    Path("latin.toml").write_bytes(b"methods = ['\xe9']")
    Path("full").mkdir()
    Path("full/thesis.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    assert commands.main(["sweep", *words]) == 2
    assert one_line(capsys).startswith(f"python -m cs_jax sweep: error: {told}")
    assert sorted(tmp_path.rglob("*")) == before


def test_every_run_of_a_sweep_has_its_result_and_no_checkpoints(swept: Path) -> None:
    out = swept / "out"
    names = ["imp-density0.1-seed0", "imp-density0.1-seed1", "random-density0.1-seed0", "random-density0.1-seed1"]
    assert sorted(path.name for path in (out / "runs").iterdir()) == names
    assert sorted(path.name for path in out.iterdir()) == ["logs", "runs", "sweep.json"]
    for name in names:
        summary = run_directory.read_summary(out / "runs" / name)
        assert summary is not None and summary["ticket"]["density"] == 0.1
        assert not (out / "runs" / name / "checkpoints").exists()
        assert "test" in (out / "logs" / f"{name}.txt").read_text()


@pytest.mark.slow
def test_a_run_of_a_sweep_is_the_one_that_train_makes(swept: Path, tmp_path: Path) -> None:
    words = "--model lenet300100 --rounds 1 --epochs 2 --rewind-epoch 1 --lr-schedule 1 --lr-drops 0.1 --controls"
    asked = "--method imp --target-density 0.1 --seed 1 --no-report --keep 1"
    assert commands.main(["train", *words.split(), *asked.split(), "--out", str(tmp_path / "run")]) == 0
    of_sweep = swept / "out" / "runs" / "imp-density0.1-seed1"
    assert (of_sweep / TICKET_FILE).read_bytes() == (tmp_path / "run" / TICKET_FILE).read_bytes()
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "run", of_sweep))
    for settings in (theirs, ours):
        assert int(settings["versions"].pop("cores")) >= 1  # a sweep shares them out among its runs
    assert {**theirs, "out": None} == {**ours, "out": None}


def test_what_is_done_is_skipped(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times(swept)
    assert sweep(swept / "quick.toml") == 0
    assert times(swept) == before
    out, spec = swept / "out", swept / "quick.toml"
    compare = f"compare them with: python -m cs_jax pareto {spec} --out {out}"
    assert capsys.readouterr().out == f"{out}: all 4 runs finished; {compare}\n"


def test_checkpoints_that_a_killed_sweep_left_in_a_finished_run_are_removed(copied: Path) -> None:
    left = copied / "out" / "runs" / "imp-density0.1-seed0" / "checkpoints"
    (left / "00000001").mkdir(parents=True)
    assert sweep(copied / "quick.toml") == 0
    assert not left.exists()


@pytest.mark.slow
def test_a_spec_with_one_more_seed_trains_that_alone(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times(copied)
    (copied / "quick.toml").write_text(FOUR.replace("[0, 1]", "[2, 0, 1]").replace('"imp", ', ""))
    assert sweep(copied / "quick.toml") == 2  # without imp it is another sweep
    told = "out: belongs to another sweep: imp-density0.1-seed0 is missing from the spec; choose another directory\n"
    assert told in one_line(capsys)
    more = FOUR.replace("[0, 1]", "[2, 0, 1]") + "[method.imp]\nlmbda = 1e-5\n"
    (copied / "quick.toml").write_text(more)
    assert sweep(copied / "quick.toml", "--jobs", "1") == 0
    told, *lines = capsys.readouterr().out.splitlines()
    assert told == "--method imp ignores lmbda in [method.imp]"
    assert lines[0].startswith("5 of 6  imp-density0.1-seed2: density 10.00%, test ")
    assert lines[1].startswith("6 of 6  random-density0.1-seed2: density 10.00%, test ")
    assert len(lines) == 3
    after = times(copied)
    assert {path: after[path] for path in before if path.name != "runs"} == {
        path: before[path] for path in before if path.name != "runs"
    }


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("epochs = 2", "epochs = 3", "imp-density0.1-seed0 has epochs 3 (was 2)"),
        ("lr_schedule = [1]", "lr_schedule = [0]", "imp-density0.1-seed0 has lr_schedule 0 (was 1)"),
        ("[0.1]", "[0.2]", "imp-density0.1-seed0 is missing from the spec"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(
    old: str, new: str, told: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = times(swept), swept / "out"
    other = written(tmp_path / "other.toml", FOUR.replace(old, new, 1))
    for command in ("sweep", "pareto"):
        assert commands.main([command, str(other), "--out", str(out)]) == 2
        assert f"error: --out {out}: belongs to another sweep: {told}; choose another directory\n" in one_line(capsys)
    assert times(swept) == before


def test_a_folder_whose_spec_is_damaged_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "out" / "sweep.json").write_text("{")
    assert sweep(copied / "quick.toml") == 2
    assert f"{copied / 'out' / 'sweep.json'}: cannot be read: " in one_line(capsys)


def test_a_second_process_on_a_sweep_is_refused(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lock(swept / "out" / "sweep.lock"):
        assert sweep(swept / "quick.toml") == 2
        assert f"out: process {os.getpid()} on host " in one_line(capsys)
    (tmp_path / "new").mkdir()
    spec = read_spec(swept / "quick.toml")
    with Lock(tmp_path / "new" / "sweep.lock"), pytest.raises(ConfigError, match="is writing to this folder"):
        run_sweep(spec, tmp_path / "new", [ANYWHERE], SweepObserver())  # the other is about to begin
    assert list((tmp_path / "new").iterdir()) == []


def test_a_sweep_that_was_killed_before_its_spec_was_written_can_begin_again(tmp_path: Path) -> None:
    for name in ("sweep.lock", ".0123456789abcdef.tmp"):
        (tmp_path / name).write_text("{")
        storage.check_same_spec(tmp_path, grid())
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not empty and not a sweep directory"):
        storage.check_same_spec(tmp_path, grid())


def test_pareto_says_what_is_not_done(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pareto", str(copied / "quick.toml"), "--out", str(copied / "out")]
    (copied / "out" / "runs" / "imp-density0.1-seed1" / "summary.json").unlink()
    assert commands.main(words) == 0
    shown = capsys.readouterr().out
    assert "\nnot finished: imp-density0.1-seed1\n" in shown
    assert "; 1 run not finished" in (copied / "out" / "report.html").read_text()
    assert re.search(r"^ *random +ticket +0.1 +2 +10.00% ", shown, re.MULTILINE)
    assert (copied / "out" / "pareto.md").read_text().startswith("| method |")
    (copied / "out" / "runs" / "random-density0.1-seed0" / "summary.json").write_text("[]")
    assert commands.main(words) == 2
    assert "random-density0.1-seed0/summary.json: damaged: " in one_line(capsys)
    shutil.rmtree(copied / "out" / "runs")
    assert commands.main(words) == 2
    again = f"python -m cs_jax sweep {copied}/quick.toml --out {copied}/out"
    assert f"out: no finished run; start the sweep with: {again}\n" in one_line(capsys)


def test_pareto_says_that_a_sweep_has_no_reference(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, spec, out = copied / "out" / "runs", copied / "quick.toml", copied / "out"
    content = json.loads((out / "sweep.json").read_text())
    content["methods"], content["method"] = ["random", "other"], {"other": {"method": "imp"}}
    for run in sorted(runs.glob("imp-*")):
        run.rename(runs / run.name.replace("imp", "other"))
    (out / "sweep.json").write_text(json.dumps(content))
    written(spec, FOUR.replace('["imp", "random"]', '["random", "other"]') + '[method.other]\nmethod = "imp"\n')
    told = f'methods are not compared: the sweep has no imp; set reference = "random" or another method in {spec}\n'
    assert commands.main(["pareto", str(spec), "--out", str(out)]) == 0
    assert told in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "there are no tickets of imp, the sweep&#39;s reference." in page
    written(spec, 'reference = "random"\n' + spec.read_text())
    assert commands.main(["pareto", str(spec), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "vs random (ref.) at the same target" in shown and "not compared" not in shown


class Killing(SweepObserver):
    """Records ended runs, and kills workers: after the given epoch and a checkpoint, or at the run's end if 0."""

    def __init__(self, directory: Path, epochs: dict[str, int]) -> None:
        self._directory, self._epochs = directory, epochs
        self._processes: dict[int, int] = {}
        self.ended: list[tuple[int, str, bool]] = []
        self.stopped = False

    def on_stop(self, running: int) -> None:
        self.stopped = True

    def on_epoch(self, worker: int, run: PlannedRun, epoch: int) -> None:
        if worker not in self._processes:
            lock = storage.folder_of(self._directory, run) / "run.lock"
            self._processes[worker] = json.loads(lock.read_text())["process"]
        checkpoints = storage.folder_of(self._directory, run) / "checkpoints"
        if 0 < self._epochs.get(run.variant, 0) <= epoch and list(checkpoints.glob("[0-9]*-[0-9]*[0-9]")):
            self._kill(worker)

    def on_end(self, worker: int, run: PlannedRun, ticket: Mapping[str, Any] | None, failure: str) -> None:
        self.ended.append((worker, run.variant, ticket is not None))
        if self._epochs.get(run.variant) == 0:
            self._kill(worker)

    def _kill(self, worker: int) -> None:
        os.kill(self._processes[worker], signal.SIGKILL)
        while kill_sweep.is_alive(self._processes[worker]):
            time.sleep(0.01)


@pytest.mark.slow
def test_failures_and_killed_workers_do_not_stop_the_other_runs_and_are_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = written(tmp_path / "trouble.toml", TROUBLE), tmp_path / "out"
    watcher = Killing(out, {"slow": 3})
    failures = run_sweep(read_spec(spec), out, [ANYWHERE], watcher)
    assert watcher.ended == [(0, "wild", False), (0, "slow", False), (1, "random", True)]
    assert failures.keys() == {"wild-density0.1-seed0", "slow-density0.1-seed0"} and not watcher.stopped
    assert failures["wild-density0.1-seed0"].startswith("loss is ")
    log = out / "logs" / "worker0.txt"
    assert failures["slow-density0.1-seed0"] == f"its process ended with exit code -9; see {log}"
    before = (out / "runs" / "random-density0.1-seed0" / TICKET_FILE).stat().st_mtime_ns
    assert sweep(spec, "--jobs", "1") == 1
    shown = capsys.readouterr()
    failed, done = shown.out.splitlines()
    assert failed == f"2 of 3  wild-density0.1-seed0: failed: {failures['wild-density0.1-seed0']}"
    assert done.startswith("3 of 3  slow-density0.1-seed0: density 10.00%, test ")
    resume = "if a retry cannot help, correct the settings of failed runs in the spec; "
    resume += f"resume with: python -m cs_jax sweep {spec} --out {out}"
    log = out / "logs" / "wild-density0.1-seed0.txt"
    told = f"1 of 3 runs failed, first wild-density0.1-seed0: see {log}; {resume}"
    assert log.read_text().endswith(f"\nfailed: {failures['wild-density0.1-seed0']}\n")
    assert shown.err == f"python -m cs_jax sweep: error: {told}\n"
    assert "resuming search 0 at epoch " in (out / "logs" / "slow-density0.1-seed0.txt").read_text()
    assert (out / "runs" / "random-density0.1-seed0" / TICKET_FILE).stat().st_mtime_ns == before
    assert commands.main(["pareto", str(spec), "--out", str(out)]) == 0
    told = f"not finished: wild-density0.1-seed0 failed: {failures['wild-density0.1-seed0']}\n"
    assert told in capsys.readouterr().out
    # Settings of failed runs may change; settings of finished runs may not.
    written(spec, TROUBLE.replace("lr = 1e30", "lr = 0.05").replace("epochs = 20", "epochs = 19"))
    assert sweep(spec, "--jobs", "1") == 2
    assert "belongs to another sweep: slow-density0.1-seed0 has epochs 19 (was 20); " in one_line(capsys)
    written(spec, TROUBLE.replace("lr = 1e30", "lr = 0.05"))
    assert sweep(spec, "--jobs", "1") == 0
    assert "3 of 3  wild-density0.1-seed0: density 10.00%, test " in capsys.readouterr().out
    assert storage.read_failures(out) == {}
    assert (out / "runs" / "random-density0.1-seed0" / TICKET_FILE).stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_worker_that_dies_when_a_run_is_done_costs_the_next_one_alone(tmp_path: Path) -> None:
    text = 'methods = ["random", "magnitude", "imp"]\ndensities = [0.1]\nseeds = [0]\n' + QUICK
    watcher = Killing(tmp_path, {"random": 0, "imp": 0})
    failures = run_sweep(make_spec("x", tomllib.loads(text)), tmp_path, [ANYWHERE], watcher)
    assert watcher.ended == [(0, "random", True), (0, "magnitude", False), (1, "imp", True)]
    told = f"its process ended with exit code -9; see {tmp_path / 'logs' / 'worker0.txt'}"
    assert failures == {"magnitude-density0.1-seed0": told}


def test_workers_that_cannot_begin_end_the_sweep(tmp_path: Path) -> None:
    nowhere = Device((), {"JAX_PLATFORMS": "cpu", "PYTHONHOME": str(tmp_path)})
    log = tmp_path / "out" / "logs" / "worker0.txt"
    told = f"^a worker ended with exit code 1 before its first run; see {log}$"
    with pytest.raises(OSError, match=told):
        run_sweep(make_spec("x", tomllib.loads(FOUR)), tmp_path / "out", [nowhere], SweepObserver())
    assert log.read_text()


def worker(folder: Path) -> subprocess.Popen[str]:
    """Starts a worker with a run that takes minutes."""
    settings = {**tomllib.loads(QUICK)["settings"], "epochs": 5000}
    (run,) = grid(methods=["imp"], settings=settings).runs
    settings = {**to_json(run.config), "out": str(folder / "run")}
    job = {"runs": [{"name": "run", "config": settings, "log": str(folder / "log.txt")}], "tickets": None}
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "cs_jax.commands.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return process


@pytest.mark.slow
def test_a_worker_whose_sweep_has_died_saves_its_run_and_leaves(tmp_path: Path) -> None:
    with worker(tmp_path / "early") as early, worker(tmp_path / "busy") as busy:
        assert early.stdin is not None and busy.stdin is not None and busy.stdout is not None
        early.stdin.close()  # before it can have looked for a job
        assert busy.stdout.readline() == '{"ready": true}\n'
        assert busy.stdout.readline() == '{"run": "run", "epoch": 1}\n'
        busy.stdin.close()
        try:
            assert busy.wait(60) == 0
            assert early.wait(60) in (0, -signal.SIGTERM)
        finally:
            busy.kill()
            early.kill()
    assert list((tmp_path / "busy" / "run" / "checkpoints").glob("0*"))
    assert not (tmp_path / "early" / "run").exists()


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_any_moment_ends_with_the_same_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    assert kill_sweep.main(kills=2, seed=0) == 0, capfd.readouterr().out


def asked(monkeypatch: pytest.MonkeyPatch, backend: str, devices: int) -> None:
    monkeypatch.setattr(sweep_devices, "_probe_jax", lambda: (backend, devices))


def test_there_is_a_place_for_each_core_and_none_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, "cpu", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 5, 6, 7, 9}, raising=False)
    assert find_devices(None, 100) == [Device((core,), {}) for core in (4, 5, 6, 7, 9)]
    assert find_devices(None, 2) == [Device((4, 6, 9), {}), Device((5, 7), {})]
    assert find_devices(2, 100) == [Device((4, 6, 9), {}), Device((5, 7), {})]
    assert find_devices(6, 100) == [Device((), {})] * 6
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert find_devices(None, 100) == [Device((), {})] * 3


def test_each_gpu_is_seen_by_workers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, "gpu", 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    one, other = {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}
    assert find_devices(None, 100) == [Device((), one, True), Device((), other, True)]
    assert find_devices(None, 1) == find_devices(1, 100) == [Device((), one, True)]
    half = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
    assert find_devices(3, 100) == [Device((), device | half, True) for device in (one, other, one)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in find_devices(None, 100)] == ["5", "GPU-7"]


def test_a_tpu_has_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(monkeypatch, "tpu", 8)
    assert find_devices(None, 100) == find_devices(1, 100) == [Device((), {}, True)]
    assert sweep(written(tmp_path / "four.toml", FOUR), "--jobs", "2") == 2
    told = "--jobs 2: must be 1 on a TPU, because one process holds all devices"
    assert one_line(capsys) == f"python -m cs_jax sweep: error: {told}\n"
    assert not (tmp_path / "out").exists()


def test_jax_is_asked_in_another_process_and_its_refusal_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "none_such")
    with pytest.raises(ConfigError, match="^JAX finds no device: .*none_such"):
        find_devices(None, 1)


def shown(*, terminal: bool) -> str:
    """Output of a display for four runs: done before, resumed and finished, failed, and started."""
    runs = list(grid(densities=[0.5, 0.25, 0.1, 0.05], settings={"epochs": 20}).runs)
    file = io.StringIO()
    with SweepDisplay(Console(force_terminal=terminal, file=file, width=110), len(runs), runs[1:]) as display:
        display.on_start(0, runs[1])
        display.on_start(1, runs[2])
        for epoch in range(31, 61):  # of 60: begun by an earlier sweep
            display.on_epoch(0, runs[1], epoch)
        for epoch in range(1, 7):
            display.on_epoch(1, runs[2], epoch)
        display.on_end(1, runs[2], None, "loss is [nan]")
        display.on_start(1, runs[3])
        for epoch in range(1, 16):
            display.on_epoch(1, runs[3], epoch)
        display.on_end(0, runs[1], {"density": 0.2501, "test_accuracy": 0.9722}, "")
    return file.getvalue()


LINES = """\
2 of 4  cs-density0.1-seed0: failed: loss is [nan]
3 of 4  cs-density0.25-seed0: density 25.01%, test 97.22%
"""


def test_without_a_terminal_there_is_a_line_for_each_run_that_ends() -> None:
    assert shown(terminal=False) == LINES


def test_a_terminal_has_a_bar_for_the_sweep_and_one_for_each_worker() -> None:
    """Epochs of resumed or failed runs that need no training are not counted."""
    text = Text.from_ansi(shown(terminal=True)).plain
    lines = [" ".join(re.sub("[━╸╺]", " ", line).split()) for line in text.splitlines() if line]
    assert [line for line in lines if " of 4 cs-" in line] == LINES.replace("  ", " ").splitlines()
    whole, worker = lines[-2:]
    assert whole.startswith(f"3 of 4 runs {51 / 96:.0%} 0:00:0")
    assert worker.startswith("cs-density0.05-seed0 25% 0:00:0")


def test_a_sweep_whose_runs_are_all_done_shows_nothing_that_is_under_way() -> None:
    file = io.StringIO()
    with SweepDisplay(Console(force_terminal=True, file=file, width=110), 4, []):
        pass
    assert "4 of 4 runs" in file.getvalue()
