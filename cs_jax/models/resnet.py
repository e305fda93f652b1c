"""Residual networks: for small images as the authors' release builds them, and for large ones."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from cs_jax.core.arrays import logits_dtype
from cs_jax.layers import convolution
from cs_jax.layers.batch_norm import BatchNorm
from cs_jax.layers.masked import MaskedConv
from cs_jax.models.features import NONE, Features, within
from cs_jax.models.wiring import Signal, Wiring

# As PyTorch draws them: not truncated.
xavier_normal = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


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
        remat: keep the inputs of blocks alone for the backward pass, and compute all else again there.
        features: output features of layers that have others than their family's, by name; a shrunk network has some.
        conv: class of the 3x3 convolutions; `flax.linen.Conv` makes the plain dense network.
        folded: no BatchNorm, and biases in the convolutions that it followed: see `cs_jax.fold`. Not for training.
    """

    num_classes: int = 10
    stage_sizes: Sequence[int] = (3, 3, 3)
    widths: Sequence[int] = (16, 32, 64)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    features: Features = NONE
    conv: type[nn.Conv] = MaskedConv
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(_conv, self.conv, bias=self.folded, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(_norm, train=train, folded=self.folded, dtype=self.dtype, param_dtype=self.param_dtype)
        x = conv(self.features.get("conv0", self.widths[0]), 3, name="conv0")(x)
        x = nn.relu(norm(name="bn0")(x))
        make_block = nn.remat(ResidualBlock, static_argnums=(2,)) if self.remat else ResidualBlock
        for name, width, stride, projects in self._blocks():
            x = make_block(
                width,
                stride,
                projects,
                features=within(self.features, name),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                conv=self.conv,
                folded=self.folded,
                name=name,
            )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(
            self.num_classes,
            kernel_init=xavier_normal,
            dtype=logits_dtype(self.dtype),
            param_dtype=self.param_dtype,
            name="classifier",
        )(x)

    def _blocks(self) -> "Iterator[_Place]":
        return _places(self.stage_sizes, self.widths, self.widths[0], factor=1)

    def wire(self, net: Wiring, x: Signal) -> Signal:
        norm = partial(_wire_norm, net, folded=self.folded)
        x = net.activation(norm(net.conv(x, "conv0", zero_padded=True), "bn0"), nn.relu)
        for name, _, _, projects in self._blocks():
            y = norm(net.conv(x, f"{name}/conv_a", zero_padded=True), f"{name}/bn_a")
            y = net.conv(net.activation(y, nn.relu), f"{name}/conv_b", zero_padded=True)
            y = norm(y, f"{name}/bn_b")
            if projects:
                x = net.conv(x, f"{name}/downsample", zero_padded=False)
            x = net.activation(net.add(x, y), nn.relu)
        return net.dense(net.pool(x), "classifier")

    def resize(self, features: Features) -> "ResNet":
        return self.clone(features=FrozenDict({**self.features, **features}))


class _Place(NamedTuple):
    """A block's place in a network."""

    name: str
    width: int
    stride: int
    projects: bool  # whether its shortcut has a convolution, because the shape changes


def _places(stage_sizes: Sequence[int], widths: Sequence[int], width_in: int, *, factor: int) -> Iterator[_Place]:
    """The blocks of a network, each of which returns `factor` times its width."""
    for stage, (num_blocks, width) in enumerate(zip(stage_sizes, widths, strict=True), start=1):
        for block in range(1, num_blocks + 1):
            stride = 2 if block == 1 and stage > 1 else 1
            yield _Place(f"stage{stage}_block{block}", width, stride, stride != 1 or width_in != factor * width)
            width_in = factor * width


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, ReLU. Where it `projects` the shortcut is a plain 1x1 convolution.

    Takes and returns (batch, height, width, channels); `stride` divides height and width. It has to project where the
    shape changes. `features` are those of layers that do not have `width`.
    """

    width: int
    stride: int
    projects: bool
    features: Features = NONE
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    conv: type[nn.Conv] = MaskedConv
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(_conv, self.conv, bias=self.folded, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(_norm, train=train, folded=self.folded, dtype=self.dtype, param_dtype=self.param_dtype)
        width_inside, width_out = (self.features.get(name, self.width) for name in ("conv_a", "conv_b"))
        y = conv(width_inside, 3, strides=self.stride, name="conv_a")(x)
        y = nn.relu(norm(name="bn_a")(y))
        y = conv(width_out, 3, name="conv_b")(y)
        y = norm(name="bn_b")(y)
        if self.projects:
            plain = partial(_conv, nn.Conv, dtype=self.dtype, param_dtype=self.param_dtype)
            x = plain(width_out, 1, strides=self.stride, name="downsample")(x)
        return nn.relu(x + y)


ResNet20 = partial(ResNet, stage_sizes=(3, 3, 3), widths=(16, 32, 64))
"""The CIFAR-10 network of the authors' release, which calls it ResNet-18: 272,282 weights, 267,696 of them masked."""

ResNet32 = partial(ResNet, stage_sizes=(5, 5, 5), widths=(16, 32, 64))
"""For CIFAR, He et al., 2015, arXiv:1512.03385, with 1x1 shortcuts: 466,714 weights, 461,232 of them masked."""

ResNet56 = partial(ResNet, stage_sizes=(9, 9, 9), widths=(16, 32, 64))
"""For CIFAR, He et al., 2015, arXiv:1512.03385, with 1x1 shortcuts: 855,578 weights, 848,304 of them masked."""

ResNet8 = partial(ResNet, stage_sizes=(1, 1, 1), widths=(16, 32, 64))
"""Small network for 28x28 images: 77,562 weights for one input channel, 73,872 of them masked."""

ResNet6 = partial(ResNet, stage_sizes=(1, 1), widths=(32, 64))
"""Small network for 8x8 digits: 77,162 weights for one input channel, 74,016 of them masked."""


class BottleneckResNet(nn.Module):
    """Residual network for large images: a stem, stages of bottleneck blocks, global average pooling, a classifier.

    The stem is a 7x7 convolution with stride 2 and a max pool with stride 2; a block has its stride in the 3x3
    convolution, as torchvision has it. Masked is every convolution but the stem's, those in the shortcuts too. Not
    masked: the stem, BatchNorm, classifier.

    Kernels of convolutions start He normal by their fan-out, the classifier as PyTorch's linear layers (its bias at 0).

    Call: `model.apply(variables, images, train=...)` with float images (batch, height, width, channels) returns
    logits (batch, num_classes). With `train=True`, BatchNorm normalises by the batch and "batch_stats" must be mutable.

    Attributes:
        num_classes: width of the classifier.
        stage_sizes: blocks in each stage; each stage but the first starts with stride 2.
        widths: channels inside the blocks of each stage; a block returns four times as many. The stem has those of
            the first.
        dtype: of the computation; by default that of images and weights.
        param_dtype: of the weights.
        remat: keep the inputs of blocks alone for the backward pass, and compute all else again there.
        features: output features of layers that have others than their family's, by name; a shrunk network has some.
        conv: class of the masked convolutions; `flax.linen.Conv` makes the plain dense network.
        folded: no BatchNorm, and biases in the convolutions: see `cs_jax.fold`. Not for training.

    References:
        He et al., 2015, arXiv:1512.03385, table 1.
    """

    num_classes: int = 10
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    widths: Sequence[int] = (64, 128, 256, 512)
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    features: Features = NONE
    conv: type[nn.Conv] = MaskedConv
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stem = partial(_conv, nn.Conv, strides=2, bias=self.folded, kernel_init=he_normal_fan_out, **dtypes)
        x = stem(self.features.get("conv0", self.widths[0]), 7, name="conv0")(x)
        x = nn.relu(_norm(train=train, folded=self.folded, name="bn0", **dtypes)(x))
        x = convolution.max_pool(x, (3, 3), strides=(2, 2), padding=(1, 1))
        make_block = nn.remat(BottleneckBlock, static_argnums=(2,)) if self.remat else BottleneckBlock
        for name, width, stride, projects in self._blocks():
            fields = {"features": within(self.features, name), "conv": self.conv, "folded": self.folded, **dtypes}
            x = make_block(width, stride, projects, name=name, **fields)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        like_pytorch = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        dtypes["dtype"] = logits_dtype(self.dtype)
        return nn.Dense(self.num_classes, kernel_init=like_pytorch, name="classifier", **dtypes)(x)

    def _blocks(self) -> Iterator[_Place]:
        return _places(self.stage_sizes, self.widths, self.widths[0], factor=4)

    def wire(self, net: Wiring, x: Signal) -> Signal:
        norm = partial(_wire_norm, net, folded=self.folded)
        x = net.pool(net.activation(norm(net.conv(x, "conv0", zero_padded=True), "bn0"), nn.relu))
        for name, _, _, projects in self._blocks():
            y = x
            for layer in "ab":
                y = norm(net.conv(y, f"{name}/conv_{layer}", zero_padded=layer == "b"), f"{name}/bn_{layer}")
                y = net.activation(y, nn.relu)
            y = norm(net.conv(y, f"{name}/conv_c", zero_padded=False), f"{name}/bn_c")
            if projects:
                x = net.conv(x, f"{name}/downsample", zero_padded=False)
                x = norm(x, f"{name}/bn_downsample")
            x = net.activation(net.add(x, y), nn.relu)
        return net.dense(net.pool(x), "classifier")

    def resize(self, features: Features) -> "BottleneckResNet":
        return self.clone(features=FrozenDict({**self.features, **features}))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolution with BN each, ReLU between, plus the shortcut, ReLU.

    Takes (batch, height, width, channels) and returns 4 * `width` channels; `stride` divides height and width. Where it
    `projects`, as it has to where the shape changes, the shortcut is a 1x1 convolution and BN. `features` are those of
    layers that have others.
    """

    width: int
    stride: int
    projects: bool
    features: Features = NONE
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    conv: type[nn.Conv] = MaskedConv
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(_conv, self.conv, bias=self.folded, kernel_init=he_normal_fan_out, **dtypes)
        norm = partial(_norm, train=train, folded=self.folded, **dtypes)
        widths = {"conv_a": self.width, "conv_b": self.width, "conv_c": 4 * self.width}
        width_a, width_b, width_out = (self.features.get(name, width) for name, width in widths.items())
        y = nn.relu(norm(name="bn_a")(conv(width_a, 1, name="conv_a")(x)))
        y = nn.relu(norm(name="bn_b")(conv(width_b, 3, strides=self.stride, name="conv_b")(y)))
        y = norm(name="bn_c")(conv(width_out, 1, name="conv_c")(y))
        if self.projects:
            x = norm(name="bn_downsample")(conv(width_out, 1, strides=self.stride, name="downsample")(x))
        return nn.relu(x + y)


ResNet50 = partial(BottleneckResNet, stage_sizes=(3, 4, 6, 3), widths=(64, 128, 256, 512))
"""For ImageNet: 25,557,032 weights for 1000 classes, 23,445,504 of them masked."""


def _conv(
    conv: type[nn.Conv],
    features: int,
    size: int,
    *,
    strides: int = 1,
    bias: bool = False,
    kernel_init: Initializer = xavier_normal,
    name: str,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
) -> nn.Conv:
    return conv(
        features,
        (size, size),
        strides=strides,
        padding=size // 2,
        use_bias=bias,
        kernel_init=kernel_init,
        dtype=dtype,
        param_dtype=param_dtype,
        conv_general_dilated_cls=convolution.get_convolve,
        name=name,
    )


def _norm(
    *, train: bool, folded: bool, name: str, dtype: DTypeLike | None, param_dtype: DTypeLike
) -> Callable[[jax.Array], jax.Array]:
    if folded:
        return lambda x: x
    return BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, name=name
    )


def _wire_norm(net: Wiring, x: Signal, name: str, *, folded: bool) -> Signal:
    return x if folded else net.batch_norm(x, name)
