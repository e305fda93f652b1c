"""A Flax Linen module in a custom training loop, on handwritten digits: two search rounds, then one retraining.

Run it: `python examples/linen_loop.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import cs_jax

ROUNDS, EPOCHS, BATCH, FINAL_TEMP, PENALTY = 2, 20, 64, 200.0, 1e-5

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
train, test = slice(0, 1400), slice(1400, None)

model = cs_jax.sparsify(nn.Sequential([nn.Dense(100), nn.relu, nn.Dense(10)]), where="layers_0/kernel")
variables = model.init(jax.random.key(0), images[:1])
params, scores = variables["params"], cs_jax.init_scores(variables["masks"], -0.05)
snapshot = params  # initial weights, for the rewind
weight_tx, score_tx = optax.adam(3e-3), optax.sgd(1.0, momentum=0.9)


def loss_fn(params: Any, masks: Any, rows: jax.Array) -> jax.Array:
    logits = model.apply({"params": params, "masks": masks}, images[rows])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()
    return loss + PENALTY * cs_jax.mask_penalty(masks)


@jax.jit
def search_step(trained: Any, states: Any, rows: jax.Array, temperature: jax.Array) -> tuple[Any, Any]:
    def loss(params: Any, scores: Any) -> jax.Array:
        return loss_fn(params, cs_jax.soft_mask(scores, temperature, init_value=-0.05), rows)

    gradients = jax.grad(loss, argnums=(0, 1))(*trained)
    steps = [tx.update(g, s, p) for tx, g, s, p in zip((weight_tx, score_tx), gradients, states, trained, strict=True)]
    return tuple(optax.apply_updates(p, u) for p, (u, _) in zip(trained, steps, strict=True)), [s for _, s in steps]


@jax.jit
def ticket_step(params: Any, state: Any, rows: jax.Array, masks: Any) -> tuple[Any, Any]:
    updates, state = weight_tx.update(jax.grad(loss_fn)(params, masks, rows), state)
    return optax.apply_updates(params, updates), state


def batches(seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(1400)
    return order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)


trained, states = (params, scores), [weight_tx.init(params), score_tx.init(scores)]
for round in range(ROUNDS):
    for epoch in range(EPOCHS):
        temperature = cs_jax.temperature(epoch, EPOCHS, FINAL_TEMP)
        for rows in batches(round * EPOCHS + epoch):
            trained, states = search_step(trained, states, rows, temperature)
    ticket = cs_jax.hard_mask(trained[1], init_value=-0.05)
    print(f"round {round}: density {cs_jax.density(ticket):.3f}")
    trained = trained[0], cs_jax.prune_scores(trained[1], FINAL_TEMP, init_value=-0.05)

params, state = snapshot, weight_tx.init(snapshot)
for epoch in range(EPOCHS):
    for rows in batches(100 + epoch):
        params, state = ticket_step(params, state, rows, ticket)
logits = model.apply({"params": params, "masks": ticket}, images[test])
accuracy = (jnp.argmax(logits, axis=-1) == labels[test]).mean()
print(f"ticket: density {cs_jax.density(ticket):.3f}, test accuracy {accuracy:.3f}")
