"""Networks built from masked layers, one file per family; their wiring, prunable channels and multiply-adds.

A call of any network has the argument `train: bool`. Networks do not depend on the temperature.
"""

import inspect
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict

from cs_jax.core.arrays import DTYPES
from cs_jax.layers.batch_norm import BatchNorm
from cs_jax.models.conv import Conv2, Conv4, Conv6, ConvNet
from cs_jax.models.features import DEFAULT_FEATURES, Features
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
"""Networks by their name in `--model`.

All have the fields `num_classes`, `dtype` and `param_dtype`; networks of several blocks or stages also have `remat`.
"""


def has_field(name: str, field: str) -> bool:
    """Whether the network `name` in `MODELS` has a field, such as "remat"."""
    return field in inspect.signature(MODELS[name]).parameters


def build(
    name: str, *, num_classes: int, dtype: str = "float32", remat: bool = False, features: Features = DEFAULT_FEATURES
) -> nn.Module:
    """Makes a network by its name. Passes only fields that differ from the default: a network may lack other fields.

    Args:
        name: key of `MODELS`.
        num_classes: number of outputs of the classifier.
        dtype: dtype of the computation, a key of `cs_jax.core.arrays.DTYPES`.
        remat: recompute activations inside blocks in the backward pass.
        features: output features by layer name, for layers that differ from the defaults; set by `shrink`.
    """
    fields: dict[str, Any] = {} if DTYPES[dtype] is None else {"dtype": DTYPES[dtype]}
    fields |= {"remat": True} if remat else {}
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
    "has_field",
]
