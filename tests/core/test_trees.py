"""Leaves by name in random trees of all containers, and masks that find their weights there."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import cs_jax
from cs_jax.core import trees

KEYS = st.sampled_from(["a", "b", "layer_1", "x/y", "~"])
LEAVES = st.builds(
    lambda shape, dtype: np.ones(shape, dtype),
    st.lists(st.integers(1, 3), max_size=3).map(tuple),
    st.sampled_from([np.float32, np.float16, np.int32]),
)
TREES = st.recursive(
    LEAVES | st.none(),
    lambda parts: st.one_of(
        st.dictionaries(KEYS, parts, max_size=3), st.lists(parts, max_size=3), st.lists(parts, max_size=2).map(tuple)
    ),
    max_leaves=8,
)


@hypothesis.given(TREES)
@hypothesis.settings(max_examples=100, deadline=None)
def test_every_leaf_has_its_own_path_in_the_order_of_leaves(tree: Any) -> None:
    found = trees.leaves_by_path(tree)
    assert all(mine is theirs for mine, theirs in zip(found.values(), jax.tree.leaves(tree), strict=True))
    names = [
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in jax.tree.leaves_with_path(tree)
    ]
    assert list(found) == names


@hypothesis.given(TREES)
@hypothesis.settings(max_examples=100, deadline=None)
def test_nested_leaves_keep_their_paths(tree: Any) -> None:
    found = trees.leaves_by_path(tree)
    again = trees.leaves_by_path(trees.nest(found)) if found else {}
    assert again.keys() == found.keys() and all(again[path] is leaf for path, leaf in found.items())


@hypothesis.given(TREES, st.randoms(use_true_random=False))
@hypothesis.settings(max_examples=100, deadline=None)
def test_masks_in_nested_dictionaries_find_their_weights_and_leave_the_others_alone(tree: Any, random: Any) -> None:
    found = trees.leaves_by_path(tree)
    floats = [path for path, leaf in found.items() if leaf.dtype != np.int32]
    chosen = [path for path in floats if random.random() < 0.5]
    masks = trees.nest({path: 2 * np.ones(found[path].shape, np.float32) for path in chosen}) if chosen else {}
    masked = cs_jax.apply_masks(tree, masks)
    assert jax.tree.structure(masked) == jax.tree.structure(tree)
    for path, leaf in trees.leaves_by_path(masked).items():
        if path in chosen:
            assert leaf.dtype == found[path].dtype and bool((leaf == 2).all())
        else:
            assert leaf is found[path]


@hypothesis.given(TREES)
@hypothesis.settings(max_examples=100, deadline=None)
def test_the_default_masks_just_the_named_float_matrices(tree: Any) -> None:
    params = {"net": tree, "kernel": jnp.ones((2, 2))}

    def is_matrix(path: Any, leaf: Any) -> bool:
        long = sum(size > 1 for size in leaf.shape)
        return leaf.ndim >= 2 and leaf.dtype != np.int32 and (path[-1] == "kernel" or (path[-1].isdigit() and long > 1))

    expected = {path for path, leaf in trees.leaves_by_path(params).items() if is_matrix(path, leaf)}
    assert {leaf.path for leaf in cs_jax.select(params).masked} == expected
