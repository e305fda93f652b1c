"""A program of `jax.export`: StableHLO with the weights inside, for any process that has JAX."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cs_jax.layers import convolution
from cs_jax.tickets.export.plain_network import Served

SUFFIX = ".stablehlo"

PLATFORMS = ("cpu", "cuda", "tpu")
"""What the program is compiled for where it is read."""


def export_stablehlo(served: Served) -> bytes:
    """A program from images (batch, height, width, channels) of 0 to 255, float32, to logits (batch, num_classes)."""
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *served.image_shape), jnp.float32)
    with convolution.for_serving():
        exported = jax.export.export(jax.jit(served.logits), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def logits(content: bytes, served: Served, images: np.ndarray) -> np.ndarray:
    """What the program computes of images of 0 to 255."""
    return np.asarray(jax.export.deserialize(bytearray(content)).call(images))
