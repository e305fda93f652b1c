"""Time and memory of steps with the optax transformation, compared with plain optax on the same model.

    python benchmarks/transformation.py [--repeats 15]

Two models: the ResNet-20 of `cs_jax.models` with plain Flax layers on random images, and the transformer of
`examples/transformer.py`. Search steps are timed without and with a target density. With a target, scores are shifted
after every tenth step. Ticket steps have fixed masks. All steps of a model run interleaved in one process.
"""

import dataclasses
import pathlib
import runpy
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from timing import Stepper, check_positive, interleave, median_ratio, start

import cs_jax
from cs_jax.models import MODELS

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
STEPS_PER_EPOCH = 10

Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    repeats: int = 15
    """Timed repeats of the ResNet steps, after two warm-up repeats; ten times this number for the transformer."""

    batch_size: int = 128
    """Images per ResNet step."""

    def __post_init__(self) -> None:
        check_positive(self, "repeats", "batch_size")


def main(settings: Settings) -> None:
    table = Table(
        "model",
        "step",
        "median ms",
        "min ms",
        "ratio to plain",
        "state, bytes per weight",
        "peak MiB",
        title=f"{jax.devices()[0].device_kind}, jax {jax.__version__}, n={settings.repeats}",
    )
    measure(table, "resnet20", *resnet(settings.batch_size), settings.repeats)
    measure(table, "transformer", *transformer(), 10 * settings.repeats)
    Console(width=120).print(table)


def resnet(batch_size: int) -> tuple[Loss, Any, Any, Any, optax.GradientTransformation]:
    model = MODELS["resnet20"](conv=nn.Conv)
    images = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
    labels = jnp.arange(batch_size) % 10
    variables = model.init(jax.random.key(1), images[:1], train=False)

    def loss_fn(params: Any, batch_stats: Any, batch: Any) -> tuple[jax.Array, Any]:
        found = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(found, batch[0], train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), batch[1]).mean()
        return loss, updates["batch_stats"]

    weight_tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
    return loss_fn, variables["params"], variables["batch_stats"], (images, labels), weight_tx


def transformer() -> tuple[Loss, Any, Any, Any, optax.GradientTransformation]:
    example = runpy.run_path(str(EXAMPLES / "transformer.py"))
    rows = np.random.default_rng(0).integers(0, 128, (example["BATCH"], example["CONTEXT"] + 1))
    params = example["Transformer"]().init(jax.random.key(0), rows[:1, :-1])["params"]
    loss_fn = example["loss_fn"]
    return lambda params, _, batch: (loss_fn(params, batch), {}), params, {}, jnp.asarray(rows), optax.adam(3e-3)


def measure(
    table: Table,
    name: str,
    loss_fn: Loss,
    params: Any,
    model_state: Any,
    batch: Any,
    weight_tx: optax.GradientTransformation,
    repeats: int,
) -> None:
    """Times the plain, search and ticket steps of a model and adds a row for each."""

    def sparse(target: float | None) -> optax.GradientTransformation:
        return cs_jax.continuous_sparsification(
            weight_tx,
            optax.sgd(0.1, momentum=0.9),
            epochs=100,
            steps_per_epoch=STEPS_PER_EPOCH,
            target_density=target,
            where="**/kernel",
        )

    key, searched = jax.random.key(0), sparse(0.2).init(params)
    masks = jax.tree.map(
        lambda mask: 2.0 * jax.random.bernoulli(key, 0.2, mask.shape).astype(mask.dtype), cs_jax.current_masks(searched)
    )
    ticket = cs_jax.freeze_ticket(searched, masks=masks)
    kinds: dict[str, tuple[optax.GradientTransformation, Any]] = {
        "plain": (weight_tx, weight_tx.init(params)),
        "search": (sparse(None), sparse(None).init(params)),
        "search, target": (sparse(0.2), sparse(0.2).init(params)),
        "ticket": (sparse(0.2), ticket),
    }
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    steps = {}
    for kind, (tx, opt_state) in kinds.items():
        step = make_step(loss_fn, tx, kind != "plain")
        carry = jax.tree.map(jnp.copy, (params, model_state, opt_state))
        steps[kind] = Stepper(jax.jit(step, donate_argnums=0).lower(carry, batch).compile(), carry, (batch,))
    times = interleave(steps, repeats)
    for kind, seconds in times.items():
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(kinds[kind][1]))
        table.add_row(
            name,
            kind,
            f"{1e3 * statistics.median(seconds):.1f}",
            f"{1e3 * min(seconds):.1f}",
            f"{median_ratio(seconds, times['plain']):.3f}",
            f"{size / weights:.2f}",
            f"{steps[kind].peak_bytes() / 2**20:.1f}",
        )


def make_step(loss_fn: Loss, tx: optax.GradientTransformation, sparse: bool) -> Callable:
    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, model_state, opt_state = carry
        at = cs_jax.masked_params(params, opt_state) if sparse else params
        (loss, model_state), gradient = jax.value_and_grad(loss_fn, has_aux=True)(at, model_state, batch)
        extra = {"masked_params": at} if sparse else {}
        updates, opt_state = tx.update(gradient, opt_state, params, **extra)
        return (optax.apply_updates(params, updates), model_state, opt_state), loss

    return step


if __name__ == "__main__":
    start(main, Settings, __doc__)
