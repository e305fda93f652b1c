"""Overlap of masks against counts by hand and all masks there are, and the line between two networks."""

import itertools
import math
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from cs_jax import analysis, training
from cs_jax.analysis import NamedOverlap, Overlap
from cs_jax.errors import ConfigError
from cs_jax.images import ImageSet
from cs_jax.models import LeNet300100, ResNet
from cs_jax.progress import Snapshot
from cs_jax.training import Recipe

A = {"a": jnp.array([[2.0, 2.0, 0.0], [0.0, 2.0, 0.0]]), "b": {"kernel": jnp.array([2.0, 0.0])}}
B = {"a": np.array([[1, 0, 0], [1, 1, 1]]), "b": {"kernel": np.array([False, True])}}
EMPTY = jax.tree.map(jnp.zeros_like, A)


def test_overlap_is_what_counting_by_hand_gives() -> None:
    # In "a" 3 and 4 of 6 are kept, 2 by both; in "b" 1 and 1 of 2, none by both.
    mean, variance = 3 * 4 / 6 + 1 / 2, 3 * 4 * 3 * 2 / (36 * 5) + 1 / 4
    together = Overlap(2, (4, 5), iou=2 / 7, shared=2 / 4, chance=mean / 4, z=(2 - mean) / math.sqrt(variance))
    assert analysis.overlap(A, B) == together
    assert analysis.layer_overlap(A, B) == {
        "a": Overlap(2, (3, 4), iou=2 / 5, shared=2 / 3, chance=2 / 3, z=0.0),
        "b/kernel": Overlap(0, (1, 1), iou=0.0, shared=0.0, chance=0.5, z=-1.0),
    }


def test_chance_and_z_are_mean_and_deviation_over_all_masks_with_each_layers_counts() -> None:
    def every(size: int, kept: int) -> list[np.ndarray]:
        return [np.isin(np.arange(size), chosen) for chosen in itertools.combinations(range(size), kept)]

    ones = [{"a": a, "b": b} for a in every(5, 3) for b in every(4, 1)]
    others = [{"a": a, "b": b} for a in every(5, 2) for b in every(4, 3)]
    found = [analysis.overlap(one, other) for one in ones for other in others]
    kept = np.array([overlap.kept for overlap in found])
    [chance] = {overlap.chance for overlap in found}
    assert chance == pytest.approx(np.mean([overlap.shared for overlap in found]), rel=1e-12)
    np.testing.assert_allclose(
        np.array([overlap.z for overlap in found], float), (kept - kept.mean()) / kept.std(), rtol=1e-12
    )


@hypothesis.given(hnp.arrays(bool, (2, 3, 4)))
@hypothesis.settings(deadline=None)
def test_overlap_is_symmetric_and_whole_with_itself(pair: np.ndarray) -> None:
    one, other = ({"rows": part[:2], "last": part[2]} for part in pair)
    found = analysis.overlap(one, other)
    assert found._replace(of=found.of[::-1]) == analysis.overlap(other, one)
    assert 0 <= found.iou <= found.shared <= 1 and 0 <= found.chance <= 1
    same = analysis.overlap(one, one)
    assert (same.iou, same.shared) == (1.0, 1.0) and (same.z is None or same.z > 0)


def test_masks_that_agree_in_the_density_of_layers_alone_overlap_as_by_chance() -> None:
    one = {"full": np.ones(100), "empty": np.zeros(100), "half": np.arange(100) % 2}
    found = analysis.overlap(one, one | {"half": np.arange(100) < 50})
    assert found == Overlap(125, (150, 150), iou=125 / 175, shared=125 / 150, chance=125 / 150, z=0.0)


