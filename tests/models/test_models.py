"""Networks: sizes, masked arrays, initialisation, errors, and BatchNorm's running variance."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cs_jax import models
from cs_jax.core import trees
from cs_jax.core.errors import ConfigError
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.presets import PRESETS
from cs_jax.models.multiply_adds import multiply_adds

KEY = jax.random.key(0)
PAGE = (Path(__file__).parents[2] / "docs" / "experiments" / "models.md").read_text()


def sizes(model: Any, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of all weights, and of masked weights."""
    shapes = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, *image_shape)), train=False))
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(shapes[c])) for c in ("params", "masks"))  # pyright: ignore


@pytest.mark.parametrize(
    "model, image_shape, everything, masked",
    [
        (models.ResNet20(), (32, 32, 3), 272_282, 267_696),
        (models.LeNet300100(), (28, 28, 1), 266_610, 784 * 300 + 300 * 100),
        (models.ResNet6(), (8, 8, 1), 77_162, 9 * (32 + 2 * 32 * 32 + 32 * 64 + 64 * 64)),
        (models.ResNet8(), (28, 28, 1), 77_562, 9 * (16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)),
        (models.ResNet32(), (32, 32, 3), 466_714, 461_232),
        (models.ResNet56(), (32, 32, 3), 855_578, 848_304),
        (models.ResNet50(num_classes=1000), (224, 224, 3), 25_557_032, 25_557_032 - 9_408 - 53_120 - 2_049_000),
        (models.VGG16(), (32, 32, 3), 14_724_042, 14_724_042 - 8_448 - 5_130),
        (models.Conv2(), (32, 32, 3), 4_301_642, 38_592 + 16 * 16 * 64 * 256 + 256 * 256),
        (models.Conv4(), (32, 32, 3), 2_425_930, 259_776 + 8 * 8 * 128 * 256 + 256 * 256),
        (models.Conv6(), (32, 32, 3), 2_262_602, 1_144_512 + 4 * 4 * 256 * 256 + 256 * 256),
        (models.ViTTiny(num_classes=1000), (224, 224, 3), 5_717_416, 12 * 12 * 192 * 192),
    ],
)
def test_number_of_weights(model: Any, image_shape: tuple[int, ...], everything: int, masked: int) -> None:
    assert sizes(model, image_shape) == (everything, masked)


def test_resnet20_masks_its_3x3_convolutions_alone() -> None:
    shapes = jax.eval_shape(lambda: models.ResNet20().init(KEY, jnp.zeros((1, 32, 32, 3))))
    leaves = jax.tree.leaves(shapes["masks"])
    assert len(leaves) == 19
    assert all(leaf.shape[:2] == (3, 3) for leaf in leaves)
    assert "downsample" in shapes["params"]["stage2_block1"]
    assert "downsample" not in shapes["masks"]["stage2_block1"]
    assert "classifier" not in shapes["masks"]


def masked_names(model: Any, image_shape: tuple[int, ...], collection: str = "masks") -> set[str]:
    shapes = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, *image_shape))))
    return {trees.name(path) for path in trees.leaves_by_path(shapes[collection])}


def test_resnet50_masks_all_convolutions_but_the_first() -> None:
    weights = masked_names(models.ResNet50(), (32, 32, 3), "params")
    convolutions = {name for name in weights if re.search(r"(conv_[abc]|downsample)/kernel$", name)}
    assert masked_names(models.ResNet50(), (32, 32, 3)) == convolutions
    assert len(convolutions) == 3 * (3 + 4 + 6 + 3) + 4
    assert weights - convolutions > {"conv0/kernel", "classifier/kernel", "stage1_block1/bn_downsample/scale"}


def test_vgg16_masks_its_thirteen_convolutions() -> None:
    layers = [
        f"stage{stage}_conv{layer}" for stage, size in enumerate((2, 2, 3, 3, 3), 1) for layer in range(1, size + 1)
    ]
    assert masked_names(models.VGG16(), (32, 32, 3)) == {f"{layer}/kernel" for layer in layers}
    assert f"{layers[0]}/bias" not in masked_names(models.VGG16(), (32, 32, 3), "params")


