"""LeNet-300-100, the fully connected network of the first lottery-ticket experiments."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.typing import DTypeLike

from cs_jax.core.arrays import logits_dtype
from cs_jax.layers.masked import MaskedDense
from cs_jax.models.features import DEFAULT_FEATURES, Features
from cs_jax.models.wiring import Signal, Wiring

xavier_normal = nn.initializers.xavier_normal()

HIDDEN = {"hidden0": 300, "hidden1": 100}
"""Number of units of each hidden layer."""


class LeNet300100(nn.Module):
    """Two masked hidden layers of 300 and 100 units with ReLU, and a dense classifier without masks.

    Call: `model.apply(variables, images, train=...)` with float images (batch, ...) returns logits
    (batch, num_classes). `train` has no effect: there is no BatchNorm.

    Attributes:
        num_classes: number of outputs of the classifier.
        dtype: dtype of the computation; by default the promoted dtype of images and weights.
        param_dtype: dtype of the weights.
        features: output features by layer name, for layers that differ from the defaults; set by `shrink`.
        dense: class of the hidden layers; `flax.linen.Dense` makes the plain network.

    References:
        LeCun et al., "Gradient-based learning applied to document recognition", 1998; Frankle and Carbin,
        arXiv:1803.03635, for lottery tickets.
    """

    num_classes: int = 10
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    features: Features = DEFAULT_FEATURES
    dense: type[nn.Dense] = MaskedDense

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for name, width in HIDDEN.items():
            x = self.dense(
                self.features.get(name, width),
                kernel_init=xavier_normal,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )(x)
            x = nn.relu(x)
        return nn.Dense(
            self.num_classes,
            kernel_init=xavier_normal,
            dtype=logits_dtype(self.dtype),
            param_dtype=self.param_dtype,
            name="classifier",
        )(x)

    def wire(self, net: Wiring, x: Signal) -> Signal:
        for name in HIDDEN:
            x = net.activation(net.dense(x, name), nn.relu)
        return net.dense(x, "classifier")

    def resize(self, features: Features) -> "LeNet300100":
        return self.clone(features=FrozenDict({**self.features, **features}))
