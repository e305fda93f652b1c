"""The README: its examples run, its tables match the printed ones, and all names in it exist."""

import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import cs_jax
from cs_jax.commands import parser
from cs_jax.experiment.observers import terminal
from cs_jax.experiment.storage.paths import TICKET_FILE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_examples_of_the_readme_run_and_find_the_density(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ticket = tmp_path / "runs" / "digits-seed0" / TICKET_FILE
    ticket.parent.mkdir(parents=True)
    images = jnp.ones((2, 8, 8, 1))
    variables = {"batch_stats": {}, **cs_jax.models.LeNet300100().init(jax.random.key(0), images)}
    model = {"name": "lenet300100", "num_classes": 10, "image_shape": [8, 8, 1]}
    cs_jax.save_ticket(ticket, **variables, metadata={"model": model, "normalization": {"mean": [78], "std": [96]}})
    namespace: dict = {"images": images}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example, namespace)
    assert capsys.readouterr().out == "density 0.25\n"
    assert namespace["ticket"].variables.keys() == {"params", "batch_stats", "masks"}


def test_names_and_files_that_the_readme_uses_exist() -> None:
    for name in re.findall(r"cs_jax\.([A-Za-z_]+)", README):
        assert hasattr(cs_jax, name), name
    paths = re.findall(r"\]\((docs/[^)]+)\)|python ([\w/]+\.py)|(examples/[\w/]+\.toml)", README)
    assert len(paths) > 20
    for path in map("".join, paths):
        assert (ROOT / path).is_file(), path


def test_flags_that_the_readme_explains_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    shown = capsys.readouterr().out
    flags = set(re.findall(r"train\.py[^`\n]*? (--[a-z-]+)", README)) | set(re.findall(r"`(--[a-z-]+)", README))
    assert flags
    for flag in flags:
        assert flag in shown, flag


def test_the_readme_and_the_page_on_the_layout_list_the_thirteen_names_of_the_package() -> None:
    layout = README[README.index("## Layout") : README.index("## Develop")]
    listed = re.findall(r"^    ([\w.]+)/?  ", layout, re.MULTILINE)
    package = {path.name for path in (ROOT / "cs_jax").iterdir() if not path.name.startswith("__")}
    assert len(listed) == 13 and set(listed) == package
    page = (ROOT / "docs" / "development" / "layout.md").read_text()
    assert re.findall(r"^\| `([\w.]+)/?` \|", page, re.MULTILINE)[:13] == listed


@pytest.mark.parametrize("page", ["README.md", "docs/start/tour.md"])
def test_the_tables_of_a_run_are_what_a_run_with_these_figures_prints(page: str) -> None:
    text = (ROOT / page).read_text()
    shown = text[text.index("    Search\n") : text.index("\n\n", text.index("    Result\n") + 20)]

    def share(cell: str) -> float:
        return float(cell.rstrip("%")) / 100

    rounds = re.findall(r"^ +(\d+) +(\S+%) +(\S+%) +(\S+%)$", shown, re.MULTILINE)
    networks = re.findall(r"^ +(\w+) +(\d+) +([\d,]+) +(\S+%) +(\S+%) +(\S+%)$", shown, re.MULTILINE)
    keys = ("density", "val_accuracy", "test_accuracy")
    found = {
        name: {
            "epochs": int(epochs),
            "num_weights": int(weights.replace(",", "")),
            **dict(zip(keys, map(share, shares), strict=True)),
        }
        for name, epochs, weights, *shares in networks
    }
    search = [
        {"round": int(number), "density": share(density), "soft_accuracy": share(soft), "hard_accuracy": share(hard)}
        for number, density, soft, hard in rounds
    ]
    out = io.StringIO()
    terminal.print_result(Console(file=out, width=80), {"search": search, "controls": {}, **found})
    assert len(rounds) == 2 and found.keys() == {"dense", "ticket"}
    assert out.getvalue().split() == shown.split()