def test_conv4_masks_convolutions_and_hidden_layers() -> None:
    layers = {"stage1_conv1", "stage1_conv2", "stage2_conv1", "stage2_conv2", "hidden0", "hidden1"}
    assert masked_names(models.Conv4(), (32, 32, 3)) == {f"{layer}/kernel" for layer in layers}
    biases = {f"{layer}/bias" for layer in layers | {"classifier"}}
    assert biases < masked_names(models.Conv4(), (32, 32, 3), "params")


def test_vit_masks_the_kernels_of_its_blocks() -> None:
    model = models.ViTTiny(depth=2)
    layers = ("query", "key", "value", "out", "mlp_in", "mlp_out")
    assert masked_names(model, (8, 8, 3)) == {f"block{n}/{layer}/kernel" for n in (1, 2) for layer in layers}
    assert {"class_token", "position_embedding", "patch_embedding/kernel"} < masked_names(model, (8, 8, 3), "params")


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_every_model_takes_any_number_of_classes_and_any_dtype(name: str, dtype: Any) -> None:
    model = models.MODELS[name](num_classes=7, dtype=dtype)
    images = jnp.zeros((2, 32, 36, 2))
    variables = jax.eval_shape(lambda: model.init(KEY, images, train=False))
    logits, _ = jax.eval_shape(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]), variables)
    assert logits.shape == (2, 7)
    assert logits.dtype == jnp.float32  # also of a network that computes in bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", models.MODELS)
def test_param_dtype_is_that_of_all_weights(name: str) -> None:
    model = models.MODELS[name](param_dtype=jnp.bfloat16)
    variables = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 32, 32, 3))))
    assert {leaf.dtype for leaf in jax.tree.leaves([variables["params"], variables["masks"]])} == {
        jnp.dtype("bfloat16")
    }


@pytest.mark.parametrize("name", ["resnet6", "resnet8"])
def test_small_residual_networks_take_images_of_odd_sizes(name: str) -> None:
    variables = jax.eval_shape(lambda: models.MODELS[name]().init(KEY, jnp.zeros((2, 9, 10, 2))))
    assert variables["params"]["classifier"]["kernel"].shape == (64, 10)


@pytest.mark.parametrize(
    "model, plain, image_shape",
    [
        (models.VGG16(stage_sizes=(1, 2), widths=(2, 3)), {"conv": nn.Conv}, (9, 12, 3)),
        (models.Conv4(widths=(2, 3)), {"conv": nn.Conv, "dense": nn.Dense}, (5, 6, 1)),
        (models.ViTTiny(depth=1, width=6), {"dense": nn.DenseGeneral}, (8, 12, 1)),
        (models.ResNet50(stage_sizes=(1, 1), widths=(2, 3)), {"conv": nn.Conv}, (9, 12, 3)),
    ],
    ids=["VGG", "ConvNet", "VisionTransformer", "BottleneckResNet"],
)
def test_masks_of_one_are_the_plain_network_and_masks_count(model: Any, plain: Any, image_shape: tuple) -> None:
    images = jax.random.normal(KEY, (2, *image_shape))
    shapes = jax.eval_shape(model.init, KEY, images)
    rng = np.random.default_rng(0)
    weights = {
        name: jax.tree.map(lambda leaf, low=low: (rng.random(leaf.shape) + low).astype(leaf.dtype), shapes[name])
        for name, low in (("params", -0.5), ("batch_stats", 0.5))
        if name in shapes
    }
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes["masks"])
    apply = jax.jit(model.apply)
    logits = apply({**weights, "masks": masks}, images)
    np.testing.assert_array_equal(logits, jax.jit(model.clone(**plain).apply)(weights, images))
    assert np.isfinite(logits).all() and logits.std() > 0
    for layer in trees.leaves_by_path(masks):
        pruned = trees.replace_leaves(masks, {layer: 0 * trees.leaves_by_path(masks)[layer]})
        assert not np.array_equal(logits, apply({**weights, "masks": pruned}, images)), layer


