"""Networks built from masked layers, one file per family. All take `train: bool` and know nothing of temperature."""

from collections.abc import Callable

from flax import linen as nn

from cs_jax.models.batch_norm import BatchNorm
from cs_jax.models.lenet import LeNet300100
from cs_jax.models.resnet import ResidualBlock, ResNet, ResNet6, ResNet8, ResNet20

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": ResNet20,
    "resnet8": ResNet8,
    "resnet6": ResNet6,
    "lenet300100": LeNet300100,
}
"""What `--model` can name. Each takes `num_classes`, `dtype` and `param_dtype`."""

__all__ = ["MODELS", "BatchNorm", "LeNet300100", "ResNet", "ResNet6", "ResNet8", "ResNet20", "ResidualBlock"]
