"""PyTorch state dicts: names, layouts, round trips, PyTorch's results, and errors."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from networks import FAMILIES, masked, random_images, ticket

from cs_jax import commands, models
from cs_jax.core import trees
from cs_jax.core.errors import ConfigError
from cs_jax.tickets import fold, shrink
from cs_jax.tickets.export import export_ticket, load_state_dict, state_dict
from cs_jax.tickets.export.plain_network import masked_logits
from cs_jax.tickets.ticket import load_ticket

PAGE = Path(__file__).parents[2] / "docs" / "tickets" / "export.md"
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def torch_python() -> str:
    """A Python that has PyTorch and safetensors."""
    named = os.environ.get("CS_JAX_TORCH_PYTHON") or (sys.executable if importlib.util.find_spec("torch") else None)
    return named or pytest.skip("no PyTorch: CS_JAX_TORCH_PYTHON names a Python that has it")


def names_of(model: Any, image_shape: tuple[int, ...]) -> set[str]:
    """PyTorch's names of a network; nothing is allocated."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape))))
    plain = {kind: variables[kind] for kind in ("params", "batch_stats")}
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), plain)
    return set(state_dict.to_tensors(model, empty, image_shape[-1]))


def same_bits(found: Any, wanted: Any) -> bool:
    ours, theirs = trees.leaves_by_path(found), trees.leaves_by_path(wanted)
    return ours.keys() == theirs.keys() and all(
        np.asarray(ours[path]).dtype == np.asarray(leaf).dtype
        and np.asarray(ours[path]).shape == np.asarray(leaf).shape
        and np.asarray(ours[path]).tobytes() == np.asarray(leaf).tobytes()
        for path, leaf in theirs.items()
    )


def test_a_resnet20_has_the_names_of_the_authors() -> None:
    wanted = {"conv0.weight", "classifier.weight", "classifier.bias", *(f"bn0.{leaf}" for leaf in NORM)}
    for stage in (1, 2, 3):
        for block in (f"stage{stage}.block{number}" for number in (1, 2, 3)):
            wanted |= {f"{block}.conv_{half}.weight" for half in "ab"}
            wanted |= {f"{block}.bn_{half}.{leaf}" for half in "ab" for leaf in NORM}
    wanted |= {f"stage{stage}.block1.downsample.weight" for stage in (2, 3)}
    assert names_of(models.ResNet20(), (32, 32, 3)) == wanted


def test_a_resnet50_has_the_names_of_torchvision() -> None:
    wanted = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{leaf}" for leaf in NORM)}
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in (f"layer{stage}.{number}" for number in range(blocks)):
            wanted |= {f"{block}.conv{number}.weight" for number in (1, 2, 3)}
            wanted |= {f"{block}.bn{number}.{leaf}" for number in (1, 2, 3) for leaf in NORM}
        wanted |= {f"layer{stage}.0.downsample.0.weight", *(f"layer{stage}.0.downsample.1.{leaf}" for leaf in NORM)}
    assert names_of(models.ResNet50(), (32, 32, 3)) == wanted