def test_a_block_of_the_vit_computes_as_linens_own_layers_do() -> None:
    block, x = models.TransformerBlock(3), jax.random.normal(KEY, (2, 5, 6))
    shapes = jax.eval_shape(block.init, KEY, x)
    rng = np.random.default_rng(0)
    params: Any = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes["params"])
    masks: Any = jax.tree.map(lambda leaf: 2 * (rng.random(leaf.shape) < 0.5).astype(leaf.dtype), shapes["masks"])
    found = jax.jit(block.apply)({"params": params, "masks": masks}, x)
    np.testing.assert_allclose(found, jax.jit(linens_block)(trees.apply_masks(params, masks), x), rtol=1e-4, atol=1e-4)


def linens_block(params: Any, x: jax.Array) -> jax.Array:
    norm, attention = nn.LayerNorm(epsilon=1e-6), nn.MultiHeadDotProductAttention(num_heads=3)
    y: Any = x + attention.apply({"params": params}, norm.apply({"params": params["norm_attention"]}, x))
    z: Any = nn.Dense(24).apply({"params": params["mlp_in"]}, norm.apply({"params": params["norm_mlp"]}, y))
    z = z * jax.scipy.stats.norm.cdf(z)  # GELU by its definition, not by tanh
    return y + nn.Dense(6).apply({"params": params["mlp_out"]}, z)


@pytest.mark.parametrize(
    "model, image_shape, tokens, patch",
    [
        (models.ViTTiny(), (32, 32, 3), 65, 4),
        (models.ViTTiny(), (60, 128, 3), 15 * 32 + 1, 4),
        (models.ViTTiny(), (64, 80, 3), 21, 16),
        (models.ViTTiny(patch_size=8), (32, 64, 3), 33, 8),
    ],
)
def test_patches_follow_the_size_of_images(model: Any, image_shape: tuple, tokens: int, patch: int) -> None:
    params = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, *image_shape))))["params"]
    assert params["position_embedding"].shape == (1, tokens, 192)
    assert params["patch_embedding"]["kernel"].shape == (patch, patch, 3, 192)


@pytest.mark.parametrize(
    "model, image_shape, message",
    [
        (models.ViTTiny(), (30, 32, 3), "images 30x32: patch size 4 must divide height and width"),
        (models.ViTTiny(), (64, 72, 3), "images 64x72: patch size 16 must divide height and width"),
        (models.ViTTiny(patch_size=0), (32, 32, 3), "images 32x32: patch size 0 must divide height and width"),
        (models.ViTTiny(num_heads=5), (32, 32, 3), "num_heads 5: must divide the width 192"),
        (models.VGG16(), (32, 31, 3), "images 32x31: require at least 32x32 pixels"),
        (models.Conv6(), (7, 8, 1), "images 7x8: require at least 8x8 pixels"),
    ],
)
def test_images_that_a_network_cannot_take_are_refused(model: Any, image_shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, *image_shape))))


def test_a_network_too_large_for_the_data_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^--model vgg16: .* images 8x8: require at least 32x32 pixels$"):
        prepare(dataclasses.replace(PRESETS["digits"], model="vgg16"))


# The page on networks.


