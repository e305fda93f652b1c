"""Scores of groups and the masks made of them, over random trees, shapes, groups and dtypes."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cs_jax
from cs_jax import NM, Axes, Block, Rule
from cs_jax.core import masks, trees
from cs_jax.core.selection import Selection

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@st.composite
def selections(draw: st.DrawFn) -> tuple[Any, Selection]:
    """Weights of one to three masked arrays, each with its own group, and unmasked ones among them."""
    params: dict[str, Any] = {"bias": np.ones(3, np.float32), "count": np.arange(2)}
    rules = []
    for index in range(draw(st.integers(1, 3))):
        group, shape = draw(grouped_shapes())
        params[f"layer{index}"] = {
            "kernel": jnp.ones(shape, draw(st.sampled_from(DTYPES))),
            "bias": jnp.ones(shape[-1]),
        }
        stacked = draw(st.integers(0, len(shape) - 2))
        rules.append(Rule(f"layer{index}/kernel", group=group, stacked=stacked))
    return params, cs_jax.select(params, rules)


@st.composite
def grouped_shapes(draw: st.DrawFn) -> tuple[Any, tuple[int, ...]]:
    ndim = draw(st.integers(2, 4))
    sizes = draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    boxes = draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    kind = draw(st.sampled_from(["entry", "output_channel", "input_channel", "axes", "block", "pattern"]))
    if kind == "block":
        return Block(tuple(boxes)), tuple(size * box for size, box in zip(sizes, boxes, strict=True))
    if kind == "axes":
        return Axes(tuple(draw(st.sets(st.integers(-ndim, ndim - 1), max_size=2)))), tuple(sizes)
    if kind == "pattern":
        m = draw(st.integers(1, 4))
        sizes[-2] *= m
        return NM(draw(st.integers(1, m)), m), tuple(sizes)
    return kind, tuple(sizes)


def random_scores(selection: Selection, seed: int, ties: bool = True) -> Any:
    """Scores of few different values, so that there are ties, or of many."""
    rng = np.random.default_rng(seed)
    scores = selection.init_scores(0.0)
    draw = (lambda shape: rng.integers(-2, 3, shape) / 4) if ties else (lambda shape: rng.normal(size=shape))
    return jax.tree.map(lambda score: jnp.asarray(draw(score.shape), score.dtype), scores)


def boxes(leaf: Any, mask: jax.Array) -> np.ndarray:
    """Entries of a mask, a row for each group."""
    apart = [size for pair in zip(leaf.score_shape, leaf.block, strict=True) for size in pair]
    order = [*range(0, len(apart), 2), *range(1, len(apart), 2)]
    return np.asarray(mask, np.float64).reshape(apart).transpose(order).reshape(-1, leaf.group_size)


@hypothesis.given(selections(), st.integers(0, 9))
@hypothesis.settings(max_examples=25, deadline=None)
def test_masks_of_random_groups_keep_what_their_rules_say(drawn: Any, seed: int) -> None:
    """One test of four properties: most of its time is compilation for new shapes."""
    params, selection = drawn
    scores = random_scores(selection, seed)
    soft, hard = selection.soft_mask(scores, 3.0, init_value=0.0), selection.hard_mask(scores, init_value=0.0)
    for made in (soft, hard):
        check_constant_within_groups(selection, made)
    check_patterns(selection, hard)
    check_apply_masks(params, selection, hard)
    check_counts(selection, scores, hard)


def check_constant_within_groups(selection: Selection, made: Any) -> None:
    """Masks have the shapes of the weights and one value in each group."""
    by_path = trees.leaves_by_path(made)
    assert {(path, leaf.shape) for path, leaf in by_path.items()} == {
        (leaf.path, leaf.shape) for leaf in selection.masked
    }
    for leaf in selection.masked:
        rows = boxes(leaf, by_path[leaf.path])
        assert (rows == rows[:, :1]).all()


def check_patterns(selection: Selection, hard: Any) -> None:
    """N:M patterns keep exactly n of m, with and without ties."""
    for leaf in selection.masked:
        if leaf.pattern is None:
            continue
        along = np.moveaxis(np.asarray(trees.leaves_by_path(hard)[leaf.path]), leaf.pattern_axis, -1)
        kept = (along.reshape(-1, leaf.pattern.m) > 0).sum(axis=1)
        assert (kept == leaf.pattern.n).all()


def check_apply_masks(params: Any, selection: Selection, hard: Any) -> None:
    """`apply_masks` keeps structure and dtypes, and returns unmasked leaves themselves."""
    masked = cs_jax.apply_masks(params, hard)
    assert jax.tree.structure(masked) == jax.tree.structure(params)
    paths = {leaf.path for leaf in selection.masked}
    before, after = trees.leaves_by_path(params), trees.leaves_by_path(masked)
    assert {path: leaf.dtype for path, leaf in before.items()} == {path: leaf.dtype for path, leaf in after.items()}
    assert all(after[path] is leaf for path, leaf in before.items() if path not in paths)
    assert paths < set(before)


def check_counts(selection: Selection, scores: Any, hard: Any) -> None:
    """Density and penalty count weights, not groups."""
    kept = 0
    for leaf, score in zip(selection.masked, selection.score_leaves(scores), strict=True):
        if leaf.pattern:
            kept += leaf.size * leaf.pattern.n // leaf.pattern.m
        else:
            kept += int((np.asarray(score) > 0).sum()) * leaf.group_size
    assert cs_jax.density(hard) == kept / selection.size
    assert float(cs_jax.mask_penalty(hard)) == 2.0 * kept


@hypothesis.given(selections())
@hypothesis.settings(max_examples=20, deadline=None)
def test_fresh_masks_are_one(drawn: Any) -> None:
    _, selection = drawn
    for init_value in (-0.3, 0.0, 0.2):
        soft = selection.soft_mask(selection.init_scores(init_value), 1.0, init_value=init_value)
        for mask in jax.tree.leaves(soft):
            np.testing.assert_allclose(mask, 1.0, rtol=1e-6)


@hypothesis.given(selections(), st.integers(0, 9))
@hypothesis.settings(max_examples=20, deadline=None)
def test_soft_masks_tend_to_hard_ones(drawn: Any, seed: int) -> None:
    _, selection = drawn
    scores = random_scores(selection, seed, ties=False)
    soft = selection.soft_mask(scores, 1e7, init_value=0.1)
    hard = selection.hard_mask(scores, init_value=0.1)
    for leaf in selection.masked:
        a, b = (trees.leaves_by_path(made)[leaf.path] for made in (soft, hard))
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_without_groups_the_methods_are_the_functions() -> None:
    params = {"a": {"kernel": np.ones((3, 4), np.float32)}, "b": {"kernel": np.ones((2, 2), np.float32)}}
    selection = cs_jax.select(params)
    scores = random_scores(selection, 0, ties=False)
    pairs = [
        (selection.soft_mask(scores, 2.0, init_value=0.1), masks.soft_mask(scores, 2.0, init_value=0.1)),
        (selection.hard_mask(scores, init_value=0.1), masks.hard_mask(scores, init_value=0.1)),
        (selection.prune_scores(scores, 2.0, init_value=0.1), masks.prune_scores(scores, 2.0, init_value=0.1)),
        (selection.init_scores(0.1), masks.init_scores(params, 0.1)),
    ]
    for ours, theirs in pairs:
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_group_gets_the_sum_of_its_weights_gradients() -> None:
    params = {"kernel": jnp.arange(8.0).reshape(2, 4)}
    selection = cs_jax.select(params, Rule(group=Block((2, 2))))
    scores = selection.init_scores(0.0)

    def loss(scores: Any) -> jax.Array:
        return cs_jax.apply_masks(params, selection.soft_mask(scores, 1.0, init_value=0.0))["kernel"].sum()

    gradient = jax.grad(loss)(scores)["kernel"]
    np.testing.assert_allclose(gradient, [[(0 + 1 + 4 + 5) / 2, (2 + 3 + 6 + 7) / 2]], rtol=1e-6)


@pytest.mark.parametrize("init_value", [-0.1, 0.0, 0.1])
@pytest.mark.parametrize("column", [[-0.0003, -0.00028, 0.0002, 0.0003], [0.1, 0.05, -0.05, -0.1], [1, 1, 1, 1]])
def test_what_a_pattern_dropped_stays_dropped_after_the_reset_and_what_it_kept_restarts_at_one(
    column: list[float], init_value: float
) -> None:
    selection = cs_jax.select({"kernel": np.ones((4, 1), np.float32)}, Rule(group=NM(2, 4)))
    scores = {"kernel": jnp.asarray(column, jnp.float32)[:, None]}
    after = selection.prune_scores(scores, 200.0, init_value=init_value)
    hard = selection.hard_mask(scores, init_value=0.0)["kernel"]
    np.testing.assert_array_equal(selection.hard_mask(after, init_value=0.0)["kernel"], hard)
    restarted = selection.soft_mask(after, 1.0, init_value=init_value)["kernel"]
    np.testing.assert_allclose(restarted[np.asarray(hard) > 0], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "scores, message",
    [
        ({}, r"scores 'kernel' missing: must have shape \(1, 4\)"),
        (
            {"kernel": jnp.ones((1, 1))},
            r"scores 'kernel' of shape \(1, 1\): must have shape \(1, 4\), for weights of shape",
        ),
        (
            {"kernel": jnp.ones((1, 4)), "bias": jnp.ones(4)},
            "scores 'bias': no masked weights have this path; remove these scores",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_name(scores: Any, message: str) -> None:
    selection = cs_jax.select({"kernel": np.ones((2, 4))}, Rule(group="output_channel"))
    with pytest.raises(ValueError, match=message):
        selection.soft_mask(scores, 1.0, init_value=0.0)
