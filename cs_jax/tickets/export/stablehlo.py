"""StableHLO export: a `jax.export` program that contains the weights, for processes with JAX."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cs_jax.layers import convolution
from cs_jax.tickets.export.plain_network import PlainNetwork

SUFFIX = ".stablehlo"

PLATFORMS = ("cpu", "cuda", "tpu")
"""Platforms that the program can be compiled for."""


def export_stablehlo(network: PlainNetwork) -> bytes:
    """Program from images (batch, height, width, channels), float32 of 0 to 255, to logits (batch, num_classes)."""
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.float32)
    with convolution.for_serving():
        exported = jax.export.export(jax.jit(network.logits), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def logits(content: bytes, network: PlainNetwork, images: np.ndarray) -> np.ndarray:
    """Logits of the program for images of 0 to 255."""
    return np.asarray(jax.export.deserialize(bytearray(content)).call(images))
