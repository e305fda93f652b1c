"""Multiply-adds: compared with counts by hand, by masked array, and in nested jaxprs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import cs_jax
from cs_jax import models
from cs_jax.core import trees
from cs_jax.layers.masked import (
    Masked,
    MaskedConv,
    MaskedConvTranspose,
    MaskedDense,
    MaskedDenseGeneral,
    MaskedEinsum,
    MaskedEmbed,
)
from cs_jax.models.multiply_adds import layer_multiply_adds, multiply_adds


@pytest.mark.parametrize(
    "layer, image_shape, count",
    [
        (MaskedDense(5), (3,), 3 * 5),
        (MaskedDense(5), (4, 3), 4 * 3 * 5),
        (MaskedDenseGeneral((2, 7), axis=(-2, -1)), (4, 3), 4 * 3 * 2 * 7),
        (MaskedEinsum((3, 5), "bi,io->bo"), (3,), 3 * 5),
        (MaskedConv(5, (3, 2)), (8, 6, 4), 8 * 6 * 5 * 3 * 2 * 4),
        (MaskedConv(5, (3, 3), padding="VALID"), (8, 6, 4), 6 * 4 * 5 * 9 * 4),
        (MaskedConv(5, (3, 3), strides=2), (8, 6, 4), 4 * 3 * 5 * 9 * 4),
        (MaskedConv(6, (3, 3), feature_group_count=2), (8, 6, 4), 8 * 6 * 6 * 9 * 2),
        (MaskedConv(8, (3, 3), feature_group_count=4), (8, 6, 4), 8 * 6 * 8 * 9),
        (MaskedConv(5, (3,), kernel_dilation=2), (8, 4), 8 * 5 * 3 * 4),
        (MaskedConvTranspose(5, (3, 3), strides=(2, 2)), (8, 6, 4), 8 * 6 * 4 * 9 * 5),
        (MaskedConvTranspose(5, (3, 3)), (8, 6, 4), 8 * 6 * 4 * 9 * 5),
    ],
)
def test_a_layer_counts_its_inputs_times_its_outputs(layer: nn.Module, image_shape: tuple, count: int) -> None:
    assert multiply_adds(layer, image_shape) == count
    assert layer_multiply_adds(layer, image_shape) == {"kernel": count}


def test_only_products_count_and_unmasked_ones_are_nobodys() -> None:
    layers = [MaskedConv(2, (1, 1)), nn.BatchNorm(True), nn.relu, nn.LayerNorm(), nn.softmax, nn.Dense(7)]
    model = nn.Sequential([*layers, lambda x: nn.avg_pool(x, (2, 2)) * x.mean() + 1])
    assert multiply_adds(model, (4, 4, 3)) == 16 * 3 * 2 + 16 * 2 * 7
    assert layer_multiply_adds(model, (4, 4, 3)) == {"layers_0/kernel": 16 * 3 * 2}


class Attention(nn.Module):
    """Learned queries: a product of two weights, then products of activations."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        queries = self.param("queries", nn.initializers.ones, (5, 3))
        query = MaskedDense(4, name="query")(queries)
        key = MaskedDense(4, name="key")(x)
        return jnp.einsum("qd,bkd->bqk", query, key)


def test_products_of_activations_are_nobodys() -> None:
    assert layer_multiply_adds(Attention(), (6, 3)) == {"key/kernel": 6 * 3 * 4, "query/kernel": 5 * 3 * 4}
    assert multiply_adds(Attention(), (6, 3)) == 6 * 3 * 4 + 5 * 3 * 4 + 5 * 6 * 4


class Layer(nn.Module):
    """Masked layer for lifted transforms; the carry keeps its width."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        return nn.gelu(MaskedDense(x.shape[-1], name="dense")(x)), None


class Lifted(nn.Module):
    """Eleven layers in a loop, with stacked or with shared weights."""

    shared: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes: Any = {"variable_broadcast": ["params", "masks"]}
        if not self.shared:
            axes = {"variable_axes": {"params": 0, "masks": 0}}
        loop = nn.scan(nn.remat(Layer), length=11, split_rngs={"params": not self.shared}, **axes)
        return loop(name="loop")(x, None)[0]


class Vmapped(nn.Module):
    """One layer for each of the entries of the first axis after the batch."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes: Any = {"params": 0, "masks": 0}
        return nn.vmap(MaskedDense, variable_axes=axes, split_rngs={"params": True}, in_axes=1)(5, name="dense")(x)


class Normalised(nn.Module):
    """A spectral norm around a masked layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return cs_jax.SpectralNorm(MaskedDense(5, name="dense"))(x, update_stats=False)


@pytest.mark.parametrize(
    "model, image_shape, counts",
    [
        (Lifted(shared=False), (3,), {"loop/dense/kernel": 11 * 9}),
        (Lifted(shared=True), (3,), {"loop/dense/kernel": 11 * 9}),
        (Vmapped(), (4, 3), {"dense/kernel": 4 * 3 * 5}),
        (nn.jit(MaskedDense)(5), (3,), {"kernel": 15}),
        (Normalised(), (3,), {"dense/kernel": 15}),
        (cs_jax.WeightNorm(MaskedDense(5)), (3,), {"layer_instance/kernel": 15}),
        (cs_jax.sparsify(nn.Sequential([nn.Dense(5)]), where="**/kernel"), (3,), {"layers_0/kernel": 15}),
    ],
    ids=["scan", "shared scan", "vmap", "jit", "SpectralNorm", "WeightNorm", "sparsify"],
)
def test_lifted_and_wrapped_layers_keep_their_counts(model: Any, image_shape: tuple, counts: dict[str, int]) -> None:
    assert layer_multiply_adds(model, image_shape) == counts


def test_a_loop_counts_its_length_times() -> None:
    model = nn.RNN(nn.SimpleCell(5))
    assert multiply_adds(model, (7, 3)) == 7 * (3 * 5 + 5 * 5)
    assert layer_multiply_adds(model, (7, 3)) == {}


class Tied(nn.Module):
    """Look-ups in a masked table, then products with it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = MaskedEmbed(11, 3, name="table")
        return table.attend(table(x.astype(int)))


