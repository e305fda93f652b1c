"""A masked network as a plain one: the same outputs, without masks and without norms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from networks import FAMILIES, masked

import cs_jax
from cs_jax import fold, shrink
from cs_jax.wiring import Signal, Wiring


def difference(model: nn.Module, variables: Any, other: nn.Module, others: Any, image_shape: tuple[int, ...]) -> float:
    dtype = jax.tree.leaves(variables)[0].dtype
    images = jnp.asarray(np.random.default_rng(1).standard_normal((3, *image_shape)), dtype)
    wanted, got = (jax.jit(partial(m.apply, v))(images) for m, v in ((model, variables), (other, others)))
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_folded_network_computes_the_same_in_float32(family: str, batch_norm: bool) -> None:
    model, image_shape = FAMILIES[family]
    variables = masked(model, image_shape)
    plain, found = fold.fold(model, variables, batch_norm=batch_norm)
    assert difference(model, variables, plain, found, image_shape) <= 1e-5
    norms = "batch_stats" in variables and not batch_norm
    assert set(found) == {"params", *(["batch_stats"] if norms else [])}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_network_computes_the_same_in_float64(family: str, x64: None) -> None:
    model, image_shape = FAMILIES[family]
    model = model.clone(param_dtype=jnp.float64)
    variables = masked(model, image_shape)
    plain, found = fold.fold(model, variables, batch_norm=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float64")}
    assert difference(model, variables, plain, found, image_shape) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_network_can_be_folded(family: str) -> None:
    model, image_shape = FAMILIES[family]
    variables = masked(model, image_shape)
    smaller, fewer = shrink.shrink(model, variables, image_shape)
    assert smaller.features  # pyright: ignore[reportAttributeAccessIssue]
    plain, found = fold.fold(smaller, fewer, batch_norm=True)
    assert difference(model, variables, plain, found, image_shape) <= 1e-5


def test_norms_are_gone_and_convolutions_have_biases() -> None:
    model, image_shape = FAMILIES["bottleneck"]
    plain, found = fold.fold(model, masked(model, image_shape), batch_norm=True)
    made = jax.eval_shape(lambda: plain.init(jax.random.key(0), jnp.zeros((1, *image_shape))))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, made)
    block = found["params"]["stage1_block1"]
    assert set(block) == {"conv_a", "conv_b", "conv_c", "downsample"}
    assert all(set(layer) == {"kernel", "bias"} for layer in block.values())


def test_a_folded_network_says_how_it_is_wired() -> None:
    for family in ("resnet", "bottleneck", "vgg"):
        model, image_shape = FAMILIES[family]
        plain, found = fold.fold(model, masked(model, image_shape), batch_norm=True)
        smaller, fewer = shrink.shrink(plain, found, image_shape)
        assert smaller.features  # pyright: ignore[reportAttributeAccessIssue]
        assert difference(plain, found, smaller, fewer, image_shape) <= 1e-5


def test_layers_without_a_mask_stay_as_they_are() -> None:
    model, image_shape = FAMILIES["resnet"]
    variables = masked(model, image_shape)
    _, found = fold.fold(model, variables, batch_norm=True)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(found["params"]["classifier"][name], variables["params"]["classifier"][name])


class NormFirst(nn.Module):
    """A norm of the images, before any layer."""

    dense: type[nn.Dense] = cs_jax.MaskedDense
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(3, name="dense0")(nn.BatchNorm(use_running_average=True, name="first")(x))

    def wire(self, net: Wiring, x: Signal) -> Signal:
        return net.dense(net.batch_norm(x, "first"), "dense0")

    def resize(self, features: Any) -> "NormFirst":
        return self


class NormBeside(NormFirst):
    """A norm of a layer that something else reads too."""

    def wire(self, net: Wiring, x: Signal) -> Signal:
        y = net.dense(x, "dense0")
        return net.add(y, net.batch_norm(y, "first"))


class NoFields(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return cs_jax.MaskedDense(3)(x)


class NotFoldable(nn.Module):
    dense: type[nn.Dense] = cs_jax.MaskedDense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=True)(self.dense(3)(x))


@pytest.mark.parametrize("model", [NormFirst(), NormBeside()])
def test_a_norm_that_does_not_follow_a_layer_of_its_own_is_refused(model: nn.Module) -> None:
    variables = model.init(jax.random.key(0), jnp.zeros((1, 5)))
    with pytest.raises(ValueError, match="norm 'first': follows what is no convolution or dense layer"):
        fold.fold(model, variables, batch_norm=True)
    assert set(fold.fold(model, variables)[1]) == {"params", "batch_stats"}


def test_a_module_without_the_fields_is_refused() -> None:
    variables = NoFields().init(jax.random.key(0), jnp.zeros((1, 5)))
    with pytest.raises(TypeError, match="got NoFields, wanted a module with a field `conv` or `dense`"):
        fold.fold(NoFields(), variables)
    variables = NotFoldable().init(jax.random.key(0), jnp.zeros((1, 5)))
    with pytest.raises(TypeError, match="got NotFoldable, wanted a module with a field `folded`"):
        fold.fold(NotFoldable(), variables, batch_norm=True)
