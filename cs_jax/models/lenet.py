"""Fully connected network of the first lottery-ticket experiments."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from cs_jax.layers import MaskedDense
from cs_jax.precision import of_logits

xavier_normal = nn.initializers.xavier_normal()


class LeNet300100(nn.Module):
    """Two masked hidden layers of 300 and 100 units with ReLU, and an unmasked classifier.

    Call: `model.apply(variables, images, train=...)` with float images (batch, ...) returns logits
    (batch, num_classes). `train` changes nothing: there is no BatchNorm.

    References:
        LeCun et al., "Gradient-based learning applied to document recognition", 1998; Frankle and Carbin,
        arXiv:1803.03635, for its use with tickets.
    """

    num_classes: int = 10
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer, width in enumerate((300, 100)):
            x = MaskedDense(
                width,
                kernel_init=xavier_normal,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"hidden{layer}",
            )(x)
            x = nn.relu(x)
        return nn.Dense(
            self.num_classes,
            kernel_init=xavier_normal,
            dtype=of_logits(self.dtype),
            param_dtype=self.param_dtype,
            name="classifier",
        )(x)
