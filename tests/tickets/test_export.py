"""Exports of tickets: results in other programs, file contents, and errors."""

import contextlib
import dataclasses
import importlib.util
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from networks import FAMILIES, masked, random_images, ticket
from scipy.sparse import csr_array

import cs_jax
from cs_jax import commands, models
from cs_jax.core.errors import ConfigError
from cs_jax.tickets.export import FORMATS, Format, export_ticket, read_sparse, stablehlo
from cs_jax.tickets.export.plain_network import make_plain_network, masked_logits
from cs_jax.tickets.ticket import LoadedTicket, save_ticket

LENET = FAMILIES["lenet"]
PAGE = Path(__file__).parents[2] / "docs" / "tickets" / "export.md"


def relative(got: Any, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a ticket."""
    model, image_shape = models.LeNet300100(), (4, 4, 1)
    path = tmp_path_factory.mktemp("ticket") / "ticket.safetensors"
    metadata = {
        "model": {"name": "lenet300100", "num_classes": 10, "image_shape": list(image_shape)},
        "normalization": {"mean": [120.0], "std": [60.0]},
    }
    save_ticket(path, batch_stats={}, metadata=metadata, **masked(model, image_shape))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", ["safetensors", "sparse"])
def test_a_network_that_was_read_back_computes_the_same(family: str, to: str, tmp_path: Path) -> None:
    found = export_ticket(ticket(*FAMILIES[family]), to, tmp_path / "file", fold=to == "sparse")
    assert found.difference <= 1e-5
    assert found.size == (tmp_path / "file").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bottleneck", "vit"])
def test_a_program_computes_the_same_in_a_process_without_cs_jax(family: str, tmp_path: Path) -> None:
    given = ticket(*FAMILIES[family])
    images = random_images(FAMILIES[family][1], count=5)
    export_ticket(given, "stablehlo", tmp_path / "program")
    np.save(tmp_path / "images.npy", images)
    program = (
        "import sys, jax.export, numpy as np\n"
        "call = jax.export.deserialize(bytearray(open('program', 'rb').read())).call\n"
        "images = np.load('images.npy')\n"
        "assert call(images[:2]).shape == (2, 4)\n"
        "np.save('logits.npy', call(images))\n"
        "assert not any(name.startswith(('cs_jax', 'flax')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert relative(np.load(tmp_path / "logits.npy"), masked_logits(given, images)) <= 1e-4


def test_a_program_is_for_three_platforms_and_any_batch(tmp_path: Path) -> None:
    export_ticket(ticket(*LENET), "stablehlo", tmp_path / "program")
    exported = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert str(exported.in_avals[0].shape) == "(batch, 4, 4, 1)"


def test_a_program_has_none_of_the_choices_that_make_training_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stablehlo, "PLATFORMS", ("cpu",))  # for several, JAX chooses between them
    content = stablehlo.export_stablehlo(make_plain_network(ticket(*FAMILIES["resnet"])))
    text = jax.export.deserialize(bytearray(content)).mlir_module()
    assert text.count("stablehlo.convolution(") == 6
    assert "stablehlo.case" not in text and "stablehlo.if" not in text


def test_scipy_computes_the_same_from_sparse_matrices(tmp_path: Path) -> None:
    given, images = ticket(*LENET), random_images(LENET[1])
    export_ticket(given, "sparse", tmp_path / "file.npz")
    arrays, about = read_sparse(tmp_path / "file.npz")
    x = (images.reshape(3, -1) - about["normalization"]["mean"][0]) / about["normalization"]["std"][0]
    for layer in ("hidden0", "hidden1", "classifier"):
        bias = arrays[f"params/{layer}/bias"][None]
        x = np.asarray(x @ arrays[f"params/{layer}/kernel"]) + bias
        x = x if layer == "classifier" else np.maximum(x, 0)
    assert relative(x, masked_logits(given, images)) <= 1e-4


def test_sparse_files_hold_the_kept_weights_of_dense_layers_and_need_no_pickle(tmp_path: Path) -> None:
    model, image_shape = FAMILIES["conv"]
    given = ticket(model, image_shape)
    export_ticket(given, "sparse", tmp_path / "file.npz", keep_shapes=True)
    with np.load(tmp_path / "file.npz", allow_pickle=False) as file:
        kept = np.count_nonzero(given.variables["masks"]["hidden0"]["kernel"])
        assert file["params/hidden0/kernel.data"].shape == (kept,)
        np.testing.assert_array_equal(file["params/hidden0/kernel.shape"], (16, 256))
        assert "params/stage1_conv1/kernel" in file.files
        assert not any(name.startswith("masks") for name in file.files)
    matrix = read_sparse(tmp_path / "file.npz")[0]["params/hidden0/kernel"]
    wanted = cs_jax.apply_masks(given.variables["params"], given.variables["masks"])["hidden0"]["kernel"]
    assert isinstance(matrix, csr_array)
    np.testing.assert_array_equal(matrix.toarray(), wanted)


def test_files_hold_the_channels_that_are_left(tmp_path: Path) -> None:
    given = ticket(*LENET)
    sizes = {}
    for keep_shapes in (True, False):
        sizes[keep_shapes] = export_ticket(given, "sparse", tmp_path / "file.npz", keep_shapes=keep_shapes).size
        shape = read_sparse(tmp_path / "file.npz")[0]["params/hidden1/kernel"].shape
        assert shape == ((300, 100) if keep_shapes else (299, 99))
    assert sizes[False] < sizes[True]


def test_a_ticket_without_normalization_takes_images_as_the_network_does(tmp_path: Path) -> None:
    given = ticket(*LENET)
    bare = dataclasses.replace(given, metadata={"model": given.metadata["model"]})
    export_ticket(bare, "stablehlo", tmp_path / "program")
    call = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes())).call
    images = random_images(LENET[1])
    assert relative(call((images - 120) / 60), masked_logits(given, images)) <= 1e-4


class Unwired(nn.Module):
    dense: type[nn.Dense] = cs_jax.MaskedDense
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(3, name="dense0")(x.reshape(x.shape[0], -1))


def emptied() -> LoadedTicket:
    given = ticket(*LENET)
    masks = given.variables["masks"]
    masks["hidden1"]["kernel"] = jnp.zeros_like(masks["hidden1"]["kernel"])
    return given


def not_finite() -> LoadedTicket:
    given = ticket(*LENET)
    given.variables["params"]["classifier"]["bias"] = jnp.full(4, jnp.nan)
    return given


@pytest.mark.parametrize(
    "given, complaint",
    [
        (emptied(), "layer 'hidden1': its mask keeps no weight.*; use --keep-shapes to export without shrinking$"),
        (
            ticket(Unwired(), (2, 2, 1)),
            "model Unwired: does not declare its wiring.*; use --keep-shapes to export",
        ),
        (
            dataclasses.replace(ticket(*LENET), model=None),
            "^ticket has a custom model; this command supports cs_jax.models only$",
        ),
        (
            dataclasses.replace(ticket(*LENET), metadata={}),
            r"^metadata: model.image_shape \[\]: must be height, width and channels; save the ticket with them$",
        ),
        (not_finite(), "^params/classifier/bias: entries must be finite$"),
    ],
)
def test_a_ticket_that_cannot_be_exported_leaves_nothing(given: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        export_ticket(given, "sparse", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_computes_something_else_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = Format(
        ".x", lambda network: b"", lambda content, network, images: 1.001 * np.asarray(network.logits(images))
    )
    monkeypatch.setitem(FORMATS, "larger", larger)
    with pytest.raises(
        ConfigError, match="--to larger: logits of the export differ by 1.0e-03 of the largest logit; must be at most"
    ):
        export_ticket(ticket(*LENET), "larger", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [emptied(), ticket(Unwired(), (2, 2, 1))])
def test_what_cannot_be_shrunk_can_keep_its_shapes(given: LoadedTicket, tmp_path: Path) -> None:
    assert export_ticket(given, "sparse", tmp_path / "file", keep_shapes=True).difference <= 1e-5


@pytest.mark.parametrize("to, suffix", [("safetensors", "pytorch.safetensors"), ("sparse", "npz")])
def test_the_command_writes_beside_the_ticket_and_tells_size_and_difference(
    to: str, suffix: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["export", str(saved), "--to", to]) == 0
    path = saved.with_name(f"ticket.{suffix}")
    size, dense = path.stat().st_size, 4 * (16 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10)
    assert re.fullmatch(
        rf"{re.escape(str(path))}: {size:,} bytes, {size / dense:.1%} of the dense weights \({dense:,} bytes\); "
        r"logits\s+differ\s+by\s+\d\.\de[-+]\d\d of the largest logit\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize(
    "words, complaint",
    [
        (
            "{ticket} --to onyx",
            "--to onyx: must be one of safetensors, onnx, stablehlo, sparse (did you mean onnx?)",
        ),
        ("{ticket}", "the following arguments are required: --to"),
        ("{folder} --to sparse", "is a folder or a device: must be a file"),
        ("{folder}/text --to sparse", "not a ticket file"),
        ("{folder}/none --to sparse", "cannot be read: No such file or directory"),
        ("{ticket} --to sparse --out {folder}", "--out {folder}: must be a file, not a folder; add a file name"),
        ("{ticket} --to sparse --out {folder}/a/b", "--out {folder}/a/b: the folder of the file must exist"),
        ("{ticket} --to sparse --out {ticket}", "--out {ticket}: must not overwrite the ticket"),
    ],
)
def test_bad_words_are_one_line_and_write_nothing(
    words: str, complaint: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("text")
    before = saved.read_bytes()
    places = {"ticket": saved, "folder": tmp_path}
    assert commands.main(["export", *words.format(**places).split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and complaint.format(**places) in error
    assert [path.name for path in tmp_path.iterdir()] == ["text"] and saved.read_bytes() == before


def test_a_file_that_is_no_sparse_network_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("other.npz", "none.npz"):
        with pytest.raises(ConfigError, match=f"{name}: not a file of the sparse export"):
            read_sparse(tmp_path / name)


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "file.npz"
    export_ticket(ticket(*LENET), "sparse", path)
    return path


KERNEL = "params/hidden1/kernel"


@pytest.mark.parametrize(
    "change",
    [
        {"cs_jax": None},
        {"cs_jax": np.array("3")},
        {"cs_jax": np.array("{}")},
        {"cs_jax": np.array("[" * 100_000)},
        {"cs_jax": np.zeros(3)},
        *({f"{KERNEL}.{part}": None} for part in ("data", "indices", "indptr", "shape")),
        {f"{KERNEL}.shape": np.array([299, 98])},
        {f"{KERNEL}.shape": np.array(["a", "b"])},
        {f"{KERNEL}.shape": np.zeros((0,), int)},
        {f"{KERNEL}.indptr": np.zeros(1, np.int32)},
        {f"{KERNEL}.indptr": np.array(3, np.int32)},
        {f"{KERNEL}.indices": np.zeros(3, np.int32)},
        {f"{KERNEL}.indices": lambda indices: indices + 1000},
        {f"{KERNEL}.indices": lambda indices: indices - 1000},
    ],
)
def test_a_sparse_file_with_odd_entries_is_refused_in_one_line(
    change: dict[str, Any], sparse_file: Path, tmp_path: Path
) -> None:
    with np.load(sparse_file) as file:
        arrays = {name: file[name] for name in file.files}
    for name, value in change.items():
        arrays[name] = value(arrays[name]) if callable(value) else value
    np.savez(tmp_path / "odd.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ConfigError, match="^.*odd.npz: not a file of the sparse export: .+$") as caught:
        read_sparse(tmp_path / "odd.npz")
    assert "\n" not in str(caught.value)


def test_a_sparse_file_that_is_cut_off_or_damaged_anywhere_is_refused_or_read(sparse_file: Path) -> None:
    content = sparse_file.read_bytes()
    rng = np.random.default_rng(0)
    for end in rng.integers(0, len(content), 40):
        with pytest.raises(ConfigError, match="not a file of the sparse export"):
            read_sparse(io.BytesIO(content[:end]))
    for place in (*rng.integers(0, len(content), 100), *range(60), *range(len(content) - 200, len(content))):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        with contextlib.suppress(ConfigError):  # names and times of files have no sum that is checked
            read_sparse(io.BytesIO(bytes(damaged)))


def test_files_of_other_kinds_are_no_sparse_networks(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("cs_jax", "{}")
    for name in ("array.npy", "text", "empty", "zip", "."):
        with pytest.raises(ConfigError, match="not a file of the sparse export"):
            read_sparse(tmp_path / name)


@pytest.mark.slow
def test_the_guide_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            needs = [name for name in ("torch", "onnxruntime") if f"import {name}" in block]
            if all(importlib.util.find_spec(name) for name in needs):
                exec(block, namespace)
