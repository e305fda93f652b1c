"""What the README shows, run."""

import re
from pathlib import Path

import pytest

import cs_jax
from cs_jax import config

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_of_the_readme_run_and_find_the_density(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example, namespace)
    assert capsys.readouterr().out == "density 0.25\n"


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
