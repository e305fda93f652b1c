"""The safetensors file of a PyTorch state dict: to it, and from it."""

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

from cs_jax.core import trees
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError, closest, one_of
from cs_jax.models import MODELS, build, wiring
from cs_jax.models.wiring import Attention, Linear
from cs_jax.tickets.checks import DTYPES, MAX_IMAGE_ENTRIES, check, given_metadata, is_shape, quoted
from cs_jax.tickets.export import torch_names
from cs_jax.tickets.export.plain_network import Served
from cs_jax.tickets.export.torch_names import COUNTER, Entry, Shapes
from cs_jax.tickets.ticket import shapes_of

Tensors = dict[str, np.ndarray]

SUFFIX = ".pytorch.safetensors"

FOLDED = "; BatchNorm is missing, as in an export with --fold, which cannot be read back: wanted one without it"


def export_state_dict(served: Served) -> bytes:
    """A file with the state dict of the network, and what is known of it as metadata."""
    tensors = to_tensors(served.model, served.variables, served.image_shape[-1])
    about = json.dumps(served.about, sort_keys=True)
    return safetensors.numpy.save(tensors, {"format": "pt", "cs_jax": about})


def logits(content: bytes, served: Served, images: np.ndarray) -> np.ndarray:
    """What a network with the weights of a file computes of images of 0 to 255."""
    shapes = {name: leaf.shape for name, leaf in _by_name(served.variables).items()}
    found = from_tensors(_tensors(content), torch_names.entries(served.model, shapes, served.image_shape[-1]))
    read = Served(served.model, found, served.image_shape, served.normalization)
    return np.asarray(jax.jit(read.logits)(images))


def to_tensors(model: nn.Module, variables: Mapping[str, PyTree], image_channels: int) -> Tensors:
    """PyTorch's state dict of a plain network: its arrays by PyTorch's names, in PyTorch's layouts.

    Args:
        model: of `cs_jax.models`.
        variables: "params" and, where there are any, "batch_stats"; masks are multiplied in before: see `fold`.
        image_channels: of the images, for a network that flattens them.
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
    """Variables of tensors that have the names and shapes of `entries`.

    Raises:
        ConfigError: a tensor is missing, is unknown, or has another shape or dtype; names it.
    """
    wanted = {entry.name: entry for entry in entries}
    for name in wanted:
        if name not in tensors:
            hint = FOLDED if _is_folded(tensors, entries) else ""
            raise ConfigError(
                f"{name!r}: got no such tensor, wanted one of shape {list(wanted[name].torch_shape)}{hint}"
            )
    for name, tensor in tensors.items():
        if name in wanted:
            shape, floats = wanted[name].torch_shape, jnp.issubdtype(tensor.dtype, jnp.floating)
            if tensor.shape != shape or not floats:
                got = f"shape {list(tensor.shape)} and dtype {tensor.dtype}"
                raise ConfigError(f"{name!r}: got {got}, wanted floats of shape {list(shape)}")
        elif not (name.endswith(f".{COUNTER}") and f"{name.removesuffix(COUNTER)}running_var" in wanted):
            raise ConfigError(f"{quoted(name)}: got a tensor that the network does not have{closest(name, wanted)}")
    leaves = {tuple(entry.path.split("/")): jnp.asarray(entry.from_torch(tensors[entry.name])) for entry in entries}
    return trees.nest(leaves)


def load_state_dict(
    path: str | Path, model_name: str, *, image_shape: Sequence[int] | None = None
) -> tuple[nn.Module, dict[str, PyTree]]:
    """A masked network with the weights of a PyTorch state dict, from a safetensors file.

    Names and layouts are those that the export writes. Widths are taken from the tensors, so a shrunk network is read
    as one. Of layers that can be masked, entries that are 0 are masked out, and all others are kept, with masks of 1: a
    network that was never pruned has masks of ones. Weights keep their bits and their dtypes; float64 is float32
    unless JAX's 64-bit mode is on.

    Args:
        path: the file.
        model_name: in `cs_jax.models.MODELS`.
        image_shape: height, width and channels; by default those that the file tells, if `export` has written it.

    Returns:
        The module and "params", "batch_stats" and "masks".

    Raises:
        ConfigError: the file cannot be read or is none of these; the model is not known; a tensor is missing, is
            unknown, or has a shape that does not fit. Says which.
    """
    tensors, about = read(Path(path))
    return from_state_dict(tensors, model_name, image_shape or about.get("image_shape") or ())


def from_state_dict(
    tensors: Tensors, model_name: str, image_shape: Sequence[int]
) -> tuple[nn.Module, dict[str, PyTree]]:
    """What `load_state_dict` makes of a file's tensors, and raises of them."""
    if model_name not in MODELS:
        raise ConfigError(f"model: got {model_name!r}, wanted {one_of(model_name, MODELS)}")
    shape = tuple(image_shape)
    if len(shape) != 3 or not is_shape(shape) or not 0 < math.prod(shape) <= MAX_IMAGE_ENTRIES:
        got = reprlib.repr(list(shape)) if shape else "nothing"
        raise ConfigError(f"image shape: got {got}, wanted height, width and channels of an image")
    model = _model_of(model_name, tensors, shape)
    shapes = {name: size for name, (size, _) in shapes_of(model, shape).items()}
    found = from_tensors(tensors, torch_names.entries(model, _unmasked(shapes), shape[-1]))
    params = trees.leaves_by_path(found["params"])
    masked = [tuple(name.split("/")[1:]) for name in shapes if name.startswith("masks/")]
    masks = {layer: (params[layer] != 0).astype(params[layer].dtype) for layer in masked}
    return model, {"params": found["params"], "batch_stats": found.get("batch_stats", {}), "masks": trees.nest(masks)}


