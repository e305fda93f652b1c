"""Compares a masked network with Flax's own network, whose weights are multiplied by the masks beforehand.

Every network, of Linen or NNX, masked or plain, is a `Network`: its fresh variables and a pure function of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import cs_jax
from cs_jax.core import trees
from cs_jax.nnx import Mask

KEY = jax.random.key(0)
MASK_VALUES = (0.0, 0.3, 2.0)  # the last two are not their own squares: masking twice would show


class Network(NamedTuple):
    params: Any
    masks: Any  # nested as the params; {} for a plain network
    rest: Any  # other variables
    call: Callable[[Any, Any, Any], tuple[Any, Any]]  # params, masks, rest -> output, rest after the call


def linen(module: nn.Module, x: jax.Array) -> Network:
    """A Linen module, and its call with the input `x`."""
    variables = dict(module.init(KEY, x))
    params, masks = variables.pop("params"), variables.pop("masks", {})

    def call(params: Any, masks: Any, rest: Any) -> tuple[Any, Any]:
        collections = {"params": params, **rest} | ({"masks": masks} if masks else {})
        return module.apply(collections, x, mutable=list(rest))

    return Network(params, masks, variables, call)


def of_nnx(model: Any, x: jax.Array) -> Network:
    """An NNX model, and its call with the input `x`."""
    is_rest = nnx.Not((nnx.Param, Mask))

    def call(params: Any, masks: Any, rest: Any) -> tuple[Any, Any]:
        called = nnx.clone(model)
        nnx.update(called, params, *([{"masks": masks}] if masks else []), rest)
        return called(x), nnx.state(called, is_rest)

    masks = nnx.state(model, Mask)
    return Network(nnx.state(model, nnx.Param), masks["masks"] if masks else {}, nnx.state(model, is_rest), call)


def random_masks(masks: Any) -> Any:
    """Masks of 0, 0.3 and 2, in float32 whatever the dtype of the weights."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda mask: jnp.asarray(rng.choice(MASK_VALUES, mask.shape), jnp.float32), masks)


def assert_equal(tree: Any, expected: Any) -> None:
    """The trees have one structure and the same bits, in arrays of the same dtype."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert jnp.asarray(ours).dtype == jnp.asarray(theirs).dtype
        np.testing.assert_array_equal(bits(ours), bits(theirs))


def bits(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key) else leaf


def assert_same_as_plain(ours: Network, plain: Network) -> None:
    """Initial variables, outputs and state agree bit for bit, with fresh masks and with random ones.

    Fresh masks are ones, of the shapes and dtypes of their weights.
    """
    assert_equal((ours.params, ours.rest), (plain.params, plain.rest))
    weights = trees.leaves_by_path(ours.params)
    for path, mask in trees.leaves_by_path(ours.masks).items():
        assert (mask.shape, mask.dtype) == (weights[path].shape, weights[path].dtype)
        np.testing.assert_array_equal(mask, 1)

    fresh = plain.call(plain.params, {}, plain.rest)
    assert_equal(ours.call(ours.params, ours.masks, ours.rest), fresh)
    masks = random_masks(ours.masks)
    masked = plain.call(cs_jax.apply_masks(plain.params, masks), {}, plain.rest)
    assert not np.array_equal(masked[0], fresh[0])
    assert_equal(ours.call(ours.params, masks, ours.rest), masked)


def assert_same_gradients(ours: Network, plain: Network) -> None:
    """Gradients by weights and masks agree, to rounding, with those through the product on the plain network."""
    masks = random_masks(ours.masks)

    def loss(network: Network, params: Any, masks: Any) -> jax.Array:
        if network is plain:
            params, masks = cs_jax.apply_masks(params, masks), {}
        return jnp.sum(network.call(params, masks, network.rest)[0] ** 2)

    grads, expected = (
        jax.jit(jax.grad(partial(loss, network), argnums=(0, 1)))(ours.params, masks) for network in (ours, plain)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), grads, expected)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads[1]))
