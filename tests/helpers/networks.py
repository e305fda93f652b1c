"""Small networks of every family, with random weights and masks, and tickets of them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cs_jax import models
from cs_jax.tickets.ticket import LoadedTicket

FAMILIES = {
    "resnet": (models.ResNet(num_classes=4, stage_sizes=(1, 1), widths=(4, 6)), (8, 8, 1)),
    "bottleneck": (models.BottleneckResNet(num_classes=4, stage_sizes=(1, 1), widths=(4, 6)), (16, 16, 3)),
    "vgg": (models.VGG(num_classes=4, stage_sizes=(1, 2), widths=(4, 6)), (8, 8, 3)),
    "conv": (models.ConvNet(num_classes=4, widths=(4,)), (4, 4, 3)),
    "vit": (models.VisionTransformer(num_classes=4, depth=1, width=12, num_heads=3), (8, 8, 3)),
    "lenet": (models.LeNet300100(num_classes=4), (4, 4, 1)),
}


def masked(model: nn.Module, image_shape: tuple[int, ...], *, scale: float = 1.9) -> Any:
    """Variables with random norms and biases, and masks that remove the first channel of every layer."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape))))
    rng, dtype = np.random.default_rng(0), model.param_dtype  # pyright: ignore[reportAttributeAccessIssue]

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape)
        match path[0].key, path[-1].key:
            case "masks", _:
                noise = scale * (noise > 0.3)
                noise[..., 0] = 0
            case _, "var":
                noise = 0.5 + np.abs(noise)
            case _, "scale":
                noise = 1 + 0.1 * noise
            case _, "kernel":
                noise /= np.sqrt(math.prod(leaf.shape[:-1]))
        return np.asarray(noise, dtype)  # a NumPy array: compiles nothing

    return jax.tree.map_with_path(fill, dict(shapes))


def ticket(model: nn.Module, image_shape: tuple[int, ...], *, scale: float = 1.9) -> LoadedTicket:
    """Loaded ticket of such a network."""
    channels = image_shape[-1]
    metadata = {
        "model": {"image_shape": list(image_shape)},
        "normalization": {"mean": [120.0] * channels, "std": [60.0] * channels},
    }
    return LoadedTicket(masked(model, image_shape, scale=scale), None, model, metadata)


def random_images(image_shape: tuple[int, ...], count: int = 3) -> np.ndarray:
    """Images of 0 to 255, float32."""
    return np.random.default_rng(2).integers(0, 256, (count, *image_shape)).astype(np.float32)
