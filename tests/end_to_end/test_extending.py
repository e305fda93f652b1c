"""The page on extending the package: its changes, made in a copy of the package, work from the outside."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "development" / "extending.md").read_text()

pytestmark = pytest.mark.slow


class Copy(NamedTuple):
    """A copy of the package with all changes of the page."""

    root: Path

    def run(self, *words: str) -> str:
        """Printed output of a Python process that imports the copy."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "COLUMNS": "200"}
        done = subprocess.run([sys.executable, *words], cwd=self.root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(self, name: str, *flags: str) -> Path:
        """Run directory of a short run."""
        short = (
            "--rounds 1 --rewind-epoch 0 --val-set-size 64 --batch-size 64 --lr-schedule --lr-drops --controls".split()
        )
        out = self.root / "runs" / name
        self.run("-m", "cs_jax", "train", "digits", *short, "--out", str(out), *flags)
        return out


def apply(hunk: str, path: Path) -> None:
    """Applies a hunk: lines with "+" are added, lines with "-" are removed, others stay."""
    lines = hunk.splitlines()
    old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
    text = "\n" + path.read_text()
    assert text.count("\n" + old) == 1, f"{path} does not have exactly once:\n{old}"
    path.write_text(text.replace("\n" + old, "\n" + new)[1:])


def code_block(page: str, content: str) -> str:
    """The block of Python code on a page that contains a text."""
    (found,) = [
        code for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL) if content in code
    ]
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "cs_jax", root / "cs_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL):
        for path, hunks in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE):
            for hunk in re.split(r"^\.\.\.\n", hunks, flags=re.MULTILINE):
                apply(hunk, root / path)
    for path, code in re.findall(r"```python\n# (cs_jax/\S+)\n(.*?)```", PAGE, re.DOTALL):
        (root / path).write_text(code)
    model, method = (
        code_block("experiments/models.md", "class TwoConvolutions"),
        code_block("experiments/methods.md", "class LastRound"),
    )
    (root / "cs_jax/models/two_convolutions.py").write_text(model)
    kept = [line for line in method.splitlines() if not re.match(r"methods\.METHODS|from cs_jax import methods", line)]
    (root / "cs_jax/methods/last_round.py").write_text("\n".join(kept) + "\n")
    return Copy(root)


@pytest.fixture(scope="module")
def searched(copy: Copy) -> Path:
    """A run with the new data set, model, flag, schedule, metric, checkpoint content and plot."""
    return copy.train("cs", *"--dataset stripes --model two_convolutions --epochs 3 --temp-schedule linear".split())


def epochs_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_row_names_files_and_lines_that_exist() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| [")]
    assert len(rows) == 10
    for row in rows:
        for path in re.findall(r"`((?:cs_jax|tests)/[\w/]+\.py)`", row):
            assert (ROOT / path).is_file(), path
        for path, names in re.findall(r"`(cs_jax/[\w/]+\.py)`: ((?:`\w+`(?:, | and |,? with its \w+ )?)+)", row):
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^\s*(?:def |class )?{name}\b", (ROOT / path).read_text(), re.MULTILINE), (
                    path,
                    name,
                )


def test_a_new_model_and_data_set_train(searched: Path) -> None:
    summary = json.loads((searched / "summary.json").read_text())
    assert summary["dataset"] == "stripes" and summary["classes"] == ["horizontal", "vertical"]
    assert set(epochs_of(searched)[0]["layer_density"]) == {"conv1/kernel", "conv2/kernel"}
    assert summary["ticket"]["test_accuracy"] is not None


def test_a_new_flag_is_in_the_help_and_in_the_config(copy: Copy, searched: Path) -> None:
    shown = copy.run("-m", "cs_jax", "train", "--help")
    assert "--temp-schedule {exponential,linear}" in shown and "exponential (as in the paper) or linear" in shown
    assert json.loads((searched / "config.json").read_text())["temp_schedule"] == "linear"


def test_a_new_temperature_schedule_changes_the_temperature(searched: Path) -> None:
    temperatures = [epoch["temperature"] for epoch in epochs_of(searched) if epoch["phase"] == "search"]
    assert temperatures == [1.0, 100.5, 200.0]


def test_a_new_metric_is_recorded_and_drawn(searched: Path) -> None:
    assert all(epoch["weight_norm"] > 0 for epoch in epochs_of(searched))
    assert "Weight norm" in (searched / "report.html").read_text()
    assert (searched / "norm.png").exists()


def test_new_checkpoint_content_is_saved(searched: Path) -> None:
    stored = [path.read_text() for path in (searched / "checkpoints").rglob("_METADATA")]
    assert any("images_seen" in text for text in stored)


def test_a_new_method_finds_a_ticket_of_its_density(copy: Copy) -> None:
    flags = (
        "--method last-round --model lenet300100 --target-density 0.25 --epochs 2 --max-train-examples 320 --no-report"
    )
    run = copy.train("last-round", *flags.split())
    assert [round(epoch["density"], 4) for epoch in epochs_of(run)[:2]] == [0.5, 0.25]
    assert json.loads((run / "summary.json").read_text())["ticket"]["density"] == 0.25


def test_a_new_layer_and_another_mask_formula_are_used(copy: Copy) -> None:
    program = (
        "import jax, jax.numpy as jnp, cs_jax, cs_jax.layers\n"
        "variables = cs_jax.layers.MaskedLayerNorm().init(jax.random.key(0), jnp.ones((1, 3)))\n"
        "print(variables['masks']['scale'].shape, cs_jax.soft_mask(jnp.float32(4), 1.0, init_value=0.0))\n"
    )
    assert copy.run("-c", program) == "(3,) 2.0\n"
