"""Schedules of temperature and learning rate, as functions of the epoch in a round."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer


def temperature(epoch: Any, num_epochs: Any, final: Any) -> Any:
    """Temperature of an epoch, `final ** (epoch / (num_epochs - 1))`: 1 in the first epoch, `final` in the last.

    The temperature is constant in an epoch, and starts again at 1 in each round. In a round of one epoch, the
    temperature is `final`.

    Args:
        epoch: epoch in the round, from 0 to `num_epochs - 1`; may be traced.
        num_epochs: number of epochs in a round, at least 1; may be traced.
        final: temperature of the last epoch, finite and above 0; may be traced.

    Returns:
        A Python float; a scalar array if an argument is an array.

    Raises:
        ValueError: an argument, where concrete, is out of range.

    References:
        Savarese et al., 2020, arXiv:1912.04427, section 3.

    >>> [temperature(epoch, 3, 100.0) for epoch in range(3)]
    [1.0, 10.0, 100.0]
    """
    traced = isinstance(num_epochs, Tracer)
    if not traced and num_epochs < 1:
        raise ValueError(f"num_epochs {num_epochs}: must be at least 1")
    if not isinstance(final, Tracer) and not (math.isfinite(final) and final > 0):
        raise ValueError(f"final {final:g}: must be a finite number above 0")
    if not (traced or isinstance(epoch, Tracer)) and not 0 <= epoch < num_epochs:
        raise ValueError(f"epoch {epoch}: must be 0 to {num_epochs - 1}")
    if traced:
        return final ** jnp.where(num_epochs > 1, epoch / jnp.maximum(num_epochs - 1, 1), 1.0)
    if num_epochs == 1:
        return final
    return final ** (epoch / (num_epochs - 1))


def learning_rate(epoch: int, base: float, boundaries: Sequence[int], drops: Sequence[float]) -> float:
    """Learning rate of an epoch: `base` times every drop with `epoch >= boundary`.

    Args:
        epoch: epoch in the round, from 0.
        base: learning rate before the first drop.
        boundaries: epochs from which the drops apply, increasing; boundaries after the last epoch have no effect.
        drops: factor of each drop; one per boundary.

    Raises:
        ValueError: `boundaries` and `drops` have different lengths.

    >>> [learning_rate(epoch, 1.0, (1, 3), (0.5, 0.5)) for epoch in range(4)]
    [1.0, 0.5, 0.5, 0.25]
    """
    if len(drops) != len(boundaries):
        raise ValueError(f"drops {tuple(drops)}: must have one factor per boundary, {len(boundaries)}")
    reached = [drop for boundary, drop in zip(boundaries, drops, strict=True) if epoch >= boundary]
    return base * math.prod(reached)
