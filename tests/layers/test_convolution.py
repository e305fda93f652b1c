"""Convolutions whose input is computed once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cs_jax import MaskedConv
from cs_jax.layers import convolution
from cs_jax.models import MODELS


def arrays(*sizes: int, groups: int = 1) -> tuple[Any, Any]:
    images = jax.random.normal(jax.random.key(0), (4, *sizes, 6))
    return images, jax.random.normal(jax.random.key(1), (*(3 for _ in sizes), 6 // groups, 4))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((8, 7), {}),
        ((8, 7), {"window_strides": (2, 2)}),
        ((8, 7), {"padding": "VALID", "rhs_dilation": (2, 1)}),
        ((8, 7), {"feature_group_count": 2}),
        ((9,), {}),
        ((4, 5, 6), {"lhs_dilation": (1, 2, 1), "padding": ((1, 1),) * 3}),
    ],
)
def test_results_and_gradients_are_those_of_jax(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    names = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}[len(sizes)]
    window = {"window_strides": (1,) * len(sizes), "padding": "SAME", "dimension_numbers": names, **options}
    inputs = arrays(*sizes, groups=options.get("feature_group_count", 1))

    def both_ways(convolve: Any) -> Any:
        def total(images: Any, kernel: Any) -> Any:
            result = convolve(jnp.cos(images), kernel, **window)
            return jnp.sum(jnp.sin(result)), result

        backward = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*inputs)
        return backward, jax.jvp(lambda *at: total(*at)[0], inputs, inputs)

    found, wanted = both_ways(convolution.convolve), both_ways(lax.conv_general_dilated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, wanted)


@pytest.mark.slow
def test_tickets_can_be_vectorised_over() -> None:
    layer, (images, _) = MaskedConv(4, (3, 3)), arrays(6, 6)
    masks = jax.vmap(lambda key: layer.init(key, images))(jax.random.split(jax.random.key(2), 3))
    found = jax.vmap(layer.apply, in_axes=(0, None))(masks, images)
    for index in range(3):
        one = layer.apply(jax.tree.map(lambda leaf, index=index: leaf[index], masks), images)
        np.testing.assert_allclose(found[index], one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_on_a_cpu_every_convolution_of_a_network_is_kept_from_its_input_s_making() -> None:
    model = MODELS["resnet6"]()
    images = jnp.ones((2, 8, 8, 1))
    variables = model.init(jax.random.key(0), images)
    compiled = jax.jit(model.apply).lower(variables, images).compile().as_text()
    assert compiled.count(" conditional(") == compiled.count(" convolution(") == 6


def test_a_program_for_serving_has_jax_s_own_convolutions() -> None:
    model = MODELS["resnet6"]()
    images = jnp.ones((2, 8, 8, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def conditionals() -> int:
        return str(jax.make_jaxpr(lambda *given: model.apply(*given))(variables, images)).count("cond[")

    with convolution.for_serving():
        assert conditionals() == 0
    assert conditionals() == 6


def test_a_pool_for_serving_has_the_same_result_and_pads_an_array() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))

    def pool() -> Any:
        return convolution.max_pool(x, (3, 3), strides=(2, 2), padding=(1, 1))

    wanted = pool()
    with convolution.for_serving():
        np.testing.assert_array_equal(pool(), wanted)
        assert "padding=((0, 0), (0, 0), (0, 0), (0, 0))" in str(jax.make_jaxpr(lambda: pool())())
    assert wanted.shape == (2, 4, 4, 3)
