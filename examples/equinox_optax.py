"""Sparsify an unmodified Equinox model through its optimizer: density 0.1, on handwritten digits.

Run it: `python examples/equinox_optax.py`.
"""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import cs_jax

EPOCHS, STEPS = 15, 20

images, labels = load_digits(return_X_y=True)
images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)

model = eqx.nn.MLP(in_size=64, out_size=10, width_size=100, depth=2, key=jax.random.key(0))
snapshot = eqx.filter(model, eqx.is_inexact_array)
where = "!layers/2/*"  # the weights of all layers except the last
cs_jax.describe(snapshot, where)

tx = cs_jax.continuous_sparsification(
    optax.adam(3e-3),
    optax.sgd(1.0, momentum=0.9),
    epochs=EPOCHS,
    steps_per_epoch=STEPS,
    target_density=0.1,
    where=where,
)
opt_state = tx.init(snapshot)


def loss_fn(model: eqx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


@eqx.filter_jit
def step(model, opt_state, x, y):
    masked = cs_jax.masked_params(model, opt_state)
    gradient = eqx.filter_grad(loss_fn)(masked, x, y)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(gradient, opt_state, params, masked_params=masked)
    return eqx.apply_updates(model, updates), opt_state


def train(model, opt_state, seed):
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS * STEPS):
        rows = rng.integers(0, 1400, 64)
        model, opt_state = step(model, opt_state, images[rows], labels[rows])
    return model, opt_state


model, opt_state = train(model, opt_state, seed=0)
params, opt_state = cs_jax.rewind(tx, opt_state, snapshot)
model, opt_state = train(eqx.combine(params, model), opt_state, seed=1)
logits = jax.vmap(cs_jax.masked_params(model, opt_state))(images[1400:])
accuracy = (logits.argmax(-1) == labels[1400:]).mean()
print(f"ticket: density {cs_jax.density(cs_jax.current_masks(opt_state)):.3f}, test accuracy {accuracy:.3f}")
