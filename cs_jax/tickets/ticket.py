"""Tickets as files: a trained sparse network in one safetensors file that can be checked, moved and served."""

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


class TicketError(ConfigError):
    """A file is no ticket, is damaged, or is for another model; says which file and what is wrong, in one line."""


@dataclass(frozen=True, eq=False)
class LoadedTicket:
    """What `load_ticket` found in a file.

    Arrays of 64 bits are NumPy's where JAX's 64-bit mode is off, because JAX would narrow them; all others are JAX's.
    """

    variables: dict[str, PyTree]  # "params", "batch_stats", "masks": what `model.apply` takes
    rewound: dict[str, PyTree] | None  # "params", "batch_stats" before retraining; None where the file has none
    model: nn.Module | None
    metadata: dict[str, Any]

    @property
    def density(self) -> float:
        """Share of masked weights that are kept, in [0, 1]."""
        return self.metadata["density"]

    @property
    def found_masks(self) -> PyTree:
        """The masks without those of ones of weights that could not have been masked."""
        leaves = trees.leaves_by_path(self.variables["masks"])
        return trees.nest({path: mask for path, mask in leaves.items() if trees.name(path) in self.metadata["layers"]})

    def known_network(self) -> tuple[nn.Module, dict[str, PyTree], tuple[int, ...]]:
        """Model, variables and shape of an image of a ticket of `cs_jax.models`.

        Raises:
            ConfigError: its model is another.
        """
        about = self.metadata.get("model") or {}
        if self.model is None or about.get("name") is None:
            raise ConfigError("is of a model of its maker's own, wanted one of cs_jax.models: do that in Python")
        return self.model, self.variables, tuple(about["image_shape"])

    def normalize(self, images: ArrayLike) -> jax.Array:
        """Images as the model takes them: less the mean and divided by the deviation that it was trained with.

        Args:
            images: (n, height, width, channels), in units of a pixel, 0 to 255.

        Raises:
            ConfigError: the ticket does not say how its images were normalised.
        """
        constants = self.metadata.get("normalization")
        if constants is None:
            raise ConfigError("the ticket has no normalization: wanted one in the metadata that it was saved with")
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
    """Writes a ticket, all of it or nothing: a failure leaves what was at `path` before.

    A trained weight that its mask removes is stored as 0, so that both forms load to the same bits; rewound weights
    are stored whole, because random and reshuffled controls need them. Empty dictionaries are not kept.

    Args:
        path: file to write, replaced where it exists; its folder must exist.
        params: trained weights, nested dictionaries of arrays, floats or integers of up to 64 bits.
        batch_stats: state beside the weights, alike; {} where there is none.
        masks: hard masks under the paths of their weights, of the same shapes and dtypes; entries are 0 or one scale
            that is common to all. A weight that is never masked is absent.
        rewound: "params" and "batch_stats" like those above, before retraining; None if there are none.
        metadata: what else to keep, JSON values. These keys have a meaning, and may all be left out: "model" ("name" in
            `cs_jax.models.MODELS`, or None for a model of your own; "num_classes"; "image_shape"; "dtype", in which it
            computes, float32 if that is left out, or bfloat16; "features" of layers that have others than their
            family's, as `shrink` leaves them), "config",
            "dataset", "classes", "normalization" ("mean", "std"), "accuracy" (shares in [0, 1]), "versions",
            "unmasked" (names of weights that the model masks, but the ticket does not: their masks are ones, and are
            not stored) and "mask_scale", which is needed where no mask keeps anything. Paths, hosts and times do not
            belong here. What this function writes itself, it writes anew: a loaded ticket's metadata can be given as
            they are.
        compact: for serving: store kept weights alone, without the rewound network.

    Raises:
        ConfigError: arrays, masks or metadata cannot be a ticket, or do not fit the model that they name.
        OSError: the file cannot be written; no temporary file is left.
    """
    leaves = file_format.leaves(params, "params") | file_format.leaves(batch_stats, "batch_stats")
    if rewound is not None:
        if not isinstance(rewound, Mapping) or set(rewound) != {"params", "batch_stats"}:
            raise ConfigError(f"rewound: got {reprlib.repr(rewound)}, wanted 'params' and 'batch_stats'")
        for collection, tree in rewound.items():
            leaves |= file_format.leaves(tree, REWOUND + collection)
    given = checks.given_metadata(metadata)
    scaled = _without_unmasked(file_format.leaves(masks, "masks"), given)
    arrays, written = file_format.pack(leaves, scaled, given.get("mask_scale"), compact=compact)
    about = given | written
    checks.check_layout(arrays, about)
    _check_model(about, arrays, None)
    files.write_whole(Path(path), file_format.encode_ticket(arrays, about))


def _without_unmasked(masks: Arrays, given: Mapping[str, Any]) -> Arrays:
    """Masks without those of ones that the metadata name."""
    names = {f"masks/{name}" for name in given.get("unmasked") or ()}
    for name in names & masks.keys():
        if (masks[name] != 1).any():
            raise ConfigError(f"{name}: got other entries than 1, wanted ones, as metadata say that it is unmasked")
    return {name: mask for name, mask in masks.items() if name not in names}


