"""Sparse modules compared with plain modules on masked weights, in all uses that Linen allows."""

import copy
import dataclasses
import functools
import pickle
from functools import partial
from operator import itemgetter
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from plain import assert_equal, assert_same_as_plain, assert_same_gradients, linen, random_masks

import cs_jax
from cs_jax import layers
from cs_jax.core import trees
from cs_jax.layers.sparsify import sparsify

T = TypeVar("T")
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 4))
SEQUENCE = jax.random.normal(jax.random.key(2), (2, 3, 4))
IMAGE = jax.random.normal(jax.random.key(3), (2, 4, 4, 2))
ONES = nn.initializers.ones  # compiles faster than random numbers do
PARTITIONED = nn.with_partitioning(ONES, ("in", "out"))


class MLP(nn.Module):
    features: tuple[int, ...] = (3, 4)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.features[:-1]:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.features[-1])(x)


class AutoEncoder(nn.Module):
    """Methods that call each other, a property, and static, class and unwrapped methods."""

    features: int = 3

    def setup(self) -> None:
        self.encoder = nn.Dense(self.features)
        self.decoder = nn.Dense(4)
        self.scales = self.param("scales_kernel", nn.initializers.ones, (1, self.features))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.encoder(x) * self.scales

    def decode(self, z: jax.Array) -> jax.Array:
        return self.decoder(z)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x))

    @property
    def codes_of_ones(self) -> jax.Array:
        return self.encode(jnp.ones((1, 4)))

    @staticmethod
    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    @classmethod
    def name_of_class(cls) -> str:
        return cls.__name__

    @nn.nowrap
    def size(self) -> int:
        return self.features


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(3, (3, 3), kernel_init=ONES)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "features", x)
        return nn.Dense(2, kernel_init=ONES)(x.mean(axis=(1, 2)))


class Block(nn.Module):
    wrap: Any = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return x + self.wrap(4, kernel_init=ONES, name="dense")(x), None


class Lifted(nn.Module):
    """Contains lifted classes that do not carry masks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan(name="scanned")(x, None)
        x, _ = nn.remat(Block)(name="rematted")(x)
        vmap = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        return vmap(4, kernel_init=ONES, name="mapped")(x)


class LiftedFunctions(nn.Module):
    """Lifted functions and methods of the module, for which Linen copies the module."""

    def setup(self) -> None:
        self.dense = nn.Dense(4)

    @nn.remat
    def remat(self, x: jax.Array) -> jax.Array:
        return self.step(x)

    @nn.jit
    def jit(self, x: jax.Array) -> jax.Array:
        return self.step(x)

    def step(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.jit(self.remat(x))
        scan = nn.scan(lambda self, x, _: (self.step(x), None), variable_broadcast="params", length=2)
        x, _ = scan(self, x, None)
        return nn.map_variables(lambda self, x: self.step(x), "params")(self, x)


class Reuse(nn.Module):
    """One layer used twice, its weights read as variables too."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(4, use_bias=False)
        return dense(dense(x)) @ dense.variables["params"]["kernel"].T


class Parts(nn.Module):
    """Submodules in fields and containers; a submodule may belong to another module."""

    first: nn.Module
    rest: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (self.first, *self.rest, self.first):
            x = layer(x)
        return x


class LoRA(nn.Module):
    """Shares its scope with its child; one method has a separate scope."""

    wrap: Any = lambda module: module

    def setup(self) -> None:
        self.child = self.wrap(nn.Dense(4))
        nn.share_scope(self, self.child)

    @nn.compact_name_scope
    def down(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, kernel_init=ONES)(x)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.child(x) + self.down(x) @ self.param("up_kernel", nn.initializers.ones, (4, 4))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, kernel_init=ONES)(x)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.WeightNorm(nn.Dense(4, kernel_init=ONES, name="dense"))(x)


