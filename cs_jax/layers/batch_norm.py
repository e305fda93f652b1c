"""Batch normalisation with the running variance of PyTorch."""

import math
from typing import Any

import jax
import numpy as np
from flax import linen as nn


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` with the unbiased batch variance in its running average, as in PyTorch.

    Training is the same as in Flax: a batch is normalised by its biased variance. The batch variance enters the running
    variance multiplied by n / (n - 1), for n values per feature in a batch. Evaluation therefore differs from Flax.

    Args of a call:
        x: float array (..., features) for the default `axis`; at least 2 values per feature in training.
        use_running_average: whether to normalise by the running averages (evaluation) instead of the batch statistics.

    Raises:
        ValueError: a training batch has one value per feature, whose variance is undefined; `mask` or
            `axis_index_groups` is set.
    """

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None) -> Any:
        if mask is not None:
            raise ValueError("BatchNorm mask: not supported; leave this argument out")
        if self.axis_index_groups is not None:
            raise ValueError("BatchNorm axis_index_groups: not supported; leave this field out")
        old_mean, old_var = (self.get_variable("batch_stats", name) for name in ("mean", "var"))
        y = super().__call__(x, use_running_average)
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        if use_running_average or self.is_initializing():
            return y
        # super() stored old * momentum + biased * (1 - momentum): only the second term gets the factor.
        kept = self.momentum * old_var
        biased = self.get_variable("batch_stats", "var") - kept
        var = kept + biased * self._unbiased_factor(x)
        # Running averages keep their dtypes for batches of any dtype, as loops over steps (lax.scan) require.
        self.put_variable("batch_stats", "var", var.astype(old_var.dtype))
        self.put_variable("batch_stats", "mean", self.get_variable("batch_stats", "mean").astype(old_mean.dtype))
        return y

    def _unbiased_factor(self, x: jax.Array) -> float:
        features = math.prod(x.shape[axis] for axis in np.atleast_1d(self.axis))
        n = x.size // features * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)
        if n < 2:
            raise ValueError(
                f"{'/'.join(self.path) or 'BatchNorm'}: a training batch must have at least 2 values per feature, "
                f"not {n}; use a larger batch"
            )
        return n / (n - 1)
