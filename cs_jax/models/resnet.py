"""Residual networks: for small images as in the authors' release, for large images as in torchvision."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.typing import DTypeLike

from cs_jax.core.arrays import logits_dtype
from cs_jax.layers import convolution
from cs_jax.layers.batch_norm import BatchNorm
from cs_jax.layers.masked import MaskedConv
from cs_jax.models.features import DEFAULT_FEATURES, Features, submodule_features
from cs_jax.models.wiring import Signal, Wiring

# Initializers as in PyTorch: not truncated, unlike `nn.initializers.xavier_normal`.
xavier_normal = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ResNet(nn.Module):
    """Residual network: a stem, stages of residual blocks, global average pooling, a classifier.

    `bottleneck` selects one of two designs:

    - False: for small images, as in the authors' release. The stem is a 3x3 convolution. A block has two 3x3
      convolutions and returns `width` channels. Shortcuts that change the shape are 1x1 convolutions without BatchNorm.
      Maskable: the 3x3 convolutions. All initial kernels are Glorot normal.
    - True: for large images, as in torchvision. The stem is a 7x7 convolution with stride 2 and a max pool with
      stride 2. A block has a 1x1, a 3x3 and a 1x1 convolution and returns 4 * `width` channels; only the 3x3
      convolution has a stride. Shortcuts that change the shape are 1x1 convolutions with BatchNorm. Maskable: every
      convolution except the stem. Initial kernels of convolutions are He normal by fan-out. The classifier is
      initialized as PyTorch's linear layers, except that its bias is 0.

    BatchNorm and the classifier are always dense. Convolutions have no bias. A 3x3 convolution pads 1 on every side,
    also at stride 2, where "SAME" would pad differently.

    Call: `model.apply(variables, images, train=...)` with float images (batch, height, width, channels) returns
    logits (batch, num_classes). With `train=True`, BatchNorm normalises by the batch and "batch_stats" must be mutable.

    Attributes:
        num_classes: number of outputs of the classifier.
        stage_sizes: blocks in each stage; each stage except the first starts with stride 2.
        widths: width of the blocks in each stage, in channels; the stem has the width of the first stage.
        dtype: dtype of the computation; by default the promoted dtype of images and weights.
        param_dtype: dtype of the weights.
        remat: store only the inputs of blocks for the backward pass, which recomputes the other activations.
        features: output features by layer name, for layers that differ from the defaults; set by `shrink`.
        conv: class of the masked convolutions; `flax.linen.Conv` makes the plain dense network.
        folded: no BatchNorm; the convolutions before it have biases instead. For inference: see `cs_jax.tickets.fold`.
        bottleneck: design of stem and blocks, as above.

    References:
        He et al., 2015, arXiv:1512.03385; table 1 for bottleneck blocks.
    """

    num_classes: int = 10
    stage_sizes: Sequence[int] = (3, 3, 3)
    widths: Sequence[int] = (16, 32, 64)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    features: Features = DEFAULT_FEATURES
    conv: type[nn.Conv] = MaskedConv
    folded: bool = False
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        stem = self._stem()
        x = nn.relu(_conv_norm(self, stem, self.features.get(stem.name, self.widths[0]), x, train))
        if self.bottleneck:
            x = convolution.max_pool(x, (3, 3), strides=(2, 2), padding=(1, 1))
        make_block = nn.remat(ResidualBlock, static_argnums=(2,)) if self.remat else ResidualBlock
        for name, width, stride, projects in self._blocks():
            x = make_block(
                width,
                stride,
                projects,
                features=submodule_features(self.features, name),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                conv=self.conv,
                folded=self.folded,
                bottleneck=self.bottleneck,
                name=name,
            )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(
            self.num_classes,
            kernel_init=torch_linear if self.bottleneck else xavier_normal,
            dtype=logits_dtype(self.dtype),
            param_dtype=self.param_dtype,
            name="classifier",
        )(x)

    def _stem(self) -> "_Conv":
        if self.bottleneck:
            return _Conv("conv0", "bn0", size=7, stride=2, masked=False)
        return _Conv("conv0", "bn0", size=3)

    def _blocks(self) -> "Iterator[_Block]":
        width_in = self.widths[0]
        for stage, (num_blocks, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True), start=1):
            width_out = 4 * width if self.bottleneck else width
            for block in range(1, num_blocks + 1):
                stride = 2 if block == 1 and stage > 1 else 1
                yield _Block(f"stage{stage}_block{block}", width, stride, stride != 1 or width_in != width_out)
                width_in = width_out

    def wire(self, net: Wiring, x: Signal) -> Signal:
        x = net.activation(self._wire_conv_norm(net, x, self._stem()), nn.relu)
        if self.bottleneck:
            x = net.pool(x)
        for name, _, stride, projects in self._blocks():
            (*inner, last), shortcut = _block_convolutions(self.bottleneck, stride)
            y = x
            for conv in inner:
                y = net.activation(self._wire_conv_norm(net, y, conv, f"{name}/"), nn.relu)
            y = self._wire_conv_norm(net, y, last, f"{name}/")
            if projects:
                x = self._wire_conv_norm(net, x, shortcut, f"{name}/")
            x = net.activation(net.add(x, y), nn.relu)
        return net.dense(net.pool(x), "classifier")

    def _wire_conv_norm(self, net: Wiring, x: Signal, conv: "_Conv", prefix: str = "") -> Signal:
        x = net.conv(x, prefix + conv.name, zero_padded=conv.size > 1)
        return x if conv.norm is None or self.folded else net.batch_norm(x, prefix + conv.norm)

    def resize(self, features: Features) -> "ResNet":
        return self.clone(features=FrozenDict({**self.features, **features}))


class _Block(NamedTuple):
    """Name and shape of a block in a network."""

    name: str
    width: int
    stride: int
    projects: bool  # the shortcut has a convolution, because the shape changes


class _Conv(NamedTuple):
    """A convolution and the BatchNorm after it, for `__call__` and for `wire`."""

    name: str
    norm: str | None  # name of the BatchNorm; None for no BatchNorm
    size: int  # side of the window
    stride: int = 1
    masked: bool = True
    expansion: int = 1  # output channels, as a multiple of the block's width


def _block_convolutions(bottleneck: bool, stride: int) -> tuple[tuple[_Conv, ...], _Conv]:
    """The convolutions of a block in order, and the convolution of its shortcut."""
    if bottleneck:
        narrow, wide = _Conv("conv_a", "bn_a", 1), _Conv("conv_c", "bn_c", 1, expansion=4)
        return (narrow, _Conv("conv_b", "bn_b", 3, stride), wide), _Conv("downsample", "bn_downsample", 1, stride)
    convolutions = _Conv("conv_a", "bn_a", 3, stride), _Conv("conv_b", "bn_b", 3)
    return convolutions, _Conv("downsample", None, 1, stride, masked=False)


class ResidualBlock(nn.Module):
    """Convolutions with BatchNorm, and ReLU between them; the shortcut is added before the last ReLU.

    Maps (batch, height, width, channels) to (batch, height / stride, width / stride, channels out). See `ResNet` for
    the convolutions with and without `bottleneck`.

    Attributes:
        width: output channels; with `bottleneck`, channels inside the block, which returns 4 * `width` channels.
        stride: divides height and width of the images.
        projects: the shortcut is a 1x1 convolution; required where the shape changes.
        features: output features by layer name, for layers that differ from the defaults.
        dtype, param_dtype, conv, folded, bottleneck: as for `ResNet`.
    """

    width: int
    stride: int
    projects: bool
    features: Features = DEFAULT_FEATURES
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    conv: type[nn.Conv] = MaskedConv
    folded: bool = False
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        convolutions, shortcut = _block_convolutions(self.bottleneck, self.stride)
        y = x
        for conv in convolutions:
            y = y if conv is convolutions[0] else nn.relu(y)
            y = _conv_norm(self, conv, self.features.get(conv.name, conv.expansion * self.width), y, train)
        if self.projects:
            x = _conv_norm(self, shortcut, y.shape[-1], x, train)
        return nn.relu(x + y)


def _conv_norm(module: ResNet | ResidualBlock, conv: _Conv, features: int, x: jax.Array, train: bool) -> jax.Array:
    """Applies a convolution and the BatchNorm after it, as submodules of `module` and with its settings."""
    dtypes: Any = {"dtype": module.dtype, "param_dtype": module.param_dtype}
    layer = module.conv if conv.masked else nn.Conv
    x = layer(
        features,
        (conv.size, conv.size),
        strides=conv.stride,
        padding=conv.size // 2,
        use_bias=module.folded and conv.norm is not None,
        kernel_init=he_normal_fan_out if module.bottleneck else xavier_normal,
        conv_general_dilated_cls=convolution.get_convolve,
        name=conv.name,
        **dtypes,
    )(x)
    if conv.norm is None or module.folded:
        return x
    return BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=conv.norm, **dtypes)(x)


BottleneckBlock = partial(ResidualBlock, bottleneck=True)
"""`ResidualBlock` with a 1x1, a 3x3 and a 1x1 convolution."""

ResNet20 = partial(ResNet, stage_sizes=(3, 3, 3), widths=(16, 32, 64))
"""The CIFAR-10 network of the authors' release (there: ResNet-18): 272,282 weights, 267,696 of them maskable."""

