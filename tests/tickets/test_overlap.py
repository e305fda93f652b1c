"""Overlap of masks, compared with counts by hand and with all possible masks."""

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

from cs_jax.core.errors import ConfigError
from cs_jax.tickets import overlap as mask_overlap
from cs_jax.tickets.overlap import NamedOverlap, Overlap

A = {"a": jnp.array([[2.0, 2.0, 0.0], [0.0, 2.0, 0.0]]), "b": {"kernel": jnp.array([2.0, 0.0])}}
B = {"a": np.array([[1, 0, 0], [1, 1, 1]]), "b": {"kernel": np.array([False, True])}}
EMPTY = jax.tree.map(jnp.zeros_like, A)


def test_overlap_is_what_counting_by_hand_gives() -> None:
    # In "a" 3 and 4 of 6 are kept, 2 by both; in "b" 1 and 1 of 2, none by both.
    mean, variance = 3 * 4 / 6 + 1 / 2, 3 * 4 * 3 * 2 / (36 * 5) + 1 / 4
    together = Overlap(2, (4, 5), iou=2 / 7, shared=2 / 4, chance=mean / 4, z=(2 - mean) / math.sqrt(variance))
    assert mask_overlap.overlap(A, B) == together
    assert mask_overlap.layer_overlap(A, B) == {
        "a": Overlap(2, (3, 4), iou=2 / 5, shared=2 / 3, chance=2 / 3, z=0.0),
        "b/kernel": Overlap(0, (1, 1), iou=0.0, shared=0.0, chance=0.5, z=-1.0),
    }


def test_chance_and_z_are_mean_and_deviation_over_all_masks_with_each_layers_counts() -> None:
    def every(size: int, kept: int) -> list[np.ndarray]:
        return [np.isin(np.arange(size), chosen) for chosen in itertools.combinations(range(size), kept)]

    ones = [{"a": a, "b": b} for a in every(5, 3) for b in every(4, 1)]
    others = [{"a": a, "b": b} for a in every(5, 2) for b in every(4, 3)]
    found = [mask_overlap.overlap(one, other) for one in ones for other in others]
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
    found = mask_overlap.overlap(one, other)
    assert found._replace(of=found.of[::-1]) == mask_overlap.overlap(other, one)
    assert 0 <= found.iou <= found.shared <= 1 and 0 <= found.chance <= 1
    same = mask_overlap.overlap(one, one)
    assert (same.iou, same.shared) == (1.0, 1.0) and (same.z is None or same.z > 0)


def test_masks_that_agree_in_the_density_of_layers_alone_overlap_as_by_chance() -> None:
    one = {"full": np.ones(100), "empty": np.zeros(100), "half": np.arange(100) % 2}
    found = mask_overlap.overlap(one, one | {"half": np.arange(100) < 50})
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
    assert mask_overlap.overlap(masks, others) == expected


def test_whatever_is_not_zero_is_kept_in_any_dtype() -> None:
    kept = np.array([0.0, -0.0, 1e-3, -1.0, 2.0])
    for mask in (kept, kept.astype(ml_dtypes.bfloat16), jnp.asarray(kept, jnp.float16), kept != 0):
        assert mask_overlap.overlap({"a": mask}, {"a": np.ones(5)}).of == (3, 5)


def test_counts_are_exact_where_floats_are_not() -> None:
    mask = np.zeros(2**24 + 3, np.float32)
    mask[: 2**24 + 1] = 2  # float32 cannot count so far
    found = mask_overlap.overlap({"a": mask}, {"a": mask[::-1]})
    assert found.of == (2**24 + 1, 2**24 + 1) and found.kept == 2**24 - 1


def test_the_table_has_each_pair_once_in_order() -> None:
    table = mask_overlap.overlap_table({"seed 0": A, "seed 1": B, "none": EMPTY})
    assert table == [
        NamedOverlap("seed 0", "seed 1", mask_overlap.overlap(A, B)),
        NamedOverlap("seed 0", "none", mask_overlap.overlap(A, EMPTY)),
        NamedOverlap("seed 1", "none", mask_overlap.overlap(B, EMPTY)),
    ]
    assert mask_overlap.overlap_table({"seed 0": A}) == mask_overlap.overlap_table({}) == []


def test_flipped_is_the_share_of_all_weights_whose_state_differs() -> None:
    assert mask_overlap.flipped(A, B) == 5 / 8  # 3 of 6 and 2 of 2
    assert mask_overlap.flipped(B, A) == 5 / 8
    assert mask_overlap.flipped(A, jax.tree.map(lambda mask: mask / 2, A)) == 0.0
    assert mask_overlap.flipped(A, EMPTY) == 4 / 8


@pytest.mark.parametrize(
    "others, text",
    [
        ({"a": A["a"]}, "'b/kernel': missing; must have shape (2,)"),
        (A | {"c": np.ones(())}, "'c': unknown; the other masks have no such array"),
        (A | {"a": np.ones((3, 2))}, "'a' of shape (3, 2): must have shape (2, 3)"),
        (A | {"a": 1.0}, "'a' 1.0: must be an array"),
    ],
)
def test_masks_of_another_network_are_refused_by_name(others: Any, text: str) -> None:
    for refused, name in (
        (lambda: mask_overlap.overlap(A, others), "others"),
        (lambda: mask_overlap.layer_overlap(A, others), "others"),
        (lambda: mask_overlap.flipped(A, others), "before"),
        (lambda: mask_overlap.overlap_table({"seed 0": A, "seed 1": B, "seed 2": others}), "seed 2"),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        assert str(error.value) == f"{name} {text}"


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="^masks: empty; must have at least one entry$"):
        mask_overlap.flipped({}, {})
