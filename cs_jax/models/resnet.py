"""Residual networks for small images, as the authors' release builds them."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from cs_jax.layers import MaskedConv
from cs_jax.models.batch_norm import BatchNorm

# Xavier normal as PyTorch draws it: not truncated.
xavier_normal = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


class ResNet(nn.Module):
    """Residual network: a stem, stages of blocks of two 3x3 convolutions, global average pooling, a classifier.

    The 3x3 convolutions are masked. Not masked: 1x1 convolutions in the shortcuts, BatchNorm, classifier. Convolutions
    have no bias and 3x3 ones pad 1 on every side, also at stride 2, where "SAME" would pad differently.

    Call: `model.apply(variables, images, train=...)` with float images (batch, height, width, channels) returns
    logits (batch, num_classes). With `train=True`, BatchNorm normalises by the batch and "batch_stats" must be mutable.

    Attributes:
        num_classes: width of the classifier.
        stage_sizes: blocks in each stage; each stage but the first starts with stride 2.
        widths: channels in each stage; the stem has those of the first.
        dtype: of the computation; by default that of images and weights.
        param_dtype: of the weights.
        conv: class of the 3x3 convolutions; `flax.linen.Conv` makes the plain dense network.
    """

    num_classes: int = 10
    stage_sizes: Sequence[int] = (3, 3, 3)
    widths: Sequence[int] = (16, 32, 64)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    conv: type[nn.Conv] = MaskedConv

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(_conv3x3, self.conv, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(_norm, train=train, dtype=self.dtype, param_dtype=self.param_dtype)
        x = conv(self.widths[0], name="conv0")(x)
        x = nn.relu(norm(name="bn0")(x))
        for stage, (num_blocks, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1):
            for block in range(1, num_blocks + 1):
                stride = 2 if block == 1 and stage > 1 else 1
                x = ResidualBlock(
                    width,
                    stride,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    conv=self.conv,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(
            self.num_classes,
            kernel_init=xavier_normal,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="classifier",
        )(x)


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, ReLU. Where the shape changes the shortcut is a plain 1x1 convolution.

    Takes and returns (batch, height, width, channels); `stride` divides height and width.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    conv: type[nn.Conv] = MaskedConv

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(_conv3x3, self.conv, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(_norm, train=train, dtype=self.dtype, param_dtype=self.param_dtype)
        y = conv(self.width, strides=self.stride, name="conv_a")(x)
        y = nn.relu(norm(name="bn_a")(y))
        y = conv(self.width, name="conv_b")(y)
        y = norm(name="bn_b")(y)
        if self.stride != 1 or x.shape[-1] != self.width:
            x = nn.Conv(
                self.width,
                (1, 1),
                strides=self.stride,
                padding=0,
                use_bias=False,
                kernel_init=xavier_normal,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="downsample",
            )(x)
        return nn.relu(x + y)


ResNet20 = partial(ResNet, stage_sizes=(3, 3, 3), widths=(16, 32, 64))
"""The CIFAR-10 network of the authors' release, which calls it ResNet-18: 272,282 weights, 267,696 of them masked."""

ResNet8 = partial(ResNet, stage_sizes=(1, 1, 1), widths=(16, 32, 64))
"""Small network for 28x28 images: 77,562 weights for one input channel, 73,872 of them masked."""

ResNet6 = partial(ResNet, stage_sizes=(1, 1), widths=(32, 64))
"""Small network for 8x8 digits: 77,162 weights for one input channel, 74,016 of them masked."""


def _conv3x3(
    conv: type[nn.Conv],
    features: int,
    *,
    strides: int = 1,
    name: str,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
) -> nn.Conv:
    return conv(
        features,
        (3, 3),
        strides=strides,
        padding=1,
        use_bias=False,
        kernel_init=xavier_normal,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


def _norm(*, train: bool, name: str, dtype: DTypeLike | None, param_dtype: DTypeLike) -> nn.Module:
    return BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, name=name
    )
