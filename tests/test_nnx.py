"""Sparse NNX models compared with plain models, inside NNX's transforms, and their errors."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from plain import assert_equal, assert_same_as_plain, assert_same_gradients, of_nnx

import cs_jax
from cs_jax.core import trees
from cs_jax.nnx import Mask, sparsify

X = jax.random.normal(jax.random.key(1), (5, 4))
SEQUENCE = X[None]
INIT = nnx.initializers.lecun_normal()
IMAGE = jax.random.normal(jax.random.key(2), (2, 6, 6, 3))


class MLP(nnx.Module):
    """Two layers, BatchNorm and dropout, which have state, and a call counter."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)
        self.calls = 0

    def encode(self, x: jax.Array) -> jax.Array:
        """Features before the last layer."""
        return self.dropout(jax.nn.relu(self.norm(self.first(x))))

    def __call__(self, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
        self.calls += 1
        return self.second(self.encode(x)) * scale

    def compiled(self, x: jax.Array) -> jax.Array:
        return nnx.jit(lambda model, x: model(x))(self, x)

    @nnx.jit
    def decorated(self, x: jax.Array) -> jax.Array:
        return self.second(self.encode(x))

    @property
    def last_kernel(self) -> jax.Array:
        return self.second.kernel[...]

    @staticmethod
    def twice(x: jax.Array) -> jax.Array:
        return 2 * x


class Container(nnx.Module):
    """Layers in every container that NNX accepts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.listed = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.named = nnx.Dict(a=nnx.Linear(4, 4, rngs=rngs))
        self.plain = nnx.data([nnx.Linear(4, 4, rngs=rngs), {"b": nnx.Linear(4, 4, rngs=rngs)}])
        self.tuple = nnx.data((nnx.Param(jnp.eye(4)), nnx.Param(jnp.ones((4, 4)))))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.listed, self.named["a"], self.plain[0], self.plain[1]["b"]):
            x = layer(x)
        return x @ self.tuple[0] @ self.tuple[1]


class Tied(nnx.Module):
    """One Param under two attributes, and one layer under two."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.third = nnx.Linear(4, 4, rngs=rngs)
        self.fourth = self.third

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fourth(self.third(self.second(self.first(x))))


class Stacked(nnx.Module):
    """Layers along a leading axis, run by a transform inside the model."""

    def __init__(self, rngs: nnx.Rngs, transform: str = "scan") -> None:
        self.layers = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))(jax.random.split(rngs(), 3))
        self.transform = transform

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.transform == "scan":
            return nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )
        return jnp.sum(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x), axis=0)


class Remat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    @nnx.remat
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(self.layer, x)


class Outer(nnx.Module):
    def __init__(self, inner: nnx.Module, rngs: nnx.Rngs) -> None:
        self.inner = inner
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.inner(x))


class Cyclic(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.self = self

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.self.self.layer(x)


def mlp() -> MLP:
    return MLP(nnx.Rngs(0))


def sequential() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), jax.nn.relu, nnx.Linear(4, 4, rngs=rngs))


