"""What changes from epoch to epoch: temperature and learning rate, as functions of the epoch inside a round."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer


def temperature(epoch: Any, num_epochs: Any, final: Any) -> Any:
    """Temperature of an epoch, `final ** (epoch / (num_epochs - 1))`: 1 in the first epoch, `final` in the last.

    Constant inside an epoch, and 1 again at the start of each round. A round of one epoch has `final`.

    Args:
        epoch: epoch inside the round, from 0 to `num_epochs - 1`; may be traced.
        num_epochs: epochs in a round, at least 1; may be traced.
        final: temperature of the last epoch, finite and above 0; may be traced.

    Returns:
        A Python float, or a scalar array where an argument is one.

    Raises:
        ValueError: an argument is out of range.

    References:
        Savarese et al., 2020, arXiv:1912.04427, section 3.

    >>> [temperature(epoch, 3, 100.0) for epoch in range(3)]
    [1.0, 10.0, 100.0]
    """
    traced = isinstance(num_epochs, Tracer)
    if not traced and num_epochs < 1:
        raise ValueError(f"num_epochs: got {num_epochs}, wanted at least 1")
    if not isinstance(final, Tracer) and not (math.isfinite(final) and final > 0):
        raise ValueError(f"final: got {final:g}, wanted a finite number above 0")
    if not (traced or isinstance(epoch, Tracer)) and not 0 <= epoch < num_epochs:
        raise ValueError(f"epoch: got {epoch}, wanted 0 to {num_epochs - 1}")
    if traced:
        return final ** jnp.where(num_epochs > 1, epoch / jnp.maximum(num_epochs - 1, 1), 1.0)
    if num_epochs == 1:
        return final
    return final ** (epoch / (num_epochs - 1))


def learning_rate(epoch: int, base: float, boundaries: Sequence[int], drops: Sequence[float]) -> float:
    """Learning rate of an epoch: `base` times every drop whose boundary has come (`epoch >= boundary`).

    Args:
        epoch: epoch inside the round, from 0.
        base: learning rate before the first drop.
        boundaries: epochs from which the drops hold, increasing; those after the last epoch have no effect.
        drops: factors, as many as boundaries.

    Raises:
        ValueError: there are more boundaries than drops, or fewer.

    >>> [learning_rate(epoch, 1.0, (1, 3), (0.5, 0.5)) for epoch in range(4)]
    [1.0, 0.5, 0.5, 0.25]
    """
    reached = [drop for boundary, drop in zip(boundaries, drops, strict=True) if epoch >= boundary]
    return base * math.prod(reached)
