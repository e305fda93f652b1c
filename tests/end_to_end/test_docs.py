"""The documentation: its examples run, its tables match the printed ones, and it builds without a warning."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import cs_jax
import cs_jax.methods
from cs_jax.experiment.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"

RUN_HERE = [
    "library/sparsify.md",
    "library/frameworks.md",
    "library/weights.md",
    "library/modules.md",
    "start/tour.md",
    "tickets/shrink.md",
    "experiments/methods.md",
    "experiments/train.md",
    "experiments/tracking.md",
]
RUN_ELSEWHERE = {
    "experiments/analysis.md": "tests/experiment/test_connectivity.py",
    "experiments/models.md": "tests/models/test_models.py",
    "tickets/export.md": "tests/tickets/test_export.py",
    "tickets/tickets.md": "tests/tickets/test_ticket.py",
}
NOT_RUN = {
    "scale/streaming.md",  # needs ImageNet
    "development/extending.md",  # excerpts of files; test_extending.py makes these changes
}

A_SHORT_RUN = [
    "--epochs",
    "1",
    "--rounds",
    "1",
    "--rewind-epoch",
    "0",
    "--max-train-examples",
    "64",
    "--no-report",
    "--controls",
]


def blocks(page: str) -> list[tuple[str, str]]:
    """Kind (python or text) and content of the code blocks of a page."""
    return re.findall(r"```(python|text)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def save_ticket(path: Path) -> None:
    """Writes an untrained ticket for 8x8 images, in place of the ticket that a guide's command makes."""
    path.parent.mkdir(parents=True)
    variables = {"batch_stats": {}, **cs_jax.models.LeNet300100().init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))}
    model = {"name": "lenet300100", "num_classes": 10, "image_shape": [8, 8, 1]}
    cs_jax.save_ticket(path, **variables, metadata={"model": model, "normalization": {"mean": [78], "std": [96]}})


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_HERE)
def test_guides_run_from_top_to_bottom_and_print_what_they_show(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cs_jax.methods.METHODS", dict(cs_jax.methods.METHODS))
    save_ticket(tmp_path / "runs/five/ticket.safetensors")
    namespace: dict = {"images": jnp.ones((2, 8, 8, 1))} if page == "start/tour.md" else {}
    printed = ""
    with jax.numpy_rank_promotion("allow"):
        for kind, block in blocks(page):
            if kind == "text":
                assert printed.split() == block.split()
                continue
            missing = [name for name in ("wandb", "mlflow") if f"import {name}" in block]
            if not any(importlib.util.find_spec(name) is None for name in missing):
                short = ", ".join(map(repr, A_SHORT_RUN))
                exec(block.replace('parse(["digits"', f'parse(["digits", {short}'), namespace)
            printed = capsys.readouterr().out


def test_every_guide_with_examples_is_run() -> None:
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "```python" in path.read_text()}
    assert pages == {*RUN_HERE, *RUN_ELSEWHERE, *NOT_RUN}
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (DOCS.parent / test).read_text()


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^[a-z]+/\w[\w-]*$", (DOCS / "index.md").read_text(), re.MULTILINE)
    pages = [str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md") if path.parent != DOCS]
    assert sorted(listed) == sorted(pages)


def test_the_reference_has_every_public_name() -> None:
    page = (DOCS / "reference" / "cs_jax.md").read_text()
    assert set(cs_jax.__all__) - {"models"} == set(re.findall(r"auto\w+:: (\w+)$", page, re.MULTILINE))


def test_the_reference_says_where_each_name_is_imported_from() -> None:
    found = 0
    for path in (DOCS / "reference").glob("*.md"):
        module = None
        for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)$", path.read_text(), re.MULTILINE):
            if kind == "currentmodule":
                module = importlib.import_module(name)
            else:
                assert hasattr(module, name), f"{path.name}: {name}"
                found += 1
    assert found > 100


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install -e '.[docs]'")
    assert "suppress_warnings" not in (DOCS / "conf.py").read_text()
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference" / "cs_jax.html").read_text()
    assert "masked_params" in page and "mask for every selected weight" in page


def test_the_guides_name_every_preset_and_method() -> None:
    (row,) = re.findall(r"^\| `preset` \|.*$", (DOCS / "experiments" / "sweeps.md").read_text(), re.MULTILINE)
    assert re.findall(r"`([\w-]+)`", row) == ["preset", *PRESETS]
    presets = re.findall(r"^\| `([\w-]+)`", (DOCS / "experiments" / "train.md").read_text(), re.MULTILINE)
    assert presets[: len(PRESETS)] == list(PRESETS)
    methods = (DOCS / "experiments" / "methods.md").read_text()
    section = methods[methods.index("## Methods") : methods.index("### Density")]
    listed = re.findall(r"^\| `(\w[\w-]*)` \|", section, re.MULTILINE)
    assert listed == list(cs_jax.methods.METHODS)
