"""Every example runs as its first lines say, finds a ticket of its density, and learns its task."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str) -> str:
    path = ROOT / "examples" / f"{name}.py"
    assert f"Run it: `python examples/{name}.py`." in path.read_text()
    done = subprocess.run([sys.executable, "-W", "error", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, lowest, highest, accuracy",
    [
        ("linen_loop", 0.05, 0.3, 0.88),
        ("equinox_optax", 0.1, 0.1, 0.88),
        ("nnx_cnn", 0.02, 0.4, 0.9),
        ("finetune", 0.5, 0.5, 0.88),
    ],
)
def test_an_example_finds_a_ticket(name: str, lowest: float, highest: float, accuracy: float) -> None:
    found = re.search(r"ticket: density (0\.\d{3}).*, test accuracy (0\.\d{3})\n$", run(name))
    assert found and lowest <= float(found[1]) <= highest and float(found[2]) >= accuracy


@pytest.mark.slow
def test_the_transformer_has_a_fifth_of_its_weights_and_the_loss_of_the_dense_one() -> None:
    printed = run("transformer")
    density = re.search(r"density (0\.\d{4})", printed)
    losses = re.search(r"validation loss dense (\d\.\d{4}), sparse (\d\.\d{4})", printed)
    assert density and abs(float(density[1]) / 0.2 - 1) < 0.01
    assert losses and float(losses[2]) < 1.03 * float(losses[1]) < 3.0


def test_every_example_is_tested() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert all(f'"{name}"' in Path(__file__).read_text() for name in names)
