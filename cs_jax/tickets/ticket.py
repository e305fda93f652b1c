"""Ticket files: save and load a trained sparse network with its masks and metadata in one safetensors file."""

import functools
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict
from flax.errors import FlaxError
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from cs_jax.core import files, trees
from cs_jax.core.errors import ConfigError, one_of
from cs_jax.data.images import normalize
from cs_jax.models import MODELS, build, has_field
from cs_jax.models.features import Features
from cs_jax.models.multiply_adds import evaluation_mode
from cs_jax.tickets import checks, file_format
from cs_jax.tickets.checks import COLLECTIONS, REWOUND, Arrays
from cs_jax.tickets.metadata import check, given_metadata


class TicketError(ConfigError):
    """A ticket file does not exist, is damaged, or does not fit the model. The message is one line with the path."""


@dataclass(frozen=True, eq=False)
class LoadedTicket:
    """A ticket that `load_ticket` read from a file.

    Arrays are JAX arrays. Without JAX's 64-bit mode, 64-bit arrays are NumPy arrays, because JAX would narrow them.
    """

    variables: dict[str, PyTree]  # "params", "batch_stats", "masks", for `model.apply`
    rewound: dict[str, PyTree] | None  # "params", "batch_stats" before retraining; None if the file has none
    model: nn.Module | None  # None if neither the metadata nor the caller gives a model
    metadata: dict[str, Any]  # see `save_ticket`

    @property
    def density(self) -> float:
        """Share of maskable weights that are kept, in [0, 1]."""
        return self.metadata["density"]

    @property
    def found_masks(self) -> PyTree:
        """Masks, without the all-ones masks of weights that the metadata list as "unmasked"."""
        leaves = trees.leaves_by_path(self.variables["masks"])
        return trees.nest({path: mask for path, mask in leaves.items() if trees.name(path) in self.metadata["layers"]})

    def known_network(self) -> tuple[nn.Module, dict[str, PyTree], tuple[int, ...]]:
        """Model, variables and image shape (height, width, channels) of a ticket with a model of `cs_jax.models`.

        Raises:
            ConfigError: the ticket has a custom model.
        """
        about = self.metadata.get("model") or {}
        if self.model is None or about.get("name") is None:
            raise ConfigError("ticket has a custom model; this command supports cs_jax.models only")
        return self.model, self.variables, tuple(about["image_shape"])

    def normalize(self, images: ArrayLike) -> jax.Array:
        """Normalised images for the model: (images - mean) / std, with the constants used in training.

        Args:
            images: (n, height, width, channels), pixel values from 0 to 255.

        Raises:
            ConfigError: the metadata have no "normalization".
        """
        constants = self.metadata.get("normalization")
        if constants is None:
            raise ConfigError(
                "metadata: normalization: missing; pass metadata={'normalization': {'mean': ..., 'std': ...}} to "
                "save_ticket"
            )
        return normalize(jnp.asarray(images), *(jnp.asarray(constants[name], float) for name in ("mean", "std")))