def test_kernels_have_output_channels_first() -> None:
    model, image_shape = FAMILIES["resnet"]
    plain, variables = fold.fold(model, masked(model, image_shape), image_shape)
    tensors = state_dict.to_tensors(plain, variables, 1)
    kernel = np.asarray(variables["params"]["stage2_block1"]["conv_a"]["kernel"])
    assert kernel.shape == (3, 3, 4, 6)
    assert tensors["stage2.block1.conv_a.weight"][5, 2, 0, 1] == kernel[0, 1, 2, 5]
    assert tensors["stage2.block1.conv_a.weight"].shape == (6, 4, 3, 3)
    assert tensors["classifier.weight"].shape == (4, 6)
    assert tensors["bn0.num_batches_tracked"].dtype == np.int64 and tensors["bn0.num_batches_tracked"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_there_and_back_is_bit_identical_for_every_family(family: str, batch_norm: bool) -> None:
    model, image_shape = FAMILIES[family]
    smaller, fewer = shrink.shrink(model, masked(model, image_shape), image_shape)
    plain, variables = fold.fold(smaller, fewer, image_shape, batch_norm=batch_norm)
    tensors = state_dict.to_tensors(plain, variables, image_shape[-1])
    shapes = {trees.name(path): leaf.shape for path, leaf in trees.leaves_by_path(variables).items()}
    entries = state_dict.torch_names.entries(plain, shapes, image_shape[-1])
    assert [entry.torch_shape for entry in entries] == [tensors[entry.name].shape for entry in entries]
    assert same_bits(state_dict.from_tensors(tensors, entries), variables)


@pytest.mark.parametrize(
    "name, image_shape",
    [("resnet6", (8, 8, 1)), ("conv2", (4, 4, 3)), pytest.param("vit_tiny", (8, 8, 3), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("shrunk", [False, True])
def test_a_file_there_and_back_is_bit_identical(
    name: str, image_shape: tuple[int, ...], shrunk: bool, tmp_path: Path
) -> None:
    model = models.build(name, num_classes=7)
    variables = masked(model, image_shape, scale=1.0)
    if name == "vit_tiny":  # without its second head
        variables["masks"]["block3"]["out"]["kernel"][1] = 0
    if shrunk:
        model, variables = shrink.shrink(model, variables, image_shape)
    plain, weights = fold.fold(model, variables, image_shape)
    path = tmp_path / "file.safetensors"
    safetensors.numpy.save_file(state_dict.to_tensors(plain, weights, image_shape[-1]), path)
    again, found = load_state_dict(path, name, image_shape=image_shape)
    assert again == model
    assert same_bits(found, {"batch_stats": {}, **weights, "masks": variables["masks"]})


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    model, image_shape = models.LeNet300100(param_dtype=jnp.bfloat16), (4, 4, 1)
    plain, weights = fold.fold(model, masked(model, image_shape), image_shape)
    content = safetensors.numpy.save(state_dict.to_tensors(plain, weights, 1))
    (tmp_path / "file").write_bytes(content)
    assert same_bits(
        load_state_dict(tmp_path / "file", "lenet300100", image_shape=(4, 4, 1))[1]["params"], weights["params"]
    )


def run_in_torch(python: str, program: str, folder: Path) -> None:
    done = subprocess.run([python, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("folds, keep_shapes", [(False, True), (False, False), (True, False)])
def test_pytorch_computes_the_same_with_the_module_of_the_guide(
    folds: bool, keep_shapes: bool, torch_python: str, tmp_path: Path
) -> None:
    given, images = ticket(*FAMILIES["resnet"]), random_images(FAMILIES["resnet"][1])
    export_ticket(given, "safetensors", tmp_path / "ticket.pytorch.safetensors", fold=folds, keep_shapes=keep_shapes)
    np.save(tmp_path / "images.npy", images)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (module,) = [block for block in blocks if "import torch" in block]
    ending = (
        "import numpy as np\n"
        "x = torch.tensor((np.load('images.npy') - 120) / 60).permute(0, 3, 1, 2)\n"
        "np.save('logits.npy', model(x).detach().numpy())\n"
    )
    run_in_torch(torch_python, module + ending, tmp_path)
    wanted = masked_logits(given, images)
    assert np.abs(np.load(tmp_path / "logits.npy") - wanted).max() <= 1e-4 * np.abs(wanted).max()


FUNCTIONAL = """
import numpy as np, torch, torch.nn.functional as F
from safetensors.torch import load_file
state = load_file("file")
def linear(x, name):
    return F.linear(x, state[name + ".weight"], state[name + ".bias"])
def conv(x, name, **window):
    return F.conv2d(x, state[name + ".weight"], state[name + ".bias"], **window)
def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)
def network(x):
{body}
x = torch.tensor((np.load("images.npy") - 120) / 60).permute(0, 3, 1, 2)
np.save("logits.npy", network(x).numpy())
"""

BODIES = {
    "lenet": """
    x = x.flatten(1)
    for name in ("hidden0", "hidden1"):
        x = linear(x, name).relu()
    return linear(x, "classifier")
""",
    "conv": """
    for name in ("stage1.conv1", "stage1.conv2"):
        x = conv(x, name, padding=1).relu()
    x = F.max_pool2d(x, 2).flatten(1)
    for name in ("hidden0", "hidden1"):
        x = linear(x, name).relu()
    return linear(x, "classifier")
""",
    "bottleneck": """
    x = F.max_pool2d(conv(x, "conv1", stride=2, padding=3).relu(), 3, 2, 1)
    for layer in ("layer1.0.", "layer2.0."):
        stride = int(layer[5])
        y = conv(x, layer + "conv1").relu()
        y = conv(conv(y, layer + "conv2", stride=stride, padding=1).relu(), layer + "conv3")
        x = (y + conv(x, layer + "downsample.0", stride=stride)).relu()
    return linear(x.mean((2, 3)), "fc")
""",
    "vit": """
    x = conv(x, "patch_embedding", stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([state["class_token"].expand(len(x), -1, -1), x], 1) + state["position_embedding"]
    y = norm(x, "block1.norm_attention")
    heads = [linear(y, "block1." + n).unflatten(-1, (-1, 4)).transpose(1, 2) for n in ("query", "key", "value")]
    x = x + linear(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), "block1.out")
    x = x + linear(F.gelu(linear(norm(x, "block1.norm_mlp"), "block1.mlp_in")), "block1.mlp_out")
    return linear(norm(x[:, 0], "norm"), "classifier")
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", BODIES)
def test_pytorch_s_functions_compute_the_same_for_other_families(
    family: str, torch_python: str, tmp_path: Path
) -> None:
    model, image_shape = FAMILIES[family]
    image_shape = (4, 4, 3) if family == "lenet" else image_shape
    given, images = ticket(model, image_shape), random_images(image_shape)
    export_ticket(given, "safetensors", tmp_path / "file", fold=True)
    np.save(tmp_path / "images.npy", images)
    run_in_torch(torch_python, FUNCTIONAL.format(body=BODIES[family]), tmp_path)
    wanted = masked_logits(given, images)
    assert np.abs(np.load(tmp_path / "logits.npy") - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    model, image_shape = models.LeNet300100(num_classes=4), (4, 4, 1)
    return state_dict.to_tensors(*fold.fold(model, masked(model, image_shape), image_shape), 1)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"hidden1.bias": None}, r"^tensor 'hidden1.bias': missing; must have shape \[100\]$"),
        (
            {"hidden1.wait": np.zeros(3)},
            r"^tensor 'hidden1.wait': unknown; the network has no such tensor \(did you mean hidden1.weight\?\)$",
        ),
        (
            {"hidden1.num_batches_tracked": np.zeros(())},
            "^tensor 'hidden1.num_batches_tracked': unknown; the network has no such tensor",
        ),
        (
            {"hidden1.bias": np.zeros(99)},
            r"^tensor 'hidden1.bias' of shape \[99\] and dtype float64: must be floats of shape \[100\]$",
        ),
        ({"hidden1.bias": np.zeros(100, int)}, "^tensor 'hidden1.bias' of shape .* and dtype int64: must be floats"),
        (
            {"hidden1.weight": np.zeros((100, 7))},
            r"^tensor 'hidden1.weight' of shape \[100, 7\] .* shape \[100, 300\]$",
        ),
        ({"classifier.weight": np.zeros(())}, r"^tensor 'classifier.\w+' of shape .* must be floats of shape \[1"),
        ({"hidden1.weight": None}, "^tensor 'hidden1.weight': missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: dict[str, Any], complaint: str, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    safetensors.numpy.save_file(changed, tmp_path / "file")
    with pytest.raises(ConfigError, match=complaint):
        load_state_dict(tmp_path / "file", "lenet300100", image_shape=(4, 4, 1))


def test_a_folded_file_is_told_from_others_that_lack_tensors(tmp_path: Path) -> None:
    model, image_shape = models.MODELS["resnet6"](num_classes=4), (8, 8, 1)
    folded = fold.fold(model, masked(model, image_shape), image_shape, batch_norm=True)
    tensors = state_dict.to_tensors(*folded, 1)
    safetensors.numpy.save_file(tensors, tmp_path / "file")
    with pytest.raises(ConfigError, match="missing; must have shape .*; BatchNorm is missing: export without --fold"):
        load_state_dict(tmp_path / "file", "resnet6", image_shape=image_shape)
    del tensors["conv0.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"missing; must have shape \[32\]$"):
        load_state_dict(tmp_path / "file", "resnet6", image_shape=image_shape)


def test_a_file_that_cannot_be_read_is_refused(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    safetensors.numpy.save_file(tensors, tmp_path / "file")
    for path, model, shape, complaint in [
        (tmp_path / "text", "lenet300100", (4, 4, 1), "^not a safetensors file"),
        (tmp_path, "lenet300100", (4, 4, 1), "^is a folder; must be a safetensors file"),
        (tmp_path / "none", "lenet300100", (4, 4, 1), "^no such file; must be a safetensors file"),
        (
            tmp_path / "file",
            "lenet300",
            (4, 4, 1),
            r"^model 'lenet300': must be one of .*\(did you mean lenet300100\?\)",
        ),
        (tmp_path / "file", "lenet300100", None, "^image shape: must be height, width and channels"),
        (tmp_path / "file", "vit_tiny", (5, 5, 1), "does not accept images of shape"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            load_state_dict(path, model, image_shape=shape)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "metadata cs_jax: not valid JSON"),
        ("[" * 100_000, "metadata cs_jax: not valid JSON"),
        ("3", "metadata cs_jax: 3: must be an object"),
        ('{"image_shape": 3}', "metadata cs_jax: image_shape 3: must be a list"),
        ('{"image_shape": ["4", 4, 1]}', r"metadata cs_jax: image_shape\[0\] '4': must be a whole number"),
        ('{"image_shape": [4, true, 1]}', r"metadata cs_jax: image_shape\[1\] True: must be a whole number"),
        ('{"image_shape": [4, 4]}', r"image shape \[4, 4\]: must be height, width and channels"),
        (
            '{"image_shape": [65536, 65536, 65536]}',
            r"image shape \[65536, 65536, 65536\]: must be height, width and channels",
        ),
        ('{"image_shape": [4, 4, 1], "normalization": 3}', "metadata cs_jax: normalization 3: must be an object"),
        (
            '{"image_shape": [4, 4, 1], "normalization": {"mean": [1]}}',
            "metadata cs_jax: normalization.std: missing",
        ),
        (
            '{"image_shape": [4, 4, 1], "normalization": {"mean": 1, "std": [1]}}',
            "normalization.mean 1: must be a list",
        ),
        (
            '{"image_shape": [4, 4, 1], "normalization": {"mean": ["a"], "std": [1]}}',
            r"normalization.mean\[0\] 'a': must be a num",
        ),
        ('{"image_shape": [4, 4, 1], "normalization": {"mean": [NaN], "std": [1]}}', "metadata cs_jax: not valid JSON"),
        (
            '{"image_shape": [4, 4, 1], "normalization": {"mean": [], "std": [1]}}',
            r"--mean: 0 numbers; must be one number, or one for each channel \(1\)",
        ),
    ],
)
def test_odd_metadata_are_one_line(
    text: str, complaint: str, tensors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.numpy.save_file(tensors, tmp_path / "file", {"cs_jax": text})
    if "--mean" not in complaint:
        with pytest.raises(ConfigError, match=complaint):
            load_state_dict(tmp_path / "file", "lenet300100")
    words = ["import", str(tmp_path / "file"), "--model", "lenet300100", "--out", str(tmp_path / "out")]
    assert commands.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(complaint, error)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_reads_its_file_once(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    safetensors.numpy.save_file(tensors, tmp_path / "file", {"cs_jax": '{"image_shape": [4, 4, 1]}'})
    program = (
        "import sys\n"
        "from cs_jax import commands\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, words: opened.append(str(words[0])) if event == 'open' else None)\n"
        "assert commands.main(['import', 'file', '--model', 'lenet300100', '--out', 'out']) == 0\n"
        "assert opened.count('file') == 1, opened\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_command_makes_a_ticket_that_computes_the_same(
    tensors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.numpy.save_file(tensors, tmp_path / "file")
    words = "--model lenet300100 --image-shape 4 4 1 --mean 120 --std 60"
    out = tmp_path / "ticket.safetensors"
    assert commands.main(["import", str(tmp_path / "file"), "--out", str(out), *words.split()]) == 0
    made = load_ticket(out)
    assert f"lenet300100, density {made.density:.2%}" in capsys.readouterr().out
    assert 0 < made.density < 0.5
    given, images = ticket(models.LeNet300100(num_classes=4), (4, 4, 1)), random_images((4, 4, 1))
    np.testing.assert_allclose(masked_logits(made, images), masked_logits(given, images), rtol=1e-4, atol=1e-5)


def test_what_export_wrote_says_itself_what_its_images_are(tmp_path: Path) -> None:
    model, image_shape = models.ResNet6(num_classes=4), (8, 8, 1)
    given = ticket(model, image_shape, scale=1.0)
    export_ticket(given, "safetensors", tmp_path / "file", keep_shapes=True)
    out = tmp_path / "ticket.safetensors"
    assert commands.main(["import", str(tmp_path / "file"), "--out", str(out), "--model", "resnet6"]) == 0
    made = load_ticket(out)
    assert made.metadata["normalization"] == given.metadata["normalization"]
    assert made.metadata["model"]["image_shape"] == [8, 8, 1]
    assert same_bits(made.variables["masks"], given.variables["masks"])


@pytest.mark.parametrize(
    "words, complaint",
    [
        (
            "--model lenet300100 --image-shape 4 4 1 --mean 1 2 --std 1 2 --out {out}",
            "--mean: 2 numbers; must be one number, or one for each channel (1)",
        ),
        (
            "--model lenet300100 --image-shape 4 4 1 --mean 1 --std 0 --out {out}",
            "--std 0: must be above 0",
        ),
        (
            "--model lenet300100 --image-shape 4 4 1 --mean 120 --out {out}",
            "--mean and --std: must be given together; add the missing flag",
        ),
        ("--model resnet6 --image-shape 4 4 1 --out {out}", "tensor 'bn0.bias': missing; must have shape [32]"),
        ("--model lenet300100 --image-shape 4 4 1 --out {file}", "must not overwrite the state dict"),
        ("--model lenet300100 --image-shape 4 4 1", "the following arguments are required: --out"),
    ],
)
def test_bad_words_are_one_line_and_write_nothing(
    words: str, complaint: str, tensors: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.numpy.save_file(tensors, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    given = words.format(out=tmp_path / "out", file=tmp_path / "file").split()
    assert commands.main(["import", str(tmp_path / "file"), *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and complaint in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == before


def test_a_shrunk_network_comes_back_as_a_shrunk_ticket(tmp_path: Path) -> None:
    given = ticket(models.LeNet300100(num_classes=4), (4, 4, 1))
    export_ticket(given, "safetensors", tmp_path / "file")
    out = tmp_path / "ticket.safetensors"
    assert commands.main(["import", str(tmp_path / "file"), "--out", str(out), "--model", "lenet300100"]) == 0
    made, images = load_ticket(out), random_images((4, 4, 1))
    assert made.metadata["model"]["features"] == {"hidden0": 299, "hidden1": 99}
    np.testing.assert_allclose(masked_logits(made, images), masked_logits(given, images), rtol=1e-4, atol=1e-5)
