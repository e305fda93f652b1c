"""The optax transformation on models of Equinox, NNX, Haiku and Linen as they are, on real digits."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits

import cs_jax

EPOCHS, BATCH = 8, 64


@pytest.fixture(scope="module", autouse=True)
def _rank_promotion() -> Any:
    """Haiku and Equinox add biases by rank promotion."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int32)


def batches(digits: tuple[np.ndarray, np.ndarray], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    images, labels = digits
    order = np.random.default_rng(seed).permutation(1280).reshape(-1, BATCH)
    return [(images[rows], labels[rows]) for rows in order]


def optimizer(**arguments: Any) -> optax.GradientTransformationExtraArgs:
    return cs_jax.continuous_sparsification(
        optax.adam(3e-3),
        optax.sgd(1.0, momentum=0.9),
        epochs=EPOCHS,
        steps_per_epoch=1280 // BATCH,
        target_density=0.1,
        **arguments,
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: np.ndarray) -> float:
    return float((logits.argmax(-1) == labels).mean())


def check_ticket(opt_state: Any, paths: list[str], test_accuracy: float) -> None:
    ticket = cs_jax.current_masks(opt_state)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(ticket)
    }
    assert list(leaves) == paths
    total = sum(leaf.size for leaf in leaves.values())
    assert cs_jax.density(ticket) == round(0.1 * total) / total
    assert test_accuracy > 0.8


def train_pure(apply: Any, start: Any, tx: Any, digits: Any) -> tuple[Any, Any]:
    """Weights under their masks and optimizer state of a searched and retrained model `apply(params, x)`."""

    @jax.jit
    def step(params: Any, opt_state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        masked = cs_jax.masked_params(params, opt_state)
        gradient = jax.grad(lambda p: cross_entropy(apply(p, x), y))(masked)
        updates, opt_state = tx.update(gradient, opt_state, params, masked_params=masked)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = start, tx.init(start)
    for phase in range(2):
        if phase == 1:
            params, opt_state = cs_jax.rewind(tx, opt_state, start)
        for epoch in range(EPOCHS):
            for x, y in batches(digits, epoch):
                params, opt_state = step(params, opt_state, x, y)
    return cs_jax.masked_params(params, opt_state), opt_state


@pytest.mark.slow
def test_a_linen_model(digits: Any) -> None:
    model = nn.Sequential([nn.Dense(48), nn.relu, nn.Dense(32), nn.relu, nn.Dense(10)])
    images, labels = digits
    start = model.init(jax.random.key(0), images[:1])
    tx = optimizer(where=["**/kernel", "!params/layers_4/*"])
    masked, opt_state = train_pure(model.apply, start, tx, digits)
    paths = ["params/layers_0/kernel", "params/layers_2/kernel"]
    check_ticket(opt_state, paths, accuracy(model.apply(masked, images[1280:]), labels[1280:]))


@pytest.mark.slow
def test_an_equinox_model(digits: Any) -> None:
    """The whole module is optimised, activation functions included."""
    images, labels = digits
    start = model = eqx.nn.MLP(64, 10, 48, 2, key=jax.random.key(0))
    tx = optimizer()
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, opt_state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        masked = cs_jax.masked_params(model, opt_state)
        gradient = eqx.filter_grad(lambda m: cross_entropy(jax.vmap(m)(x), y))(masked)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(gradient, opt_state, params, masked_params=masked)
        return eqx.apply_updates(model, updates), opt_state

    for phase in range(2):
        if phase == 1:
            params, static = eqx.partition(start, eqx.is_inexact_array)
            params, opt_state = cs_jax.rewind(tx, opt_state, params)
            model = eqx.combine(params, static)
        for epoch in range(EPOCHS):
            for x, y in batches(digits, epoch):
                model, opt_state = step(model, opt_state, x, y)
    logits = jax.vmap(cs_jax.masked_params(model, opt_state))(images[1280:])
    check_ticket(opt_state, [f"layers/{i}/weight" for i in range(3)], accuracy(logits, labels[1280:]))


@pytest.mark.slow
def test_a_haiku_model(digits: Any) -> None:
    images, labels = digits
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([48, 32, 10])(x)))
    masked, opt_state = train_pure(net.apply, net.init(jax.random.key(0), images[:1]), optimizer(), digits)
    paths = [f"mlp/~/linear_{i}/w" for i in range(3)]
    check_ticket(opt_state, paths, accuracy(net.apply(masked, images[1280:]), labels[1280:]))


class Cnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.hidden = nnx.Linear(256, 32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x.reshape(-1, 8, 8, 1))))
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


@pytest.mark.slow
def test_an_nnx_model_with_its_optimizer(digits: Any) -> None:
    """BatchNorm statistics are updated by the model, weights by `nnx.Optimizer`."""
    images, labels = digits
    model = Cnn(nnx.Rngs(0))
    start = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    tx = optimizer()
    optimizer_ = nnx.Optimizer(model, tx, wrt=nnx.Param)

    traces = []

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        traces.append(1)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        masked = cs_jax.masked_params(params, optimizer.opt_state)
        masked_model = nnx.merge(graphdef, masked, rest)
        gradient = nnx.grad(lambda m: cross_entropy(m(x), y))(masked_model)
        nnx.update(model, nnx.state(masked_model, nnx.BatchStat))
        optimizer.update(model, gradient, masked_params=masked)

    for phase in range(2):
        if phase == 1:
            assert len(traces) == 1
            optimizer_.opt_state = cs_jax.next_round(optimizer_.opt_state)  # another round, of the same program
            for x, y in batches(digits, 0) * EPOCHS:
                step(model, optimizer_, x, y)
            assert len(traces) == 1
            params, optimizer_.opt_state = cs_jax.rewind(tx, optimizer_.opt_state, start)
            nnx.update(model, params)
        for epoch in range(EPOCHS):
            for x, y in batches(digits, epoch):
                step(model, optimizer_, x, y)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    served = nnx.merge(graphdef, cs_jax.masked_params(params, optimizer_.opt_state), rest)
    served.eval()
    paths = ["conv/kernel", "hidden/kernel"]
    check_ticket(optimizer_.opt_state, paths, accuracy(served(images[1280:]), labels[1280:]))
    assert float(jnp.abs(model.norm.mean[...]).sum()) > 0
