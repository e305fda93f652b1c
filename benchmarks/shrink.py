"""Comparison of shrunk networks with their tickets, on the whole test set.

    python benchmarks/shrink.py TICKET ... [--data-dir FOLDER]

Prints for each ticket: the largest difference between the outputs of the shrunk network and the ticket, relative to the
largest output, in float32 and in float64; the number of predictions that differ; weights and multiply-adds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from cs_jax.core.errors import ConfigError
from cs_jax.data.load import load_test
from cs_jax.data.stream import Images
from cs_jax.experiment.config import Config
from cs_jax.models.multiply_adds import multiply_adds
from cs_jax.tickets.shrink import shrink
from cs_jax.tickets.ticket import LoadedTicket, load_ticket
from cs_jax.training.executor import Executor

COLUMNS = ("test images", "difference", "in float64", "predictions changed", "weights", "multiply-adds")


def main(paths: list[Path], data_dir: Path | None) -> None:
    table = Table("ticket", title=f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for path in paths:
        table.add_row(str(path), *row(load_ticket(path), data_dir))
    Console(width=140).print(table)


def row(ticket: LoadedTicket, data_dir: Path | None) -> list[str]:
    """Cells of a ticket, in the order of `COLUMNS`."""
    assert ticket.model is not None
    about, constants = ticket.metadata, ticket.metadata["normalization"]
    images, _ = load_test(Config(dataset=about["dataset"], data_dir=data_dir), constants["mean"], constants["std"])
    shape = about["model"]["image_shape"]
    smaller, found = shrink(ticket.model, ticket.variables, shape)
    single = outputs(ticket.model, ticket.variables, images), outputs(smaller, found, images)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), ticket.variables)
        double = outputs(ticket.model, wide, images), outputs(*shrink(ticket.model, wide, shape), images)
    changed = int((single[0].argmax(axis=1) != single[1].argmax(axis=1)).sum())
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) for tree in (ticket.variables, found)]
    costs = [multiply_adds(model, shape) for model in (ticket.model, smaller)]
    shares = (f"{new:,} of {old:,}" for old, new in (sizes, costs))
    return [f"{len(images):,}", *(f"{difference(*pair):.1e}" for pair in (single, double)), str(changed), *shares]


def outputs(model: nn.Module, variables: Any, images: Images) -> np.ndarray:
    return np.asarray(Executor().predict(model, variables, images, batch_size=250))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(one).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tickets", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path, help="folder of prepared data sets")
    given = parser.parse_args()
    try:
        main(given.tickets, given.data_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
