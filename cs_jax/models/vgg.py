"""VGG networks for CIFAR: with BatchNorm, and with one linear layer instead of three."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.typing import DTypeLike

from cs_jax.core.arrays import logits_dtype
from cs_jax.layers.batch_norm import BatchNorm
from cs_jax.layers.masked import MaskedConv
from cs_jax.models.conv import check_pools
from cs_jax.models.features import DEFAULT_FEATURES, Features
from cs_jax.models.resnet import he_normal_fan_out
from cs_jax.models.wiring import Signal, Wiring


class VGG(nn.Module):
    """Stages of 3x3 convolutions with BatchNorm and ReLU; global average pooling; a classifier.

    Each stage ends with a 2x2 max pool. Maskable: the convolutions, which have no bias. Always dense: BatchNorm,
    classifier. Initial kernels of convolutions are He normal by fan-out. The initial kernel of the classifier is normal
    with standard deviation 0.01. Both are as in torchvision.

    Call: `model.apply(variables, images, train=...)` with float images (batch, height, width, channels) returns
    logits (batch, num_classes). With `train=True`, BatchNorm normalises by the batch and "batch_stats" must be mutable.

    Attributes:
        num_classes: number of outputs of the classifier.
        stage_sizes: convolutions in each stage.
        widths: channels in each stage.
        dtype: dtype of the computation; by default the promoted dtype of images and weights.
        param_dtype: dtype of the weights.
        remat: store only the inputs of stages for the backward pass, which recomputes the other activations.
        features: output features by layer name, for layers that differ from the defaults; set by `shrink`.
        conv: class of the convolutions; `flax.linen.Conv` makes the plain dense network.
        folded: no BatchNorm; the convolutions have biases instead. For inference: see `cs_jax.tickets.fold`.

    Raises:
        ValueError: the images are too small for the pools, which halve height and width.

    References:
        Simonyan and Zisserman, 2014, arXiv:1409.1556, configuration D; Li et al., 2016, arXiv:1608.08710, for CIFAR.
    """

    num_classes: int = 10
    stage_sizes: Sequence[int] = (2, 2, 3, 3, 3)
    widths: Sequence[int] = (64, 128, 256, 512, 512)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    features: Features = DEFAULT_FEATURES
    conv: type[nn.Conv] = MaskedConv
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_pools(x, len(self.widths))
        make_stage = nn.remat(VGG._stage, static_argnums=(2, 3)) if self.remat else VGG._stage
        for stage in range(1, len(self.widths) + 1):
            x = make_stage(self, x, stage, train)
        x = jnp.mean(x, axis=(1, 2))  # 32x32 images have one pixel left here
        return nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.normal(0.01),
            dtype=logits_dtype(self.dtype),
            param_dtype=self.param_dtype,
            name="classifier",
        )(x)

    def _stage(self, x: jax.Array, stage: int, train: bool) -> jax.Array:
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(
            self.conv, kernel_size=(3, 3), padding=1, use_bias=self.folded, kernel_init=he_normal_fan_out, **dtypes
        )
        norm = partial(BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, **dtypes)
        for layer in range(1, self.stage_sizes[stage - 1] + 1):
            name = f"stage{stage}_conv{layer}"
            x = conv(self.features.get(name, self.widths[stage - 1]), name=name)(x)
            x = nn.relu(x if self.folded else norm(name=f"stage{stage}_bn{layer}")(x))
        return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))

    def wire(self, net: Wiring, x: Signal) -> Signal:
        for stage, layers in enumerate(self.stage_sizes, start=1):
            for layer in range(1, layers + 1):
                x = net.conv(x, f"stage{stage}_conv{layer}", zero_padded=True)
                x = net.activation(x if self.folded else net.batch_norm(x, f"stage{stage}_bn{layer}"), nn.relu)
            x = net.pool(x)
        return net.dense(net.pool(x), "classifier")

    def resize(self, features: Features) -> "VGG":
        return self.clone(features=FrozenDict({**self.features, **features}))


VGG16 = partial(VGG, stage_sizes=(2, 2, 3, 3, 3), widths=(64, 128, 256, 512, 512))
"""For CIFAR-10: 14,724,042 weights, 14,710,464 of them maskable."""