# Model and its input.
MODELS: dict[str, tuple[Callable[[], Any], jax.Array]] = {
    "mlp": (mlp, X),
    "layer": (lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)), X),
    "sequential": (sequential, X),
    "container": (lambda: Container(nnx.Rngs(0)), X),
    "tied": (lambda: Tied(nnx.Rngs(0)), X),
    "cyclic": (lambda: Cyclic(nnx.Rngs(0)), X),
    "scan": (lambda: Stacked(nnx.Rngs(0)), X),
    "vmap": (lambda: Stacked(nnx.Rngs(0), "vmap"), X),
    "remat": (lambda: Remat(nnx.Rngs(0)), X),
    "convolution": (lambda: nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), IMAGE),
    "attention": (lambda: nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)), SEQUENCE),
    "lstm": (
        lambda: nnx.RNN(nnx.LSTMCell(4, 4, recurrent_kernel_init=INIT, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        SEQUENCE,
    ),
    "gru": (
        lambda: nnx.RNN(nnx.GRUCell(4, 4, recurrent_kernel_init=INIT, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        SEQUENCE,
    ),
}
every_model = pytest.mark.parametrize("make, x", MODELS.values(), ids=MODELS)


def randomized(sparse: Any, seed: int = 0) -> Any:
    """The model with masks of zeros and twos."""
    masks = nnx.state(sparse, Mask)
    rng = np.random.default_rng(seed)
    values = jax.tree.map(lambda mask: jnp.asarray(2 * rng.integers(0, 2, mask.shape), mask.dtype), masks)
    nnx.update(sparse, values)
    return sparse


def baked(sparse: Any, plain: Any) -> Any:
    """The plain model with the sparse model's weights multiplied by their masks."""
    params = nnx.state(sparse, nnx.Param)
    nnx.update(plain, cs_jax.apply_masks(params, nnx.state(sparse, Mask)["masks"]))
    return plain


def names(tree: Any) -> list[str]:
    return [trees.name(path) for path in trees.leaves_by_path(tree)]


def tiny(seed: int = 0) -> tuple[Any, Any]:
    """A plain layer and a sparse copy of it, with masks of zeros and twos."""
    plain = nnx.Linear(4, 4, rngs=nnx.Rngs(seed))
    return plain, randomized(sparsify(plain))


# Structure of a sparse model.


@every_model
def test_a_sparse_model_is_the_plain_model_on_masked_weights(make: Any, x: jax.Array) -> None:
    plain = make()
    sparse = sparsify(plain)
    assert isinstance(sparse, type(plain)) and type(sparse).__name__ == f"Sparse{type(plain).__name__}"
    assert_same_as_plain(of_nnx(sparse, x), of_nnx(plain, x))


@pytest.mark.parametrize("name", ["mlp", "tied", "scan", "remat"])
def test_compiled_calls_mask_as_eager_ones_do(name: str) -> None:
    make, x = MODELS[name]
    sparse = randomized(sparsify(make()))
    expected = nnx.clone(sparse)(x)
    compiled = nnx.jit(lambda model, x: model(x))(sparse, x)
    np.testing.assert_allclose(compiled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "tied", "scan", "remat", "attention"])
def test_gradients_equal_those_through_apply_masks_on_the_plain_model(name: str) -> None:
    make, x = MODELS[name]
    assert_same_gradients(of_nnx(sparsify(make()), x), of_nnx(make(), x))


@every_model
def test_a_split_model_merges_and_clones_to_one_that_masks(make: Any, x: jax.Array) -> None:
    sparse = randomized(sparsify(make()))
    graphdef, params, masks, rest = nnx.split(sparse, nnx.Param, Mask, ...)
    copies = [nnx.merge(graphdef, params, masks, rest, copy=True), nnx.clone(sparse), copy.deepcopy(sparse)]
    expected = sparse(x)
    for other in copies:
        assert type(other) is type(sparse)
        np.testing.assert_array_equal(other(x), expected)


@every_model
def test_a_call_leaves_weights_and_masks_as_they_are(make: Any, x: jax.Array) -> None:
    sparse = randomized(sparsify(make()))
    variables = jax.tree.leaves(nnx.state(sparse, (nnx.Param, Mask)), is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    before = nnx.split(sparse, (nnx.Param, Mask), ...)
    sparse(x)
    after = nnx.split(sparse, (nnx.Param, Mask), ...)
    assert_equal(before[1], after[1])
    assert jax.tree.structure(before[2]) == jax.tree.structure(after[2])
    now = jax.tree.leaves(nnx.state(sparse, (nnx.Param, Mask)), is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    assert [id(leaf) for leaf in variables if isinstance(leaf, nnx.Param)] == [
        id(leaf) for leaf in now if isinstance(leaf, nnx.Param)
    ]


def test_masks_are_nested_as_the_params_and_have_their_shapes_and_dtypes() -> None:
    sparse = sparsify(Container(nnx.Rngs(0)), where=["**/kernel", "tuple/0"])
    masks = nnx.to_pure_dict(nnx.state(sparse, Mask))["masks"]
    kernel = {"kernel": (4, 4)}
    assert jax.tree.map(jnp.shape, masks) == {
        "listed": {0: kernel, 1: kernel},
        "named": {"a": kernel},
        "plain": {0: kernel, 1: {"b": kernel}},
        "tuple": {0: (4, 4)},
    }
    assert isinstance(sparse.masks["listed"][0]["kernel"], Mask)
    half = sparsify(nnx.Linear(2, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    mask = nnx.to_pure_dict(nnx.state(half, Mask))["masks"]["kernel"]
    assert mask.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mask, jnp.ones((2, 3), jnp.bfloat16))


def test_only_selected_params_are_masked() -> None:
    assert names(nnx.state(sparsify(mlp()), Mask)["masks"]) == ["first/kernel", "second/kernel"]
    assert names(nnx.state(sparsify(mlp(), "second/{kernel,bias}"), Mask)["masks"]) == ["second/bias", "second/kernel"]
    rule = cs_jax.Rule("second/kernel", group="output_channel")
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(sparsify(mlp(), rule), Mask))) == {
        "masks": {"second": {"kernel": (4, 4)}}
    }


def test_the_given_model_is_not_changed_and_shares_no_variable() -> None:
    plain = mlp()
    before = nnx.state(nnx.clone(plain))
    sparse = randomized(sparsify(plain))
    sparse(X)
    nnx.update(sparse, jax.tree.map(jnp.zeros_like, nnx.state(sparse, nnx.Param)))
    assert type(plain) is MLP and not hasattr(plain, "masks") and plain.calls == 0
    assert_equal(nnx.state(plain), before)


def test_a_mask_of_another_dtype_is_cast_to_that_of_its_weights() -> None:
    sparse = sparsify(nnx.Linear(4, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    nnx.update(sparse, jax.tree.map(lambda mask: mask.astype(jnp.float32), nnx.state(sparse, Mask)))
    seen = []
    sparse.promote_dtype = lambda values, dtype: (seen.extend(value.dtype for value in values), values)[1]
    sparse(X.astype(jnp.bfloat16))
    assert seen == [jnp.bfloat16] * 3


def test_masks_take_the_sharding_names_and_device_placement_of_their_weights() -> None:
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    with jax.set_mesh(mesh):
        plain = nnx.Linear(4, 4, kernel_init=init, rngs=nnx.Rngs(0))
    sparse = sparsify(plain)
    mask = sparse.masks["kernel"]
    assert mask.out_sharding == ("data", "model")
    assert mask[...].sharding == plain.kernel[...].sharding
    assert nnx.get_partition_spec(nnx.state(sparse, Mask))["masks"]["kernel"].get_value() == jax.P("data", "model")


def test_a_stacked_sparse_model_has_a_mask_for_each_copy() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    stack = randomized(nnx.vmap(lambda key: sparsify(nnx.Linear(4, 4, rngs=nnx.Rngs(key))))(keys))
    assert stack.masks["kernel"].shape == (3, 4, 4)
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    expected = X
    for kernel, mask, bias in zip(stack.kernel, stack.masks["kernel"], stack.bias, strict=True):
        expected = expected @ (kernel * mask) + bias[None]
    np.testing.assert_allclose(run(X, stack), expected, rtol=1e-5, atol=1e-5)


def test_abstract_sparse_models_can_be_made() -> None:
    abstract = nnx.eval_shape(lambda: sparsify(mlp()))
    assert_equal(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape), nnx.state(abstract, Mask)),
        jax.tree.map(lambda leaf: np.zeros(leaf.shape), nnx.state(sparsify(mlp()), Mask)),
    )


# Calls.


def test_every_public_method_masks_once() -> None:
    sparse = randomized(sparsify(mlp()))
    plain = baked(sparse, mlp())
    sparse.eval()
    plain.eval()
    for method in ("encode", "__call__", "compiled", "decorated"):
        expected = getattr(plain, method)(X)
        np.testing.assert_array_equal(getattr(sparse, method)(X), expected, err_msg=method)
    np.testing.assert_array_equal(sparse(X, scale=3.0), plain(X, scale=3.0))
    np.testing.assert_array_equal(sparse.twice(X), 2 * X)
    np.testing.assert_array_equal(nnx.jit(type(sparse).encode)(sparse, X), plain.encode(X))


def test_inherited_partial_and_wrapped_methods_mask() -> None:
    class Child(nnx.Linear):
        def scaled(self, x: jax.Array, scale: float) -> jax.Array:
            return super().__call__(x) * scale

        doubled = partialmethod(scaled, scale=2.0)

        def steps(self, x: jax.Array):
            yield self(x)

    sparse = randomized(sparsify(Child(4, 4, rngs=nnx.Rngs(0))))
    expected = baked(sparse, nnx.Linear(4, 4, rngs=nnx.Rngs(0)))(X)
    np.testing.assert_array_equal(sparse(X), expected)
    np.testing.assert_array_equal(sparse.doubled(X), 2 * expected)
    np.testing.assert_array_equal(next(sparse.steps(X)), expected)


def test_attributes_and_properties_are_the_plain_weights() -> None:
    sparse = randomized(sparsify(mlp()))
    np.testing.assert_array_equal(sparse.second.kernel[...], mlp().second.kernel[...])
    np.testing.assert_array_equal(sparse.last_kernel, mlp().second.kernel[...])


def test_a_method_that_returns_self_returns_the_sparse_model() -> None:
    class Fluent(nnx.Linear):
        def with_flag(self) -> Any:
            self.flag = True
            return self

        def both(self) -> tuple[Any, int]:
            return self, 1

        def part(self) -> Any:
            return self.kernel

    sparse = randomized(sparsify(Fluent(4, 4, rngs=nnx.Rngs(0))))
    assert sparse.with_flag() is sparse and sparse.flag is True
    assert sparse.both()[0] is sparse
    np.testing.assert_array_equal(sparse.part()[...], sparse.kernel * sparse.masks["kernel"])


def test_signatures_and_docstrings_are_those_of_the_plain_class() -> None:
    import inspect

    sparse = type(sparsify(mlp()))
    assert inspect.signature(sparse.__call__) == inspect.signature(MLP.__call__)
    assert sparse.encode.__doc__ == MLP.encode.__doc__ and sparse.__doc__ == MLP.__doc__
    assert sparse.__module__ == __name__


def test_state_changes_in_a_call_as_in_the_plain_model() -> None:
    plain, sparse = mlp(), sparsify(mlp())
    for _ in range(3):
        np.testing.assert_array_equal(sparse(X), plain(X))
    assert sparse.calls == plain.calls == 3
    assert sparse.dropout.rngs.count[...] == 3
    assert np.any(sparse.norm.mean[...])
    assert_equal(nnx.state(sparse, nnx.Not(Mask)), nnx.state(plain))


def test_compiled_calls_change_state_as_in_the_plain_model() -> None:
    plain, sparse = mlp(), sparsify(mlp())
    call = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(call(sparse, X), call(plain, X))
    assert_equal(nnx.state(sparse, nnx.Not(Mask)), nnx.state(plain))
    assert sparse.dropout.rngs.count[...] == 1 and sparse.calls == plain.calls


def test_train_eval_and_set_attributes_reach_every_layer() -> None:
    sparse = randomized(sparsify(mlp()))
    plain = baked(sparse, mlp())
    for model in (sparse, plain):
        model.eval()
    assert sparse.dropout.deterministic and sparse.norm.use_running_average
    np.testing.assert_array_equal(sparse(X), plain(X))
    sparse.train()
    assert not sparse.dropout.deterministic and not sparse.norm.use_running_average
    sparse.set_attributes(nnx.Dropout, deterministic=True, rate=0.25)
    assert sparse.dropout.deterministic and sparse.dropout.rate == 0.25
    view = nnx.view(sparse, deterministic=True, use_running_average=True)
    np.testing.assert_array_equal(view(X), plain(X))


def test_a_decoding_cache_fills_as_in_the_plain_model() -> None:
    plain = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    sparse = randomized(sparsify(plain))
    plain = baked(sparse, plain)
    for model in (plain, sparse):
        model.init_cache((1, 5, 4))
    for step in range(3):
        token = SEQUENCE[:, step : step + 1]
        np.testing.assert_array_equal(sparse(token), plain(token))
    assert sparse.cache_index[...] == 3
    assert_equal(nnx.state(sparse, nnx.Cache), nnx.state(plain, nnx.Cache))


class Sowing(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.layer(x)
        self.sow(nnx.Intermediate, "outputs", x)
        self.layer.sow(nnx.Intermediate, "inside", x)
        return x


class Perturbed(nnx.Linear):
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.perturb("nudge", super().__call__(inputs))


def test_sown_values_and_perturbations_are_captured() -> None:
    sparse = randomized(sparsify(Sowing(nnx.Rngs(0))))
    outputs, found = nnx.capture(sparse, nnx.Intermediate)(X)
    np.testing.assert_array_equal(found["outputs"][0], outputs)
    np.testing.assert_array_equal(found["layer"]["inside"][0], outputs)
    np.testing.assert_array_equal(outputs, baked(sparse, Sowing(nnx.Rngs(0))).layer(X))
    perturbed = sparsify(Perturbed(4, 4, rngs=nnx.Rngs(0)))
    _, perturbations = nnx.capture(perturbed, nnx.Perturbation)(X)
    shifted, _ = nnx.capture(perturbed, nnx.Perturbation, init=jax.tree.map(jnp.ones_like, perturbations))(X)
    np.testing.assert_array_equal(shifted, nnx.capture(perturbed, nnx.Perturbation)(X)[0] + 1)
    _, found = nnx.capture(sparsify(mlp()), nnx.Intermediate, method_outputs=nnx.Intermediate)(X)
    assert {"__call__", "first", "second"} <= set(found)


@pytest.mark.filterwarnings("ignore:Using 'Module:DeprecationWarning")
def test_values_sown_without_capture_become_attributes() -> None:
    sparse = sparsify(Sowing(nnx.Rngs(0)))
    outputs = sparse(X)
    sparse(X)
    popped = nnx.pop(sparse, nnx.Intermediate)
    assert len(popped["outputs"]) == len(popped["layer"]["inside"]) == 2
    np.testing.assert_array_equal(popped["outputs"][0], outputs)
    assert names(nnx.state(sparse, Mask)) == ["masks/layer/kernel"]


def test_attributes_that_a_call_sets_or_deletes_are_those_of_the_model() -> None:
    class Changing(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.data([nnx.Linear(4, 4, rngs=nnx.Rngs(0))])
            self.w = nnx.Param(jnp.ones((4, 4)))
            self.array = jnp.zeros(())
            self.gone = 1

        def __call__(self) -> None:
            self.array += 1
            self.layers[0].name = "renamed"
            self.layers.append(nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
            self.other = self.w
            self.layer = self.layers[0]
            self.fresh = nnx.Variable(jnp.ones(()))
            del self.gone

    sparse = sparsify(Changing())
    layer, w = sparse.layers[0], sparse.w
    sparse()
    assert sparse.layer is layer is sparse.layers[0] and layer.name == "renamed"
    assert sparse.other is w is sparse.w
    assert len(sparse.layers) == 2 and sparse.array == 1 and sparse.fresh[...] == 1
    assert not hasattr(sparse, "gone")
    assert names(nnx.state(sparse, Mask)["masks"]) == ["layers/0/kernel", "w"]
    nnx.split(sparse)


def test_a_call_that_fails_leaves_the_model_as_it_was() -> None:
    sparse = randomized(sparsify(mlp()))
    before = nnx.state(nnx.clone(sparse), (nnx.Param, Mask))
    with pytest.raises(TypeError, match="dot_general"):
        sparse(jnp.ones((5, 7)))
    with pytest.raises(TypeError, match="dot_general"):
        nnx.jit(lambda model, x: model(x))(sparse, jnp.ones((5, 7)))
    assert_equal(nnx.state(sparse, (nnx.Param, Mask)), before)
    sparse.eval()
    plain = baked(sparse, mlp())
    plain.eval()
    np.testing.assert_array_equal(sparse(X), plain(X))


def test_calls_in_several_threads_mask_once_each() -> None:
    plain, sparse = tiny()
    expected = baked(sparse, plain)(X)
    results: list[Any] = []

    def work() -> None:
        results.extend(np.asarray(sparse(X)) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_a_sparse_model_masks_inside_another_module() -> None:
    inner = randomized(sparsify(mlp()))
    outer = Outer(inner, nnx.Rngs(1))
    plain = Outer(baked(inner, mlp()), nnx.Rngs(1))
    outer.eval()
    plain.eval()
    np.testing.assert_array_equal(outer(X), plain(X))
    assert names(nnx.state(outer, Mask)) == ["inner/masks/first/kernel", "inner/masks/second/kernel"]
    merged = nnx.merge(*nnx.split(outer))
    np.testing.assert_array_equal(merged(X), plain(X))


def test_a_shared_param_has_one_mask_that_acts_in_both_places() -> None:
    sparse = sparsify(Tied(nnx.Rngs(0)))
    assert names(nnx.state(sparse, Mask)["masks"]) == ["first/kernel", "fourth/kernel"]
    assert names(nnx.state(sparse, nnx.Param)) == [
        "first/bias",
        "first/kernel",
        "fourth/bias",
        "fourth/kernel",
        "second/bias",
    ]
    assert sparse.masks["first"]["kernel"] is sparse.masks["second"]["kernel"]
    assert sparse.masks["third"]["kernel"] is sparse.masks["fourth"]["kernel"]


def test_shared_params_are_masked_in_both_places_where_jax_takes_them_apart() -> None:
    sparse = randomized(sparsify(Tied(nnx.Rngs(0))))
    expected = sparse(X)
    np.testing.assert_allclose(jax.jit(lambda model, x: model(x))(sparse, X), expected, rtol=1e-5, atol=1e-6)


def test_modules_that_are_no_pytrees_mask() -> None:
    class NoPytree(nnx.Module, pytree=False):
        def __init__(self) -> None:
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(1))]

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layers[0](self.layer(x))

    sparse = randomized(sparsify(NoPytree()))
    assert names(nnx.state(sparse, Mask)["masks"]) == ["layer/kernel", "layers/0/kernel"]
    np.testing.assert_array_equal(sparse(X), baked(sparse, NoPytree())(X))


@pytest.mark.parametrize("kind", ["ref", "hijax"])
def test_variables_that_are_references_mask(kind: str) -> None:
    with nnx.var_defaults(**{kind: True}):
        plain = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        sparse = sparsify(plain)
        sparse.masks["kernel"][...] = jnp.full((4, 4), 2.0)
        expected = X @ (2 * plain.kernel[...]) + plain.bias[...][None]
        np.testing.assert_allclose(sparse(X), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(lambda model, x: model(x))(sparse, X), expected, rtol=1e-6)


def test_equal_models_have_equal_graph_definitions_and_compile_once() -> None:
    traces = []

    @nnx.jit
    def call(model: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return model(x)

    for seed in range(3):
        call(randomized(sparsify(nnx.Linear(4, 4, rngs=nnx.Rngs(seed))), seed), X)
    assert len(traces) == 1
    first, second = (nnx.graphdef(sparsify(mlp())) for _ in range(2))
    assert first == second and hash(first) == hash(second)


def test_a_compiled_method_inside_the_model_compiles_once() -> None:
    traces = []

    class Inside(nnx.Linear):
        @nnx.jit
        def __call__(self, inputs: jax.Array) -> jax.Array:
            traces.append(1)
            return super().__call__(inputs)

    sparse = sparsify(Inside(4, 4, rngs=nnx.Rngs(0)))
    for seed in range(3):
        randomized(sparse, seed)(X)
    assert len(traces) == 1


def test_sparse_models_print_display_and_pickle() -> None:
    plain, sparse = tiny()
    assert "SparseLinear" in repr(sparse) and "Mask" in repr(sparse)
    assert "Mask" in nnx.tabulate(sparse, X)
    nnx.display(sparse)
    np.testing.assert_array_equal(sparse(X), baked(sparse, plain)(X))
    again = pickle.loads(pickle.dumps(sparse))
    assert type(again) is type(sparse)
    np.testing.assert_array_equal(again(X), sparse(X))
    assert not hasattr(copy.copy(plain), "masks") and copy.copy(sparse).masks is sparse.masks


def test_state_goes_through_pure_dictionaries() -> None:
    _, sparse = tiny()
    other = sparsify(nnx.Linear(4, 4, rngs=nnx.Rngs(5)))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(sparse)))
    nnx.update(other, state)
    np.testing.assert_array_equal(other(X), sparse(X))


def test_importing_the_package_does_not_import_nnx_support() -> None:
    code = "import sys, cs_jax; assert 'cs_jax.nnx' not in sys.modules; import cs_jax.nnx; cs_jax.nnx.sparsify"
    subprocess.run([sys.executable, "-c", code], check=True)


# Training.


def test_nnx_grad_takes_params_or_masks_alone() -> None:
    _, sparse = tiny()

    def loss(model: Any) -> jax.Array:
        return jnp.sum(model(X))

    by_params = nnx.grad(loss)(sparse)
    by_masks = nnx.grad(loss, argnums=nnx.DiffState(0, Mask))(sparse)
    value, _ = nnx.value_and_grad(loss)(sparse)
    np.testing.assert_array_equal(value, loss(sparse))
    assert names(by_params) == ["bias", "kernel"] and names(by_masks) == ["masks/kernel"]
    sums = jnp.broadcast_to(jnp.sum(X, axis=0)[:, None], (4, 4))
    mask, kernel = sparse.masks["kernel"][...], sparse.kernel[...]
    np.testing.assert_allclose(by_params["kernel"][...], sums * mask, rtol=1e-5)
    np.testing.assert_allclose(by_masks["masks"]["kernel"][...], sums * kernel, rtol=1e-5)


def test_an_optimizer_updates_the_weights_and_not_their_products_with_masks() -> None:
    _, sparse = tiny()
    before, mask = sparse.kernel[...], sparse.masks["kernel"][...]
    optimizer = nnx.Optimizer(sparse, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(X)))(model))

    step(sparse, optimizer)
    sums = jnp.sum(X, axis=0)[:, None]
    np.testing.assert_allclose(sparse.kernel[...], before - 0.5 * sums * mask, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sparse.kernel[...][mask == 0], before[mask == 0])
    np.testing.assert_array_equal(sparse.masks["kernel"][...], mask)
    assert names(nnx.state(optimizer, nnx.optimizer.OptState)) == ["step"]


def test_tree_functions_keep_the_structure_of_the_masks() -> None:
    masks = nnx.state(sparsify(mlp()), Mask)
    scores = cs_jax.init_scores(masks, 0.1)
    results = [
        scores,
        cs_jax.soft_mask(scores, 2.0, init_value=0.1),
        cs_jax.hard_mask(scores, init_value=0.1),
        cs_jax.prune_scores(scores, 2.0, init_value=0.1),
    ]
    for result in results:
        assert jax.tree.structure(result) == jax.tree.structure(masks)
        assert isinstance(result["masks"]["first"]["kernel"], Mask)
    assert cs_jax.density(masks) == 1.0
    assert cs_jax.mask_penalty(masks) == 2 * 4 * 4


def test_scores_of_groups_make_masks_for_the_model() -> None:
    plain = sequential()
    selection = cs_jax.select(nnx.state(plain, nnx.Param), cs_jax.Rule("**/kernel", group="output_channel"))
    sparse = sparsify(plain, "**/kernel")
    masks = nnx.state(sparse, Mask)
    scores = jax.tree.map(lambda score: score.at[..., 0].set(-1.0), selection.init_scores(1.0))
    nnx.replace_by_pure_dict(masks, {"masks": selection.hard_mask(scores, init_value=0.0)})
    nnx.update(sparse, masks)
    assert cs_jax.density(nnx.state(sparse, Mask)) == 3 / 4
    np.testing.assert_array_equal(sparse(X)[:, 0], sparse.layers[2].bias[0])


@pytest.mark.slow
def test_the_loop_finds_a_sparse_network() -> None:
    rngs = nnx.Rngs(0)
    plain = nnx.Sequential(nnx.Linear(4, 16, rngs=rngs), jax.nn.relu, nnx.Linear(16, 1, rngs=rngs))
    sparse = sparsify(plain)
    graphdef, params, masks, rest = nnx.split(sparse, nnx.Param, Mask, ...)
    scores = cs_jax.init_scores(masks, 0.0)
    inputs = jax.random.normal(jax.random.key(3), (64, 4))
    targets = inputs[:, :1]  # one input of four matters

    def model_loss(params: Any, masks: Any) -> jax.Array:
        return jnp.mean((nnx.merge(graphdef, params, masks, rest)(inputs) - targets) ** 2)

    def loss_fn(trained: Any, temperature: jax.Array) -> jax.Array:
        params, scores = trained
        masks = cs_jax.soft_mask(scores, temperature, init_value=0.0)
        return model_loss(params, masks) + 3e-4 * cs_jax.mask_penalty(masks)

    optimizer = optax.adam(0.02)

    @jax.jit
    def train(trained: Any) -> Any:
        def step(carry: Any, temperature: jax.Array) -> tuple[Any, jax.Array]:
            trained, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(trained, temperature)
            updates, state = optimizer.update(grads, state, trained)
            return (optax.apply_updates(trained, updates), state), loss

        return jax.lax.scan(step, (trained, optimizer.init(trained)), jnp.geomspace(1.0, 100.0, 400))[0][0]

    params, scores = train((params, scores))
    ticket = cs_jax.hard_mask(scores, init_value=0.0)
    assert 0.0 < cs_jax.density(ticket) < 0.5
    assert model_loss(params, ticket) < 0.05 < jnp.mean(targets**2)
    final = nnx.merge(graphdef, params, ticket, rest)
    baked(final, plain)
    np.testing.assert_array_equal(final(inputs), plain(inputs))


def test_gradients_of_scores_equal_those_of_an_independent_computation() -> None:
    plain = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    graphdef, params, masks, rest = nnx.split(sparsify(plain), nnx.Param, Mask, ...)
    scores = jax.tree.map(lambda score: score + jnp.linspace(-1, 1, 16).reshape(4, 4), cs_jax.init_scores(masks, 0.0))

    def loss(params: Any, scores: Any) -> jax.Array:
        masks = cs_jax.soft_mask(scores, 3.0, init_value=0.0)
        return jnp.sum(nnx.merge(graphdef, params, masks, rest)(X) ** 2)

    def by_hand(kernel: jax.Array, bias: jax.Array, score: jax.Array) -> jax.Array:
        return jnp.sum((X @ (kernel * 2 * jax.nn.sigmoid(3 * score)) + bias[None]) ** 2)

    grads, score_grads = jax.grad(loss, argnums=(0, 1))(params, scores)
    expected = jax.grad(by_hand, argnums=(0, 1, 2))(plain.kernel[...], plain.bias[...], scores["masks"]["kernel"][...])
    found = grads["kernel"][...], grads["bias"][...], score_grads["masks"]["kernel"][...]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# Refusals.


@pytest.mark.parametrize("model", [MLP, jnp.ones(3), {"a": nnx.Param(jnp.ones((2, 2)))}, lambda x: x])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"(?s)model .*: must be an instance of nnx.Module"):
        sparsify(model)


def test_containers_which_cannot_be_called_are_refused() -> None:
    with pytest.raises(TypeError, match="model .*List: must have a public method"):
        sparsify(nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))]))