@pytest.mark.parametrize(
    "masks, others, expected",
    [
        (EMPTY, EMPTY, Overlap(0, (0, 0), 1.0, 1.0, 1.0, None)),
        (A, EMPTY, Overlap(0, (4, 0), 0.0, 1.0, 1.0, None)),
        ({"a": np.ones(3)}, {"a": np.array([1, 0, 0])}, Overlap(1, (3, 1), 1 / 3, 1.0, 1.0, None)),
        ({"a": np.ones(1)}, {"a": np.ones(1)}, Overlap(1, (1, 1), 1.0, 1.0, 1.0, None)),
        ({"a": np.ones((0, 2))}, {"a": np.ones((0, 2))}, Overlap(0, (0, 0), 1.0, 1.0, 1.0, None)),
        ({"a": np.float32(2)}, {"a": np.int8(0)}, Overlap(0, (1, 0), 0.0, 1.0, 1.0, None)),
    ],
)
def test_z_is_none_where_chance_leaves_no_choice(masks: Any, others: Any, expected: Overlap) -> None:
    assert analysis.overlap(masks, others) == expected


def test_whatever_is_not_zero_is_kept_in_any_dtype() -> None:
    kept = np.array([0.0, -0.0, 1e-3, -1.0, 2.0])
    for mask in (kept, kept.astype(ml_dtypes.bfloat16), jnp.asarray(kept, jnp.float16), kept != 0):
        assert analysis.overlap({"a": mask}, {"a": np.ones(5)}).of == (3, 5)


def test_counts_are_exact_where_floats_are_not() -> None:
    mask = np.zeros(2**24 + 3, np.float32)
    mask[: 2**24 + 1] = 2  # float32 cannot count so far
    found = analysis.overlap({"a": mask}, {"a": mask[::-1]})
    assert found.of == (2**24 + 1, 2**24 + 1) and found.kept == 2**24 - 1


def test_the_table_has_each_pair_once_in_order() -> None:
    table = analysis.overlap_table({"seed 0": A, "seed 1": B, "none": EMPTY})
    assert table == [
        NamedOverlap("seed 0", "seed 1", analysis.overlap(A, B)),
        NamedOverlap("seed 0", "none", analysis.overlap(A, EMPTY)),
        NamedOverlap("seed 1", "none", analysis.overlap(B, EMPTY)),
    ]
    assert analysis.overlap_table({"seed 0": A}) == analysis.overlap_table({}) == []


def test_flipped_is_the_share_of_all_weights_whose_state_differs() -> None:
    assert analysis.flipped(A, B) == 5 / 8  # 3 of 6 and 2 of 2
    assert analysis.flipped(B, A) == 5 / 8
    assert analysis.flipped(A, jax.tree.map(lambda mask: mask / 2, A)) == 0.0
    assert analysis.flipped(A, EMPTY) == 4 / 8


@pytest.mark.parametrize(
    "others, text",
    [
        ({"a": A["a"]}, "'b/kernel': got nothing, wanted shape (2,)"),
        (A | {"c": np.ones(())}, "'c': got shape (), wanted nothing"),
        (A | {"a": np.ones((3, 2))}, "'a': got shape (3, 2), wanted shape (2, 3)"),
        (A | {"a": 1.0}, "'a': got 1.0, wanted an array"),
    ],
)
def test_masks_of_another_network_are_refused_by_name(others: Any, text: str) -> None:
    for refused, name in (
        (lambda: analysis.overlap(A, others), "others"),
        (lambda: analysis.layer_overlap(A, others), "others"),
        (lambda: analysis.flipped(A, others), "before"),
        (lambda: analysis.overlap_table({"seed 0": A, "seed 1": B, "seed 2": others}), "seed 2"),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        assert str(error.value) == f"{name} {text}"


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="^masks: got no entry, wanted at least one$"):
        analysis.flipped({}, {})


def test_interpolation_is_linear_and_keeps_structure_and_dtype() -> None:
    start = {"a": jnp.array([0.0, 8.0]), "b": [np.array([[1.0]]), jnp.array(2.0, jnp.bfloat16)]}
    end = {"a": jnp.array([4.0, -8.0]), "b": [np.array([[3.0]]), jnp.array(6.0, jnp.bfloat16)]}
    found = analysis.interpolate(start, end, 0.25)
    expected = {"a": np.array([1.0, 4.0]), "b": [np.array([[1.5]]), np.array(3.0)]}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [jnp.float32, np.float64, jnp.bfloat16]