class TreeParam(nn.Module):
    """A parameter that is a tree."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weights = self.param("weights", lambda key: {"in": jnp.ones((4, 3)), "out": [jnp.ones((3, 4))]})
        return x @ weights["in"] @ weights["out"][0]


class Pair(nn.Module):
    """Parent that calls a sparse child, a method of the child and a submodule of the child."""

    child: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.child(x) + self.child.decoder(self.child.encode(x))
        return nn.Dense(4, name="dense")(x)


class Net(nn.Module):
    """Parent that makes sparse children in setup and in a compact method."""

    where: Any = None

    def setup(self) -> None:
        self.auto = sparsify(AutoEncoder(), self.where)
        self.plain = nn.Dense(4)

    @nn.compact_name_scope
    def head(self, x: jax.Array) -> jax.Array:
        return sparsify(nn.Dense(2, parent=None, name="last"))(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.plain(self.auto(x)))


KERNELS = ["**/kernel", "*_kernel"]
CASES = {
    "compact": (MLP(), X, None),
    "setup": (AutoEncoder(), X, KERNELS),
    "convolution and norm": (ConvNet(), IMAGE, "*/kernel"),
    "lifted classes inside": (Lifted(), X, "**/kernel"),
    "lifted functions inside": (LiftedFunctions(), X, None),
    "a layer used twice": (Reuse(), X, None),
    "submodules in fields": (Parts(nn.Dense(4), [nn.Dense(4), nn.relu]), X, None),
    "a shared scope": (LoRA(), X, ["**/kernel", "up_kernel"]),
    "attention": (Attention(), SEQUENCE, None),
    "LSTM": (nn.RNN(nn.LSTMCell(3, kernel_init=ONES, recurrent_kernel_init=ONES)), SEQUENCE, None),
    "GRU": (nn.RNN(nn.GRUCell(3, kernel_init=ONES, recurrent_kernel_init=ONES)), SEQUENCE, "**/h?/kernel"),
    "weight norm": (Normalised(), X, "dense/kernel"),
    "a parameter that is a tree": (TreeParam(), X, "**/out/*"),
    "partitioned weights": (nn.Dense(3, kernel_init=PARTITIONED), X, None),
    "narrow weights": (nn.Dense(3, param_dtype=jnp.bfloat16, kernel_init=ONES), X, None),
    "a lifted class": (nn.remat(nn.Dense)(3, kernel_init=ONES), X, None),
    "a mapped class": (
        nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(4, kernel_init=ONES),
        X,
        None,
    ),
}


def without_masks(variables: Any) -> Any:
    """Variables for the plain module: weights multiplied by the masks, and no masks."""
    rest = {name: value for name, value in variables.items() if name != "masks"}
    return {**rest, "params": cs_jax.apply_masks(variables["params"], variables["masks"])}


@functools.cache
def auto_encoder() -> tuple[Any, Any]:
    sparse = sparsify(AutoEncoder(), KERNELS)
    variables = sparse.init(KEY, X)
    return sparse, {**variables, "masks": random_masks(variables["masks"])}


def paths(tree: Any) -> set[str]:
    return {trees.name(path) for path in trees.leaves_by_path(tree)}


def assert_same_objects(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert all(a is b for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True))


@pytest.mark.parametrize("module, x, where", CASES.values(), ids=CASES.keys())
def test_a_sparse_network_is_the_dense_network_on_masked_weights(module: Any, x: jax.Array, where: Any) -> None:
    sparse = linen(sparsify(module, where), x)
    assert_same_as_plain(sparse, linen(module, x))
    assert trees.leaves_by_path(sparse.masks).keys() == {
        leaf.path for leaf in cs_jax.select(sparse.params, where).masked
    }


def test_gradients_are_those_of_the_masked_weights() -> None:
    assert_same_gradients(linen(sparsify(AutoEncoder(), KERNELS), X), linen(AutoEncoder(), X))


ENCODERS = {
    "by name": "encode",
    "of the plain class": AutoEncoder.encode,
    "of the sparse class": lambda module, x: type(module).encode(module, x),
    "in a function": lambda module, x: module.encode(x),
    "submodule in a function": lambda module, x: module.encoder(x) * module.scales,
}


@pytest.mark.parametrize("method", ENCODERS.values(), ids=ENCODERS.keys())
def test_other_methods_are_masked(method: Any) -> None:
    sparse, variables = auto_encoder()
    expected = AutoEncoder().apply(without_masks(variables), X, method="encode")
    assert_equal(sparse.apply(variables, X, method=method), expected)
    if callable(method):
        assert_equal(nn.apply(method, sparse)(variables, X), expected)


def test_a_submodule_in_a_field_can_be_the_method() -> None:
    module = Parts(nn.Dense(4), [])
    sparse = sparsify(module)
    variables = sparse.init(KEY, X)
    variables["masks"] = random_masks(variables["masks"])
    expected = module.apply(without_masks(variables), X, method="first")
    assert_equal(sparse.apply(variables, X, method="first"), expected)


def test_properties_and_variables_are_masked_and_other_kinds_of_methods_work() -> None:
    sparse, variables = auto_encoder()
    expected = AutoEncoder().apply(without_masks(variables), method=lambda module: module.codes_of_ones)
    assert_equal(sparse.apply(variables, method=lambda module: module.codes_of_ones), expected)
    assert_equal(sparse.bind(variables).variables["params"], without_masks(variables)["params"])
    assert sparse.size() == 3
    assert sparse.double(2) == 4
    assert sparse.name_of_class() == "SparseAutoEncoder"


def test_a_bound_module_is_masked_and_unbinds_to_what_it_was() -> None:
    sparse, variables = auto_encoder()
    plain, bound = AutoEncoder().bind(without_masks(variables)), sparse.bind(variables)
    assert_equal(bound(X), plain(X))
    assert_equal(bound.encoder(X), plain.encoder(X))
    module, unbound = bound.unbind()
    assert module == sparse
    assert_same_objects(unbound, variables)
    encoder, masked = bound.encoder.unbind()
    assert_equal(encoder.apply(masked, X), plain.encoder(X))
    compact = sparsify(MLP())
    compact_variables = compact.init(KEY, X)
    bound = compact.bind(compact_variables)
    bound(X)
    assert_same_objects(bound.unbind()[1], compact_variables)


def train(module: Any, variables: Any, **kwargs: Any) -> Any:
    return module.apply(variables, IMAGE, train=True, rngs={"dropout": KEY}, **kwargs)


@pytest.mark.parametrize(
    "mutable",
    [["batch_stats"], ["batch_stats", "intermediates"], True, nn.DenyList(["params", "masks"])],
    ids=["statistics", "intermediates too", "all", "all but"],
)
def test_statistics_intermediates_and_dropout_are_those_of_the_plain_module(mutable: Any) -> None:
    module, sparse = ConvNet(), sparsify(ConvNet())
    variables = conv_net()
    output, state = train(sparse, variables, mutable=mutable)
    expected, plain_state = train(module, without_masks(variables), mutable=mutable)
    assert_equal(output, expected)
    if mutable is True:
        assert_same_objects(state.pop("params"), variables["params"])
        assert_same_objects(state.pop("masks"), variables["masks"])
        del plain_state["params"]
    assert_equal(state, plain_state)


@functools.cache
def conv_net() -> Any:
    variables = sparsify(ConvNet()).init(KEY, IMAGE)
    return {**variables, "masks": random_masks(variables["masks"])}


def test_random_numbers_are_those_of_the_plain_module_call_after_call() -> None:
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(x)) + noise

    def twice(module: Any, x: jax.Array) -> jax.Array:
        return module(module(x))

    sparse, rngs = sparsify(Noisy()), {name: jax.random.key(0) for name in ("params", "noise", "dropout")}
    variables = sparse.init(rngs, X)
    for output, expected in (
        (sparse.init_with_output(rngs, X, method=twice)[0], Noisy().init_with_output(rngs, X, method=twice)[0]),
        (sparse.apply(variables, X, rngs=rngs, method=twice), Noisy().apply(variables, X, rngs=rngs, method=twice)),
    ):
        assert_equal(output, expected)


def test_captured_intermediates_are_those_of_the_plain_module() -> None:
    sparse, variables = auto_encoder()
    _, state = sparse.apply(variables, X, capture_intermediates=True)
    _, expected = AutoEncoder().apply(without_masks(variables), X, capture_intermediates=True)
    assert_equal(state, expected)


@pytest.mark.parametrize("mutable", ["params", ["params", "masks"], True])
@pytest.mark.parametrize("module", [MLP(), nn.remat(MLP)(), Pair(sparsify(AutoEncoder()))], ids=type)
def test_apply_gives_back_params_and_masks_as_they_were(module: Any, mutable: Any) -> None:
    sparse = module if isinstance(module, Pair) else sparsify(module)
    variables = sparse.init(KEY, X)
    variables["masks"] = random_masks(variables["masks"])
    _, state = sparse.apply(variables, X, mutable=mutable)
    assert_same_objects(state, {name: variables[name] for name in state})
    assert "params" in state


def test_a_module_that_changes_its_weights_in_apply_is_stopped() -> None:
    def change(module: Any) -> None:
        module.put_variable("params", "scales_kernel", jnp.zeros((1, 3)))

    sparse, variables = auto_encoder()
    with pytest.raises(Exception, match='"params" is immutable'):
        sparse.apply(variables, method=change, mutable=["params"])


def test_a_part_can_be_initialised_and_applied_alone() -> None:
    sparse = sparsify(AutoEncoder(), ["encoder/kernel", "decoder/kernel"])
    both = sparse.init(KEY, X, method=lambda module, x: module.decoder(module.encoder(x)))
    assert paths(both["masks"]) == {"encoder/kernel", "decoder/kernel"}
    variables = sparse.init(KEY, X, method="encode")
    assert paths(variables["masks"]) == {"encoder/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    expected = AutoEncoder().apply(without_masks(variables), X, method="encode")
    assert_equal(sparse.apply(variables, X, method="encode"), expected)


def test_apply_can_initialise() -> None:
    sparse, variables = auto_encoder()
    _, made = sparse.apply({}, X, rngs={"params": KEY}, mutable=True)
    assert_equal(made["params"], variables["params"])
    assert paths(made["masks"]) == paths(variables["masks"])


def test_other_ways_to_initialise_agree() -> None:
    sparse = sparsify(MLP())
    variables = sparse.init(KEY, X)
    assert_equal(jax.jit(sparse.init)(KEY, X), variables)
    assert_equal(sparse.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype)), variables)
    assert_equal(nn.init(lambda module, x: module(x), sparse)(KEY, X), variables)
    shapes = jax.eval_shape(sparse.init, KEY, X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    output = jax.eval_shape(sparse.apply, shapes, X)
    assert (output.shape, output.dtype) == ((2, 4), jnp.float32)


def test_a_sparse_module_is_masked_inside_other_modules() -> None:
    where = ["en*/kernel", "*_kernel"]
    variables = Net(where).init(KEY, X)
    assert paths(variables["masks"]) == {"auto/encoder/kernel", "auto/scales_kernel", "head/last/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    params = without_masks(variables)["params"]
    expected = nn.Dense(4).apply({"params": params["plain"]}, AutoEncoder().apply({"params": params["auto"]}, X))
    expected = nn.Dense(2).apply({"params": params["head"]["last"]}, expected)
    assert_equal(Net(where).apply(variables, X), expected)


def test_a_parent_sees_masked_methods_and_submodules() -> None:
    sparse, plain = Pair(sparsify(AutoEncoder())), Pair(AutoEncoder())
    variables = sparse.init(KEY, X)
    params = variables["params"]
    assert_equal(params, plain.init(KEY, X)["params"])
    assert paths(variables["masks"]) == {"child/encoder/kernel", "child/decoder/kernel", "child/scales_kernel"}
    variables["masks"] = random_masks(variables["masks"])
    assert_equal(sparse.apply(variables, X), plain.apply(without_masks(variables), X))
    output, state = sparse.apply(variables, X, capture_intermediates=True)
    assert_equal(state, plain.apply(without_masks(variables), X, capture_intermediates=True)[1])


def test_a_parent_may_use_submodules_alone() -> None:
    class Parent(nn.Module):
        def setup(self) -> None:
            self.child = sparsify(AutoEncoder(), "**/kernel")

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.child.encoder(x)

    variables = Parent().init(KEY, X)
    assert paths(variables["masks"]) == {"child/encoder/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    expected = nn.Dense(3).apply({"params": without_masks(variables)["params"]["child"]["encoder"]}, X)
    assert_equal(Parent().apply(variables, X), expected)


class Sharing(nn.Module):
    """Uses one layer directly and in a field of a child."""

    wrap: Any = lambda module: module

    def setup(self) -> None:
        self.own = nn.Dense(4)
        self.child = self.wrap(Parts(self.own, [nn.Dense(4)]))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.child(self.own(x))


def test_a_layer_that_is_shared_from_outside_stays_the_owners() -> None:
    variables = Sharing(sparsify).init(KEY, X)
    assert paths(variables["masks"]) == {"child/rest_0/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    assert_equal(Sharing(sparsify).apply(variables, X), Sharing().apply(without_masks(variables), X))
    whole = sparsify(Sharing())
    variables = whole.init(KEY, X)
    assert paths(variables["masks"]) == {"own/kernel", "child/rest_0/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    assert_equal(whole.apply(variables, X), Sharing().apply(without_masks(variables), X))


def test_instances_in_two_fields_stay_shared() -> None:
    class Two(nn.Module):
        one: nn.Module
        other: nn.Module

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.other(self.one(x))

    def build(wrap: Any) -> nn.Module:
        layer = nn.Dense(4)
        return Two(wrap(Parts(layer, [])), Parts(layer, []))

    sparse, plain = build(sparsify), build(lambda module: module)
    variables = sparse.init(KEY, X)
    assert_equal(variables["params"], plain.init(KEY, X)["params"])
    assert paths(variables["masks"]) == {"one/first/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    assert_equal(sparse.apply(variables, X), plain.apply(without_masks(variables), X))


def test_a_sparse_child_may_share_its_scope_with_a_sparse_module() -> None:
    def dense(module: nn.Module) -> Any:
        return sparsify(module, lambda path, _: path == "kernel")  # the glob would match the parent's too

    for sparse, masked in ((LoRA(dense), {"kernel"}), (sparsify(LoRA(dense), "up_kernel"), {"kernel", "up_kernel"})):
        variables = sparse.init(KEY, X)
        assert paths(variables["masks"]) == masked
        variables["masks"] = random_masks(variables["masks"])
        assert_equal(sparse.apply(variables, X), LoRA().apply(without_masks(variables), X))


def test_names_clash_as_in_the_plain_module() -> None:
    class Clash(nn.Module):
        wrap: Any = lambda module: module

        def setup(self) -> None:
            self.child = self.wrap(nn.Dense(4))
            nn.share_scope(self, self.child)

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            weights = self.param("kernel", nn.initializers.ones, (4, 4))
            return self.child(x @ weights)

    for wrap in (lambda module: module, sparsify):
        with pytest.raises(Exception, match='Could not create param "kernel" in Module .*Dense: Name in use'):
            Clash(wrap).init(KEY, X)


AROUND = {
    "scan": partial(nn.scan, variable_axes={"params": 0, "masks": 0}, split_rngs={"params": True}, length=2),
    "remat": nn.remat,
    "jit": nn.jit,
    "remat of remat": lambda cls: nn.remat(nn.remat(cls)),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_transforms_around_a_sparse_class_carry_masks(around: Any) -> None:
    sparse, plain = around(type(sparsify(Block(), "**/kernel")))(), around(Block)()
    variables = sparse.init(KEY, X, None)
    params = variables["params"]
    assert_equal(params, plain.init(KEY, X, None)["params"])
    assert variables["masks"]["dense"]["kernel"].shape == params["dense"]["kernel"].shape
    variables["masks"] = random_masks(variables["masks"])
    assert_equal(sparse.apply(variables, X, None)[0], plain.apply(without_masks(variables), X, None)[0])


def test_a_sparse_module_in_a_scanned_module_has_masks_for_each_step() -> None:
    class Step(nn.Module):
        wrap: Any

        def setup(self) -> None:
            self.dense = self.wrap(nn.Dense(4, kernel_init=ONES))

        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return self.dense(x), None

    axes = {"params": 0, "masks": 0}
    scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)
    variables = scan(sparsify).init(KEY, X, None)
    assert variables["masks"]["dense"]["kernel"].shape == (2, 4, 4)
    variables["masks"] = random_masks(variables["masks"])
    expected, _ = scan(lambda module: module).apply(without_masks(variables), X, None)
    assert_equal(scan(sparsify).apply(variables, X, None)[0], expected)


def test_one_network_is_mapped_over_many_masks() -> None:
    sparse = type(sparsify(nn.Dense(3)))
    many = nn.vmap(
        sparse, in_axes=None, axis_size=2, variable_axes={"params": None, "masks": 0}, split_rngs={"params": False}
    )(3)
    variables = many.init(KEY, X)
    assert variables["masks"]["kernel"].shape == (2, 4, 3)
    variables["masks"] = random_masks(variables["masks"])
    outputs = many.apply(variables, X)
    for index in range(2):
        one = {"params": variables["params"], "masks": jax.tree.map(itemgetter(index), variables["masks"])}
        np.testing.assert_allclose(outputs[index], nn.Dense(3).apply(without_masks(one), X), rtol=1e-5)


@pytest.mark.parametrize("around", [nn.remat, nn.jit])
def test_methods_that_a_transform_around_leaves_out_are_masked(around: Any) -> None:
    sparse, variables = auto_encoder()
    lifted = around(type(sparse))()
    assert_equal(lifted.apply(variables, X), sparse.apply(variables, X))
    assert lifted.apply(variables, method=lambda module: (module.scope, module.encode(X))[0] is module.scope)
    for method in ("encode", lambda module, x: module.encoder(x), lambda module, x: module(module(x))):
        assert_equal(lifted.apply(variables, X, method=method), sparse.apply(variables, X, method=method))
        masks = lifted.init(KEY, X, method=method)["masks"]
        assert paths(masks) == paths(sparse.init(KEY, X, method=method)["masks"])


def test_a_class_made_of_a_sparse_class_is_masked() -> None:
    class Twice(type(sparsify(MLP()))):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x) + nn.Dense(4, name="more")(x)

        def twice(self, x: jax.Array) -> jax.Array:
            return self(self(x))

    def add(params: Any, x: jax.Array) -> jax.Array:
        return MLP().apply({"params": params}, x) + nn.Dense(4).apply({"params": params["more"]}, x)

    variables = Twice().init(KEY, X)
    assert paths(variables["masks"]) == {"Dense_0/kernel", "Dense_1/kernel", "more/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    params = without_masks(variables)["params"]
    assert_equal(Twice().apply(variables, X, method="twice"), add(params, add(params, X)))


@pytest.mark.parametrize("broadcast", ["params", ["params", "masks"]], ids=str)
def test_a_sparse_cell_runs_in_any_rnn(broadcast: Any) -> None:
    sparse = nn.RNN(sparsify(nn.SimpleCell(3, recurrent_kernel_init=ONES)), variable_broadcast=broadcast)
    plain = nn.RNN(nn.SimpleCell(3, recurrent_kernel_init=ONES))
    variables = sparse.init(KEY, SEQUENCE)
    params = variables["params"]
    assert_equal(params, plain.init(KEY, SEQUENCE)["params"])
    assert paths(variables["masks"]) == {"cell/i/kernel", "cell/h/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    assert_equal(sparse.apply(variables, SEQUENCE), plain.apply(without_masks(variables), SEQUENCE))


def test_a_transform_around_that_drops_masks_is_refused() -> None:
    sparse = type(sparsify(Block(), "**/kernel"))
    scan = nn.scan(sparse, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    with pytest.raises(ValueError, match="dense/kernel: cannot make its mask.*name 'masks' with 'params'"):
        scan().init(KEY, X, None)
    with pytest.raises(ValueError, match="kernel: cannot make its mask"):
        sparsify(nn.Dense(3)).init(KEY, X, mutable=["params"])


def test_masked_layers_inside_keep_their_masks() -> None:
    module = Parts(nn.Dense(4), [layers.MaskedDense(4)])
    sparse = sparsify(module, "first/kernel")
    variables = sparse.init(KEY, X)
    assert paths(variables["masks"]) == {"first/kernel", "rest_0/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    expected = Parts(nn.Dense(4), [nn.Dense(4)]).apply(without_masks(variables), X)
    assert_equal(sparse.apply(variables, X), expected)


def test_masking_what_a_layer_masks_is_refused() -> None:
    module = Parts(nn.Dense(4), [layers.MaskedDense(4)])
    sparse = sparsify(module)
    with pytest.raises(ValueError, match="rest_0/kernel: already has a mask, from its layer"):
        sparse.init(KEY, X)
    variables = module.init(KEY, X)
    masks = jax.tree.map(
        jnp.ones_like, {name: {"kernel": layer["kernel"]} for name, layer in variables["params"].items()}
    )
    with pytest.raises(ValueError, match="rest_0/kernel: already has a mask"):
        sparse.apply({**variables, "masks": masks}, X)


def test_masking_what_a_layer_in_a_scan_masks_is_refused() -> None:
    axes = {"params": 0, "masks": 0}
    scanned = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
    sparse = sparsify(scanned(layers.MaskedDense), "**/kernel")
    with pytest.raises(ValueError, match="already has a mask|needs a mask"):
        sparse.apply(sparse.init(KEY, X), X)


def test_sparse_modules_nest_unless_they_mask_the_same() -> None:
    inner = sparsify(nn.Dense(4), "kernel")
    sparse = sparsify(Parts(nn.Dense(4), [inner]), "first/kernel")
    variables = sparse.init(KEY, X)
    assert paths(variables["masks"]) == {"first/kernel", "rest_0/kernel"}
    variables["masks"] = random_masks(variables["masks"])
    expected = Parts(nn.Dense(4), [nn.Dense(4)]).apply(without_masks(variables), X)
    assert_equal(sparse.apply(variables, X), expected)
    both = sparsify(Parts(nn.Dense(4), [inner]))
    with pytest.raises(ValueError, match="rest_0/kernel: already has a mask, from its layer or from a sparse module"):
        both.init(KEY, X)
    with pytest.raises(ValueError, match="rest_0/kernel: already has a mask"):
        both.apply(variables, X)


def test_another_network_can_be_applied_inside() -> None:
    teacher, teacher_variables = auto_encoder()

    class Student(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4)(x) + teacher.apply(teacher_variables, x)

    sparse = sparsify(Student())
    variables = sparse.init(KEY, X)
    variables["masks"] = random_masks(variables["masks"])
    assert_equal(sparse.apply(variables, X), Student().apply(without_masks(variables), X))


def test_equal_modules_and_rules_make_equal_sparse_modules() -> None:
    first, second = sparsify(MLP((3, 2)), "**/kernel"), sparsify(MLP((3, 2)), "**/kernel")
    assert first == second
    assert hash(first) == hash(second)
    assert first == sparsify(MLP((3, 2)), [cs_jax.Rule("**/kernel", group="output_channel")])
    assert first != sparsify(MLP((3, 3)), "**/kernel")
    assert first != sparsify(MLP((3, 2)))
    assert first != MLP((3, 2))


def test_an_equal_module_as_a_static_argument_does_not_retrace() -> None:
    traces = []

    @partial(jax.jit, static_argnums=0)
    def apply(model: nn.Module, variables: Any) -> Any:
        traces.append(model)
        return model.apply(variables, X)

    variables = sparsify(MLP()).init(KEY, X)
    apply(sparsify(MLP()), variables)
    apply(sparsify(MLP()), variables)
    assert len(traces) == 1


def test_copies_are_sparse() -> None:
    sparse, variables = auto_encoder()
    expected = sparse.apply(variables, X)
    for other in (sparse.clone(), sparse.copy(), copy.copy(sparse), copy.deepcopy(sparse), pickled(sparse)):
        assert other == sparse
        assert_equal(other.apply(variables, X), expected)
    assert sparse.copy(features=2) == sparsify(AutoEncoder(2), KERNELS)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def test_a_sparse_module_tells_what_it_is() -> None:
    sparse, _ = auto_encoder()
    assert isinstance(sparse, AutoEncoder)
    assert (type(sparse).__name__, type(sparse).__module__) == ("SparseAutoEncoder", __name__)
    assert "`AutoEncoder` with masked weights" in type(sparse).__doc__ and AutoEncoder.__doc__ in type(sparse).__doc__
    one_line = " ".join(repr(sparse).split())
    assert one_line == f"sparsify(AutoEncoder( # attributes features = 3 ), where={tuple(KERNELS)})"
    assert repr(sparsify(MLP(), "*/kernel")).endswith(", where='*/kernel')")
    assert "first = sparsify(Dense(" in repr(Parts(sparsify(nn.Dense(4)), []))


def test_tabulate_shows_masks() -> None:
    console = {"width": 200, "force_terminal": False, "no_color": True}
    table = sparsify(MLP()).tabulate(KEY, X, console_kwargs=console, compute_flops=True)
    assert "SparseMLP" in table
    assert "masks" in next(line for line in table.splitlines() if "params" in line)
    assert "24 (96 B)" in table.splitlines()[-5]


def test_masks_take_the_partitioning_of_their_weights() -> None:
    sparse = sparsify(nn.Dense(3, kernel_init=PARTITIONED))
    variables = sparse.init(KEY, X)
    specs = nn.get_partition_spec(variables)
    assert specs["masks"]["kernel"] == specs["params"]["kernel"] == jax.sharding.PartitionSpec("in", "out")
    bare = {"params": variables["params"], "masks": {"kernel": jnp.ones((4, 3))}}
    assert_equal(sparse.apply(bare, X), sparse.apply(variables, X))


@pytest.mark.parametrize(
    "where, masked",
    [
        (cs_jax.Rule(KERNELS, group=cs_jax.Head(4), target_density=0.01), {"encoder", "decoder", "scales_kernel"}),
        ([cs_jax.Rule("en*/kernel"), cs_jax.Rule("de*/kernel", group=cs_jax.NM(2, 4))], {"encoder", "decoder"}),
        (lambda path, weight: path.startswith("enc") and weight.ndim == 2, {"encoder"}),
        ("!encoder/*", {"decoder", "scales_kernel"}),
        (["**/kernel", "!encoder/kernel"], {"decoder"}),
    ],
    ids=["a rule", "rules", "a function", "all but", "glob but"],
)
def test_any_rules_are_taken(where: Any, masked: set[str]) -> None:
    assert sparsify(AutoEncoder(), where).init(KEY, X)["masks"].keys() == masked


@pytest.mark.parametrize("change", [nn.FrozenDict, partial(jax.tree.map, np.asarray)], ids=["frozen", "NumPy"])
def test_other_containers_and_arrays_are_taken(change: Any) -> None:
    sparse, variables = auto_encoder()
    assert_equal(sparse.apply(change(variables), X), sparse.apply(variables, X))


def test_a_mask_is_cast_to_the_dtype_of_its_weights() -> None:
    module = nn.Dense(3, param_dtype=jnp.bfloat16)
    variables = {**module.init(KEY, X), "masks": {"kernel": jnp.full((4, 3), 0.3)}}
    assert_equal(sparsify(module).apply(variables, X), module.apply(without_masks(variables), X))


def test_modules_with_their_own_dataclass_features_are_taken() -> None:
    class Custom(nn.Module, Generic[T], kw_only=True):
        width: int = 2
        table: Any = dataclasses.field(default_factory=dict)

        def __post_init__(self) -> None:
            object.__setattr__(self, "table", {"width": self.width})
            super().__post_init__()

        def __hash__(self) -> int:
            return hash(self.width)

        def __eq__(self, other: Any) -> bool:
            return self.width == other.width

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(self.table["width"])(x)

    sparse = sparsify(Custom(width=5))
    assert sparse.init(KEY, X)["masks"]["Dense_0"]["kernel"].shape == (4, 5)
    assert hash(sparse) == hash(5)
    assert sparse == sparsify(Custom(width=5))


@pytest.mark.parametrize(
    "module, error, message",
    [
        (MLP, TypeError, r"module MLP: must be an instance, not a class, as in sparsify\(MLP\(\.\.\.\)\)"),
        (3, TypeError, r"module 3: must be an instance of flax.linen.Module, as in sparsify\(MLP\(\.\.\.\)\)"),
        (MLP().bind({}), TypeError, "module MLP: must not be bound to variables"),
        (sparsify(MLP()), ValueError, "module SparseMLP: must not be sparse already"),
    ],
)
def test_what_cannot_be_sparsified_is_refused(module: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        sparsify(module)


def test_a_module_that_a_compact_method_bound_is_refused() -> None:
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return sparsify(nn.Dense(3))(x)

    with pytest.raises(TypeError, match=r"make it with parent=None, as in sparsify\(Dense\(\.\.\., parent=None\)\)"):
        Parent().init(KEY, X)


def test_where_must_be_rules() -> None:
    with pytest.raises(TypeError, match="where 3: must be a glob"):
        sparsify(MLP(), 3)


@pytest.mark.parametrize(
    "where, message",
    [
        ("**/kernle", "glob '\\*\\*/kernle': matches none of 4 leaves"),
        (["**/kernel", "bais"], "glob 'bais': matches none of 4 leaves"),
        (lambda path, weight: False, "selects none of 4 leaves"),
        ("**", "selects all 4 leaves"),
    ],
)
def test_rules_that_select_nothing_are_refused(where: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(MLP(), where).init(KEY, X)


@pytest.mark.parametrize("where", ["bais", ["**/kernel", "bais"]], ids=str)
def test_rules_that_select_nothing_inside_another_module_are_refused_once_it_is_applied(where: Any) -> None:
    pair = Pair(sparsify(AutoEncoder(), where))
    with pytest.raises(ValueError, match="glob 'bais': matches none of 5 leaves"):
        pair.apply(pair.init(KEY, X), X)


@pytest.mark.parametrize("around", [nn.remat, nn.jit])
def test_rules_that_select_nothing_in_a_transformed_class_are_refused(around: Any) -> None:
    with pytest.raises(ValueError, match="glob 'bais': matches none of 4 leaves"):
        around(type(sparsify(MLP(), "bais")))().init(KEY, X)


def test_methods_that_follow_a_call_may_make_more_weights() -> None:
    class Late(AutoEncoder):
        @nn.compact
        def more(self, x: jax.Array) -> jax.Array:
            return nn.Dense(1, name="late")(self(x))

    variables = sparsify(Late(), ["**/kernel", "late/bias"]).init(KEY, X, method="more")
    assert paths(variables["masks"]) == {"encoder/kernel", "decoder/kernel", "late/kernel", "late/bias"}


def test_rules_that_select_nothing_of_a_part_are_refused() -> None:
    sparse = sparsify(AutoEncoder(), "decoder/kernel")
    with pytest.raises(ValueError, match="glob 'decoder/kernel': matches none of 3 leaves"):
        sparse.init(KEY, X, method="encode")
    with pytest.raises(ValueError, match="glob 'decoder/kernel': matches none of 3 leaves"):
        sparse.apply(AutoEncoder().init(KEY, X, method="encode"), X, method="encode")


def test_a_selected_weight_that_is_no_float_array_is_refused() -> None:
    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.param("count", lambda key: jnp.arange(4))[None]

    with pytest.raises(ValueError, match="count.*int32: must have a float"):
        sparsify(Counted(), "count").init(KEY, X)
    with pytest.raises(ValueError, match="layers_0/count.*int32: must have a float"):
        nn.Sequential([sparsify(Counted(), "count")]).init(KEY, X)


def test_missing_masks_are_named() -> None:
    sparse, variables = auto_encoder()
    message = "decoder/kernel: needs a mask in the collection 'masks'; apply the model to"
    with pytest.raises(ValueError, match=message):
        sparse.apply({"params": variables["params"]}, X)
    with pytest.raises(ValueError, match=message):
        sparse.apply({"params": variables["params"]}, X, mutable=True)
    with pytest.raises(ValueError, match=message):
        sparse.bind({"params": variables["params"], "masks": {"encoder": variables["masks"]["encoder"]}})
    pair = Pair(sparsify(AutoEncoder()))
    with pytest.raises(ValueError, match="child/" + message):
        pair.apply({"params": pair.init(KEY, X)["params"]}, X)


@pytest.mark.parametrize(
    "mask, message",
    [
        (
            jnp.ones((1, 3)),
            r"masks 'child/encoder/kernel' of shape \(1, 3\): must have the shape of the weights, \(4, 3\)",
        ),
        (1.0, "masks 'child/encoder/kernel' 1.0: must be an array"),
    ],
    ids=["shape", "number"],
)
def test_a_mask_that_does_not_fit_is_named(mask: Any, message: str) -> None:
    pair = Pair(sparsify(AutoEncoder(), "en*/kernel"))
    variables = pair.init(KEY, X)
    variables["masks"]["child"]["encoder"]["kernel"] = mask
    with pytest.raises(ValueError, match=message):
        pair.apply(variables, X)
