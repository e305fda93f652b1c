"""Masked weights of a model, with scores and masks; a group of weights may share a score."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from cs_jax.core import masks, trees
from cs_jax.core.arrays import at_least_float32
from cs_jax.core.groups import Grouping
from cs_jax.core.trees import Path


@dataclass(frozen=True)
class Budget:
    """Number of weights to keep in a set of masked arrays.

    Attributes:
        members: indices of the arrays in `Selection.masked`.
        keep: number of weights to keep in all members together.
        size: number of weights in all members together.
    """

    members: tuple[int, ...]
    keep: int
    size: int

    @property
    def density(self) -> float:
        return self.keep / self.size


@jax.tree_util.register_static
@dataclass(frozen=True)
class Selection:
    """Masked weights of a model and their groups; made by `select`.

    The methods are the `cs_jax` functions of the same names, for scores that groups of weights share. Scores and masks
    are nested dictionaries along the paths of the masked weights, without other weights. For a Flax model, this is the
    structure of its "masks" collection. Score arrays have one entry per group; masks have the shapes of their weights.

    A selection is static: hashable, and a pytree without leaves. Methods raise a ValueError if scores do not fit (the
    message names the array), or if a number is out of range (the message names the argument).

    Attributes:
        masked: masked arrays, in the order of the model's leaves.
        budgets: numbers of weights to keep; empty without a target density. An array is in at most one budget.
        allow_empty_layers: whether a ticket may prune all weights of an array that belongs to a budget.
    """

    masked: tuple[Grouping, ...]
    budgets: tuple[Budget, ...] = ()
    allow_empty_layers: bool = False

    def init_scores(self, value: ArrayLike, *, dtype: DTypeLike | None = None) -> PyTree:
        """Scores with the initial value, one for each group.

        Args:
            value: initial score (s0 in the paper), finite and at least -80; may be traced.
            dtype: float dtype of the scores; None: the dtype of each weight array, but at least float32.

        Returns:
            Nested dictionaries with arrays of the groups' shapes.
        """
        shapes = self.nest(jax.ShapeDtypeStruct(leaf.score_shape, leaf.dtype) for leaf in self.masked)
        return masks.init_scores(shapes, value, dtype=dtype)

    def soft_mask(self, scores: PyTree, temperature: ArrayLike, *, init_value: ArrayLike) -> PyTree:
        """Soft masks as `cs_jax.soft_mask`, with the value of each group repeated over its weights.

        With an N:M pattern, the mask is `sigmoid(temperature * (score - boundary) + init_value) / sigmoid(init_value)`.
        The boundary lies between the n-th and the next highest score of the group. At temperature 1 it is the n-th
        highest score, whose mask is 1. As the temperature grows, the boundary tends to the midpoint of the two scores,
        the masks of the n highest scores tend to `1 / sigmoid(init_value)`, and the other masks tend to 0.

        Args:
            scores: nested dictionaries as from `init_scores`.
            temperature: finite scalar > 0, dimensionless; may be traced.
            init_value: initial value of the scores, at least -80; may be traced.

        Returns:
            Nested dictionaries with arrays of the weights' shapes, in the dtypes of the scores.
        """

        def soften(leaf: Grouping, score: jax.Array) -> jax.Array:
            if leaf.pattern is None:
                return masks.soft_mask(score, temperature, init_value=init_value)
            wide = at_least_float32(score)
            shifted = temperature * (wide - lax.stop_gradient(_boundary(leaf, wide, temperature))) + init_value
            return masks.soft_mask(shifted, 1.0, init_value=init_value).astype(score.dtype)

        return self._map(lambda leaf, score: _repeat(leaf, soften(leaf, score)), scores)

    def hard_mask(self, scores: PyTree, *, init_value: ArrayLike) -> PyTree:
        """Hard masks as `cs_jax.hard_mask`, with the value of each group repeated over its weights.

        With an N:M pattern, the n highest of m scores are kept; among equal scores, the first are kept. Budgets are
        ignored: see `target_density.ticket_masks`.

        Args:
            scores: nested dictionaries as from `init_scores`.
            init_value: initial value of the scores, at least -80; may be traced.

        Returns:
            Nested dictionaries with arrays of the weights' shapes, in the dtypes of the scores; entries are 0 or
            `1 / sigmoid(init_value)`.
        """

        def harden(leaf: Grouping, score: jax.Array) -> jax.Array:
            if leaf.pattern is None:
                return masks.hard_mask(score, init_value=init_value)
            kept = jnp.where(_rank(leaf, score) < leaf.pattern.n, 1.0, -1.0).astype(score.dtype)
            return masks.hard_mask(kept, init_value=init_value)

        return self._map(lambda leaf, score: _repeat(leaf, harden(leaf, score)), scores)

    def prune_scores(self, scores: PyTree, temperature: ArrayLike, *, init_value: ArrayLike) -> PyTree:
        """Scores after the reset between rounds, as `cs_jax.prune_scores`.

        With an N:M pattern, kept scores become `init_value`. A dropped score becomes
        `init_value - temperature * distance`. The distance, at least 0, is measured from the midpoint of the n-th and
        the next highest score of the group.

        Args:
            scores: nested dictionaries as from `init_scores`.
            temperature: finite scalar > 0, dimensionless; may be traced.
            init_value: initial value of the scores, at least -80; may be traced.

        Returns:
            Tree like `scores` (structure, shapes, dtypes).
        """

        def reset(leaf: Grouping, score: jax.Array) -> jax.Array:
            if leaf.pattern is None:
                return masks.prune_scores(score, temperature, init_value=init_value)
            wide = at_least_float32(score)
            distance = jnp.where(_rank(leaf, score) < leaf.pattern.n, 0, wide - _boundary(leaf, wide, jnp.inf))
            below = masks.prune_scores(distance, temperature, init_value=0.0)
            return (below + jnp.asarray(init_value, wide.dtype)).astype(score.dtype)

        return self._map(reset, scores)

    def expand(self, values: PyTree) -> PyTree:
        """Arrays of the weights' shapes, with the value of each group repeated over its weights.

        Args:
            values: nested dictionaries with arrays of the scores' shapes, any dtype.
        """
        return self._map(_repeat, values)

    def check_masks(self, found: PyTree) -> None:
        """Raises a ValueError unless `found` has exactly one mask for each masked array, of the same shape."""
        _check_shapes(found, {leaf.path: leaf.shape for leaf in self.masked})

    @property
    def size(self) -> int:
        """Number of masked weights."""
        return sum(leaf.size for leaf in self.masked)

    def _map(self, function: Callable[[Grouping, Any], Any], scores: PyTree) -> PyTree:
        return self.nest(map(function, self.masked, self.score_leaves(scores)))

    def nest(self, arrays: Iterable[Any]) -> PyTree:
        """Nested dictionaries of arrays that are given in the order of `masked`."""
        return trees.nest({leaf.path: array for leaf, array in zip(self.masked, arrays, strict=True)})

    def score_leaves(self, scores: PyTree) -> list[Any]:
        """Score arrays in the order of `masked`."""
        found = trees.leaves_by_path(scores)
        expected = {leaf.path: leaf for leaf in self.masked}
        for path in found:
            if path not in expected:
                raise ValueError(f"scores {trees.name(path)!r}: no masked weights have this path; remove these scores")
        for path, leaf in expected.items():
            if path not in found:
                raise ValueError(f"scores {leaf.name!r} missing: must have shape {leaf.score_shape}")
            shape = jnp.shape(found[path])
            if shape != leaf.score_shape:
                raise ValueError(
                    f"scores {leaf.name!r} of shape {shape}: must have shape {leaf.score_shape}, for weights of shape "
                    f"{leaf.shape} in groups of {leaf.block}"
                )
        return [found[leaf.path] for leaf in self.masked]


def _check_shapes(found: PyTree, expected: dict[Path, tuple[int, ...]]) -> None:
    shapes = {path: jnp.shape(mask) for path, mask in trees.leaves_by_path(found).items()}
    for path, shape in expected.items():
        if path not in shapes:
            raise ValueError(f"masks {trees.name(path)!r} missing: must have shape {shape}")
        if shapes[path] != shape:
            raise ValueError(f"masks {trees.name(path)!r} of shape {shapes[path]}: must have shape {shape}")
    for path in shapes.keys() - expected.keys():
        raise ValueError(f"masks {trees.name(path)!r}: no masked weights have this path; remove these masks")


def _repeat(leaf: Grouping, array: jax.Array) -> jax.Array:
    """Values of the groups repeated over the weights of each group."""
    if leaf.group_size == 1:
        return array
    if all(groups == 1 or step == 1 for groups, step in zip(leaf.score_shape, leaf.block, strict=True)):
        return jnp.broadcast_to(array, leaf.shape)  # faster than the reshapes below
    separated = [size for groups in leaf.score_shape for size in (groups, 1)]
    boxes = [size for pair in zip(leaf.score_shape, leaf.block, strict=True) for size in pair]
    return jnp.broadcast_to(array.reshape(separated), boxes).reshape(leaf.shape)


def _in_groups(leaf: Grouping, array: jax.Array) -> jax.Array:
    """The array with the N:M groups along a new last axis."""
    assert leaf.pattern is not None
    moved = jnp.moveaxis(array, leaf.pattern_axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, leaf.pattern.m)


def _out_of_groups(leaf: Grouping, groups: jax.Array) -> jax.Array:
    return jnp.moveaxis(groups.reshape(*groups.shape[:-2], -1), -1, leaf.pattern_axis)


def _rank(leaf: Grouping, score: jax.Array) -> jax.Array:
    """Rank of every entry in its N:M group: 0 for the highest score; of equal scores, the first one ranks higher."""
    order = jnp.argsort(-_in_groups(leaf, score), axis=-1, stable=True)
    return _out_of_groups(leaf, jnp.argsort(order, axis=-1, stable=True))


def _boundary(leaf: Grouping, score: jax.Array, temperature: ArrayLike) -> jax.Array:
    """Boundary between kept and dropped scores in the N:M group of every entry.

    At temperature 1 the boundary is the n-th highest score. As the temperature grows, it tends to the midpoint of the
    n-th and the next highest score. If n equals m, the boundary tends to the lowest score minus 1.
    """
    assert leaf.pattern is not None
    n, m = leaf.pattern.n, leaf.pattern.m
    groups = _in_groups(leaf, score)
    ascending = jnp.sort(groups, axis=-1)
    lowest_kept = ascending[..., m - n, None]
    highest_dropped = ascending[..., m - n - 1, None] if n < m else lowest_kept - 2
    gap = (lowest_kept - highest_dropped) / 2
    boundary = lowest_kept - gap * (1 - 1 / jnp.asarray(temperature, score.dtype))
    return _out_of_groups(leaf, jnp.broadcast_to(boundary, groups.shape))


# Flax serialization stores nothing for a selection, and restoring keeps the selection of the target state.
serialization.register_serialization_state(Selection, lambda selection: {}, lambda selection, _: selection)
