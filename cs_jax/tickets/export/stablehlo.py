"""StableHLO export: a function serialized by `jax.export`, with the weights as constants, for processes with JAX."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cs_jax.layers import convolution
from cs_jax.tickets.export.plain_network import PlainNetwork

SUFFIX = ".stablehlo"

PLATFORMS = ("cpu", "cuda", "tpu")
"""Platforms for which the function can be compiled."""


def export_stablehlo(network: PlainNetwork) -> bytes:
    """Serialized function from images to logits.

    Images are float32 of shape (batch, height, width, channels), 0 to 255. Logits are (batch, num_classes).
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.float32)
    with convolution.for_serving():
        exported = jax.export.export(jax.jit(network.logits), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def logits(content: bytes, network: PlainNetwork, images: np.ndarray) -> np.ndarray:
    """Logits of the serialized function for images with pixels of 0 to 255."""
    return np.asarray(jax.export.deserialize(bytearray(content)).call(images))
