"""ONNX export with jax2onnx, checked with ONNX Runtime."""

import logging

import jax
import numpy as np

from cs_jax.core.errors import ConfigError, quiet
from cs_jax.layers import convolution
from cs_jax.tickets.export.plain_network import PlainNetwork

SUFFIX = ".onnx"

OPSET = 21
"""Operator set version; supported by ONNX Runtime since 1.18 (June 2024)."""


def export_onnx(network: PlainNetwork) -> bytes:
    """ONNX file with the input "images" and the output "logits".

    "images" is float32 of shape (batch, height, width, channels), 0 to 255. "logits" is (batch, num_classes).

    Raises:
        ConfigError: jax2onnx is not installed.
    """
    try:
        from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing(error) from error
    # jax2onnx logs unused types, and its layers add biases of lower rank.
    silent = quiet("onnx_ir", logging.ERROR)
    with convolution.for_serving(), silent, jax.numpy_rank_promotion("allow"):
        model = to_onnx(
            network.logits,
            [("batch", *network.image_shape)],
            model_name=type(network.model).__name__,
            opset=OPSET,
            input_names=["images"],
            output_names=["logits"],
        )
    # jax2onnx writes wrong shapes of intermediate results. Runtimes infer the shapes, and would warn about differences.
    del model.graph.value_info[:]
    return model.SerializeToString()


def logits(content: bytes, network: PlainNetwork, images: np.ndarray) -> np.ndarray:
    """Logits that ONNX Runtime computes for images with pixels of 0 to 255."""
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing(error) from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images})
    return np.asarray(found)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"--to onnx: requires jax2onnx and onnxruntime ({error}); install them: pip install 'cs_jax[onnx]'"
    )
