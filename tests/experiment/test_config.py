"""Flags, presets, and one line for each thing that cannot be used."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

import cs_jax
from cs_jax.commands.parser import parse
from cs_jax.core.errors import ConfigError
from cs_jax.core.settings import flag
from cs_jax.experiment import presets
from cs_jax.experiment.config import Config
from cs_jax.experiment.presets import without_effect
from cs_jax.experiment.storage import config_file, paths

METHODS = "cs, imp, imp-c, iss, gmp, magnitude, random, snip, supermask, supermask-iss, dense"


def test_digits_is_the_preset_when_none_is_named() -> None:
    assert parse([]) == presets.PRESETS["digits"]
    assert parse(["--epochs", "20"]) == dataclasses.replace(presets.PRESETS["digits"], epochs=20)


def test_cifar10_is_the_authors_experiment() -> None:
    cifar10 = parse(["cifar10"])
    assert (cifar10.rounds, cifar10.epochs, cifar10.batch_size, cifar10.rewind_epoch) == (2, 85, 128, 2)
    assert (cifar10.lr, cifar10.lr_schedule, cifar10.lr_drops, cifar10.decay) == (0.1, (56, 71), (0.1, 0.1), 1e-4)
    assert (cifar10.lmbda, cifar10.final_temp, cifar10.mask_initial_value) == (1e-8, 200.0, 0.0)
    assert (cifar10.reset, cifar10.val_set_size, cifar10.augment, cifar10.score_lr) == (
        "paper",
        5000,
        "flip-crop",
        None,
    )


def test_imagenet_is_streamed_and_trained_as_usual() -> None:
    imagenet = parse(["imagenet-resnet50"])
    assert (imagenet.dataset, imagenet.model, imagenet.image_size) == ("imagenet2012", "resnet50", 224)
    assert (imagenet.batch_size, imagenet.lr, imagenet.decay, imagenet.augment) == (256, 0.1, 1e-4, "resized-crop")
    assert (imagenet.epochs, imagenet.lr_schedule, imagenet.lr_drops) == (90, (30, 60, 80), (0.1, 0.1, 0.1))
    assert (imagenet.rounds, imagenet.rewind_epoch, imagenet.final_temp, imagenet.lmbda) == (2, 2, 200.0, 1e-8)


def test_every_flag_overrides_its_field() -> None:
    words = (
        "cifar10 --batch-size 7 --epochs 9 --rounds 3 --lr 0.2 --lr-schedule 1 3 5 --lr-drops 0.5 0.4 0.3 --decay 0 "
        "--rewind-epoch 4 --lmbda 1e-3 --final-temp 1 --mask-initial-value -0.3 --val-set-size 0 --seed 5 "
        "--reset released --model resnet8 --dataset fashion_mnist --data-dir d --max-train-examples 11 "
        "--controls shuffled dense --method imp --after finetune "
        "--score-lr 2 --augment none --out o --keep 4 --checkpoint-steps 5 "
        "--checkpoint-seconds 0 --no-report --image-size 24 --stream --loader-threads 3 "
        "--data-parallel 1 --model-parallel 2 --accumulate 7 --remat --dtype bfloat16 "
        "--score-dtype bfloat16"
    ).split()
    by_weight = {"scope": "--scope layer", "allow_empty_layers": "--allow-empty-layers"}
    by_channel = {"granularity": "--granularity channel", "channel_multiple": "--channel-multiple 3"}
    exclusive = (
        {"prune_rate": "--prune-rate 0.3", **by_weight},
        {"target_density": "--target-density 0.3", **by_weight},
        {"target_multiply_adds": "--target-multiply-adds 0.3", **by_channel},
    )
    for given in exclusive:
        parsed = parse([*words, *" ".join(given.values()).split()])
        changed = [f.name for f in dataclasses.fields(Config) if getattr(parsed, f.name) != getattr(Config(), f.name)]
        excluded = {name for others in exclusive for name in others} - given.keys()
        assert changed == [f.name for f in dataclasses.fields(Config) if f.name not in {"preset", *excluded}]
        assert {getattr(parsed, name) for name in given} <= {0.3, 3, "layer", "channel", True}
        assert parsed.lr_schedule == (1, 3, 5)
        assert parsed.mask_initial_value == -0.3
        assert (parsed.method, parsed.after) == ("imp", "finetune")
        assert parsed.controls == ("shuffled", "dense")


def test_controls_without_a_name_are_none() -> None:
    assert parse([]).controls == ("dense",)
    assert parse(["--controls", "--seed", "3"]) == dataclasses.replace(parse(["--seed", "3"]), controls=())


@pytest.mark.parametrize(
    "words, rounds, retrainings",
    [
        ("", 2, ("ticket",)),
        ("--controls random dense", 2, ("ticket", "random", "dense")),
        ("--after none --controls dense", 2, ("dense",)),
        ("--method supermask", 2, ()),
        ("--method snip --target-density 0.1 --controls reinit", 0, ("ticket", "reinit")),
        ("--method dense", 0, ("ticket",)),
    ],
)
def test_method_and_controls_decide_what_is_trained(words: str, rounds: int, retrainings: tuple[str, ...]) -> None:
    settings = parse(["cifar10", *words.split()])
    assert (settings.search_rounds, settings.retrainings) == (rounds, retrainings)


def test_the_run_directory_is_named_for_preset_method_and_seed() -> None:
    assert str(parse(["fashion-mnist", "--seed", "3"]).run_directory) == "runs/fashion-mnist-seed3"
    assert str(parse(["--out", "there"]).run_directory) == "there"
    assert str(parse(["--method", "imp-c"]).run_directory) == "runs/digits-imp-c-seed0"


def test_drops_after_the_last_epoch_and_no_drops_are_allowed() -> None:
    assert parse(["--epochs", "3", "--lr-schedule", "56", "71"]).lr_schedule == (56, 71)
    assert parse(["--lr-schedule", "--lr-drops"]).lr_schedule == ()


@pytest.mark.parametrize(
    "words, drops",
    [
        ("--lr-schedule 3 --seed 1", (0.1,)),
        ("--lr-schedule=3", (0.1,)),
        ("--seed 1 --lr-schedule 3 4 5", (0.1, 0.1, 0.1)),
        ("--lr-schedule", ()),
        ("--lr-schedule 3 --lr-drops 0.5", (0.5,)),
        ("--seed 1", (0.1, 0.1)),
    ],
)
def test_a_schedule_alone_has_the_presets_last_drop_for_each_of_its_epochs(
    words: str, drops: tuple[float, ...]
) -> None:
    assert parse(words.split()).lr_drops == drops


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "fashion",
            "preset fashion: must be one of digits, fashion-mnist, cifar10, imagenet-resnet50 (did you mean "
            "fashion-mnist?)",
        ),
        (
            "--model resnet21",
            "--model resnet21: must be one of resnet20, resnet32, resnet56, resnet50, resnet8, resnet6, vgg16, conv2, "
            "conv4, conv6, vit_tiny, lenet300100 (did you mean resnet32?)",
        ),
        ("--method gpm", f"--method gpm: must be one of {METHODS} (did you mean gmp?)"),
        ("--method x", f"--method x: must be one of {METHODS}"),
        (
            "--controls dense reini",
            "--controls reini: must be one of dense, reinit, shuffled, random (did you mean reinit?)",
        ),
        ("--controls digits", "--controls digits: must be one of dense, reinit, shuffled, random"),
        ("--controls dense dense", "--controls dense dense: must name each control once"),
        (
            "--after none --controls dense reinit",
            "--controls reinit: requires a retraining after the search; use --controls dense",
        ),
        (
            "--method supermask --controls random shuffled",
            "--controls random shuffled: requires a retraining after the search; use --controls dense",
        ),
        (
            "--after finetine",
            "--after finetine: must be one of rewind, finetune, lr-rewind, none (did you mean finetune?)",
        ),
        (
            "--method supermask --after finetune",
            "--after finetune: --method supermask allows none only, because its weights are frozen",
        ),
        (
            "--method snip --target-density 0.1 --after lr-rewind",
            "--after lr-rewind: --method snip allows rewind only, because there is no search to continue from",
        ),
        ("--scope layers", "--scope layers: must be one of global, layer"),
        ("--method gmp", "--target-density: required by --method gmp; give a share above 0 and at most 1"),
        ("--method random", "--target-density: required by --method random; give a share above 0 and at most 1"),
        (
            "--method dense --target-density 0.1",
            "--target-density 0.1: --method dense prunes nothing; omit --target-density",
        ),
        ("--prune-rate 0.1", "--prune-rate 0.1: requires --method imp or imp-c"),
        ("--method iss --prune-rate 0.1", "--prune-rate 0.1: requires --method imp or imp-c"),
        (
            "--method imp --prune-rate 0.1 --target-density 0.2",
            "--prune-rate 0.1: excludes --target-density 0.2; give one of them",
        ),
        ("--method imp --prune-rate 0", "--prune-rate 0.0: must be a share above 0 and below 1"),
        ("--method imp-c --prune-rate 1", "--prune-rate 1.0: must be a share above 0 and below 1"),
        ("--method imp --prune-rate nan", "--prune-rate nan: must be a share above 0 and below 1"),
        ("--method imp --prune-rate x", "--prune-rate x: must be a number"),
        (
            "--augment flip",
            "--augment flip: must be one of none, crop, flip-crop, resized-crop (did you mean flip-crop?)",
        ),
        ("--reset both", "--reset both: must be one of paper, released"),
        ("--epoch 3", "--epoch: unknown flag (did you mean --epochs?); --help lists all flags"),
        ("--frobnicate", "--frobnicate: unknown flag; --help lists all flags"),
        (
            "--epochs 3 cifar10",
            "cifar10: not a flag; a preset (digits, fashion-mnist, cifar10, imagenet-resnet50) must be the first",
        ),
        ("--epochs", "--epochs: expected one argument"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--epochs 1.5", "--epochs 1.5: must be a whole number"),
        ("--epochs=x", "--epochs x: must be a whole number"),
        ("--rounds -1", "--rounds -1: must be at least 1"),
        ("--batch-size 0", "--batch-size 0: must be at least 1"),
        ("--accumulate 0", "--accumulate 0: must be at least 1"),
        ("--accumulate 3", "--accumulate 3: must divide --batch-size 64"),
        ("--accumulate 128", "--accumulate 128: must divide --batch-size 64"),
        ("--accumulate 1.5", "--accumulate 1.5: must be a whole number"),
        ("--remat --model lenet300100", "--remat: not supported by --model lenet300100; omit --remat"),
        ("--dtype float16", "--dtype float16: must be one of float32, bfloat16 (did you mean bfloat16?)"),
        ("--dtype bf16", "--dtype bf16: must be one of float32, bfloat16 (did you mean bfloat16?)"),
        ("--score-dtype float64", "--score-dtype float64: must be one of float32, bfloat16 (did you mean bfloat16?)"),
        ("--max-train-examples 0", "--max-train-examples 0: must be at least 1"),
        ("--image-size 0", "--image-size 0: must be at least 1"),
        ("--loader-threads 0", "--loader-threads 0: must be at least 1"),
        ("--max-train-examples x", "--max-train-examples x: must be a whole number"),
        ("--val-set-size -1", "--val-set-size -1: must be at least 0"),
        ("--lr 0", "--lr 0.0: must be a finite number above 0"),
        ("--lr nan", "--lr nan: must be a finite number above 0"),
        ("--batch_size x", "--batch-size x: must be a whole number"),
        ("--batch-size 3 --batch-size x", "--batch-size x: must be a whole number"),
        ("--lr 1e39", "--lr 1e+39: must be a finite number above 0"),
        ("--lr 1e-50", "--lr 1e-50: must be a finite number above 0"),
        ("--final-temp 1e39", "--final-temp 1e+39: must be a finite number of at least 1"),
        ("--mask-initial-value 1e39", "--mask-initial-value 1e+39: must be a finite number of at least -80"),
        ("--lr abc", "--lr abc: must be a number"),
        ("--score-lr inf", "--score-lr inf: must be a finite number above 0"),
        ("--score-lr x", "--score-lr x: must be a number"),
        ("--decay -1e-4", "--decay -0.0001: must be a finite number of at least 0"),
        ("--lmbda -1", "--lmbda -1.0: must be a finite number of at least 0"),
        ("--lmbda nan", "--lmbda nan: must be a finite number of at least 0"),
        ("--final-temp 0.99", "--final-temp 0.99: must be a finite number of at least 1"),
        ("--final-temp inf", "--final-temp inf: must be a finite number of at least 1"),
        ("--mask-initial-value nan", "--mask-initial-value nan: must be a finite number of at least -80"),
        ("--mask-initial-value -81", "--mask-initial-value -81.0: must be a finite number of at least -80"),
        ("--epochs 2", "--rewind-epoch 2: must be 0 to 1, because a round has 2 epochs"),
        ("--rewind-epoch -1", "--rewind-epoch -1: must be 0 to 14, because a round has 15 epochs"),
        ("--lr-schedule 3 3", "--lr-schedule 3 3: must be increasing epochs from 0"),
        ("--lr-schedule -1 3", "--lr-schedule -1 3: must be increasing epochs from 0"),
        ("--lr-schedule 1 x", "--lr-schedule x: must be a whole number"),
        ("--lr-drops 0.1", "--lr-drops 0.1: must be 2 factors, one per epoch of --lr-schedule"),
        ("--lr-drops 0.1 0", "--lr-drops 0.1 0.0: must be finite numbers above 0"),
        ("--seed -1", "--seed -1: must be 0 to 4294967295"),
        ("--seed 4294967296", "--seed 4294967296: must be 0 to 4294967295"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words.split())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", ["20", "60", "400"])
def test_the_line_does_not_depend_on_the_terminal(width: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    for given, message in (
        ("0", "--epochs 0: must be at least 1"),
        ("x", "--epochs x: must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            parse(["--epochs", given])


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        parse(["cifar10", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert (flag(field.name) in shown) == (field.name != "preset")
    assert "digits, fashion-mnist, cifar10" in shown
    assert shown.count("default:") == len(dataclasses.fields(Config)) - 1


def test_a_config_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="^--lr nan: must be a finite number above 0$"):
        Config(lr=math.nan)
    with pytest.raises(ConfigError, match="^--reset both: must be one of paper, released$"):
        Config(reset="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"^--scope layers: must be one of global, layer \(did you mean layer\?\)$"):
        Config(scope="layers")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "settings",
    [
        *presets.PRESETS.values(),
        Config(out=Path("a b"), data_dir=Path("/c"), lr_schedule=(), lr_drops=(), lr=0.1 + 0.2, target_density=1 / 3),
        Config(max_train_examples=7, score_lr=1, reset="released", controls=("dense", "random"), report=False),
        Config(method="imp", after="lr-rewind", prune_rate=0.3, scope="layer"),
        Config(accumulate=4, remat=True, dtype="bfloat16", score_dtype="bfloat16"),
    ],
)
def test_a_stored_config_is_the_same_when_it_is_read(settings: Config) -> None:
    assert config_file.from_json(json.loads(json.dumps(config_file.to_json(settings)))) == settings


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs", 2.5),
        ("epochs", True),
        ("report", 1),
        ("lr", "0.1"),
        ("lr_schedule", [1.5]),
        ("model", 3),
        ("out", 1),
        ("controls", "dense"),
        ("controls", [1]),
        ("method", 1),
        ("after", 0),
        ("scope", "all"),
        ("prune_rate", "0.3"),
        ("remat", 1),
        ("accumulate", 2.0),
        ("dtype", None),
    ],
)
def test_a_stored_config_of_another_type_is_told(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^stored settings: {name}.* (must be|unknown)"):
        config_file.from_json({**config_file.to_json(Config()), name: value})


def begun(folder: Path) -> Config:
    stored = Config(epochs=3, seed=8)
    folder.mkdir()
    content = {**config_file.to_json(stored), "versions": {"cs_jax": cs_jax.__version__}, "data": ""}
    (folder / paths.CONFIG_FILE).write_text(json.dumps(content))
    return stored


@pytest.mark.parametrize("words", ["--resume {} --keep 5", "--keep=5 --resume={}"])
def test_resume_takes_the_settings_of_the_run_and_flags_override_them(words: str, tmp_path: Path) -> None:
    stored = begun(tmp_path / "run")
    found = parse(words.format(tmp_path / "run").split())
    assert found == dataclasses.replace(stored, out=tmp_path / "run", keep=5)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--resume", "--resume: expected one argument"),
        ("--resume --keep 5", "--resume: expected one argument"),
        ("--resume a --resume={} --rounds=0", "--rounds 0: must be at least 1"),
        ("--resume {} --out b", "--out b: excludes --resume {}; give one of them"),
        ("digits --resume {}", "--resume {}: excludes the preset digits; remove the preset"),
    ],
)
def test_what_resume_cannot_mean_is_told(words: str, message: str, tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(ConfigError) as error:
        parse(words.format(tmp_path / "run").split())
    assert str(error.value).startswith(message.format(tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        ("", []),
        ("--score-lr 0.5 --rounds 3 --reset released", []),
        ("--method imp --rounds 3 --rewind-epoch 1", []),
        ("--method imp --score-lr 0.5 --final-temp 50", ["--score-lr 0.5", "--final-temp 50.0"]),
        ("--method iss --score-lr 0.5 --reset released", ["--reset released"]),
        ("--method snip --target-density 0.1 --rounds 3 --lmbda 0", ["--lmbda 0.0", "--rounds 3"]),
        ("--method dense --controls --scope layer", ["--scope layer"]),
        ("--method imp --score-dtype bfloat16 --dtype bfloat16", ["--score-dtype bfloat16"]),
    ],
)
def test_flags_that_a_method_makes_no_use_of_are_known(words: str, unused: list[str]) -> None:
    assert without_effect(parse(words.split())) == unused


def test_epochs_to_rewind_to_are_asked_of_methods_with_a_search_alone() -> None:
    assert parse("--method random --target-density 0.1 --epochs 1".split()).rewind_epoch == 2
    with pytest.raises(ConfigError, match="^--rewind-epoch 2: must be 0 to 0, because a round has 1 epochs$"):
        parse("--method imp --epochs 1".split())


def test_dense_beside_the_dense_network_is_itself() -> None:
    asked = parse(["--method", "dense"])
    assert asked.controls == ("dense",) and asked.retrainings == ("ticket",)
    with pytest.raises(ConfigError, match="^--controls dense reinit: --method dense has no masks; omit --controls$"):
        parse("--method dense --controls dense reinit".split())


def test_what_follows_a_search_is_the_same_whether_named_or_left_to_the_method() -> None:
    left, named, other = (
        config_file.to_json(parse(["--method", "imp", *words]))
        for words in ([], ["--after", "rewind"], ["--after", "finetune"])
    )
    assert config_file.differences(left, named) == ""
    assert config_file.differences(left, other) == "after finetune (was rewind)"
    no_controls = left | {"controls": []}
    assert config_file.differences(left, no_controls, flag) == "--controls nothing (was dense)"
