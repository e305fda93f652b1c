"""What the README shows, run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import cs_jax
from cs_jax.commands import parser
from cs_jax.experiment.storage.paths import TICKET_FILE

README = (Path(__file__).parents[2] / "README.md").read_text()


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


def test_names_that_the_readme_uses_exist() -> None:
    for name in re.findall(r"cs_jax\.([A-Za-z_]+)", README):
        assert hasattr(cs_jax, name) or name == "models", name
    for name in re.findall(r"`(Masked\w+|ResNet\d+|LeNet\d+)`", README):
        assert hasattr(cs_jax, name) or hasattr(cs_jax.models, name), name


def test_flags_that_the_readme_explains_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    shown = capsys.readouterr().out
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert flag in shown, flag
