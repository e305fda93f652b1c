"""Masked layers compared with Flax's layers, inside lifted transforms, and their errors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from plain import assert_same_as_plain, assert_same_gradients, linen

import cs_jax
from cs_jax import layers

KEY = jax.random.key(0)
IMAGE = jax.random.normal(jax.random.key(1), (2, 7, 7, 4))
FLAT = IMAGE[0, 0]

# Masked layer, plain layer, arguments, input.
LAYERS = [
    (layers.MaskedDense, nn.Dense, {"features": 3}, FLAT),
    (layers.MaskedDense, nn.Dense, {"features": 3, "use_bias": False, "dtype": jnp.bfloat16}, FLAT),
    (layers.MaskedDense, nn.Dense, {"features": 3, "param_dtype": jnp.bfloat16}, FLAT),
    (layers.MaskedDense, nn.Dense, {"features": 3, "precision": "highest", "dot_general": jax.lax.dot_general}, FLAT),
    (layers.MaskedDenseGeneral, nn.DenseGeneral, {"features": (2, 3), "axis": (-2, -1)}, IMAGE),
    (layers.MaskedDenseGeneral, nn.DenseGeneral, {"features": 3, "axis": -1, "batch_dims": 0}, IMAGE),
    (layers.MaskedEinsum, nn.Einsum, {"shape": (4, 5), "einsum_str": "...i,io->...o"}, FLAT),
    (layers.MaskedConv, nn.Conv, {"features": 6, "kernel_size": (3, 3)}, IMAGE),
    (
        layers.MaskedConv,
        nn.Conv,
        {"features": 8, "kernel_size": (3, 3), "strides": 2, "kernel_dilation": 2, "feature_group_count": 2},
        IMAGE,
    ),
    (
        layers.MaskedConv,
        nn.Conv,
        {"features": 6, "kernel_size": (3,), "padding": "CIRCULAR", "use_bias": False},
        IMAGE[0],
    ),
    (layers.MaskedConvTranspose, nn.ConvTranspose, {"features": 3, "kernel_size": (2, 2), "strides": (2, 2)}, IMAGE),
    (layers.MaskedConvLocal, nn.ConvLocal, {"features": 3, "kernel_size": (3, 3)}, IMAGE),
    (layers.MaskedEmbed, nn.Embed, {"num_embeddings": 5, "features": 3}, jnp.array([0, 4, 1])),
]


def ids(case: Any) -> str | None:
    return case.__name__ if isinstance(case, type) else None


@pytest.mark.parametrize("masked, plain, arguments, x", LAYERS, ids=ids)
def test_a_masked_layer_is_the_plain_layer_on_masked_weights(
    masked: Any, plain: Any, arguments: Any, x: jax.Array
) -> None:
    ours, theirs = masked(**arguments), plain(**arguments)
    assert ours.init(KEY, x).keys() == {"params", "masks"}
    assert set(theirs.__dataclass_fields__) == set(ours.__dataclass_fields__)
    network = linen(ours, x)
    assert network.masks.keys() == set(masked.masked_params)
    assert_same_as_plain(network, linen(theirs, x))


@pytest.mark.parametrize(
    "masked, plain, arguments",
    [
        (layers.MaskedDense, nn.Dense, {"features": 3}),
        (layers.MaskedConv, nn.Conv, {"features": 4, "kernel_size": (3, 3)}),
    ],
    ids=ids,
)
def test_gradients_are_those_through_the_product_with_the_mask(masked: Any, plain: Any, arguments: Any) -> None:
    assert_same_gradients(linen(masked(**arguments), IMAGE), linen(plain(**arguments), IMAGE))


def test_embedding_is_masked_in_attend_too() -> None:
    embed = layers.MaskedEmbed(num_embeddings=5, features=3)
    variables = embed.init(KEY, jnp.array([0]))
    masks = {"embedding": jnp.zeros((5, 3))}
    np.testing.assert_array_equal(embed.apply({**variables, "masks": masks}, jnp.ones(3), method="attend"), np.zeros(5))


class Cell(nn.Module):
    wrap: Any = layers.MaskedDense

    @nn.compact
    def __call__(self, carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return self.wrap(carry.shape[-1], name="dense")(carry), None


class Scanned(nn.Module):
    variable_axes: Any
    wrap: Any = layers.MaskedDense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(Cell, variable_axes=self.variable_axes, split_rngs={"params": True}, length=3)
        return scan(self.wrap, name="cell")(x, None)[0]


@pytest.mark.parametrize("wrap", [layers.MaskedDense, nn.remat(layers.MaskedDense)], ids=["scan", "scan of remat"])
def test_scanned_layers_have_a_mask_each(wrap: Any) -> None:
    model = Scanned({"params": 0, "masks": 0}, wrap)
    variables = model.init(KEY, FLAT)
    kernel, bias = variables["params"]["cell"]["dense"]["kernel"], variables["params"]["cell"]["dense"]["bias"]
    masks = jax.random.bernoulli(jax.random.key(3), 0.5, kernel.shape).astype(kernel.dtype)
    expected = FLAT
    for layer in range(3):
        expected = expected @ (kernel[layer] * masks[layer]) + bias[layer][None]
    out = model.apply({"params": variables["params"], "masks": {"cell": {"dense": {"kernel": masks}}}}, FLAT)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_vmapped_layers_have_a_mask_each() -> None:
    axes = {"params": 0, "masks": 0}
    model = nn.vmap(layers.MaskedDense, variable_axes=axes, split_rngs={"params": True})(3)
    x = jnp.ones((2, 4))
    variables = model.init(KEY, x)
    masks = {"kernel": jnp.stack([jnp.zeros((4, 3)), jnp.ones((4, 3))])}
    out = model.apply({"params": variables["params"], "masks": masks}, x)
    np.testing.assert_array_equal(out[0], np.zeros(3))
    np.testing.assert_allclose(out[1], variables["params"]["kernel"][1].sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scanned({"params": 0}),
        lambda: nn.vmap(layers.MaskedDense, variable_axes={"params": None}, split_rngs={"params": False})(3),
    ],
    ids=["scan", "vmap"],
)
def test_a_transform_that_drops_masks_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="does not carry the collection 'masks'; name 'masks' with 'params'"):
        make().init(KEY, FLAT)


class Normalised(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(layers.MaskedDense(3, use_bias=False, name="dense"))(x)


def test_weight_norm_normalises_first_and_masks_then() -> None:
    model = Normalised(layers.WeightNorm)
    variables = model.init(KEY, FLAT)
    kernel = np.asarray(variables["params"]["dense"]["kernel"])
    mask = np.tri(4, 3, dtype=np.float32)
    out = model.apply({**variables, "masks": {"dense": {"kernel": mask}}}, FLAT)
    unit = kernel / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(out, FLAT @ (unit * mask), rtol=1e-5, atol=1e-6)


def test_spectral_norm_normalises_first_and_masks_then() -> None:
    model = Normalised(lambda layer: partial(layers.SpectralNorm(layer, n_steps=50), update_stats=False))
    variables = model.init(KEY, FLAT)
    kernel = np.asarray(variables["params"]["dense"]["kernel"])
    mask = np.tri(4, 3, dtype=np.float32)
    out = model.apply({**variables, "masks": {"dense": {"kernel": mask}}}, FLAT)
    unit = kernel / np.linalg.norm(kernel, ord=2)
    np.testing.assert_allclose(out, FLAT @ (unit * mask), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.WeightNorm, lambda layer: partial(nn.SpectralNorm(layer), update_stats=False)])
def test_flax_norms_that_would_change_masks_stop_at_init(norm: Any) -> None:
    with pytest.raises(Exception, match="Name in use|name in use|Could not create"):
        Normalised(norm).init(KEY, FLAT)


def test_lazy_init_makes_masks() -> None:
    variables = layers.MaskedDense(3).lazy_init(KEY, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    assert variables["masks"]["kernel"].shape == (4, 3)


def test_tabulate_shows_masks() -> None:
    console = {"width": 200, "force_terminal": False, "no_color": True}
    table = layers.MaskedDense(3).tabulate(KEY, FLAT, console_kwargs=console)
    header = next(line for line in table.splitlines() if "params" in line)
    assert "masks" in header
    assert "12 (48 B)" in table  # 4 x 3 masks


def test_masks_take_the_partitioning_of_their_weights() -> None:
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    variables = layers.MaskedDense(3, kernel_init=init).init(KEY, FLAT)
    specs = nn.get_partition_spec(variables)
    assert specs["masks"]["kernel"] == specs["params"]["kernel"] == jax.sharding.PartitionSpec("in", "out")
    scores = cs_jax.init_scores(variables["masks"], 0.0)
    assert nn.get_partition_spec(scores) == specs["masks"]
    out = layers.MaskedDense(3, kernel_init=init).apply(variables, FLAT)
    np.testing.assert_allclose(out, jnp.broadcast_to(FLAT.sum(axis=1, keepdims=True), (7, 3)), rtol=1e-5)


class Gated(layers.Masked, nn.Module):
    masked_params = ("weight", "gate")
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1], self.features))
        gate = self.param("gate", nn.initializers.ones, (1, self.features))
        return x @ weight * gate + self.param("bias", nn.initializers.zeros, (1, self.features))


def test_a_users_layer_masks_the_parameters_that_it_names() -> None:
    variables = Gated(2).init(KEY, FLAT)
    assert variables["masks"].keys() == {"weight", "gate"}
    masks = {"weight": jnp.ones((4, 2)), "gate": jnp.array([[0.0, 1.0]])}
    out = Gated(2).apply({"params": variables["params"], "masks": masks}, FLAT)
    np.testing.assert_allclose(out, jnp.stack([jnp.zeros(7), FLAT.sum(axis=1)], axis=1), rtol=1e-5)


def test_a_layer_with_setup_is_masked() -> None:
    class WithSetup(layers.Masked, nn.Module):
        masked_params = ("weight",)

        def setup(self) -> None:
            self.weight = self.param("weight", nn.initializers.ones, (1, 4))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.weight

    out = WithSetup().apply({"params": {"weight": jnp.ones((1, 4))}, "masks": {"weight": jnp.zeros((1, 4))}}, FLAT)
    np.testing.assert_array_equal(out, np.zeros((7, 4)))


def test_a_masked_layer_can_be_extended() -> None:
    class Scaled(layers.MaskedDense):
        masked_params = ("kernel", "gain")

        @nn.compact
        def __call__(self, inputs: jax.Array) -> jax.Array:
            return super().__call__(inputs) * self.param("gain", nn.initializers.ones, (1, self.features))

    assert Scaled(3).init(KEY, FLAT)["masks"].keys() == {"kernel", "gain"}


def test_the_mixin_on_the_wrong_side_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Late: Masked must be the first base class, .*; write class Late\(Masked, \.\.\.\)"
    ):
        type("Late", (nn.Dense, layers.Masked), {})


def test_masked_params_must_be_a_tuple() -> None:
    with pytest.raises(TypeError, match="masked_params 'kernel' of Named: must be a tuple of names"):
        type("Named", (layers.Masked, nn.Dense), {"masked_params": "kernel"})


@pytest.mark.parametrize("masked_params", [("kernle",), ("kernel", "bias")])
def test_naming_a_parameter_that_the_layer_lacks_is_refused(masked_params: tuple[str, ...]) -> None:
    layer = type("Layer", (layers.Masked, nn.Dense), {"masked_params": masked_params})
    with pytest.raises(
        ValueError, match=f"masked_params '{masked_params[-1]}' of Layer at the top: must be a parameter"
    ):
        layer(3, use_bias=False).init(KEY, FLAT)


def test_naming_a_parameter_in_a_layer_without_any_is_refused() -> None:
    class Bare(layers.Masked, nn.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    with pytest.raises(ValueError, match="masked_params 'kernel' of .*: must be a parameter"):
        Bare().init(KEY, FLAT)


def test_naming_a_submodule_is_refused() -> None:
    class Parent(layers.Masked, nn.Module):
        masked_params = ("child",)

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3, name="child")(x)

    with pytest.raises(ValueError, match="masked_params 'child' of .*: must be a parameter"):
        Parent().init(KEY, FLAT)


def test_missing_masks_are_named() -> None:
    model = Cell()
    params = model.init(KEY, FLAT, None)["params"]
    with pytest.raises(ValueError, match="dense/kernel: needs a mask in the collection 'masks'"):
        model.apply({"params": params}, FLAT, None)
    with pytest.raises(ValueError, match="dense/kernel: needs a mask in the collection 'masks'"):
        model.apply({"params": params}, FLAT, None, mutable=["masks"])
    with pytest.raises(ValueError, match="dense/kernel: needs a mask in the collection 'masks'"):
        model.apply({"params": params, "masks": {"other": {"kernel": jnp.ones((4, 4))}}}, FLAT, None)


def test_a_mask_of_another_shape_is_refused_even_if_it_would_broadcast() -> None:
    model = Cell()
    params = model.init(KEY, FLAT, None)["params"]
    with pytest.raises(
        ValueError, match=r"mask of dense/kernel with shape \(1, 4\): must have the shape of the weights, \(4, 4\)"
    ):
        model.apply({"params": params, "masks": {"dense": {"kernel": jnp.ones((1, 4))}}}, FLAT, None)


def test_a_mask_that_is_no_array_is_refused() -> None:
    params = layers.MaskedDense(3).init(KEY, FLAT)["params"]
    with pytest.raises(
        ValueError, match=r"mask of kernel with shape \(\): must have the shape of the weights, \(4, 3\)"
    ):
        layers.MaskedDense(3).apply({"params": params, "masks": {"kernel": 1.0}}, FLAT)


def test_a_parameter_that_is_no_float_array_is_refused() -> None:
    class Counted(layers.Masked, nn.Module):
        masked_params = ("count",)

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.param("count", lambda key: jnp.arange(3))

    with pytest.raises(ValueError, match="count of dtype int32: must be a float array, because it is masked"):
        Counted().init(KEY, jnp.ones(3))