def test_the_way_between_far_ends_does_not_overflow_narrow_floats() -> None:
    found = analysis.interpolate({"a": np.array([6e4], np.float16)}, {"a": np.array([-6e4], np.float16)}, 0.5)
    assert found["a"] == 0 and found["a"].dtype == np.float16


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_both_ends_are_exact_to_the_bit_and_equal_entries_stay(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    start, end = ({"a": rng.normal(scale=scale, size=1000).astype(dtype)} for scale in (1e-4, 1e4))
    start["a"][0], end["a"][1] = -0.0, np.inf
    for share, wanted in ((0, start), (0.0, start), (1, end), (1.0, end)):
        assert analysis.interpolate(start, end, share)["a"].tobytes() == wanted["a"].tobytes()
    for share in (1 / 3, 0.9):
        assert analysis.interpolate(start, start, share)["a"].tobytes() == (start["a"] + dtype(0)).tobytes()


@pytest.mark.parametrize(
    "others, share, text",
    [
        ({"a": np.ones(2)}, 1.1, "share: got 1.1, wanted a number from 0 to 1"),
        ({"a": np.ones(2)}, float("nan"), "share: got nan, wanted a number from 0 to 1"),
        ({"a": np.ones(3)}, 0.0, r"others 'a': got shape \(3,\), wanted shape \(2,\)"),
        ({}, 1.0, r"others 'a': got nothing, wanted shape \(2,\)"),
        ({"a": np.ones(2, np.float32)}, 0.5, "others 'a': got dtype float32, wanted float64"),
        ({"a": np.ones(2, int)}, 0.5, "weights 'a': got dtype int64, wanted a float dtype"),
    ],
)
def test_what_cannot_be_interpolated_is_refused(others: Any, share: float, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        analysis.interpolate({"a": np.ones(2)}, others, share)


@pytest.mark.parametrize("start, end", [(1.0, np.ones(())), (np.ones(()), 1.0)])
def test_a_number_that_is_no_array_is_not_interpolated(start: Any, end: Any) -> None:
    with pytest.raises(ValueError, match="^weights 'a': got 1.0, wanted a float array$"):
        analysis.interpolate({"a": start}, {"a": end}, 0.5)


@pytest.mark.parametrize(
    "errors, barrier",
    [([0.25, 0.25], 0.0), ([0.1, 0.1, 0.1], 0.0), ([0.0, 0.5, 0.25], 0.375), ([0.5, 0.0, 0.25], 0.125)],
)
def test_the_barrier_is_the_highest_error_less_the_mean_of_the_ends(errors: list[float], barrier: float) -> None:
    assert analysis.error_barrier(errors) == barrier


@pytest.mark.parametrize("errors, got", [([], "0"), ([0.5], "1"), ([0.5, math.nan, 0.25], "nan")])
def test_a_barrier_of_no_line_is_refused(errors: list[float], got: str) -> None:
    with pytest.raises(ConfigError, match=f"^errors: got {got}, wanted"):
        analysis.error_barrier(errors)


def pixels(values: Any, labels: Any) -> ImageSet:
    """Images of (n, pixels) values in hundreds, normalised to the values less 1."""
    values = np.asarray(values)
    images = jnp.asarray(np.rint(100 * values[:, None, :, None]), jnp.uint8)
    return ImageSet(images, jnp.asarray(labels, jnp.int32), mean=jnp.array([100.0]), std=jnp.array([100.0]))


def magnitude_network(first: int, second: int) -> dict[str, Any]:
    """LeNet that calls the pixel x a 1 where |x| > 0.4, by hidden units for x and for -x."""
    params = jax.tree.map(
        np.zeros_like, LeNet300100(num_classes=2).init(jax.random.key(0), jnp.ones((1, 1, 1, 1)))["params"]
    )
    params["hidden0"]["kernel"][0, [first, second]] = 1, -1
    params["hidden1"]["kernel"][[first, second], 0] = 1
    params["classifier"]["kernel"][0, 1] = 1
    params["classifier"]["bias"][1] = -0.4
    return params


def test_swapped_hidden_units_are_the_same_network_behind_a_barrier() -> None:
    model, data = LeNet300100(num_classes=2), pixels([[0], [2], [1], [1.25]], [1, 1, 0, 0])
    masks = {"hidden0": {"kernel": jnp.ones((1, 300))}, "hidden1": {"kernel": jnp.ones((300, 100))}}
    ends = Snapshot(magnitude_network(0, 1), {}), Snapshot(magnitude_network(1, 0), {})
    path = analysis.connect(model, ends, masks, data, data, points=5, batch_size=3)
    expected = []  # between the ends both units are |1 - 2 share| x and its negative: their sum is its magnitude
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        logit = np.array([1, 1, 0, 0.25]) * abs(1 - 2 * share) - 0.4
        loss = np.log1p(np.exp(np.where([True, True, False, False], -logit, logit))).mean()
        expected.append((share, 0.5 if share == 0.5 else 0.0, pytest.approx(loss, rel=1e-6)))
    assert path == expected
    assert analysis.error_barrier([point.error for point in path]) == 0.5


def test_a_permuted_dense_network_has_a_barrier(lenet: Recipe, synthetic: ImageSet) -> None:
    variables = training.init_variables(lenet, jax.random.key(0), synthetic.images.shape[1:])
    params = variables["params"]
    units = np.random.default_rng(0).permutation(300)
    permuted = params | {
        "hidden0": jax.tree.map(lambda weights: weights[..., units], params["hidden0"]),
        "hidden1": params["hidden1"] | {"kernel": params["hidden1"]["kernel"][units]},
    }
    logits = training.predict(lenet.model, variables, synthetic, batch_size=37)
    data = synthetic.replace(labels=jnp.argmax(logits, axis=-1))
    ends = Snapshot(params, {}), Snapshot(permuted, {})
    path = analysis.connect(lenet.model, ends, variables["masks"], data, data, batch_size=16)
    assert [point.share for point in path] == [tenths / 10 for tenths in range(11)]
    assert path[0].error == path[-1].error == 0.0
    assert analysis.error_barrier([point.error for point in path]) > 0.1


def test_masks_decide_what_the_line_leads_through(lenet: Recipe, synthetic: ImageSet) -> None:
    variables = training.init_variables(lenet, jax.random.key(0), synthetic.images.shape[1:])
    ends = Snapshot(variables["params"], {}), Snapshot(jax.tree.map(jnp.negative, variables["params"]), {})
    removed = jax.tree.map(jnp.zeros_like, variables["masks"])
    path = analysis.connect(lenet.model, ends, removed, synthetic, synthetic, points=3, batch_size=37)
    # Nothing but equal logits is left.
    assert [point.loss for point in path] == [pytest.approx(math.log(4))] * 3


class Normalized(nn.Module):
    """Two pixels as logits, after BatchNorm."""

    momentum: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x[:, 0, :, 0])


def normalized_end(scale: float, bias: float, mean: float, var: float) -> Snapshot:
    params, stats = {"scale": scale, "bias": bias}, {"mean": mean, "var": var}
    return Snapshot(*({"norm": {k: jnp.array([v, 0.5]) for k, v in one.items()}} for one in (params, stats)))


@pytest.mark.parametrize("batch_size, batches", [(2, 2), (5, 1), (99, 1)])
def test_statistics_of_every_point_are_one_pass_in_whole_batches_from_the_interpolated_ones(
    batch_size: int, batches: int
) -> None:
    # The data are one value, so that a batch of any of them has this mean and no variance.
    left = 0.5**batches
    data, validation = pixels([[1.5, 0.5]] * 5, [0] * 5), pixels([[0, 2], [2, 1], [1, 2]], [0, 1, 1])
    ends = normalized_end(1.0, 0.0, mean=3.0, var=2.0), normalized_end(3.0, -1.0, mean=-1.0, var=4.0)
    path = analysis.connect(Normalized(), ends, {}, data, validation, points=5, batch_size=batch_size)
    x = np.array([[-1, 1], [1, 0], [0, 1]])
    for point in path:
        share = point.share
        mean = left * np.array([3 - 4 * share, 0.5]) + (1 - left) * np.array([0.5, -0.5])
        var = left * np.array([2 + 2 * share, 0.5])
        logits = (x - mean) / np.sqrt(var + 1e-5) * np.array([1 + 2 * share, 0.5]) + np.array([-share, 0.5])
        margin = (logits[:, 1] - logits[:, 0]) * np.array([-1, 1, 1])
        assert point.error == np.mean(margin < 0)
        assert point.loss == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
    assert analysis.error_barrier([point.error for point in path]) > 0


def test_statistics_do_not_follow_data_that_are_sorted() -> None:
    values = np.repeat([[0.0, 2.0], [2.0, 0.0]], 20, axis=0)
    data = pixels(values, np.repeat([1, 0], 20))
    end = normalized_end(1.0, 0.0, mean=0.0, var=1.0)
    start, _ = analysis.connect(Normalized(momentum=0.0), (end, end), {}, data, data, points=2, batch_size=10)
    assert start.error == 0.0  # the last ten in order are all of one class: half of the images would be wrong


def test_identical_ends_have_no_barrier_and_stay_as_they_are(synthetic: ImageSet) -> None:
    recipe = Recipe(ResNet(num_classes=4, stage_sizes=(1,), widths=(4,)))
    variables = training.init_variables(recipe, jax.random.key(0), synthetic.images.shape[1:])
    end = Snapshot(variables["params"], variables["batch_stats"])
    before = jax.tree.map(np.array, end)
    paths = [
        analysis.connect(recipe.model, (end, end), variables["masks"], synthetic, synthetic, points=4, batch_size=16)
        for _ in range(2)
    ]
    assert paths[0] == paths[1]
    assert len({point[1:] for point in paths[0]}) == 1
    assert analysis.error_barrier([point.error for point in paths[0]]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, end, before)


class Dropped(nn.Module):
    """A layer after dropout, which needs a PRNG key in training mode."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x[:, 0, :, 0]))


def test_a_model_without_statistics_is_evaluated_alone() -> None:
    params = {"Dense_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    data = pixels([[0, 2], [2, 0]], [1, 0])
    ends = Snapshot(params, {}), Snapshot(jax.tree.map(jnp.negative, params), {})
    path = analysis.connect(Dropped(), ends, {}, data, data, points=2, batch_size=2)
    assert [point.error for point in path] == [0.0, 1.0]


traces: list[bool] = []


class Traced(Normalized):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        traces.append(train)
        return super().__call__(x, train)


def test_a_line_is_compiled_once() -> None:
    data = pixels(np.random.default_rng(0).uniform(0, 2, (7, 2)), [0] * 7)
    ends = normalized_end(1.0, 0.0, 0.0, 1.0), normalized_end(2.0, 0.0, 0.0, 2.0)
    analysis.connect(Traced(), ends, {}, data, data, points=5, batch_size=3)
    assert traces == [True, False]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"points": 1}, "points: got 1, wanted at least 2"),
        ({"batch_size": 0}, "batch_size: got 0, wanted at least 1"),
        ({"data": pixels(np.ones((0, 2)), [])}, "images of data: got 0, wanted at least 1"),
        ({"validation": pixels(np.ones((0, 2)), [])}, "images of validation: got 0, wanted at least 1"),
    ],
)
def test_a_line_without_points_or_images_is_refused(changes: dict[str, Any], text: str) -> None:
    end = normalized_end(1.0, 0.0, 0.0, 1.0)
    images = pixels([[1, 1]], [0])
    arguments = {"data": images, "validation": images, "points": 2, "batch_size": 1} | changes
    with pytest.raises(ConfigError, match=f"^{text}$"):
        analysis.connect(Normalized(), (end, end), {}, **arguments)


def test_ends_of_two_networks_are_refused_by_name() -> None:
    one = normalized_end(1.0, 0.0, 0.0, 1.0)
    other = one._replace(batch_stats={"norm": {"mean": jnp.zeros(2), "var": jnp.ones(3)}})
    with pytest.raises(ConfigError, match=r"^others 'norm/var': got shape \(3,\), wanted shape \(2,\)$"):
        analysis.connect(Normalized(), (one, other), {}, pixels([[1, 1]], [0]), pixels([[1, 1]], [0]), batch_size=1)
