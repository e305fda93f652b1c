"""PyTorch state dicts in safetensors files: export and import."""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from jaxtyping import PyTree
from msgspec import Struct

from cs_jax.core import trees
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError, closest, one_of
from cs_jax.core.schema import convert, decode
from cs_jax.models import MODELS, build, wiring
from cs_jax.models.wiring import Attention, Linear
from cs_jax.tickets.checks import DTYPES
from cs_jax.tickets.export import torch_names
from cs_jax.tickets.export.plain_network import PlainNetwork
from cs_jax.tickets.export.torch_names import COUNTER, Entry, Shapes
from cs_jax.tickets.metadata import MAX_IMAGE_ENTRIES, Shape, is_shape, quoted
from cs_jax.tickets.ticket import shapes_of

Tensors = dict[str, np.ndarray]

SUFFIX = ".pytorch.safetensors"

FOLDED = "; BatchNorm is missing: export without --fold, because folded files cannot be imported"


class _Normalization(Struct, forbid_unknown_fields=True):
    mean: list[float]
    std: list[float]


class _About(Struct):
    """Metadata that the export writes. Other keys are ignored."""

    image_shape: Shape | None = None
    normalization: _Normalization | None = None


def export_state_dict(network: PlainNetwork) -> bytes:
    """Content of a safetensors file: the state dict of the network, with image shape and normalisation as metadata."""
    tensors = to_tensors(network.model, network.variables, network.image_shape[-1])
    about = json.dumps(network.about, sort_keys=True)
    return safetensors.numpy.save(tensors, {"format": "pt", "cs_jax": about})


def logits(content: bytes, network: PlainNetwork, images: np.ndarray) -> np.ndarray:
    """Logits of a network with the weights of a file, for images with pixels of 0 to 255."""
    shapes = {name: leaf.shape for name, leaf in _by_name(network.variables).items()}
    found = from_tensors(_tensors(content), torch_names.entries(network.model, shapes, network.image_shape[-1]))
    read = PlainNetwork(network.model, found, network.image_shape, network.normalization)
    return np.asarray(jax.jit(read.logits)(images))


def to_tensors(model: nn.Module, variables: Mapping[str, PyTree], image_channels: int) -> Tensors:
    """PyTorch state dict of a plain network: arrays with PyTorch's names and layouts.

    Args:
        model: module of `cs_jax.models`.
        variables: "params" multiplied by their masks and, if there is BatchNorm, "batch_stats"; see `fold`.
        image_channels: number of channels of the images, for networks that flatten them.
    """
    arrays = _by_name(variables)
    shapes = {path: array.shape for path, array in arrays.items()}
    tensors = {}
    for entry in torch_names.entries(model, shapes, image_channels):
        tensors[entry.name] = np.ascontiguousarray(entry.to_torch(arrays[entry.path]))
        if entry.path.startswith("batch_stats/") and entry.path.endswith("/var"):
            tensors[f"{entry.name.rpartition('.')[0]}.{COUNTER}"] = np.zeros((), np.int64)
    return tensors


def from_tensors(tensors: Mapping[str, np.ndarray], entries: Sequence[Entry]) -> dict[str, PyTree]:
    """Variables from tensors with the names and shapes of `entries`.

    Raises:
        ConfigError: a tensor is missing, is unknown, has another shape, or has no float dtype.
    """
    wanted = {entry.name: entry for entry in entries}
    for name in wanted:
        if name not in tensors:
            hint = FOLDED if _is_folded(tensors, entries) else ""
            raise ConfigError(f"tensor {name!r}: missing; must have shape {list(wanted[name].torch_shape)}{hint}")
    for name, tensor in tensors.items():
        if name in wanted:
            shape, floats = wanted[name].torch_shape, jnp.issubdtype(tensor.dtype, jnp.floating)
            if tensor.shape != shape or not floats:
                found = f"shape {list(tensor.shape)} and dtype {tensor.dtype}"
                raise ConfigError(f"tensor {name!r} of {found}: must be floats of shape {list(shape)}")
        elif not (name.endswith(f".{COUNTER}") and f"{name.removesuffix(COUNTER)}running_var" in wanted):
            raise ConfigError(f"tensor {quoted(name)}: unknown; the network has no such tensor{closest(name, wanted)}")
    leaves = {tuple(entry.path.split("/")): jnp.asarray(entry.from_torch(tensors[entry.name])) for entry in entries}
    return trees.nest(leaves)


