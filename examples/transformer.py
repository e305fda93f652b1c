"""Sparsify a small decoder-only transformer to density 0.2, on source files of Python's standard library.

Run it: `python examples/transformer.py`.

The model has plain Flax layers. The optax transformation masks the attention and MLP kernels. The first four fifths of
the steps train scores and weights together. The last fifth trains the kept weights with fixed masks. For comparison, a
dense model is trained on the same batches.
"""

import pathlib
import sysconfig
import time
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

import cs_jax

DENSITY, STEPS, SEARCH_STEPS, EPOCHS = 0.2, 500, 400, 40
CONTEXT, BATCH, WIDTH, LAYERS, HEADS = 64, 24, 64, 2, 4
VOCABULARY = 128  # ASCII
FILES = ("argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "difflib", "tokenize")
LAST_FILE = "textwrap"  # validation data


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        causal = nn.make_causal_mask(x[..., 0])
        x += nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.LayerNorm()(x), mask=causal)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = self.param("positions", nn.initializers.normal(0.02), (1, CONTEXT, WIDTH))
        x = nn.Embed(VOCABULARY, WIDTH)(tokens) + positions
        for index in range(LAYERS):
            x = Block(name=f"block_{index}")(x)
        return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm()(x))


def read(*modules: str) -> np.ndarray:
    """Source of modules of the standard library as ASCII codes, with spaces in place of non-ASCII bytes."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    text = np.frombuffer(b"".join((folder / f"{name}.py").read_bytes() for name in modules), np.uint8)
    return np.where(text < VOCABULARY, text, 32).astype(np.int32)


def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
    logits = Transformer().apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train(params: Any, tx: optax.GradientTransformation, text: np.ndarray, sparse: bool) -> Any:
    """Weights after STEPS updates; if `sparse`, multiplied by the masks of the ticket."""

    @jax.jit
    def step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any]:
        masked = cs_jax.masked_params(params, opt_state) if sparse else params
        gradient = jax.grad(loss_fn)(masked, tokens)
        extra = {"masked_params": masked} if sparse else {}
        updates, opt_state = tx.update(gradient, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    starts = np.random.default_rng(0).integers(0, len(text) - CONTEXT - 1, (STEPS, BATCH))
    for number, rows in enumerate(starts):
        if sparse and number == SEARCH_STEPS:
            opt_state = cs_jax.freeze_ticket(opt_state)
        params, opt_state = step(params, opt_state, text[rows[:, None] + np.arange(CONTEXT + 1)])
    if sparse:
        print(f"density {cs_jax.density(cs_jax.current_masks(opt_state)):.4f} of the attention and MLP kernels")
    return cs_jax.masked_params(params, opt_state) if sparse else params


def main() -> None:
    started = time.perf_counter()
    text, unseen = read(*FILES), read(LAST_FILE)
    params = Transformer().init(jax.random.key(0), text[None, :CONTEXT])["params"]
    weight_tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, STEPS))
    tx = cs_jax.continuous_sparsification(
        weight_tx,
        optax.adam(3e-3),
        epochs=EPOCHS,
        steps_per_epoch=SEARCH_STEPS // EPOCHS,
        target_density=DENSITY,
    )
    windows = unseen[: len(unseen) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    dense = float(loss_fn(train(params, weight_tx, text, sparse=False), windows))
    sparse = float(loss_fn(train(params, tx, text, sparse=True), windows))
    print(f"validation loss dense {dense:.4f}, sparse {sparse:.4f} ({sparse / dense - 1:+.1%})")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
