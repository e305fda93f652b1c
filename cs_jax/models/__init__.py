"""Networks built from masked layers, one file per family. All take `train: bool` and know nothing of temperature."""

import inspect
from collections.abc import Callable

from flax import linen as nn
from flax.core import FrozenDict

from cs_jax.core.arrays import DTYPES
from cs_jax.layers.batch_norm import BatchNorm
from cs_jax.models.conv import Conv2, Conv4, Conv6, ConvNet
from cs_jax.models.features import NONE, Features
from cs_jax.models.lenet import LeNet300100
from cs_jax.models.resnet import (
    BottleneckBlock,
    BottleneckResNet,
    ResidualBlock,
    ResNet,
    ResNet6,
    ResNet8,
    ResNet20,
    ResNet32,
    ResNet50,
    ResNet56,
)
from cs_jax.models.vgg import VGG, VGG16
from cs_jax.models.vit import TransformerBlock, VisionTransformer, ViTTiny

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": ResNet20,
    "resnet32": ResNet32,
    "resnet56": ResNet56,
    "resnet50": ResNet50,
    "resnet8": ResNet8,
    "resnet6": ResNet6,
    "vgg16": VGG16,
    "conv2": Conv2,
    "conv4": Conv4,
    "conv6": Conv6,
    "vit_tiny": ViTTiny,
    "lenet300100": LeNet300100,
}
"""What `--model` can name. Each takes `num_classes`, `dtype` and `param_dtype`, those with blocks `remat` too."""


def takes(name: str, field: str) -> bool:
    """Whether a network has a field, `remat` for one."""
    return field in inspect.signature(MODELS[name]).parameters


def build(
    name: str, *, num_classes: int, dtype: str = "float32", remat: bool = False, features: Features = NONE
) -> nn.Module:
    """A network by its name; fields are given to it where they are not the default, as it need not have them.

    Args:
        name: in `MODELS`.
        num_classes: width of the classifier.
        dtype: of the computation, in `precision.DTYPES`.
        remat: compute activations inside of blocks again in the backward pass.
        features: of layers that have others than the family's, by name, as `shrink` leaves them.
    """
    wide = DTYPES[dtype] is None
    fields = {**({} if wide else {"dtype": DTYPES[dtype]}), **({"remat": True} if remat else {})}
    fields |= {"features": FrozenDict(features)} if features else {}
    return MODELS[name](num_classes=num_classes, **fields)


__all__ = [
    "MODELS",
    "BatchNorm",
    "BottleneckBlock",
    "BottleneckResNet",
    "Conv2",
    "Conv4",
    "Conv6",
    "ConvNet",
    "LeNet300100",
    "ResNet",
    "ResNet6",
    "ResNet8",
    "ResNet20",
    "ResNet32",
    "ResNet50",
    "ResNet56",
    "ResidualBlock",
    "TransformerBlock",
    "VGG",
    "VGG16",
    "ViTTiny",
    "VisionTransformer",
    "build",
    "takes",
]