def test_sparse_models_and_parts_are_refused() -> None:
    sparse = sparsify(mlp())
    with pytest.raises(ValueError, match="model SparseMLP: must not be sparse already"):
        sparsify(sparse)
    with pytest.raises(ValueError, match="model SparseMLP at 'inner': must not be sparse already"):
        sparsify(Outer(sparse, nnx.Rngs(0)))


def test_an_attribute_masks_is_refused() -> None:
    model = mlp()
    model.masks = 3
    with pytest.raises(ValueError, match="model MLP: must not have an attribute 'masks'"):
        sparsify(model)


def test_rules_that_select_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"glob 'third/\*': matches none of"):
        sparsify(mlp(), "third/*")


def test_arrays_inside_a_param_are_refused() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model.several = nnx.Param({"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="weights 'several/value/v': must be a whole Param"):
        sparsify(model, ["several/**", "kernel"])
    assert names(nnx.state(sparsify(model, "kernel"), Mask)) == ["masks/kernel"]


def test_a_mask_of_another_shape_is_refused_in_the_call() -> None:
    sparse = sparsify(mlp())
    sparse.masks["first"]["kernel"] = Mask(jnp.ones((8, 4)))
    with pytest.raises(
        ValueError, match=r"masks 'first/kernel' of shape \(8, 4\): must have the shape of the weights, \(4, 4\)"
    ):
        sparse(X)


def test_a_mask_without_weights_is_refused_in_the_call() -> None:
    sparse = sparsify(mlp())
    del sparse.second
    sparse.second = jnp.tanh
    with pytest.raises(ValueError, match="masks 'second/kernel': must have the path of a weight"):
        sparse(X)


def test_missing_masks_are_refused_in_the_call() -> None:
    sparse = sparsify(mlp())
    nnx.pop(sparse, Mask)
    with pytest.raises(ValueError, match="model SparseMLP: must have the attribute 'masks'"):
        sparse(X)
    del sparse.masks
    with pytest.raises(ValueError, match="model SparseMLP: must have the attribute 'masks'"):
        sparse(X)
    with pytest.raises(ValueError, match="model SparseMLP: must have the attribute 'masks'"):
        type(sparse)(nnx.Rngs(0))(X)


def test_masks_that_are_no_variables_are_refused_in_the_call() -> None:
    sparse = sparsify(mlp())
    sparse.masks["first"]["kernel"] = jnp.ones((4, 8))
    with pytest.raises(TypeError, match="masks 'first/kernel' of type ArrayImpl: must be a Mask"):
        sparse(X)


def test_a_call_that_sets_masked_weights_is_refused() -> None:
    class Clipping(nnx.Linear):
        def __call__(self, inputs: jax.Array) -> jax.Array:
            self.kernel[...] = jnp.clip(self.kernel[...], -1, 1)
            return super().__call__(inputs)

        def set_bias(self) -> None:
            self.bias[...] = jnp.ones(4)

    sparse = sparsify(Clipping(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="weights 'kernel': must not be set in a call"):
        sparse(X)
    with pytest.raises(ValueError, match="weights 'kernel': must not be set in a call"):
        nnx.jit(lambda model, x: model(x))(sparse, X)
    sparse.set_bias()
    np.testing.assert_array_equal(sparse.bias[...], jnp.ones(4))
    sparse.kernel[...] = jnp.zeros((4, 4))


class TwoNetworks(nnx.Module):
    def __init__(self) -> None:
        self.online = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.target = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

    def synchronize(self) -> None:
        nnx.update(self.target, nnx.state(self.online))

    def decay(self) -> None:
        nnx.update(self.online, jax.tree.map(lambda weight: 0.5 * weight, nnx.state(self.online)))

    def load(self, kernel: jax.Array) -> None:
        nnx.update(self, {"online": {"kernel": kernel}})

    @nnx.jit
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.online(x) - self.target(x)


def test_a_call_that_updates_masked_weights_is_refused() -> None:
    sparse = randomized(sparsify(TwoNetworks()))
    before = nnx.state(nnx.clone(sparse), nnx.Param)
    with pytest.raises(ValueError, match="weights 'target/kernel': must not be set in a call"):
        sparse.synchronize()
    with pytest.raises(ValueError, match="weights 'target/kernel': must not be set in a call"):
        nnx.jit(lambda model: model.synchronize())(sparse)
    with pytest.raises(ValueError, match="weights 'online/kernel': must not be set in a call"):
        sparse.load(jnp.zeros((4, 4)))
    with pytest.raises(ValueError, match="weights 'online/kernel': must not be set in a call"):
        sparse.decay()
    np.testing.assert_array_equal(sparse.online.kernel[...], before["online"]["kernel"][...])
    sparse.online.kernel[...] = sparse.online.kernel[...].at[0, 0].set(jnp.nan)
    assert np.all(np.isnan(sparse(X)[:, 0]))  # nnx.jit puts copies of the weights back, which is no change
