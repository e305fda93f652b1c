"""Forms of a ticket: what they are, their measurements and the recommendation."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cs_jax import commands
from cs_jax.core import errors
from cs_jax.models import LeNet300100, ResNet6
from cs_jax.tickets import speed
from cs_jax.tickets.speed import Measured
from cs_jax.tickets.ticket import LoadedTicket, load_ticket, save_ticket

IMAGE = (4, 4, 1)


def save(path: Path) -> Path:
    """Saves a LeNet of random weights; half of the first units have no kept inputs, and few weights are kept."""
    variables = LeNet300100().init(jax.random.key(0), jnp.zeros((1, *IMAGE)))
    rng = np.random.default_rng(0)
    masks = jax.tree.map(lambda mask: np.array(rng.random(mask.shape) < 0.1, np.float32), variables["masks"])
    masks["hidden0"]["kernel"][:, :150] = 0
    about = {"name": "lenet300100", "num_classes": 10, "image_shape": list(IMAGE)}
    save_ticket(path, params=variables["params"], batch_stats={}, masks=masks, metadata={"model": about})
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("speed") / "ticket.safetensors")


def test_forms_of_a_network_are_what_it_can_be_served_as(path: Path) -> None:
    ticket = load_ticket(path)
    forms = speed.forms(ticket)
    assert list(forms) == ["dense", "masked", "shrunk"]
    weights = sum(leaf.size for leaf in jax.tree.leaves(ticket.variables["params"]))
    assert forms["dense"].num_bytes == 4 * weights
    dense = 16 * 300 + 300 * 100 + 100 * 10
    assert forms["dense"].multiply_adds == forms["masked"].multiply_adds == dense
    width = forms["shrunk"].variables["params"]["hidden0"]["bias"].size
    assert width <= 150 and forms["shrunk"].multiply_adds == 16 * width + width * 100 + 100 * 10


@pytest.mark.slow
def test_norms_are_folded_where_there_are_some() -> None:
    model = ResNet6(num_classes=3)
    variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, *IMAGE)), train=False))(jax.random.key(0))
    about = {"model": {"name": "resnet6", "num_classes": 3, "image_shape": list(IMAGE)}}
    forms = speed.forms(LoadedTicket(dict(variables), None, model, about))
    assert list(forms) == ["dense", "masked", "dense, folded", "shrunk", "shrunk, folded"]


def test_every_form_computes_what_the_masked_network_does(path: Path) -> None:
    rows = speed.measure(speed.forms(load_ticket(path)), IMAGE, batch_size=3, repeats=2)
    assert [row.form for row in rows] == ["dense", "masked", "shrunk"]
    for row in rows:
        assert row.difference < 1e-5 and row.batch_size == 3 and row.peak_bytes > row.num_bytes // 2
        assert 0 < row.lowest <= row.ratio <= row.highest and row.seconds > 0
    assert rows[0].ratio == rows[0].lowest == rows[0].highest == 1


def row(form: str, ratio: float, upper: float, size: int) -> Measured:
    return Measured(form, 8, 0.1, ratio, ratio, upper, upper, 1, size, 1, 0.0)


@pytest.mark.parametrize(
    "ratios, words",
    [
        ({"dense": (1.0, 1.0, 9), "shrunk": (0.96, 0.97, 5)}, "batch 8: stay dense; no other form is clearly faster"),
        ({"dense": (1.0, 1.0, 9), "shrunk": (0.5, 1.1, 5)}, "batch 8: stay dense; no other form is clearly faster"),
        ({"dense": (1.0, 1.0, 9), "a": (0.5, 0.6, 5), "b": (0.8, 0.9, 1)}, "batch 8: a, 2.00 times as fast as dense"),
        ({"dense": (1.0, 1.0, 9), "a": (0.5, 0.6, 5), "b": (0.52, 0.6, 1)}, "batch 8: b, 1.92 times as fast as dense"),
    ],
)
def test_another_form_is_recommended_only_where_it_is_clearly_faster(
    ratios: dict[str, tuple[float, float, int]], words: str
) -> None:
    assert speed.recommend([row(form, *figures) for form, figures in ratios.items()]) == words


def test_the_command_prints_every_form_and_what_to_serve(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["speed", str(path), "--batch-sizes", "2", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {form} " in shown for form in ("dense", "masked", "shrunk")) and "batch 2: " in shown


def test_too_little_memory_is_told_from_other_errors_of_a_device() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros(2**50).block_until_ready()
    assert errors.out_of_memory(caught.value)
    assert not errors.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch-sizes", "1", "0"], "--batch-sizes 0: must be at least 1"),
        (["--batch-sizes", "many"], "argument --batch-sizes: invalid int value: 'many'"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["speed", str(path), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_ticket_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"layer": {"kernel": np.ones((2, 2), np.float32)}}
    save_ticket(tmp_path / "mine", params=arrays, batch_stats={}, masks=arrays, metadata={})
    assert commands.main(["speed", str(tmp_path / "mine")]) == 2
    assert "mine: ticket has a custom model; this command supports cs_jax.models only" in capsys.readouterr().err