def load_state_dict(
    path: str | Path, model_name: str, *, image_shape: Sequence[int] | None = None
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A masked network with the weights of a PyTorch state dict in a safetensors file.

    The file must have the names and layouts that the export writes. Layer widths are taken from the tensors, so shrunk
    networks can be read. In maskable layers, the mask is 0 for weights that are exactly 0, and 1 for all others. A
    dense network therefore gets masks of ones. Weights keep their bits and dtypes, except that float64 becomes float32
    unless JAX's 64-bit mode is on.

    Args:
        path: safetensors file.
        model_name: name in `cs_jax.models.MODELS`.
        image_shape: height, width and channels; default: the shape in the file's metadata, which `export` writes.

    Returns:
        The module, and its variables "params", "batch_stats" and "masks".

    Raises:
        ConfigError: the file cannot be read or is not a state dict; the model is unknown; the image shape is missing or
            invalid; or a tensor is missing, is unknown, has another shape, or has no float dtype.
    """
    tensors, about = read(Path(path))
    return from_state_dict(tensors, model_name, image_shape or about.get("image_shape") or ())


def from_state_dict(
    tensors: Tensors, model_name: str, image_shape: Sequence[int]
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A masked network with the weights of tensors; see `load_state_dict`."""
    if model_name not in MODELS:
        raise ConfigError(f"model {model_name!r}: must be {one_of(model_name, MODELS)}")
    shape = tuple(image_shape)
    if len(shape) != 3 or not is_shape(shape) or not 0 < math.prod(shape) <= MAX_IMAGE_ENTRIES:
        found = f" {reprlib.repr(list(shape))}" if shape else ""
        raise ConfigError(f"image shape{found}: must be height, width and channels of an image")
    model = _model_of(model_name, tensors, shape)
    shapes = {name: size for name, (size, _) in shapes_of(model, shape).items()}
    found = from_tensors(tensors, torch_names.entries(model, _unmasked(shapes), shape[-1]))
    params = trees.leaves_by_path(found["params"])
    masked = [tuple(name.split("/")[1:]) for name in shapes if name.startswith("masks/")]
    masks = {layer: (params[layer] != 0).astype(params[layer].dtype) for layer in masked}
    return model, {"params": found["params"], "batch_stats": found.get("batch_stats", {}), "masks": trees.nest(masks)}


def _model_of(name: str, tensors: Tensors, image_shape: tuple[int, ...]) -> nn.Module:
    """Network with the number of classes and the layer widths of the tensors.

    A layer has the default width if its tensor is missing or has no valid shape; `from_tensors` then raises an error.
    """
    model = build(name, num_classes=1)
    net, output = wiring.wiring_of(model)
    shapes = {path: shape for path, (shape, _) in shapes_of(model, image_shape).items()}
    named = {entry.path: entry.name for entry in torch_names.entries(model, _unmasked(shapes), image_shape[-1])}

    def width(layer: str) -> int | None:
        tensor = tensors.get(named[f"params/{layer}/kernel"], np.zeros(()))
        return tensor.shape[0] if tensor.ndim and tensor.shape[0] else None

    features = {}
    for signal, node in enumerate(net.nodes):
        match node:
            case Linear(name=layer) if signal != output:
                usual, found = shapes[f"params/{layer}/kernel"][-1], width(layer)
            case Attention(name=layer):
                _, usual, size = shapes[f"params/{layer}/query/kernel"]
                found = (width(f"{layer}/query") or 0) // size or None
            case _:
                continue
        if found not in (None, usual):
            features[layer] = found
    classifier = net.nodes[output]
    assert isinstance(classifier, Linear)
    model = model.clone(num_classes=width(classifier.name) or 1)  # pyright: ignore[reportCallIssue]
    return model.resize(features) if features else model  # pyright: ignore[reportAttributeAccessIssue]


def _is_folded(tensors: Mapping[str, np.ndarray], entries: Sequence[Entry]) -> bool:
    """True if no kernel is missing and all BatchNorm statistics are missing."""
    kernels = [entry.name in tensors for entry in entries if entry.path.endswith("/kernel")]
    norms = [entry.name in tensors for entry in entries if entry.path.startswith("batch_stats/")]
    return all(kernels) and bool(norms) and not any(norms)


def _unmasked(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith("masks/")}


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors of a safetensors file, and a dictionary of "image_shape" and "normalization", None if missing.

    Raises:
        ConfigError: the file is not a safetensors file, or its metadata have other types than `export` writes.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{'is a folder' if path.is_dir() else 'no such file'}; must be a safetensors file")
        content = path.read_bytes()
        tensors = _tensors(content)
        # `_tensors` has checked the header.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, _about((header.get("__metadata__") or {}).get("cs_jax", "{}"))
    except ConfigError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"not a safetensors file: {quoted(str(error))[1:-1]}") from error


def _about(text: str) -> dict[str, Any]:
    """Image shape and normalisation constants from the JSON text in a file's metadata."""
    about = decode(text.encode(), dict[str, Any], "metadata cs_jax")
    convert(about, _About, "metadata cs_jax")
    return {"image_shape": about.get("image_shape"), "normalization": about.get("normalization")}


def _tensors(content: bytes) -> Tensors:
    found = {}
    for name, tensor in safetensors.deserialize(content):
        if tensor["dtype"] not in DTYPES:
            raise ConfigError(f"tensor {quoted(name)} of dtype {tensor['dtype']}: must be one of {', '.join(DTYPES)}")
        found[name] = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return found


def _by_name(variables: Mapping[str, PyTree]) -> Tensors:
    return {trees.name(path): np.asarray(on_host(leaf)) for path, leaf in trees.leaves_by_path(dict(variables)).items()}
