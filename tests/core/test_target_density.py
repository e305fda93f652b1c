"""Tickets with exactly the target density, and scores that track the target in training."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cs_jax
from cs_jax import CollapsedLayerWarning, Rule
from cs_jax.core import target_density, trees
from cs_jax.core.selection import Selection

pytestmark = pytest.mark.filterwarnings("ignore::cs_jax.CollapsedLayerWarning")


def selection_of(*shapes: tuple[int, ...], target: float, group: Any = "entry", **arguments: Any) -> Selection:
    params = {f"layer{index}": {"kernel": np.ones(shape, np.float32)} for index, shape in enumerate(shapes)}
    return cs_jax.select(params, Rule(group=group), target_density=target, **arguments)


def scores_of(selection: Selection, *values: Any) -> Any:
    return trees.nest(
        {
            leaf.path: jnp.asarray(value, jnp.float32).reshape(leaf.score_shape)
            for leaf, value in zip(selection.masked, values, strict=True)
        }
    )


def kept(ticket: Any) -> list[list[int]]:
    return [np.flatnonzero(np.asarray(mask)).tolist() for mask in jax.tree.leaves(ticket)]


def ticket_of(selection: Selection, scores: Any) -> list[list[int]]:
    return kept(target_density.ticket_masks(selection, scores, init_value=0.0))


def test_the_highest_scores_are_kept_wherever_they_are() -> None:
    selection = selection_of((2, 3), (1, 4), target=0.4)
    scores = scores_of(selection, [-5, 1, 2, -9, 0, -1], [3, -7, -8, -6])
    assert ticket_of(selection, scores) == [[1, 2, 4], [0]]


def test_ties_go_to_the_first_array_and_entry() -> None:
    selection = selection_of((2, 2), (2, 2), target=0.5)
    assert ticket_of(selection, scores_of(selection, [1, 1, 1, 1], [1, 1, 1, 2])) == [[0, 1, 2], [3]]


def test_every_array_keeps_its_best_score_unless_it_may_be_emptied() -> None:
    selection = selection_of((2, 2), (2, 2), target=0.5)
    scores = scores_of(selection, [-1, -2, -3, -2], [4, 5, 6, 7])
    with pytest.warns(
        CollapsedLayerWarning, match="layer 'layer0/kernel' has collapsed: it keeps only its highest score"
    ):
        assert ticket_of(selection, scores) == [[0], [1, 2, 3]]
    selection = selection_of((2, 2), (2, 2), target=0.5, allow_empty_layers=True)
    with pytest.warns(CollapsedLayerWarning, match="layer 'layer0/kernel' has collapsed: it keeps no weight"):
        assert ticket_of(selection, scores) == [[], [0, 1, 2, 3]]


def test_without_a_budget_scores_above_zero_are_kept() -> None:
    selection = cs_jax.select({"kernel": np.ones((2, 2))})
    assert ticket_of(selection, scores_of(selection, [-1, 0, 1e-9, 1])) == [[2, 3]]


def channels_kept(values: list[list[float]], target: float) -> list[int]:
    """Number of kept channels in two arrays, whose channels have 4 and 2 weights."""
    selection = selection_of((4, len(values[0])), (2, len(values[1])), target=target, group="output_channel")
    ticket = target_density.ticket_masks(selection, scores_of(selection, *values), init_value=0.0)
    for mask in jax.tree.leaves(ticket):
        assert (np.asarray(mask) == np.asarray(mask)[:1]).all()
    return [int((np.asarray(mask)[0] > 0).sum()) for mask in jax.tree.leaves(ticket)]


@pytest.mark.filterwarnings("ignore::cs_jax.DensityWarning")
def test_groups_are_kept_whole_and_what_is_left_goes_to_smaller_ones() -> None:
    """Of 7 weights: a channel of 4, not a second one, then one of 2."""
    assert channels_kept([[3, 2], [1, 0, -1]], target=0.5) == [1, 1]


def test_a_large_group_takes_the_place_of_small_ones_that_come_after_it_where_that_fits_better() -> None:
    """Of 8 weights of 14: three channels of 2 and then none of 4 would be 6; one of 4 and the best two of 2 are 8."""
    assert channels_kept([[1, 0], [4, 3, 2]], target=8 / 14) == [1, 2]


def test_a_density_that_groups_cannot_reach_is_told() -> None:
    message = "ticket keeps 8 of 12 weights, and the target is 7: groups of 4 weights cannot be split"
    with pytest.warns(cs_jax.DensityWarning, match=message):
        selection = selection_of((4, 3), target=0.6, group="output_channel")
        target_density.ticket_masks(selection, scores_of(selection, [1, 2, 3]), init_value=0.0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Selection, Any]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
    size = sum(rows * columns for rows, columns in shapes)
    keep = draw(st.integers(len(shapes), size))
    selection = selection_of(*shapes, target=keep / size)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    tied = draw(st.booleans())
    values = [rng.integers(-2, 3, shape) if tied else rng.normal(size=shape) for shape in shapes]
    return selection, scores_of(selection, *values)


@hypothesis.given(problems())
@hypothesis.settings(max_examples=100, deadline=None)
def test_a_ticket_has_exactly_the_weights_of_its_budget_and_the_best_of_each_array(problem: Any) -> None:
    selection, scores = problem
    ticket = target_density.ticket_masks(selection, scores, init_value=0.0)
    assert sum(map(len, kept(ticket))) == selection.budgets[0].keep
    assert all(kept(ticket))
    for score, mask in zip(jax.tree.leaves(scores), jax.tree.leaves(ticket), strict=True):
        on, off = np.asarray(score)[np.asarray(mask) > 0], np.asarray(score)[np.asarray(mask) == 0]
        assert off.size == 0 or on.min() >= off.max()


@hypothesis.given(problems())
@hypothesis.settings(max_examples=30, deadline=None)
def test_holding_a_density_shifts_all_scores_alike_and_leaves_the_budget_above_zero(problem: Any) -> None:
    selection, scores = problem
    held = target_density.track_density(selection, scores, 0, 1)
    flat, after = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (scores, held))
    np.testing.assert_allclose(after - flat, (after - flat)[0], atol=1e-5)
    keep = selection.budgets[0].keep
    boundary = np.sort(flat)[::-1][keep - 1 : keep + 1]
    if len(boundary) == 1 or boundary[0] > boundary[1]:
        assert (after > 0).sum() == keep
    else:  # the scores at the boundary are equal: none of them is above 0
        assert (after > 0).sum() == (flat > boundary[0]).sum() < keep


@pytest.mark.parametrize("values", [[-1e30, -50.0, -1e-38, 2e-38, 7e20, 1e-9], [0.0, -0.0, 1.0, -1.0, 2.0, -2.0]])
def test_the_threshold_is_found_however_far_scores_are_apart(values: list[float]) -> None:
    selection = selection_of((1, 6), target=0.5)
    held = target_density.track_density(selection, scores_of(selection, values), 0, 1)
    order = np.argsort(-np.float32(values), kind="stable")
    above = np.flatnonzero(np.asarray(held["layer0"]["kernel"]) > 0)
    assert set(above) <= set(order[:3])
    assert len(above) == (3 if len(set(np.float32(values))) == 6 else 2)


def test_all_scores_are_above_zero_where_all_weights_are_kept() -> None:
    selection = selection_of((2, 3), target=1.0)
    for values in ([0.0] * 6, [-3.0, 2.0, 2.0, 0.0, -1e20, 5.0]):
        assert (
            target_density.track_density(selection, scores_of(selection, values), 0, 1)["layer0"]["kernel"] > 0
        ).all()


def test_the_budget_shrinks_by_the_same_factor_each_round() -> None:
    selection = selection_of((10, 10), target=0.01)
    scores = scores_of(selection, np.random.default_rng(0).normal(size=100))
    counts = [
        int((jax.tree.leaves(target_density.track_density(selection, scores, r, 2))[0] > 0).sum()) for r in range(3)
    ]
    assert counts == [10, 1, 1]


@pytest.mark.usefixtures("x64")
def test_double_precision_scores_are_told_apart() -> None:
    selection = cs_jax.select({"kernel": np.ones((1, 4))}, target_density=0.5)
    scores = {"kernel": jnp.asarray([[1.0, 1.0 + 1e-15, 1.0 + 2e-15, 0.0]], jnp.float64)}
    held = target_density.track_density(selection, scores, 0, 1)
    np.testing.assert_array_equal(held["kernel"] > 0, [[False, True, True, False]])


def test_rules_with_targets_are_held_each_on_its_own_and_the_rest_is_left_alone() -> None:
    params = {name: {"kernel": np.ones((2, 4), np.float32)} for name in "abc"}
    where = [Rule("a/kernel", target_density=0.25), Rule("b/kernel", target_density=0.75), Rule()]
    selection = cs_jax.select(params, where)
    scores = scores_of(selection, *(np.random.default_rng(0).normal(size=8) - 9 for _ in range(3)))
    held = target_density.track_density(selection, scores, 0, 1)
    assert [int((leaf > 0).sum()) for leaf in jax.tree.leaves(held)] == [2, 6, 0]
    np.testing.assert_array_equal(held["c"]["kernel"], scores["c"]["kernel"])
    assert [len(entries) for entries in ticket_of(selection, scores)] == [2, 6, 0]


def test_a_score_that_is_not_finite_makes_no_ticket() -> None:
    selection = selection_of((1, 2), target=0.5)
    with pytest.raises(ValueError, match="scores 'layer0/kernel': must be finite numbers"):
        target_density.ticket_masks(selection, scores_of(selection, [1, np.nan]), init_value=0.0)
