"""The masked weights of a model, and their scores and masks where a score can stand for a group of weights."""

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


@dataclass(frozen=True)
class Budget:
    """How many weights some of the masked arrays may keep together.

    Attributes:
        members: indices into `Selection.masked`.
        keep: weights to keep, of all the members together.
        size: weights of all members.
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
    """Which weights are masked and what their scores stand for; made by `select`.

    Its methods are the functions of the same names for scores that may be shared by groups of weights. Scores and
    masks are nested dictionaries along the paths of the weights, which hold masked weights alone: for a Flax model,
    the structure of its "masks" collection. Scores have the shape of their groups, masks that of their weights.

    It is static: hashable, and a pytree without leaves.

    Attributes:
        masked: the masked arrays, in the order of the model's leaves.
        budgets: how many weights they may keep; none where no density was asked for. No array is in two.
        allow_empty_layers: whether a budget may leave an array without any weight.
    """

    masked: tuple[Grouping, ...]
    budgets: tuple[Budget, ...] = ()
    allow_empty_layers: bool = False

    def init_scores(self, value: ArrayLike, *, dtype: DTypeLike | None = None) -> PyTree:
        """Scores of `value`, one for each group.

        Args:
            value: initial score (s0 in the paper), finite and at least -80; may be traced.
            dtype: float dtype of the scores; by default that of each weight array, at least float32.

        Raises:
            ValueError: `value` or `dtype` is out of range.
        """
        shapes = self.nest(jax.ShapeDtypeStruct(leaf.score_shape, leaf.dtype) for leaf in self.masked)
        return masks.init_scores(shapes, value, dtype=dtype)

    def soft_mask(self, scores: PyTree, temperature: ArrayLike, *, init_value: ArrayLike) -> PyTree:
        """`cs_jax.soft_mask`, each group's value repeated over its weights.

        Under an N:M pattern a score counts by its distance to the boundary between the kept and the dropped of its
        group, `sigmoid(temperature * (score - boundary) + init_value) / sigmoid(init_value)`, so that as the
        temperature grows n of m are left. The boundary starts at the n-th highest score, whose mask is 1 at
        temperature 1, and tends to the middle between it and the next one.

        Args:
            scores: as `init_scores` makes them.
            temperature: scalar > 0, may be traced.
            init_value: the scores' initial value, may be traced.

        Returns:
            Masks of the weights' shapes, in the scores' dtypes.
        """

        def soften(leaf: Grouping, score: jax.Array) -> jax.Array:
            if leaf.pattern is None:
                return masks.soft_mask(score, temperature, init_value=init_value)
            wide = at_least_float32(score)
            evidence = temperature * (wide - lax.stop_gradient(_boundary(leaf, wide, temperature))) + init_value
            return masks.soft_mask(evidence, 1.0, init_value=init_value).astype(score.dtype)

        return self._map(lambda leaf, score: _repeat(leaf, soften(leaf, score)), scores)

    def hard_mask(self, scores: PyTree, *, init_value: ArrayLike) -> PyTree:
        """`cs_jax.hard_mask`, each group's value repeated over its weights; n of m under an N:M pattern.

        Equal scores in an N:M group are kept from the first on. Budgets have no part in this: see `ticket_masks`.

        Args:
            scores: as `init_scores` makes them.
            init_value: the scores' initial value, may be traced.

        Returns:
            Masks of the weights' shapes: 0 or `1 / sigmoid(init_value)`.
        """

        def harden(leaf: Grouping, score: jax.Array) -> jax.Array:
            if leaf.pattern is None:
                return masks.hard_mask(score, init_value=init_value)
            kept = jnp.where(_rank(leaf, score) < leaf.pattern.n, 1.0, -1.0).astype(score.dtype)
            return masks.hard_mask(kept, init_value=init_value)

        return self._map(lambda leaf, score: _repeat(leaf, harden(leaf, score)), scores)

    def prune_scores(self, scores: PyTree, temperature: ArrayLike, *, init_value: ArrayLike) -> PyTree:
        """`cs_jax.prune_scores`; under an N:M pattern kept scores start again, dropped ones stay below them.

        There a dropped score becomes `init_value - temperature * distance`, with its distance to the boundary.
        """

        def reset(leaf: Grouping, score: jax.Array) -> jax.Array:
            if leaf.pattern is None:
                return masks.prune_scores(score, temperature, init_value=init_value)
            wide = at_least_float32(score)
            distance = jnp.where(_rank(leaf, score) < leaf.pattern.n, 0, wide - _boundary(leaf, wide, jnp.inf))
            evidence = masks.prune_scores(distance, temperature, init_value=0.0)
            return (evidence + jnp.asarray(init_value, wide.dtype)).astype(score.dtype)

        return self._map(reset, scores)

    def expand(self, values: PyTree) -> PyTree:
        """A value for each group, repeated over the weights of the group.

        Args:
            values: of the scores' shapes.
        """
        return self._map(_repeat, values)

    def check_masks(self, found: PyTree) -> None:
        """Raises a ValueError that names the array, unless `found` are masks of the masked weights' shapes."""
        shapes = {path: jnp.shape(mask) for path, mask in trees.leaves_by_path(found).items()}
        wanted = {leaf.path: leaf.shape for leaf in self.masked}
        for path in shapes.keys() | wanted.keys():
            if shapes.get(path) != wanted.get(path):
                got, want = (f"shape {known[path]}" if path in known else "none" for known in (shapes, wanted))
                raise ValueError(f"masks {trees.name(path)!r}: got {got}, wanted {want}")

    @property
    def size(self) -> int:
        """Masked weights in all."""
        return sum(leaf.size for leaf in self.masked)

    def _map(self, function: Callable[[Grouping, Any], Any], scores: PyTree) -> PyTree:
        return self.nest(map(function, self.masked, self.score_leaves(scores)))

    def nest(self, arrays: Iterable[Any]) -> PyTree:
        """The tree of arrays that are in the order of `masked`."""
        return trees.nest({leaf.path: array for leaf, array in zip(self.masked, arrays, strict=True)})

    def score_leaves(self, scores: PyTree) -> list[Any]:
        """Score arrays in the order of `masked`.

        Raises:
            ValueError: a score is missing, has no weights, or has another shape than its groups; names it.
        """
        found = trees.leaves_by_path(scores)
        wanted = {leaf.path: leaf for leaf in self.masked}
        for path in found:
            if path not in wanted:
                raise ValueError(f"scores {trees.name(path)!r}: no such weights are masked")
        for path, leaf in wanted.items():
            if path not in found:
                raise ValueError(f"scores hold nothing for the masked weights {leaf.name!r}")
            if jnp.shape(found[path]) != leaf.score_shape:
                raise ValueError(
                    f"scores {leaf.name!r} have shape {jnp.shape(found[path])}, wanted {leaf.score_shape}: "
                    f"weights of shape {leaf.shape} in groups of {leaf.block}"
                )
        return [found[leaf.path] for leaf in self.masked]