def save_ticket(
    path: str | os.PathLike[str],
    *,
    params: PyTree,
    batch_stats: PyTree,
    masks: PyTree,
    rewound: Mapping[str, PyTree] | None = None,
    metadata: Mapping[str, Any],
    compact: bool = False,
) -> None:
    """Writes a ticket file atomically: a failure leaves an existing file at `path` unchanged.

    Pruned weights are stored as 0, so that the full and the compact form load to the same bits. Rewound weights are not
    pruned, because random and reshuffled controls need all of them. Empty dictionaries are not stored.

    Args:
        path: file to write; replaced if it exists. Its folder must exist.
        params: trained weights; nested dictionaries of float or integer arrays of up to 64 bits.
        batch_stats: BatchNorm or other model state, nested dictionaries of the same kind; {} if there is none.
        masks: hard masks with the paths, shapes and dtypes of their weights. Entries are 0 or the mask scale, which is
            the same in all masks. Weights without a mask have no entry.
        rewound: "params" and "batch_stats" before retraining, with the paths, shapes and dtypes of `params` and
            `batch_stats`; None if unknown.
        metadata: JSON values. Keys with a meaning, all optional: "model" (see below), "config" (settings of the run),
            "dataset", "classes" (names), "normalization" ("mean" and "std", a list of numbers by channel), "accuracy"
            (shares in [0, 1] by name), "versions", "unmasked" (names of weights that the model masks but the ticket
            does not; their masks are ones and are not stored) and "mask_scale" (required if no mask keeps a weight).
            Do not store paths, host names or times, so that equal tickets give equal files. Keys that this function
            writes itself are ignored, so the metadata of a loaded ticket can be passed unchanged.
        compact: for serving: store only the kept weights, and no rewound network.

    "model" is a dictionary of "name" (in `cs_jax.models.MODELS`, None for a custom model), "num_classes", "image_shape"
    (height, width, channels), "dtype" (of the computations: float32, the default, or bfloat16) and "features" (widths
    of layers that `shrink` changed, by name).

    Raises:
        ConfigError: arrays, masks or metadata are not a valid ticket, or do not fit the model in the metadata.
        OSError: the file cannot be written; no temporary file is left.
    """
    leaves = file_format.leaves(params, "params") | file_format.leaves(batch_stats, "batch_stats")
    if rewound is not None:
        if not isinstance(rewound, Mapping) or set(rewound) != {"params", "batch_stats"}:
            raise ConfigError(f"rewound {reprlib.repr(rewound)}: must have the keys params and batch_stats only")
        for collection, tree in rewound.items():
            leaves |= file_format.leaves(tree, REWOUND + collection)
    given = given_metadata(metadata)
    scaled = _without_unmasked(file_format.leaves(masks, "masks"), given)
    arrays, written = file_format.pack(leaves, scaled, given.get("mask_scale"), compact=compact)
    about = given | written
    checks.check_layout(arrays, about)
    _check_model(about, arrays, None)
    files.write_whole(Path(path), file_format.encode_ticket(arrays, about))


def _without_unmasked(masks: Arrays, given: Mapping[str, Any]) -> Arrays:
    """Masks, without the all-ones masks of weights that the metadata list as "unmasked"."""
    names = {f"masks/{name}" for name in given.get("unmasked") or ()}
    for name in names & masks.keys():
        if (masks[name] != 1).any():
            raise ConfigError(f"{name}: entries must be 1, because metadata lists it as unmasked")
    return {name: mask for name, mask in masks.items() if name not in names}


