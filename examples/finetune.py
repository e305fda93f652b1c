"""Fine-tune a trained network into a ticket of whole channels with half of the convolution weights, without a rewind.

Run it: `python examples/finetune.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import cs_jax

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32).reshape(-1, 8, 8, 1), jnp.asarray(labels)

model = nn.Sequential(
    [
        nn.Conv(24, (3, 3), strides=2),
        nn.relu,
        nn.Conv(48, (3, 3), strides=2),
        nn.relu,
        lambda x: x.reshape(len(x), -1),
        nn.Dense(10),
    ]
)


def loss_fn(params: Any, rows: np.ndarray) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images[rows]), labels[rows]).mean()


def accuracy(params: Any) -> float:
    return float((model.apply(params, images[1400:]).argmax(-1) == labels[1400:]).mean())


def train(params: Any, tx: optax.GradientTransformation, opt_state: Any, steps: int, sparse: bool) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, opt_state: Any, rows: np.ndarray) -> tuple[Any, Any]:
        masked = cs_jax.masked_params(params, opt_state) if sparse else params
        extra = {"masked_params": masked} if sparse else {}
        updates, opt_state = tx.update(jax.grad(loss_fn)(masked, rows), opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(steps)
    for _ in range(steps):
        params, opt_state = step(params, opt_state, rng.integers(0, 1400, 64))
    return params, opt_state


dense_tx = optax.adam(3e-3)
params = model.init(jax.random.key(0), images[:1])
params, _ = train(params, dense_tx, dense_tx.init(params), 300, sparse=False)
print(f"trained: test accuracy {accuracy(params):.3f}")

tx = cs_jax.continuous_sparsification(
    optax.adam(1e-3),
    optax.sgd(0.3, momentum=0.9),
    epochs=20,
    steps_per_epoch=10,
    where=cs_jax.Rule("params/layers_{0,2}/kernel", group="output_channel", target_density=0.5),
)
params, opt_state = train(params, tx, tx.init(params), 200, sparse=True)
opt_state = cs_jax.freeze_ticket(opt_state)
params, opt_state = train(params, tx, opt_state, 100, sparse=True)
masks = cs_jax.current_masks(opt_state)
channels = {name: int(layer["kernel"].any(axis=(0, 1, 2)).sum()) for name, layer in masks["params"].items()}
ticket = cs_jax.masked_params(params, opt_state)
print(f"ticket: density {cs_jax.density(masks):.3f}, channels {channels}, test accuracy {accuracy(ticket):.3f}")
