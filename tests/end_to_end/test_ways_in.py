"""Masked layers, `sparsify` and the optax transformation give the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from sklearn.datasets import load_digits

import cs_jax

STEPS, SNAPSHOT_STEP, RETRAINING, FINAL_TEMP, INIT_VALUE, PENALTY = 15, 4, 10, 20.0, 0.03, 1e-4
WEIGHT_TX = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.03, momentum=0.9, nesterov=True))
SCORE_TX = optax.sgd(0.5, momentum=0.9, nesterov=True)


class Net(nn.Module):
    """Convolution and hidden layer with masks; BatchNorm and classifier without."""

    conv: Any = nn.Conv
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(4, (3, 3), strides=2, use_bias=False, param_dtype=x.dtype, name="conv")(x)
        x = jnp.tanh(nn.BatchNorm(use_running_average=False, param_dtype=x.dtype, name="norm")(x))
        x = jnp.tanh(self.dense(12, param_dtype=x.dtype, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, param_dtype=x.dtype, name="classifier")(x)


PLAIN = Net()
MASKED = Net(cs_jax.MaskedConv, cs_jax.MaskedDense)
SPARSE = cs_jax.sparsify(Net())


def loss_fn(model: nn.Module, variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits, _ = model.apply(variables, images, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batches(dtype: Any) -> list[tuple[jax.Array, jax.Array]]:
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, dtype).reshape(-1, 8, 8, 1)
    rows = np.random.default_rng(0).integers(0, len(labels), (2 * STEPS + RETRAINING, 32))
    return [(images[chosen], jnp.asarray(labels[chosen])) for chosen in rows]


def by_module(model: nn.Module, params: Any, dtype: Any) -> list[Any]:
    """Weights, scores and masks after two rounds, the reset and the retraining of a model that reads masks."""
    images, labels = batches(dtype)[0]
    masks = model.init(jax.random.key(9), images)["masks"]
    scores = cs_jax.init_scores(masks, INIT_VALUE)

    @jax.jit
    def step(trained: Any, states: Any, images: jax.Array, labels: jax.Array, temperature: Any) -> tuple[Any, Any]:
        def loss(params: Any, scores: Any) -> jax.Array:
            soft = cs_jax.soft_mask(scores, temperature, init_value=INIT_VALUE)
            penalty = PENALTY * cs_jax.mask_penalty(soft)
            return loss_fn(model, {"params": params, "masks": soft}, images, labels) + penalty

        return descend(trained, states, jax.grad(loss, argnums=(0, 1))(*trained), (WEIGHT_TX, SCORE_TX))

    @jax.jit
    def ticket_step(params: Any, state: Any, images: jax.Array, labels: jax.Array, ticket: Any) -> tuple[Any, Any]:
        gradient = jax.grad(lambda p: loss_fn(model, {"params": p, "masks": ticket}, images, labels))(params)
        return descend((params,), (state,), (gradient,), (WEIGHT_TX,))

    data, seen, snapshot = iter(batches(dtype)), [], params
    trained, states = (params, scores), (WEIGHT_TX.init(params), SCORE_TX.init(scores))
    for round in range(2):
        for number in range(STEPS):
            snapshot = trained[0] if (round, number) == (0, SNAPSHOT_STEP) else snapshot
            temperature = cs_jax.temperature(number, STEPS, FINAL_TEMP)
            trained, states = step(trained, states, *next(data), temperature)
        ticket = cs_jax.hard_mask(trained[1], init_value=INIT_VALUE)
        seen.append((*trained, ticket))
        if round == 0:
            trained = trained[0], cs_jax.prune_scores(trained[1], FINAL_TEMP, init_value=INIT_VALUE)
            seen.append(trained)
    params, state = snapshot, WEIGHT_TX.init(snapshot)
    for _ in range(RETRAINING):
        (params,), (state,) = ticket_step(params, state, *next(data), ticket)
    return [*seen, params]


def descend(values: Any, states: Any, gradients: Any, txs: Any) -> tuple[Any, Any]:
    steps = [tx.update(g, s, p) for tx, g, s, p in zip(txs, gradients, states, values, strict=True)]
    new = tuple(optax.apply_updates(p, u) for p, (u, _) in zip(values, steps, strict=True))
    return new, tuple(state for _, state in steps)


def by_transformation(params: Any, dtype: Any) -> list[Any]:
    """The same for the plain model and the transformation."""
    tx = cs_jax.continuous_sparsification(
        WEIGHT_TX,
        SCORE_TX,
        epochs=STEPS,
        steps_per_epoch=1,
        final_temp=FINAL_TEMP,
        init_value=INIT_VALUE,
        penalty=PENALTY,
    )

    @jax.jit
    def step(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        masked = cs_jax.masked_params(params, opt_state)
        gradient = jax.grad(lambda p: loss_fn(PLAIN, {"params": p}, images, labels))(masked)
        updates, opt_state = tx.update(gradient, opt_state, params, masked_params=masked)
        return optax.apply_updates(params, updates), opt_state

    data, seen, snapshot, opt_state = iter(batches(dtype)), [], params, tx.init(params)
    for round in range(2):
        for number in range(STEPS):
            snapshot = params if (round, number) == (0, SNAPSHOT_STEP) else snapshot
            params, opt_state = step(params, opt_state, *next(data))
        seen.append((params, opt_state.scores, cs_jax.ticket_masks(opt_state)))
        if round == 0:
            opt_state = cs_jax.next_round(opt_state)
            seen.append((params, opt_state.scores))
    params, opt_state = cs_jax.rewind(tx, opt_state, snapshot)
    for _ in range(RETRAINING):
        params, opt_state = step(params, opt_state, *next(data))
    return [*seen, params]


@pytest.mark.filterwarnings("ignore::cs_jax.UnfinishedSearchWarning")
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(jnp.float32, 1e-5), (jnp.float64, 1e-11)],
    ids=["float32", "float64"],
)
@pytest.mark.usefixtures("x64")
def test_the_three_ways_in_agree(dtype: Any, tolerance: float) -> None:
    """Compares 30 steps with one reset, and the retraining after the rewind."""
    images, _ = batches(dtype)[0]
    params = PLAIN.init(jax.random.key(1), images)["params"]
    by_layers = by_module(MASKED, params, dtype)
    ticket = by_layers[2][2]
    assert list(ticket) == ["conv", "hidden"] and 0.1 < cs_jax.density(ticket) < 0.9
    for other in (by_module(SPARSE, params, dtype), by_transformation(params, dtype)):
        assert jax.tree.structure(other) == jax.tree.structure(by_layers)
        for ours, theirs in zip(jax.tree.leaves(by_layers), jax.tree.leaves(other), strict=True):
            assert ours.dtype == theirs.dtype == dtype
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
