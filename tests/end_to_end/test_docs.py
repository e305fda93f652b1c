"""The documentation: its examples run, its tables are what is printed, and it builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import cs_jax
from cs_jax.experiment.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["library/sparsify.md", "tickets/shrink.md"])
def test_guides_run_from_top_to_bottom_and_print_what_they_show(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict = {}
    printed = ""
    with jax.numpy_rank_promotion("allow"):
        for kind, block in re.findall(r"```(python|text)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            if kind == "python":
                exec(block, namespace)
                printed = capsys.readouterr().out
            else:
                assert printed.split() == block.split()


def test_the_reference_has_every_public_name() -> None:
    page = (DOCS / "reference" / "cs_jax.md").read_text()
    listed = set(re.findall(r"auto\w+:: (?:cs_jax\.)?(\w+)$", page, re.MULTILINE))
    assert set(cs_jax.__all__) - {"models"} <= listed


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference" / "cs_jax.html").read_text()
    assert "masked_params" in page and "Trains a mask for every selected weight" in page


def test_the_guide_of_sweeps_names_every_preset() -> None:
    (row,) = re.findall(r"^\| `preset` \|.*$", (DOCS / "experiments" / "sweeps.md").read_text(), re.MULTILINE)
    assert re.findall(r"`([\w-]+)`", row) == ["preset", *PRESETS]
