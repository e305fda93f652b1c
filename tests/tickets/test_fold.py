"""Masked networks folded into plain networks: equal outputs, without masks and norms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from networks import FAMILIES, masked

import cs_jax
from cs_jax.core.errors import ConfigError
from cs_jax.models.wiring import Signal, Wiring
from cs_jax.tickets import fold, shrink


def difference(model: nn.Module, variables: Any, other: nn.Module, others: Any, image_shape: tuple[int, ...]) -> float:
    dtype = jax.tree.leaves(variables)[0].dtype
    images = jnp.asarray(np.random.default_rng(1).standard_normal((3, *image_shape)), dtype)
    wanted, got = (jax.jit(partial(m.apply, v))(images) for m, v in ((model, variables), (other, others)))
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_folded_network_computes_the_same_in_float32(family: str, batch_norm: bool) -> None:
    model, image_shape = FAMILIES[family]
    variables = masked(model, image_shape)
    plain, found = fold.fold(model, variables, image_shape, batch_norm=batch_norm)
    assert difference(model, variables, plain, found, image_shape) <= 1e-5
    norms = "batch_stats" in variables and not batch_norm
    assert set(found) == {"params", *(["batch_stats"] if norms else [])}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_network_computes_the_same_in_float64(family: str, x64: None) -> None:
    model, image_shape = FAMILIES[family]
    model = model.clone(param_dtype=jnp.float64)
    variables = masked(model, image_shape)
    plain, found = fold.fold(model, variables, image_shape, batch_norm=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float64")}
    assert difference(model, variables, plain, found, image_shape) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_network_can_be_folded(family: str) -> None:
    model, image_shape = FAMILIES[family]
    variables = masked(model, image_shape)
    smaller, fewer = shrink.shrink(model, variables, image_shape)
    assert smaller.features  # pyright: ignore[reportAttributeAccessIssue]
    plain, found = fold.fold(smaller, fewer, image_shape, batch_norm=True)
    assert difference(model, variables, plain, found, image_shape) <= 1e-5


def test_norms_are_gone_and_convolutions_have_biases() -> None:
    model, image_shape = FAMILIES["bottleneck"]
    plain, found = fold.fold(model, masked(model, image_shape), image_shape, batch_norm=True)
    made = jax.eval_shape(lambda: plain.init(jax.random.key(0), jnp.zeros((1, *image_shape))))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, made)
    block = found["params"]["stage1_block1"]
    assert set(block) == {"conv_a", "conv_b", "conv_c", "downsample"}
    assert all(set(layer) == {"kernel", "bias"} for layer in block.values())


def test_a_folded_network_says_how_it_is_wired() -> None:
    for family in ("resnet", "bottleneck", "vgg"):
        model, image_shape = FAMILIES[family]
        plain, found = fold.fold(model, masked(model, image_shape), image_shape, batch_norm=True)
        smaller, fewer = shrink.shrink(plain, found, image_shape)
        assert smaller.features  # pyright: ignore[reportAttributeAccessIssue]
        assert difference(plain, found, smaller, fewer, image_shape) <= 1e-5


def test_layers_without_a_mask_stay_as_they_are() -> None:
    model, image_shape = FAMILIES["resnet"]
    variables = masked(model, image_shape)
    _, found = fold.fold(model, variables, image_shape, batch_norm=True)
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
    """A norm after a layer whose output has another reader."""

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
    with pytest.raises(
        ValueError, match="norm 'first': cannot be folded; must follow a convolution or dense layer whose"
    ):
        fold.fold(model, variables, (5,), batch_norm=True)
    assert set(fold.fold(model, variables, (5,))[1]) == {"params", "batch_stats"}


def test_a_module_without_the_fields_is_refused() -> None:
    variables = NoFields().init(jax.random.key(0), jnp.zeros((1, 5)))
    with pytest.raises(TypeError, match="^model NoFields: must have a field `conv` or `dense`"):
        fold.fold(NoFields(), variables, (5,))
    variables = NotFoldable().init(jax.random.key(0), jnp.zeros((1, 5)))
    with pytest.raises(TypeError, match="^model NotFoldable: must have a field `folded`"):
        fold.fold(NotFoldable(), variables, (5,), batch_norm=True)


class ThreeNorms(nn.Module):
    """Layers with norms, with a right or one of several wrong wirings; a layer in no field is hidden."""

    told: str = "rightly"
    hidden: bool = False
    dense: type[nn.Dense] = cs_jax.MaskedDense
    folded: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(3):
            x = self.dense(4, name=f"dense{layer}")(x)
            if not self.folded:
                x = nn.BatchNorm(use_running_average=True, name=f"norm{layer}")(x)
        return cs_jax.MaskedDense(2, name="last")(x) if self.hidden else nn.Dense(2, name="last")(x)

    def wire(self, net: Wiring, x: Signal) -> Signal:
        epsilon = 1e-5 if self.told != "another epsilon" else 0.1
        names = {"swapped": ("norm1", "norm0", "norm2"), "unknown": ("norm0", "norm1", "norm3")}
        for layer, name in enumerate(names.get(self.told, ("norm0", "norm1", "norm2"))):
            x = net.dense(x, f"dense{layer}")
            x = x if self.told == "partly" and layer == 1 else net.batch_norm(x, name, epsilon=epsilon)
        return net.dense(x, "last")

    def resize(self, features: Any) -> "ThreeNorms":
        return self


@pytest.mark.parametrize(
    "told, complaint",
    [
        ("another epsilon", "^wiring of ThreeNorms is wrong: folding its norms changes the network: outputs differ by"),
        ("swapped", "^wiring of ThreeNorms is wrong: folding its norms changes the network: outputs differ by"),
        ("partly", "wiring: misses 'norm1/bias'; name every layer in `wire`"),
        ("unknown", "wiring of layer 'norm3': no such layer in the params"),
    ],
)
def test_a_wrong_wiring_is_refused(told: str, complaint: str) -> None:
    variables = masked(ThreeNorms(told), (5,))
    fold.fold(ThreeNorms(), variables, (5,), batch_norm=True)
    with pytest.raises(ValueError, match=complaint):
        fold.fold(ThreeNorms(told), variables, (5,), batch_norm=True)


def test_a_masked_layer_in_no_field_is_refused() -> None:
    model = ThreeNorms(hidden=True)
    with pytest.raises(ValueError, match="ThreeNorms cannot be applied without masks: last/kernel: needs a mask"):
        fold.fold(model, masked(model, (5,)), (5,))


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    variables = masked(ThreeNorms(), (5,))
    variables["params"]["last"]["bias"] = jnp.full(2, jnp.inf)
    with pytest.raises(ConfigError, match="^params/last/bias: entries must be finite$"):
        fold.fold(ThreeNorms(), variables, (5,))


@pytest.mark.parametrize("make", [fold.fold, shrink.shrink])
def test_images_that_the_network_does_not_take_are_refused(make: Any) -> None:
    model = cs_jax.models.LeNet300100(num_classes=3)
    with pytest.raises(
        ValueError, match=r"^image_shape \(5, 5, 1\): not accepted by LeNet300100 with these variables"
    ) as caught:
        make(model, masked(model, (4, 4, 1)), (5, 5, 1))
    assert "\n" not in str(caught.value)


class Doubled(cs_jax.MaskedDense):
    """Custom masked layer that extends Flax's layer and masks its bias too."""

    masked_params = ("kernel", "bias")

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 2 * super().__call__(inputs)


class Renamed(Doubled):
    """A subclass of that."""


class Mixed(cs_jax.Masked, nn.Dense):
    """Masked layer made like the library's layers."""

    use_bias: bool = False


@pytest.mark.parametrize("dense", [Doubled, Renamed, Mixed])
def test_subclasses_of_masked_layers_keep_what_they_do_and_mask_nothing(dense: type[nn.Dense]) -> None:
    model = ThreeNorms(dense=dense)
    variables = masked(model, (5,))
    served, found = fold.fold(model, variables, (5,))
    assert difference(model, variables, served, found, (5,)) <= 1e-6
    assert "masks" not in served.init(jax.random.key(0), jnp.zeros((1, 5)))
    assert fold.plain(model) == served and hash(fold.plain(model)) == hash(served)


def test_layers_of_the_library_become_those_of_flax() -> None:
    assert fold.plain(ThreeNorms()).dense is nn.Dense  # pyright: ignore[reportAttributeAccessIssue]
