"""Prints a table of the weights that rules select for masks."""

import math

import jax.numpy as jnp
from jaxtyping import PyTree
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cs_jax.core import trees
from cs_jax.core.default_rules import is_float
from cs_jax.core.groups import Grouping
from cs_jax.core.rules import Where, select


def describe(
    params: PyTree, where: Where = None, *, target_density: float | None = None, allow_empty_layers: bool = False
) -> None:
    """Prints a table of all float arrays of a model: masked or not, number of entries, share of all weights.

    In the column "masked", "yes" means that the array has one score per entry, "by 3×3×16×1" that it has one score per
    block of this size, and "2:4" that it has this N:M pattern. Arrays without a mask have "no" if they have two or more
    axes, and "-" if they have fewer.

    Args:
        params: weights of any model: arrays, tracers or `jax.ShapeDtypeStruct` in any pytree.
        where: rules, as for `select`.
        target_density: share of all masked weights that the ticket keeps, in (0, 1], or None; as for `select`.
        allow_empty_layers: whether a ticket may prune all weights of a masked array.

    Raises:
        TypeError: as for `select`.
        ValueError: as for `select`.
    """
    leaves = {path: leaf for path, leaf in trees.leaves_by_path(params).items() if is_float(leaf)}
    selection = select(params, where, target_density=target_density, allow_empty_layers=allow_empty_layers)
    masked = {leaf.path: leaf for leaf in selection.masked}
    sizes = {path: math.prod(jnp.shape(leaf)) for path, leaf in leaves.items()}
    total = sum(sizes.values())
    table = Table("path", "shape", "masked", "scores", "entries", "share", box=box.SIMPLE)
    table.columns[0].overflow = "fold"
    for column in table.columns[3:]:
        column.justify = "right"
    for path, size in sizes.items():
        shape = "×".join(map(str, jnp.shape(leaves[path]))) or "scalar"
        scores = f"{math.prod(masked[path].score_shape):,}" if path in masked else ""
        kind = _kind(masked[path]) if path in masked else "no" if jnp.ndim(leaves[path]) >= 2 else "-"
        table.add_row(escape(trees.name(path)), shape, kind, scores, f"{size:,}", f"{size / total:.1%}")
    console = Console()
    console.print(table, soft_wrap=True)
    console.print(
        f"{selection.size:,} of {total:,} weights have a mask ({selection.size / total:.1%}), in {len(masked)} arrays",
        highlight=False,
    )
    for budget in selection.budgets:
        names = f"all {len(masked)}" if len(budget.members) == len(masked) else f"{len(budget.members)}"
        console.print(
            f"{budget.keep:,} of {budget.size:,} weights to keep in {names} arrays (density {budget.density:.4g})",
            highlight=False,
        )


def _kind(leaf: Grouping) -> str:
    if leaf.pattern is not None:
        return f"{leaf.pattern.n}:{leaf.pattern.m}"
    return "yes" if leaf.group_size == 1 else "by " + "×".join(map(str, leaf.block))