def _model_of(name: str, tensors: Tensors, image_shape: tuple[int, ...]) -> nn.Module:
    """The network with the classes and widths of its tensors; where one is missing or makes no sense, with its own."""
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
    """Whether all kernels are there and no BatchNorm is."""
    kernels = [entry.name in tensors for entry in entries if entry.path.endswith("/kernel")]
    norms = [entry.name in tensors for entry in entries if entry.path.startswith("batch_stats/")]
    return all(kernels) and bool(norms) and not any(norms)


def _unmasked(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith("masks/")}


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors of a safetensors file, and what `export` said of the network; nothing where it has not written it.

    Raises:
        ConfigError: it is no such file, or says what `export` does not write.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"got {'a folder' if path.is_dir() else 'no such file'}, wanted a safetensors file")
        content = path.read_bytes()
        tensors = _tensors(content)
        # Its header has been found right by now.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, _about((header.get("__metadata__") or {}).get("cs_jax", "{}"))
    except ConfigError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"got no safetensors file: {quoted(str(error))[1:-1]}") from error


def _about(text: str) -> dict[str, Any]:
    """The image shape and the normalization in a file's metadata, as a ticket could have them."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"metadata cs_jax: got no proper JSON: {str(error)[:80]}") from error
    check("metadata cs_jax", about, isinstance(about, dict), "an object")
    shape, normalization = about.get("image_shape"), about.get("normalization")
    check("metadata image_shape", shape, shape is None or is_shape(shape), "height, width and channels")
    if normalization is not None:
        usual = isinstance(normalization, dict) and set(normalization) == {"mean", "std"}
        check("metadata normalization", normalization, usual, "mean and std")
        given_metadata({"normalization": normalization})
    return {"image_shape": shape, "normalization": normalization}


def _tensors(content: bytes) -> Tensors:
    found = {}
    for name, tensor in safetensors.deserialize(content):
        if tensor["dtype"] not in DTYPES:
            raise ConfigError(f"{quoted(name)}: got dtype {tensor['dtype']}, wanted one of {', '.join(DTYPES)}")
        found[name] = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return found


def _by_name(variables: Mapping[str, PyTree]) -> Tensors:
    return {trees.name(path): np.asarray(on_host(leaf)) for path, leaf in trees.leaves_by_path(dict(variables)).items()}
