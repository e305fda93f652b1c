"""PyTorch names and layouts of a network's arrays, and conversion in both directions.

A name is the path of the layer with dots, also after a stage ("stage1.block2"), as in the authors' release. A `ResNet`
with bottleneck blocks has the names of torchvision's ResNets. Kernels are (out, in, height, width) and (out, in).
PyTorch flattens images with channels first, so a dense layer after flattening reads its inputs in another order.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flax import linen as nn

from cs_jax.models import ResNet, wiring
from cs_jax.models.wiring import Attention, Input, Linear

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of arrays by name, "params/conv0/kernel"."""

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
"""PyTorch's names of leaves that have another name in Flax."""

COUNTER = "num_batches_tracked"
"""Name of an int64 scalar that PyTorch's BatchNorm has in addition."""

TORCHVISION = {
    "conv0": "conv1",
    "bn0": "bn1",
    "classifier": "fc",
    **{f"conv_{letter}": f"conv{number}" for number, letter in enumerate("abc", start=1)},
    **{f"bn_{letter}": f"bn{number}" for number, letter in enumerate("abc", start=1)},
    "downsample": "downsample.0",
    "bn_downsample": "downsample.1",
}


@dataclass(frozen=True)
class Entry:
    """Name and layout of an array in both libraries."""

    path: str  # in cs_jax, "params/conv0/kernel"
    name: str  # in PyTorch, "conv0.weight"
    shape: tuple[int, ...]  # in cs_jax
    axes_in: int | None = None  # number of input axes of a kernel, after the window axes; None for other arrays
    channels: int | None = None  # channels of the flattened images that a kernel reads; None for other arrays

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self.to_torch(np.broadcast_to(np.float32(0), self.shape)).shape

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The array in PyTorch's layout."""
        if self.axes_in is None:
            return array.reshape(-1) if self.path.endswith("/bias") else array
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        matrix = array.reshape(math.prod(self.shape[: self.axes_in]), -1)
        if self.channels is not None:
            matrix = _reordered(matrix, -1, self.channels)
        return matrix.T

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """The array in the layout of cs_jax."""
        if self.axes_in is None:
            return array.reshape(self.shape)
        if len(self.shape) == 4:
            return array.transpose(2, 3, 1, 0)
        matrix = array.T
        if self.channels is not None:
            matrix = _reordered(matrix, self.channels, -1)
        return matrix.reshape(self.shape)


def _reordered(matrix: np.ndarray, *axes: int) -> np.ndarray:
    """Matrix with rows in the order (first, second) reordered to (second, first); `axes` are the two sizes or -1."""
    rows, columns = matrix.shape
    return matrix.reshape(*axes, columns).swapaxes(0, 1).reshape(rows, columns)


def entries(model: nn.Module, shapes: Shapes, image_channels: int) -> list[Entry]:
    """Entries of all arrays of a network except masks.

    Args:
        model: module of `cs_jax.models`; gives the names and the wiring.
        shapes: shapes of "params" and "batch_stats", by name.
        image_channels: number of channels of the images, for networks that flatten images.
    """
    flattened = _flattened(model, shapes, image_channels)
    outs = {
        f"params/{node.name}/out/kernel" for node in wiring.wiring_of(model)[0].nodes if isinstance(node, Attention)
    }
    found = []
    for path, shape in shapes.items():
        axes_in = None if not path.endswith("/kernel") else 2 if path in outs else 1
        found.append(Entry(path, _name(model, path), shape, axes_in, flattened.get(path)))
    return found


def _name(model: nn.Module, path: str) -> str:
    _, *layers, leaf = path.split("/")
    if isinstance(model, ResNet) and model.bottleneck:
        layers = [re.sub(r"stage(\d+)_block(\d+)", _torchvision_block, TORCHVISION.get(name, name)) for name in layers]
    else:
        layers = [re.sub(r"^(stage\d+)_", r"\1.", name) for name in layers]
    return ".".join((*layers, LEAVES.get(leaf, leaf)))


def _torchvision_block(match: re.Match[str]) -> str:
    return f"layer{match[1]}.{int(match[2]) - 1}"


def _flattened(model: nn.Module, shapes: Shapes, image_channels: int) -> dict[str, int]:
    """Number of channels before flattening, by name of the dense kernel that reads the flattened images."""
    channels: list[int] = []
    found = {}
    for node in wiring.wiring_of(model)[0].nodes:
        match node:
            case Input():
                channels.append(image_channels)
            case Linear(source, name):
                kernel = f"params/{name}/kernel"
                if len(shapes[kernel]) == 2 and shapes[kernel][0] != channels[source]:
                    found[kernel] = channels[source]
                channels.append(shapes[kernel][-1])
            case Attention(name=name):
                channels.append(shapes[f"params/{name}/out/kernel"][-1])
            case _:
                channels.append(channels[wiring.sources(node)[0]])
    return found