class Own(Masked, nn.Module):
    """Two masked arrays and their product, computed by `multiply`."""

    multiply: Callable

    masked_params = ("a", "b")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape = (x.shape[-1], x.shape[-1])
        a, b = (self.param(name, nn.initializers.ones, shape) for name in self.masked_params)
        return self.multiply(x, a, b) @ jnp.ones((3, 1000)) if train else self.multiply(x, a, b)


def test_a_table_counts_products_and_no_look_ups() -> None:
    assert layer_multiply_adds(Tied(), (4,)) == {"table/embedding": 4 * 3 * 11}


@pytest.mark.parametrize(
    "multiply, a, b, whole",
    [
        (lambda x, a, b: x @ a @ a + b, 18, 0, 18),
        (lambda x, a, b: jax.jit(jnp.dot)(x, jnp.swapaxes(a, 0, 1)) @ b, 9, 9, 18),
        (lambda x, a, b: x @ jnp.concatenate([a, b], axis=1), 0, 0, 18),
        (lambda x, a, b: x @ (a @ b), 0, 0, 27 + 9),
        (lambda x, a, b: x * a[:1] * b[:1], 0, 0, 0),
        (lambda x, a, b: jax.lax.cond(x.sum() > 0, lambda: x @ a @ a, lambda: x @ b), 18, 0, 18),
        (lambda x, a, b: jax.lax.cond(x.sum() > 0, lambda: a, lambda: b.T) @ b, 0, 9 * 3, 9 * 3),
        (lambda x, a, b: jax.lax.fori_loop(0, 4, lambda _, y: y @ a, x), 36, 0, 36),
        (lambda x, a, b: jax.lax.fori_loop(0, 4, lambda _, y: y @ b + x, a[:1]), 0, 36, 36),
        (lambda x, a, b: jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y - a[:1], x) @ b, 0, 9, 9),
        (lambda x, a, b: jax.checkpoint(lambda y: jax.nn.silu(y @ a))(x), 9, 0, 9),
    ],
    ids=[
        "twice",
        "jit",
        "joined",
        "product of both",
        "entries",
        "cond",
        "chosen",
        "for",
        "carried",
        "while",
        "checkpoint",
    ],
)
def test_arrays_of_a_layer_of_ones_own_are_told_apart(multiply: Callable, a: int, b: int, whole: int) -> None:
    model = Own(multiply)
    assert layer_multiply_adds(model, (3,)) == {"a": a, "b": b}
    assert multiply_adds(model, (3,)) == whole


def test_products_in_a_loop_of_unknown_length_are_refused() -> None:
    model = Own(lambda x, a, b: jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y @ a, x))
    complaint = "model: cannot count products in a while loop; use lax.scan or another loop of known length"
    with pytest.raises(ValueError, match=complaint):
        multiply_adds(model, (3,))


@pytest.mark.parametrize(
    "name, image_shape, rest",
    [
        ("resnet20", (32, 32, 3), 256 * 16 * 32 + 64 * 32 * 64 + 64 * 10),
        ("resnet32", (32, 32, 3), 256 * 16 * 32 + 64 * 32 * 64 + 64 * 10),
        ("resnet56", (32, 32, 3), 256 * 16 * 32 + 64 * 32 * 64 + 64 * 10),
        ("resnet50", (224, 224, 3), 112 * 112 * 49 * 3 * 64 + 2048 * 10),
        ("resnet8", (28, 28, 1), 14 * 14 * 16 * 32 + 7 * 7 * 32 * 64 + 64 * 10),
        ("resnet6", (8, 8, 1), 4 * 4 * 32 * 64 + 64 * 10),
        ("vgg16", (32, 32, 3), 512 * 10),
        ("conv2", (32, 32, 3), 256 * 10),
        ("conv4", (32, 32, 3), 256 * 10),
        ("conv6", (32, 32, 3), 256 * 10),
        ("vit_tiny", (224, 224, 3), 196 * 256 * 3 * 192 + 12 * 2 * 197 * 197 * 192 + 192 * 10),
        ("lenet300100", (28, 28, 1), 100 * 10),
    ],
)
def test_masked_layers_and_the_rest_are_the_whole(name: str, image_shape: tuple[int, ...], rest: int) -> None:
    model = models.MODELS[name](num_classes=10)
    counts = layer_multiply_adds(model, image_shape)
    masks = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape))))["masks"]
    assert set(counts) == {trees.name(path) for path in trees.leaves_by_path(masks)}
    assert all(count > 0 for count in counts.values())
    assert sum(counts.values()) + rest == multiply_adds(model, image_shape)


def test_layers_of_a_resnet_count_their_own() -> None:
    counts = layer_multiply_adds(models.ResNet20(), (32, 32, 3))
    assert counts["conv0/kernel"] == 32 * 32 * 9 * 3 * 16
    assert counts["stage1_block1/conv_a/kernel"] == 32 * 32 * 9 * 16 * 16
    assert counts["stage3_block1/conv_a/kernel"] == 8 * 8 * 9 * 32 * 64
    assert counts["stage3_block3/conv_b/kernel"] == 8 * 8 * 9 * 64 * 64
