"""How many channels of a network an unstructured mask leaves without weights, and what the network without them saves.

    python benchmarks/channels_left.py [--model vgg16] [--densities 0.03 0.01 0.003]

No network is trained: masks are drawn at random, or keep the largest initial weights of all layers together.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from cs_jax.core import trees
from cs_jax.models import MODELS
from cs_jax.models.multiply_adds import multiply_adds
from cs_jax.tickets.shrink import shrink

IMAGE_SHAPE = (32, 32, 3)


def main(name: str, densities: list[float]) -> None:
    model = MODELS[name](num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)))
    kernels = {path: np.asarray(trees.leaves_by_path(variables["params"])[path]) for path in masked(variables)}
    table = Table("masks", "density", "channels", "weights", "multiply-adds", title=f"{name}, {IMAGE_SHAPE}, initial")
    for density in densities:
        for kind, keep in (("at random", at_random), ("largest initial weights", largest)):
            masks = trees.nest({path: jnp.asarray(mask) for path, mask in keep(kernels, density).items()})
            smaller, found = shrink(model, {**variables, "masks": masks}, IMAGE_SHAPE)
            pairs = [(channels(tree), size(tree["params"])) for tree in (found, variables)]
            costs = [multiply_adds(network, IMAGE_SHAPE) for network in (smaller, model)]
            kept = sum(int(np.count_nonzero(mask)) for mask in jax.tree.leaves(masks)) / size(masks)
            shares = (share(*values) for values in (*zip(*pairs, strict=True), costs))
            table.add_row(kind, f"{kept:.2%}", *shares)
    Console(width=140).print(table)


def masked(variables: Any) -> list[trees.Path]:
    return [*trees.leaves_by_path(variables["masks"])]


def at_random(kernels: dict[trees.Path, np.ndarray], density: float) -> dict[trees.Path, np.ndarray]:
    draw = np.random.default_rng(0)
    return {path: (draw.random(kernel.shape) < density).astype(np.float32) for path, kernel in kernels.items()}


def largest(kernels: dict[trees.Path, np.ndarray], density: float) -> dict[trees.Path, np.ndarray]:
    lowest = np.quantile(np.concatenate([np.abs(kernel).ravel() for kernel in kernels.values()]), 1 - density)
    return {path: (np.abs(kernel) >= lowest).astype(np.float32) for path, kernel in kernels.items()}


def channels(variables: Any) -> int:
    """Output channels of all masked layers."""
    params = trees.leaves_by_path(variables["params"])
    return sum(params[path].shape[-1] for path in masked(variables))


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def share(left: int, whole: int) -> str:
    return f"{left:,} of {whole:,} ({left / whole:.1%})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS], default="vgg16")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.03, 0.01, 0.003])
    given = parser.parse_args()
    main(given.model, given.densities)
