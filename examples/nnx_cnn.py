"""Sparsify a convolutional NNX network with BatchNorm, with masks as variables of type `Mask`, on handwritten digits.

Run it: `python examples/nnx_cnn.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import cs_jax
import cs_jax.nnx

EPOCHS, STEPS, FINAL_TEMP, INIT_VALUE = 15, 20, 200.0, -0.03

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32).reshape(-1, 8, 8, 1), jnp.asarray(labels)


class Cnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 24, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 24, 48, rngs=rngs)
        self.head = nnx.Linear(48, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def loss_fn(model: Cnn, rows: np.ndarray) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(images[rows]), labels[rows]).mean()


model = cs_jax.nnx.sparsify(Cnn(nnx.Rngs(0)))
scores = cs_jax.init_scores(nnx.state(model, cs_jax.nnx.Mask), INIT_VALUE)
snapshot = nnx.state(nnx.clone(model), (nnx.Param, nnx.BatchStat))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
score_tx = optax.sgd(1.0, momentum=0.9)


@nnx.jit
def search_step(model: Cnn, optimizer: Any, scores: Any, score_state: Any, rows: Any, temperature: Any) -> Any:
    def loss(model: Cnn, scores: Any) -> jax.Array:
        nnx.update(model, cs_jax.soft_mask(scores, temperature, init_value=INIT_VALUE))
        return loss_fn(model, rows)

    gradient, score_gradient = nnx.grad(loss, argnums=(0, 1))(model, scores)
    optimizer.update(model, gradient)
    updates, score_state = score_tx.update(score_gradient, score_state)
    return optax.apply_updates(scores, updates), score_state


@nnx.jit
def ticket_step(model: Cnn, optimizer: Any, rows: Any) -> None:
    optimizer.update(model, nnx.grad(loss_fn)(model, rows))


rng, score_state = np.random.default_rng(0), score_tx.init(scores)
for epoch in range(EPOCHS):
    temperature = cs_jax.temperature(epoch, EPOCHS, FINAL_TEMP)
    for rows in rng.integers(0, 1400, (STEPS, 64)):
        scores, score_state = search_step(model, optimizer, scores, score_state, rows, temperature)

ticket = cs_jax.hard_mask(scores, init_value=INIT_VALUE)
nnx.update(model, snapshot)  # rewind
nnx.update(model, ticket)
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for rows in rng.integers(0, 1400, (EPOCHS * STEPS, 64)):
    ticket_step(model, optimizer, rows)
model.eval()
accuracy = (model(images[1400:]).argmax(-1) == labels[1400:]).mean()
print(f"ticket: density {cs_jax.density(ticket):.3f}, test accuracy {accuracy:.3f}")