def table() -> list[list[str]]:
    """Cells of the table, row by row, without its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]


def number(cell: str) -> float:
    """As in "1,000", "4.3 M [4]"."""
    digits, unit = re.match(r"([\d.,]+) ?([KMG]?)", cell).groups()  # pyright: ignore
    return float(digits.replace(",", "")) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[unit]


def test_the_page_has_every_network() -> None:
    assert {row[0].strip("`") for row in table()} == set(models.MODELS)


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0].strip("`"))
def test_figures_of_the_page_are_those_of_the_networks(row: list[str]) -> None:
    name, images, weights, published_weights, masked, count, published_count, *_ = row
    height, width, classes = map(int, re.findall(r"\d+", images))
    model = models.MODELS[name.strip("`")](num_classes=classes)
    image_shape = (height, width, 1 if "grey" in images else 3)
    assert (number(weights), number(masked)) == sizes(model, image_shape)
    assert number(count) == multiply_adds(model, image_shape)
    for ours, published in ((weights, published_weights), (count, published_count)):
        if published and name != "`conv6`":  # whose weights are others than published, as the page says
            assert number(ours) == pytest.approx(number(published), rel=0.04)


def test_the_examples_of_the_page_run_and_print_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for kind, block in re.findall(r"```(python|text)\n(.*?)```", PAGE, re.DOTALL):
        if kind == "python":
            exec(block, namespace)
        else:
            assert capsys.readouterr().out == block
    assert sizes(namespace["TwoConvolutions"](num_classes=4), (8, 8, 1)) == (9_700, 9 * 32 + 9 * 32 * 32)


def test_initial_kernels_are_xavier_normal_and_not_truncated() -> None:
    layer, images = "stage3_block2/conv_a", jnp.zeros((1, 8, 8, 3))
    kernel = jax.jit(lambda: kernel_of(models.ResNet20().init(KEY, images), layer))()
    deviation = np.sqrt(2 / (9 * 64 + 9 * 64))
    assert np.std(kernel) == pytest.approx(deviation, rel=0.02)
    assert np.abs(kernel).max() > 3 * deviation  # of 36,864 draws about 100; a truncated one stops at 2.3


@pytest.mark.parametrize(
    "model, image_shape, layer, deviation",
    [
        (models.VGG16(), (32, 32, 3), "stage2_conv1", math.sqrt(2 / (9 * 128))),
        (models.VGG16(num_classes=99), (32, 32, 3), "classifier", 0.01),
        (models.ResNet50(), (32, 32, 3), "stage2_block1/conv_b", math.sqrt(2 / (9 * 128))),
        (models.ResNet50(), (32, 32, 3), "stage3_block1/downsample", math.sqrt(2 / 1024)),
        (models.ResNet50(num_classes=99), (32, 32, 3), "classifier", math.sqrt(1 / 3 / 2048)),
        (models.Conv4(), (8, 8, 3), "stage2_conv1", math.sqrt(2 / (9 * 64 + 9 * 128))),
        (models.Conv4(), (8, 8, 3), "hidden1", math.sqrt(2 / 512)),
        (models.ViTTiny(depth=1), (8, 8, 3), "block1/query", 0.02),
        (models.ViTTiny(depth=1), (8, 8, 3), "block1/mlp_out", 0.02),
    ],
)
def test_kernels_start_as_in_the_source(model: Any, image_shape: tuple, layer: str, deviation: float) -> None:
    # Compiled for this one kernel: what else a large network starts with is not computed.
    kernel = jax.jit(lambda: kernel_of(model.init(KEY, jnp.zeros((1, *image_shape))), layer))()
    assert np.std(kernel) == pytest.approx(deviation, rel=0.03)


def kernel_of(variables: Any, layer: str) -> jax.Array:
    return trees.leaves_by_path(variables["params"])[(*layer.split("/"), "kernel")]


@pytest.mark.usefixtures("x64")
def test_batch_norm_keeps_the_unbiased_variance_and_normalises_by_the_biased_one() -> None:
    x = jax.random.normal(KEY, (3, 2, 1, 4), jnp.float64) * 5 + 1
    norm = models.BatchNorm(momentum=0.9, param_dtype=jnp.float64)
    variables = norm.init(KEY, x, use_running_average=False)
    old = {"mean": jnp.full(4, 0.3), "var": jnp.full(4, 0.7)}
    y, updates = norm.apply(
        {"params": variables["params"], "batch_stats": old}, x, use_running_average=False, mutable=["batch_stats"]
    )
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    np.testing.assert_allclose(y, (x - mean.reshape(1, 1, 1, -1)) / np.sqrt(variance + 1e-5).reshape(1, 1, 1, -1))
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.27 + 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.63 + 0.1 * variance * 6 / 5, rtol=1e-12)
    evaluated = norm.apply({"params": variables["params"], "batch_stats": old}, x, use_running_average=True)
    np.testing.assert_allclose(evaluated, (x - 0.3) / np.sqrt(0.7 + 1e-5), rtol=1e-12)


def test_batch_norm_refuses_what_has_no_variance() -> None:
    norm = models.BatchNorm(use_running_average=False)
    variables = norm.init(KEY, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="a training batch must have at least 2 values per feature, not 1"):
        norm.apply(variables, jnp.ones((1, 3)), mutable=["batch_stats"])
    with pytest.raises(ValueError, match="BatchNorm mask: not supported; leave this argument out"):
        norm.apply(variables, jnp.ones((2, 3)), mask=jnp.ones((2, 3)), mutable=["batch_stats"])
