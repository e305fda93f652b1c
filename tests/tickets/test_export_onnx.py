"""ONNX models and their results in ONNX Runtime. Requires jax2onnx, which CI installs in a separate environment."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from networks import FAMILIES, random_images, ticket

from cs_jax import commands
from cs_jax.tickets.export import export_ticket, onnx, plain_network
from cs_jax.tickets.ticket import save_ticket

installed = importlib.util.find_spec("jax2onnx") is not None
wants_jax2onnx = pytest.mark.skipif(not installed, reason="jax2onnx is not installed: pip install -e '.[onnx]'")


@wants_jax2onnx
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("folds", [False, True])
def test_onnx_runtime_computes_the_same_for_any_batch(family: str, folds: bool, tmp_path: Path) -> None:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    given, path = ticket(*FAMILIES[family]), tmp_path / "ticket.onnx"
    export_ticket(given, "onnx", path, fold=folds)
    session = onnxruntime.InferenceSession(path)
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", *FAMILIES[family][1]])
    assert (logits.name, logits.shape) == ("logits", ["batch", 4])
    for count in (1, 5):
        given_images = random_images(FAMILIES[family][1], count)
        (got,) = session.run(None, {"images": given_images})
        wanted = plain_network.masked_logits(given, given_images)
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@wants_jax2onnx
def test_a_model_has_none_of_the_choices_that_make_training_fast() -> None:
    import onnx as library  # pyright: ignore[reportMissingImports]

    content = onnx.export_onnx(plain_network.make_plain_network(ticket(*FAMILIES["resnet"]), fold_batch_norm=True))
    operators = [node.op_type for node in library.load_from_string(content).graph.node]
    assert operators.count("Conv") == 6
    assert not {"If", "Loop", "BatchNormalization"} & set(operators)


@wants_jax2onnx
def test_weights_are_in_the_file_once() -> None:
    network = plain_network.make_plain_network(ticket(*FAMILIES["conv"]), keep_shapes=True)
    weights = sum(leaf.nbytes for layer in network.variables["params"].values() for leaf in layer.values())
    assert weights < len(onnx.export_onnx(network)) < weights + 10_000


@pytest.mark.skipif(installed, reason="jax2onnx is installed")
def test_without_jax2onnx_the_command_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cs_jax.models import LeNet300100

    given = ticket(LeNet300100(), (4, 4, 1))
    metadata = {"model": {"name": "lenet300100", "num_classes": 10, "image_shape": [4, 4, 1]}}
    save_ticket(tmp_path / "ticket", metadata=metadata, batch_stats={}, **given.variables)
    assert commands.main(["export", str(tmp_path / "ticket"), "--to", "onnx"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'cs_jax[onnx]'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["ticket"]
