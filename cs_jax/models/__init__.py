"""Networks built from masked layers, one file per family. All take `train: bool` and know nothing of temperature."""

from collections.abc import Callable

from flax import linen as nn

from cs_jax.models.batch_norm import BatchNorm
from cs_jax.models.conv import Conv2, Conv4, Conv6, ConvNet
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
"""What `--model` can name. Each takes `num_classes`, `dtype` and `param_dtype`."""

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
]