def load_ticket(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> LoadedTicket:
    """Reads a ticket that `save_ticket` wrote, bit for bit, after checks of the file.

    The hash detects damage, not forgery: anyone can write a ticket. A hostile file raises an error or loads as an
    ordinary network; code from a file is never executed.

    Args:
        path: file in the full or the compact form.
        model: custom module of the ticket; default: the model of `cs_jax.models` in the metadata. The arrays are
            checked against the module if the metadata have an "image_shape".

    Returns:
        The ticket. Its `model` is None if neither the metadata nor `model` gives one.

    Raises:
        TicketError: the file does not exist, is not a ticket, is damaged, does not fit the model, or does not fit into
            memory.
    """
    try:
        arrays, about = file_format.read(Path(path))
        checks.check_layout(arrays, about)
        model = _check_model(about, arrays, model)
        whole = file_format.unpack(arrays, about)
        whole |= {f"masks/{name}": np.ones_like(whole[f"params/{name}"]) for name in about.get("unmasked") or ()}
        arrays = {name: _to_jax(array) for name, array in whole.items()}
    except ConfigError as error:
        raise TicketError(f"{path}: {error}") from error
    except MemoryError as error:
        raise TicketError(f"{path}: does not fit into memory") from error
    variables = {collection: _nest(arrays, collection + "/") for collection in COLLECTIONS}
    rewound = {collection: _nest(arrays, REWOUND + collection + "/") for collection in ("params", "batch_stats")}
    return LoadedTicket(variables, rewound if rewound["params"] else None, model, about)


def _to_jax(array: np.ndarray) -> Any:
    """The array on JAX's default device, or unchanged if JAX would narrow its dtype."""
    return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array


def _nest(arrays: Mapping[str, Any], prefix: str) -> PyTree:
    leaves = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return trees.nest({tuple(name.split("/")): array for name, array in leaves.items()})


def _check_model(about: Mapping[str, Any], arrays: Arrays, model: nn.Module | None) -> nn.Module | None:
    """The given model, or else the model in the metadata, after checks against the arrays; None if there is neither."""
    entry = about.get("model") or {}
    name, image_shape = entry.get("name"), tuple(entry.get("image_shape") or ())
    if model is not None:
        name, wanted = type(model).__name__, shapes_of(model, image_shape) if image_shape else None
    elif name is not None:
        check("metadata: model.name", name, name in MODELS, f"must be {one_of(name, MODELS)}")
        dtype = entry.get("dtype") or "float32"
        supported = dtype == "float32" or has_field(name, "dtype")
        check("metadata: model.dtype", dtype, supported, f"must be float32, the only dtype of {name}")
        features = entry.get("features") or {}
        _check_features(name, features, arrays)
        model, wanted = _known_model(name, entry["num_classes"], image_shape, dtype, FrozenDict(features))
    else:
        return None
    if wanted is not None:
        got = {key: (array.shape, _kind(array.dtype)) for key, array in arrays.items() if not key.startswith(REWOUND)}
        for layer, masked in about["layers"].items():  # stored packed, or as kept weights only
            got["params/" + layer] = got["masks/" + layer] = (tuple(masked["shape"]), "floats")
        got |= {"masks/" + name: got["params/" + name] for name in about.get("unmasked") or ()}
        checks.check_same_shapes("array", got, wanted, f"model {name}")
    return model


def _check_features(name: str, features: Features, arrays: Arrays) -> None:
    """Raises a ConfigError unless the model supports other layer widths and the ticket has the named layers."""
    supported = not features or has_field(name, "features")
    check("metadata: model.features", features, supported, f"must be empty, because {name} has fixed layer widths")
    for layer in features:
        known = any(key.startswith(f"params/{layer}/") for key in arrays)
        check("metadata: model.features", layer, known, "must be a layer of the ticket")


def _kind(dtype: DTypeLike) -> str:
    """ "floats" for any float dtype, otherwise the name of the dtype."""
    return "floats" if jnp.issubdtype(dtype, jnp.floating) else str(dtype)


@functools.lru_cache(maxsize=64)
def _known_model(
    name: str, num_classes: int, image_shape: tuple[int, ...], dtype: str, features: Features
) -> tuple[nn.Module, dict[str, tuple]]:
    """A model of `cs_jax.models` and its `shapes_of`; cached, because tracing the initialisation is slow."""
    model = build(name, num_classes=num_classes, dtype=dtype, features=features)
    return model, shapes_of(model, image_shape)


def shapes_of(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, tuple]:
    """Shape and dtype of every leaf by name, "params/conv0/kernel"; allocates no arrays.

    The dtype is "floats" for any float dtype.

    Raises:
        ConfigError: the model does not accept images of this shape.
    """
    try:
        variables = jax.eval_shape(
            lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), **evaluation_mode(model)))
        )
    except (TypeError, ValueError, ArithmeticError, LookupError, NotImplementedError, FlaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model {type(model).__name__}: does not accept images of shape {image_shape}: {reason}"
        ) from error
    shapes = {}
    for collection in COLLECTIONS:
        for path, leaf in trees.leaves_by_path(dict(variables).get(collection, {})).items():
            kind = "floats" if collection == "masks" else _kind(leaf.dtype)
            shapes[trees.name((collection, *path))] = (leaf.shape, kind)
    return shapes


def dense_sizes(ticket: LoadedTicket) -> dict[str, int]:
    """Number of entries of each array of "params" and "batch_stats" in the dense network, by name.

    For a shrunk ticket, the dense network is the model with default layer widths. For a custom model, the dense network
    has the layer widths of the ticket. Names are like "params/conv0/kernel".
    """
    entry = ticket.metadata.get("model") or {}
    if entry.get("name") is None:
        held = {name: ticket.variables.get(name, {}) for name in ("params", "batch_stats")}
        return {trees.name(path): leaf.size for path, leaf in trees.leaves_by_path(held).items()}
    dtype, image_shape = entry.get("dtype") or "float32", tuple(entry["image_shape"])
    _, shapes = _known_model(entry["name"], entry["num_classes"], image_shape, dtype, FrozenDict())
    return {name: math.prod(shape) for name, (shape, _) in shapes.items() if not name.startswith("masks/")}