def load_ticket(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> LoadedTicket:
    """The network in a file that `save_ticket` wrote, bit for bit; checked before anything is made of it.

    Its hash tells damage, not forgery: anyone can make a ticket. A file that was made to harm is refused, or gives a
    network like any other; no code is ever run from it.

    Args:
        path: the file, in either form.
        model: the module to serve with; by default the one of `cs_jax.models` that the file names. The ticket is
            checked against it, if the metadata has the "image_shape" to initialise it with.

    Returns:
        The ticket; its `model` is None where the file names none and none was given.

    Raises:
        TicketError: there is no such file, it is no ticket, it is damaged, or it does not fit the model.
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
        raise TicketError(f"{path}: got more than fits into memory") from error
    variables = {collection: _nest(arrays, collection + "/") for collection in COLLECTIONS}
    rewound = {collection: _nest(arrays, REWOUND + collection + "/") for collection in ("params", "batch_stats")}
    return LoadedTicket(variables, rewound if rewound["params"] else None, model, about)


def _to_jax(array: np.ndarray) -> Any:
    """The array on JAX's default device, or as it is where JAX would narrow it."""
    return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array


def _nest(arrays: Mapping[str, Any], prefix: str) -> PyTree:
    leaves = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return trees.nest({tuple(name.split("/")): array for name, array in leaves.items()})


def _check_model(about: Mapping[str, Any], arrays: Arrays, model: nn.Module | None) -> nn.Module | None:
    """The model that was given or is named, after a look whether it has the ticket's leaves; None if there is none."""
    entry = about.get("model") or {}
    name, image_shape = entry.get("name"), tuple(entry.get("image_shape") or ())
    if model is not None:
        name, wanted = type(model).__name__, shapes_of(model, image_shape) if image_shape else None
    elif name is not None:
        checks.check("model", name, name in MODELS, one_of(name, MODELS))
        dtype = entry.get("dtype") or "float32"
        checks.check("model dtype", dtype, dtype == "float32" or has_field(name, "dtype"), f"float32, as {name} has")
        features = entry.get("features") or {}
        _check_features(name, features, arrays)
        model, wanted = _known_model(name, entry["num_classes"], image_shape, dtype, FrozenDict(features))
    else:
        return None
    if wanted is not None:
        got = {key: (array.shape, _kind(array.dtype)) for key, array in arrays.items() if not key.startswith(REWOUND)}
        for layer, masked in about["layers"].items():  # packed, or only the kept weights
            got["params/" + layer] = got["masks/" + layer] = (tuple(masked["shape"]), "floats")
        got |= {"masks/" + name: got["params/" + name] for name in about.get("unmasked") or ()}
        checks.check_same_shapes("ticket's", got, wanted, f"model {name}")
    return model


def _check_features(name: str, features: Features, arrays: Arrays) -> None:
    """Raises unless a model has the layers whose features are told."""
    checks.check("model features", features, not features or has_field(name, "features"), f"none, as {name} has")
    for layer in features:
        known = any(key.startswith(f"params/{layer}/") for key in arrays)
        checks.check("model features", layer, known, "layers that the ticket has")


def _kind(dtype: DTypeLike) -> str:
    """ "floats", in any precision, or the dtype."""
    return "floats" if jnp.issubdtype(dtype, jnp.floating) else str(dtype)


@functools.lru_cache(maxsize=64)
def _known_model(
    name: str, num_classes: int, image_shape: tuple[int, ...], dtype: str, features: Features
) -> tuple[nn.Module, dict[str, tuple]]:
    model = build(name, num_classes=num_classes, dtype=dtype, features=features)
    return model, shapes_of(model, image_shape)


def shapes_of(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, tuple]:
    """Shape and kind of every leaf by name; nothing is allocated."""
    try:
        variables = jax.eval_shape(
            lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), **evaluation_mode(model)))
        )
    except (TypeError, ValueError, ArithmeticError, LookupError, NotImplementedError, FlaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model: got {type(model).__name__}, which takes no images of shape {image_shape}: {reason}"
        ) from error
    shapes = {}
    for collection in COLLECTIONS:
        for path, leaf in trees.leaves_by_path(dict(variables).get(collection, {})).items():
            kind = "floats" if collection == "masks" else _kind(leaf.dtype)
            shapes[trees.name((collection, *path))] = (leaf.shape, kind)
    return shapes


def dense_sizes(ticket: LoadedTicket) -> dict[str, int]:
    """Entries of all arrays of "params" and "batch_stats" in the dense network, by name, "params/conv0/kernel".

    For a ticket that was shrunk this is the network of its family that nothing was taken out of; for one of a model of
    its maker's own it is that model.
    """
    entry = ticket.metadata.get("model") or {}
    if entry.get("name") is None:
        held = {name: ticket.variables.get(name, {}) for name in ("params", "batch_stats")}
        return {trees.name(path): leaf.size for path, leaf in trees.leaves_by_path(held).items()}
    dtype, image_shape = entry.get("dtype") or "float32", tuple(entry["image_shape"])
    _, shapes = _known_model(entry["name"], entry["num_classes"], image_shape, dtype, FrozenDict())
    return {name: math.prod(shape) for name, (shape, _) in shapes.items() if not name.startswith("masks/")}