def _repeat(leaf: Grouping, array: jax.Array) -> jax.Array:
    """A value for each group, repeated over the group's weights."""
    if leaf.group_size == 1:
        return array
    whole = all(groups == 1 or step == 1 for groups, step in zip(leaf.score_shape, leaf.block, strict=True))
    if whole:
        return jnp.broadcast_to(array, leaf.shape)
    apart = [size for groups in leaf.score_shape for size in (groups, 1)]
    boxes = [size for pair in zip(leaf.score_shape, leaf.block, strict=True) for size in pair]
    return jnp.broadcast_to(array.reshape(apart), boxes).reshape(leaf.shape)


def _in_groups(leaf: Grouping, array: jax.Array) -> jax.Array:
    """The N:M groups of an array along a new last axis."""
    assert leaf.pattern is not None
    moved = jnp.moveaxis(array, leaf.pattern_axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, leaf.pattern.m)


def _out_of_groups(leaf: Grouping, groups: jax.Array) -> jax.Array:
    return jnp.moveaxis(groups.reshape(*groups.shape[:-2], -1), -1, leaf.pattern_axis)


def _rank(leaf: Grouping, score: jax.Array) -> jax.Array:
    """Place of every entry in its N:M group, 0 for the highest score; the first of equals comes first."""
    order = jnp.argsort(-_in_groups(leaf, score), axis=-1, stable=True)
    return _out_of_groups(leaf, jnp.argsort(order, axis=-1, stable=True))


def _boundary(leaf: Grouping, score: jax.Array, temperature: ArrayLike) -> jax.Array:
    """What the scores of each entry's N:M group are measured from.

    The n-th highest score at temperature 1, towards infinity the middle between it and the next; where there is no
    next, because n is m, 1 below the lowest.
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


# A state that holds a selection is serialized as it is: the selection is made anew with the optimizer.
serialization.register_serialization_state(Selection, lambda selection: {}, lambda selection, _: selection)
