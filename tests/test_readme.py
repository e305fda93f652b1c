"""What the README shows, run."""

import re
from pathlib import Path

import pytest

import cs_jax
from cs_jax import config

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_loop_of_the_readme_finds_a_sparse_layer(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, {})
    found = re.fullmatch(r"density (0\.\d\d)\n", capsys.readouterr().out)
    assert found and 0.02 < float(found[1]) < 0.9


def test_names_that_the_readme_uses_exist() -> None:
    for name in re.findall(r"cs_jax\.([A-Za-z_]+)", README):
        assert hasattr(cs_jax, name) or name == "models", name
    for name in re.findall(r"`(Masked\w+|ResNet\d+|LeNet\d+)`", README):
        assert hasattr(cs_jax, name) or hasattr(cs_jax.models, name), name


def test_flags_that_the_readme_explains_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    shown = capsys.readouterr().out
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert flag in shown, flag
