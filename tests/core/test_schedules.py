"""Temperature and learning rate by epoch."""

import jax.numpy as jnp
import pytest

import cs_jax
from cs_jax.core import schedules


def test_temperature_rises_from_one_to_the_final_one() -> None:
    values = [cs_jax.temperature(epoch, 85, 200.0) for epoch in range(85)]
    assert (values[0], values[-1]) == (1.0, 200.0)
    assert values[42] == pytest.approx(200**0.5)
    assert all(
        later / earlier == pytest.approx(200 ** (1 / 84)) for earlier, later in zip(values, values[1:], strict=False)
    )


def test_a_single_epoch_has_the_final_temperature() -> None:
    assert cs_jax.temperature(0, 1, 200.0) == 200.0


def test_temperature_takes_an_array() -> None:
    assert float(cs_jax.temperature(jnp.int32(1), 3, 100.0)) == pytest.approx(10.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0, 200.0), "num_epochs 0: must be at least 1"),
        ((3, 3, 200.0), "epoch 3: must be 0 to 2"),
        ((-1, 3, 200.0), "epoch -1: must be 0 to 2"),
        ((-1.0, 3, 200.0), "epoch -1.0: must be 0 to 2"),
        ((0, 3, 0.0), "final 0: must be a finite number above 0"),
        ((0, 3, float("inf")), "final inf: must be a finite"),
    ],
)
def test_temperature_refuses_what_is_out_of_range(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cs_jax.temperature(*arguments)


def test_learning_rate_of_the_authors_schedule() -> None:
    rates = [schedules.learning_rate(epoch, 0.1, (56, 71), (0.1, 0.1)) for epoch in (0, 55, 56, 70, 71, 84)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_drops_after_the_last_epoch_and_no_drops_do_nothing() -> None:
    assert schedules.learning_rate(3, 0.1, (56,), (0.1,)) == 0.1
    assert schedules.learning_rate(3, 0.1, (), ()) == 0.1


def test_learning_rate_needs_one_drop_per_boundary() -> None:
    with pytest.raises(ValueError, match=r"drops \(0.5,\): must have one factor per boundary, 2"):
        schedules.learning_rate(3, 0.1, (1, 2), (0.5,))
