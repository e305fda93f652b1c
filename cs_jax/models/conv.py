"""Small convolutional networks of the first lottery-ticket experiments: Conv-2, Conv-4, Conv-6."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.typing import DTypeLike

from cs_jax.core.arrays import logits_dtype
from cs_jax.layers.masked import MaskedConv, MaskedDense
from cs_jax.models.features import DEFAULT_FEATURES, Features
from cs_jax.models.lenet import xavier_normal
from cs_jax.models.wiring import Signal, Wiring


class ConvNet(nn.Module):
    """Pairs of 3x3 convolutions, each pair followed by a 2x2 max pool; two hidden layers of 256 units; a classifier.

    All layers have biases; all except the classifier have ReLU. There is no BatchNorm. Maskable: kernels of
    convolutions and hidden layers. Always dense: biases, classifier. Initial kernels are Glorot normal; initial biases
    are 0.

    Call: `model.apply(variables, images, train=...)` with float images (batch, height, width, channels) returns logits
    (batch, num_classes). `train` has no effect.

    Attributes:
        num_classes: number of outputs of the classifier.
        widths: channels of the two convolutions in each pair.
        dtype: dtype of the computation; by default the promoted dtype of images and weights.
        param_dtype: dtype of the weights.
        remat: store only the inputs of stages for the backward pass, which recomputes the other activations.
        features: output features by layer name, for layers that differ from the defaults; set by `shrink`.
        conv, dense: classes of the masked layers; `flax.linen.Conv` and `flax.linen.Dense` make the plain network.

    Raises:
        ValueError: the images are too small for the pools, which halve height and width.

    References:
        Frankle and Carbin, 2019, arXiv:1803.03635, figure 2.
    """

    num_classes: int = 10
    widths: Sequence[int] = (64, 128, 256)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    features: Features = DEFAULT_FEATURES
    conv: type[nn.Conv] = MaskedConv
    dense: type[nn.Dense] = MaskedDense

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_pools(x, len(self.widths))
        fields = self._fields()
        make_stage = nn.remat(ConvNet._stage, static_argnums=(2,)) if self.remat else ConvNet._stage
        for stage in range(1, len(self.widths) + 1):
            x = make_stage(self, x, stage)
        x = x.reshape(x.shape[0], -1)
        for name in ("hidden0", "hidden1"):
            x = nn.relu(self.dense(self.features.get(name, 256), name=name, **fields)(x))
        fields["dtype"] = logits_dtype(self.dtype)
        return nn.Dense(self.num_classes, name="classifier", **fields)(x)

    def _stage(self, x: jax.Array, stage: int) -> jax.Array:
        fields = self._fields()
        for layer in (1, 2):
            name = f"stage{stage}_conv{layer}"
            width = self.features.get(name, self.widths[stage - 1])
            x = nn.relu(self.conv(width, (3, 3), padding=1, name=name, **fields)(x))
        return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))

    def wire(self, net: Wiring, x: Signal) -> Signal:
        for stage in range(1, len(self.widths) + 1):
            for layer in (1, 2):
                x = net.activation(net.conv(x, f"stage{stage}_conv{layer}", zero_padded=True), nn.relu)
            x = net.pool(x)
        for name in ("hidden0", "hidden1"):
            x = net.activation(net.dense(x, name), nn.relu)
        return net.dense(x, "classifier")

    def resize(self, features: Features) -> "ConvNet":
        return self.clone(features=FrozenDict({**self.features, **features}))

    def _fields(self) -> dict[str, Any]:
        return {"kernel_init": xavier_normal, "dtype": self.dtype, "param_dtype": self.param_dtype}


Conv2 = partial(ConvNet, widths=(64,))
"""For CIFAR-10: 4,301,642 weights, 4,298,432 of them maskable."""

Conv4 = partial(ConvNet, widths=(64, 128))
"""For CIFAR-10: 2,425,930 weights, 2,422,464 of them maskable."""

Conv6 = partial(ConvNet, widths=(64, 128, 256))
"""For CIFAR-10: 2,262,602 weights, 2,258,624 of them maskable."""


def check_pools(images: jax.Array, pools: int) -> None:
    """Raises a ValueError if `pools` 2x2 max pools leave no pixel of images (batch, height, width, channels)."""
    height, width = images.shape[1:3]
    least = 2**pools
    if min(height, width) < least:
        raise ValueError(f"images {height}x{width}: require at least {least}x{least} pixels")
