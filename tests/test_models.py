"""Networks: sizes, what is masked, and BatchNorm's running variance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cs_jax import models

KEY = jax.random.key(0)


def sizes(model: Any, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Weights in all, and masked ones."""
    shapes = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, *image_shape)), train=False))
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(shapes[c])) for c in ("params", "masks"))  # pyright: ignore


@pytest.mark.parametrize(
    "model, image_shape, everything, masked",
    [
        (models.ResNet20(), (32, 32, 3), 272_282, 267_696),
        (models.LeNet300100(), (28, 28, 1), 266_610, 784 * 300 + 300 * 100),
        (models.ResNet6(), (8, 8, 1), 77_162, 9 * (32 + 2 * 32 * 32 + 32 * 64 + 64 * 64)),
        (models.ResNet8(), (28, 28, 1), 77_562, 9 * (16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)),
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


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_every_model_takes_any_number_of_classes_and_any_dtype(name: str, dtype: Any) -> None:
    model = models.MODELS[name](num_classes=7, dtype=dtype)
    images = jnp.zeros((2, 9, 10, 2))
    variables = jax.eval_shape(lambda: model.init(KEY, images, train=False))
    logits, _ = jax.eval_shape(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]), variables)
    assert logits.shape == (2, 7)
    assert logits.dtype == (dtype or jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_initial_kernels_are_xavier_normal_and_not_truncated() -> None:
    kernel = models.ResNet20().init(KEY, jnp.zeros((1, 8, 8, 3)))["params"]["stage3_block2"]["conv_a"]["kernel"]
    deviation = np.sqrt(2 / (9 * 64 + 9 * 64))
    assert np.std(kernel) == pytest.approx(deviation, rel=0.02)
    assert np.abs(kernel).max() > 3 * deviation  # of 36,864 draws about 100; a truncated one stops at 2.3


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
    with pytest.raises(ValueError, match="got 1 value per feature in a training batch, wanted at least 2"):
        norm.apply(variables, jnp.ones((1, 3)), mutable=["batch_stats"])
    with pytest.raises(ValueError, match="mask of a BatchNorm is not supported"):
        norm.apply(variables, jnp.ones((2, 3)), mask=jnp.ones((2, 3)), mutable=["batch_stats"])
