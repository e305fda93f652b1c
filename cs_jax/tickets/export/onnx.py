"""An ONNX model, made by jax2onnx and read back by ONNX Runtime."""

import logging

import jax
import numpy as np

from cs_jax.core.errors import ConfigError, quiet
from cs_jax.layers import convolution
from cs_jax.tickets.export.plain_network import Served

SUFFIX = ".onnx"

OPSET = 21
"""Version of the operators: ONNX Runtime reads it since 1.18, of June 2024."""


def export_onnx(served: Served) -> bytes:
    """A model from "images" (batch, height, width, channels) of 0 to 255, float32, to "logits" (batch, num_classes).

    Raises:
        ConfigError: jax2onnx is not installed.
    """
    try:
        from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing(error) from error
    # It remarks on values whose types nobody asks for, and its layers add biases with fewer axes.
    silent = quiet("onnx_ir", logging.ERROR)
    with convolution.for_serving(), silent, jax.numpy_rank_promotion("allow"):
        model = to_onnx(
            served.logits,
            [("batch", *served.image_shape)],
            model_name=type(served.model).__name__,
            opset=OPSET,
            input_names=["images"],
            output_names=["logits"],
        )
    # Shapes between layers, of which it gets some wrong: runtimes infer them, and warn of the difference.
    del model.graph.value_info[:]
    return model.SerializeToString()


def logits(content: bytes, served: Served, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes of images of 0 to 255."""
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing(error) from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images})
    return np.asarray(found)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"--to onnx: needs jax2onnx and onnxruntime ({error}), wanted both installed: pip install 'cs_jax[onnx]'"
    )
