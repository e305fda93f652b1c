"""Masks from scores: exact small cases, properties over random trees, and refused arguments."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from cs_jax.core import masks, trees

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float64)

finite_scores = hnp.arrays(
    np.float64, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-1e3, 1e3, allow_subnormal=False)
)
temperatures = st.floats(1e-3, 1e3)
init_values = st.floats(-3, 3)


@pytest.mark.parametrize("score, kept", [(-1e-3, 0.0), (0.0, 0.0), (-0.0, 0.0), (1e-3, 2.0)])
def test_hard_mask_keeps_only_positive_scores(score: float, kept: float) -> None:
    mask = masks.hard_mask({"kernel": jnp.full((3, 2), score)}, init_value=0.0)
    np.testing.assert_array_equal(mask["kernel"], kept)


def test_hard_mask_has_the_scale_of_the_initial_value() -> None:
    mask = masks.hard_mask(jnp.array([1.0, -1.0]), init_value=-0.05)
    np.testing.assert_allclose(mask, [1 + np.exp(0.05), 0], rtol=1e-7)


def test_soft_mask_is_exactly_one_at_the_start_for_initial_value_zero() -> None:
    scores = masks.init_scores({"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}}, 0.0)
    mask = masks.soft_mask(scores, 1.0, init_value=0.0)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool((leaf == 1).all()), mask))


@pytest.mark.parametrize("init_value", [-79.0, -0.3, 0.2, 5.0])
def test_soft_mask_is_one_at_the_start_to_rounding(init_value: float) -> None:
    scores = masks.init_scores(jnp.ones(4), init_value)
    np.testing.assert_allclose(masks.soft_mask(scores, 1.0, init_value=init_value), 1.0, rtol=2e-5)


@pytest.mark.usefixtures("x64")
def test_soft_mask_matches_the_formula_in_float64() -> None:
    scores = np.array([-2.0, -0.1, 0.0, 0.3])
    expected = (1 / (1 + np.exp(-7.0 * scores))) * (1 + np.exp(0.1))
    np.testing.assert_allclose(masks.soft_mask(jnp.asarray(scores), 7.0, init_value=-0.1), expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [-3e38, -1e4, -101.0, -1e-30, 0.0, 1e-30, 101.0, 1e4, 3e38])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 200.0, 1e30])
@pytest.mark.usefixtures("x64")
def test_values_and_gradients_stay_finite_where_the_sigmoid_saturates(
    dtype: jnp.dtype, score: float, temperature: float
) -> None:
    scores = jnp.asarray([score], dtype)

    def total(scores: jax.Array, temperature: jax.Array) -> jax.Array:
        return masks.mask_penalty(masks.soft_mask(scores, temperature, init_value=-0.05))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(scores, jnp.asarray(temperature, jnp.float32))
    reset = masks.prune_scores(scores, temperature, init_value=-0.05)
    for result in (value, *gradients, reset):
        assert np.isfinite(np.asarray(result, np.float64)).all()


def test_gradient_of_soft_mask_matches_the_formula() -> None:
    scores, temperature = jnp.array([-0.4, 0.0, 0.7]), 3.0
    gradient = jax.grad(lambda s: masks.mask_penalty(masks.soft_mask(s, temperature, init_value=0.0)))(scores)
    sigmoid = 1 / (1 + np.exp(-temperature * np.asarray(scores)))
    np.testing.assert_allclose(gradient, 2 * temperature * sigmoid * (1 - sigmoid), rtol=1e-5)


@pytest.mark.parametrize(
    "temperature, expected", [(1.0, [-0.5, -0.05, -0.02, -0.02]), (10.0, [-5.0, -0.5, -0.02, -0.02])]
)
def test_reset_limits_scores_to_the_initial_value(temperature: float, expected: list[float]) -> None:
    reset = masks.prune_scores(jnp.array([-0.5, -0.05, 0.0, 3.0]), temperature, init_value=-0.02)
    np.testing.assert_allclose(reset, expected, rtol=1e-6)


def test_hard_mask_is_empty_right_after_a_reset_with_nonpositive_initial_value() -> None:
    reset = masks.prune_scores(jnp.array([5.0, 0.1, -1.0]), 2.0, init_value=0.0)
    assert masks.density(masks.hard_mask(reset, init_value=0.0)) == 0.0


@pytest.mark.usefixtures("x64")
@hypothesis.given(finite_scores, temperatures, init_values)
@hypothesis.settings(
    max_examples=50, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_soft_mask_rises_with_score_and_stays_in_range(
    scores: np.ndarray, temperature: float, init_value: float
) -> None:
    mask = np.asarray(masks.soft_mask(scores, temperature, init_value=init_value)).ravel()
    order = np.argsort(scores.ravel(), kind="stable")
    assert (np.diff(mask[order]) >= 0).all()
    assert (mask >= 0).all() and (mask <= (1 + np.exp(-init_value)) * (1 + 1e-12)).all()


@hypothesis.given(finite_scores, st.floats(1, 1e3), st.floats(-3, 0, allow_subnormal=False))
@hypothesis.settings(max_examples=50, deadline=None)
def test_paper_reset_never_revives_a_pruned_entry(scores: np.ndarray, temperature: float, init_value: float) -> None:
    reset = np.asarray(masks.prune_scores(scores, temperature, init_value=init_value))
    assert (reset[scores <= 0] <= np.maximum(scores[scores <= 0], init_value)).all()
    assert (reset <= init_value).all()


@hypothesis.given(
    st.dictionaries(st.sampled_from("abc"), hnp.arrays(st.sampled_from([np.float32, np.float64]), (2, 3)), min_size=1)
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_structure_shapes_and_dtypes_of_numpy_trees_are_kept(tree: dict[str, np.ndarray]) -> None:
    scores = {name: np.nan_to_num(array) for name, array in tree.items()}
    for result in (
        masks.soft_mask(scores, 2.0, init_value=0.0),
        masks.hard_mask(scores, init_value=0.0),
        masks.prune_scores(scores, 2.0, init_value=0.0),
        trees.apply_masks(scores, {}),
        masks.init_scores(scores, 0.0),
    ):
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in result.items()} == {
            name: (leaf.shape, leaf.dtype) for name, leaf in scores.items()
        }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("x64")
def test_dtype_is_kept(dtype: jnp.dtype) -> None:
    scores = jnp.array([-1.0, 0.5], dtype)
    results = [
        masks.soft_mask(scores, jnp.float32(2.0), init_value=0.0),
        masks.hard_mask(scores, init_value=0.0),
        masks.prune_scores(scores, 2.0, init_value=0.0),
        trees.apply_masks(scores, jnp.ones(2)),
    ]
    assert [result.dtype for result in results] == [dtype] * 4


def test_scores_of_bfloat16_masks_are_float32_unless_asked_otherwise() -> None:
    mask = jnp.ones(2, jnp.bfloat16)
    assert masks.init_scores(mask, 0.1).dtype == jnp.float32
    assert masks.init_scores(mask, 0.1, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_masks_work_with_traced_temperature_and_initial_value() -> None:
    scores = {"kernel": jnp.array([-0.2, 0.4])}
    traced = jax.jit(lambda t, v: masks.soft_mask(scores, t, init_value=v))(3.0, -0.1)
    np.testing.assert_allclose(traced["kernel"], masks.soft_mask(scores, 3.0, init_value=-0.1)["kernel"], rtol=1e-6)


def test_density_counts_entries_over_all_leaves() -> None:
    tree = {"large": jnp.array([[1.0, 0.0], [0.0, 0.0]]), "small": np.array([2.0]), "scalar": jnp.float32(0)}
    assert masks.density(tree) == 2 / 6
    assert masks.density({"a": jnp.zeros(3)}) == 0.0
    assert masks.density({"a": jnp.full((2, 2), 2.0)}) == 1.0
    assert float(jax.jit(masks.density)(tree)) == pytest.approx(2 / 6)


def test_penalty_of_bfloat16_masks_is_accumulated_in_float32() -> None:
    penalty = masks.mask_penalty({"a": jnp.ones(1001, jnp.bfloat16), "b": jnp.ones(2)})
    assert penalty.dtype == jnp.float32
    assert float(penalty) == 1003.0


def test_penalty_of_an_empty_tree_is_zero() -> None:
    assert float(masks.mask_penalty({})) == 0.0


def test_apply_masks_multiplies_matching_paths_and_leaves_the_rest() -> None:
    bias = jnp.array([5.0])
    params = {"a": {"kernel": jnp.array([[1.0, 2.0]]), "bias": bias}, "b": [np.array([3.0, 4.0])]}
    masked = trees.apply_masks(params, {"a": {"kernel": jnp.array([[0.0, 2.0]])}, "b": [np.array([1.0, 0.0])]})
    np.testing.assert_array_equal(masked["a"]["kernel"], [[0.0, 4.0]])
    np.testing.assert_array_equal(masked["b"][0], [3.0, 0.0])
    assert masked["a"]["bias"] is bias


def test_paths_that_read_alike_are_told_apart() -> None:
    masked = trees.apply_masks({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {"a": {"b": jnp.zeros(1)}})
    assert (float(masked["a/b"][0]), float(masked["a"]["b"][0])) == (1.0, 0.0)


def test_penalty_of_float64_numpy_masks_needs_no_64_bit_mode() -> None:
    assert float(masks.mask_penalty({"a": np.ones(3), "b": jnp.ones(2)})) == 5.0


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: masks.soft_mask({"a": jnp.arange(3)}, 1.0, init_value=0.0),
            "scores 'a' of dtype int32: must have a float dtype",
        ),
        (lambda: masks.hard_mask(np.arange(3), init_value=0.0), "scores of dtype int64: must have a float dtype"),
        (lambda: masks.prune_scores({"a": [1.0]}, 1.0, init_value=0.0), "scores 'a/0' 1.0: must be an array"),
        (
            lambda: masks.soft_mask(jnp.ones(2), 0.0, init_value=0.0),
            "temperature 0: must be a finite number above 0",
        ),
        (
            lambda: masks.soft_mask(jnp.ones(2), jnp.float32(-1), init_value=0.0),
            "temperature -1: must be a finite number above 0",
        ),
        (
            lambda: masks.soft_mask(jnp.ones(2), jnp.ones(2), init_value=0.0),
            r"temperature of shape \(2,\): must be a scalar",
        ),
        (lambda: masks.soft_mask(jnp.ones(2), float("nan"), init_value=0.0), "temperature nan: must be a finite"),
        (
            lambda: masks.soft_mask(jnp.ones(2), 1.0, init_value=-81.0),
            "init_value -81: must be a finite number of at least -80",
        ),
        (lambda: masks.init_scores(jnp.ones(2), float("inf")), "value inf: must be a finite"),
        (lambda: masks.init_scores(jnp.ones(2), 0.0, dtype=jnp.int32), "dtype int32: must be a float dtype"),
        (lambda: masks.soft_mask(jnp.ones(2), "1", init_value=0.0), "temperature '1': must be a real number"),
        (lambda: masks.soft_mask(jnp.ones(2), None, init_value=0.0), "temperature None: must be a real number"),
        (lambda: masks.init_scores({"a": 1.0}, 0.0), "masks 'a' 1.0: must be an array"),
        (lambda: masks.density(1.0), "masks 1.0: must be an array"),
        (lambda: masks.density({}), "masks without entries: must have at least one entry"),
        (lambda: masks.density(jnp.ones((0, 3))), "masks without entries: must have at least one entry"),
        (
            lambda: trees.apply_masks({"a": jnp.ones(2)}, {"b": jnp.ones(2)}),
            "masks 'b': must have the path of a weight; params have a",
        ),
        (
            lambda: trees.apply_masks({"a": jnp.arange(2)}, {"a": jnp.ones(2)}),
            "weights 'a' of dtype int32: must have a float dtype",
        ),
        (
            lambda: trees.apply_masks({"a": {"k": jnp.ones((2, 3))}}, {"a": {"k": jnp.ones((3,))}}),
            r"masks 'a/k' of shape \(3,\): must have the shape of the weights, \(2, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # pyright: ignore[reportCallIssue]