ResNet32 = partial(ResNet, stage_sizes=(5, 5, 5), widths=(16, 32, 64))
"""For CIFAR, He et al., 2015, arXiv:1512.03385, with 1x1 shortcuts: 466,714 weights, 461,232 of them maskable."""

ResNet56 = partial(ResNet, stage_sizes=(9, 9, 9), widths=(16, 32, 64))
"""For CIFAR, He et al., 2015, arXiv:1512.03385, with 1x1 shortcuts: 855,578 weights, 848,304 of them maskable."""

ResNet8 = partial(ResNet, stage_sizes=(1, 1, 1), widths=(16, 32, 64))
"""Small network for 28x28 images: 77,562 weights for one input channel, 73,872 of them maskable."""

ResNet6 = partial(ResNet, stage_sizes=(1, 1), widths=(32, 64))
"""Small network for 8x8 digits: 77,162 weights for one input channel, 74,016 of them maskable."""

BottleneckResNet = partial(ResNet, bottleneck=True, stage_sizes=(3, 4, 6, 3), widths=(64, 128, 256, 512))
"""`ResNet` with the design for large images; by default the stages of ResNet-50."""

ResNet50 = BottleneckResNet
"""For ImageNet: 25,557,032 weights for 1000 classes, 23,445,504 of them maskable."""
