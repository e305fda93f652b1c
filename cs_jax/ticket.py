"""Tickets as files: a trained sparse network in one safetensors file that can be checked, moved and served.

Arrays are called "params/...", "batch_stats/..." and "masks/..." after their paths, and "rewound/params/..." and
"rewound/batch_stats/..." for the network before it was retrained. All else is JSON under the one metadata key "cs_jax":
safetensors writes several keys in random order. Nothing of the place or time is in the file, so equal content gives
equal bytes.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import reprlib
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from flax.errors import FlaxError
from jax.typing import DTypeLike
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cs_jax import trees
from cs_jax.config import ConfigError, one_of
from cs_jax.models import MODELS

PyTree = Any
Arrays = dict[str, np.ndarray]
"""Arrays by name, "params/conv0/kernel"."""

FORMAT = 1
FULL, COMPACT = "full", "compact"

MAX_HEADER_BYTES = 2**21
MAX_ARRAYS = 2**13
MAX_RANK = 16
MAX_ENTRIES = 2**40
MAX_DEPTH = 16
MAX_CLASSES = 2**20
MAX_IMAGE_ENTRIES = 2**28

_METADATA_KEY = "cs_jax"
_REWOUND = "rewound/"
_COLLECTIONS = ("params", "batch_stats", "masks")
_GROUPS = (*_COLLECTIONS, _REWOUND + "params", _REWOUND + "batch_stats")
_WRITTEN_KEYS = ("format", "form", "density", "layers", "sha256")
_FLOATS = {"F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16), "F32": np.dtype("f4"), "F64": np.dtype("f8")}
_DTYPES = _FLOATS | {f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)}


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
            `cs_jax.models.MODELS`, or None for a model of your own; "num_classes"; "image_shape"), "config",
            "dataset", "classes", "normalization" ("mean", "std"), "accuracy" (shares in [0, 1]), "versions",
            and "mask_scale", which is needed where no mask keeps anything. Paths, hosts and times do not belong here.
            What this function writes itself, it writes anew: a loaded ticket's metadata can be given as they are.
        compact: for serving: store kept weights alone, without the rewound network.

    Raises:
        ConfigError: arrays, masks or metadata cannot be a ticket, or do not fit the model that they name.
        OSError: the file cannot be written; no temporary file is left.
    """
    leaves = _leaves(params, "params") | _leaves(batch_stats, "batch_stats")
    if rewound is not None:
        if not isinstance(rewound, Mapping) or set(rewound) != {"params", "batch_stats"}:
            raise ConfigError(f"rewound: got {reprlib.repr(rewound)}, wanted 'params' and 'batch_stats'")
        for collection, tree in rewound.items():
            leaves |= _leaves(tree, _REWOUND + collection)
    scaled = _leaves(masks, "masks")
    _check_masks(scaled, leaves)
    about = _checked_metadata(metadata) | {"mask_scale": _mask_scale(scaled, metadata.get("mask_scale"))}
    bits = {name.removeprefix("masks/"): mask != 0 for name, mask in scaled.items()}
    about |= {"format": FORMAT, "form": COMPACT if compact else FULL, **_densities(bits)}
    arrays = _pack(leaves, bits, compact=compact)
    _check_layout(arrays, about)
    _check_model(about, arrays, None)
    about["sha256"] = _content_hash(arrays, about)
    data = safetensors.numpy.save(arrays, {_METADATA_KEY: _to_json(about)})
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES or len(arrays) >= MAX_ARRAYS:
        raise ConfigError(
            f"got {len(arrays):,} arrays, or long metadata: wanted fewer than {MAX_ARRAYS:,}, and at most "
            f"{MAX_HEADER_BYTES:,} bytes of names and metadata"
        )
    _write(Path(path), data)


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
        arrays, about = _read(Path(path))
        _check_layout(arrays, about)
        model = _check_model(about, arrays, model)
        arrays = {name: _to_jax(array) for name, array in _unpack(arrays, about).items()}
    except ConfigError as error:
        raise TicketError(f"{path}: {error}") from error
    except MemoryError as error:
        raise TicketError(f"{path}: got more than fits into memory") from error
    variables = {collection: _nest(arrays, collection + "/") for collection in _COLLECTIONS}
    rewound = {collection: _nest(arrays, _REWOUND + collection + "/") for collection in ("params", "batch_stats")}
    return LoadedTicket(variables, rewound if rewound["params"] else None, model, about)


def describe(ticket: LoadedTicket, *, file_size: int | None = None) -> RenderableType:
    """What a person wants to know of a ticket, for rich to print: facts, then a table of its masked layers.

    Args:
        ticket: as loaded.
        file_size: of its file, in bytes; left out if not given.
    """
    facts = Table.grid("", "", padding=(0, 2))
    for label, value in _facts(ticket, file_size).items():
        facts.add_row(label, Text(_printable(value), overflow="fold"))
    layers = Table("layer", title="Masked layers", box=box.SIMPLE_HEAD, title_justify="left")
    layers.columns[0].overflow = "fold"
    for header in ("shape", "kept", "density"):
        layers.add_column(header, justify="right")
    for name, layer in ticket.metadata["layers"].items():
        size = math.prod(layer["shape"])
        shape = "×".join(map(str, layer["shape"])) or "scalar"
        kept = f"{round(layer['density'] * size):,} of {size:,}"
        layers.add_row(Text(_printable(name)), shape, kept, f"{layer['density']:.2%}")
    return Group(facts, "", layers)


def _facts(ticket: LoadedTicket, file_size: int | None) -> dict[str, str]:
    about = ticket.metadata
    model = about.get("model") or {}
    accuracy = {name: share for name, share in (about.get("accuracy") or {}).items() if share is not None}
    weights = jax.tree.leaves(ticket.variables["params"])
    total, dense_bytes = sum(weight.size for weight in weights), sum(weight.nbytes for weight in weights)
    masked = sum(math.prod(layer["shape"]) for layer in about["layers"].values())
    kept = round(about["density"] * masked)
    facts = {
        "model": str(model.get("name") or "not named"),
        "classes": f"{model['num_classes']:,}" if model.get("num_classes") else "-",
        "images": "×".join(map(str, model.get("image_shape") or ())) or "-",
        "data set": about.get("dataset") or "-",
        "accuracy": ", ".join(f"{name} {share:.2%}" for name, share in accuracy.items()) or "-",
        "density": f"{about['density']:.2%} ({kept:,} of {masked:,} masked weights)",
        "mask scale": f"{about['mask_scale']:g}",
        "weights": f"{kept + total - masked:,} of {total:,}, {total - masked:,} of them never masked",
        "form": about["form"] + (", with the rewound network" if ticket.rewound else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items()) or "-",
        "sha256": about["sha256"],
    }
    if file_size is not None:
        facts["size"] = f"{file_size:,} bytes, {file_size / dense_bytes:.1%} of the dense weights' {dense_bytes:,}"
    return facts


def _printable(text: str) -> str:
    """Text of a file as one line without control sequences."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# Arrays and masks, to and from what is stored.


def _leaves(tree: PyTree, name: str) -> Arrays:
    """Leaves of nested dictionaries by name, in C order."""
    if isinstance(tree, Mapping):
        arrays = {}
        for key, branch in tree.items():
            if not isinstance(key, str) or "/" in key:
                raise ConfigError(f"{name}: got the key {reprlib.repr(key)}, wanted text without '/'")
            arrays |= _leaves(branch, f"{name}/{key}")
        return arrays
    if name in _GROUPS or not hasattr(tree, "dtype"):
        raise ConfigError(f"{name}: got {type(tree).__name__}, wanted nested dictionaries of arrays")
    if tree.dtype not in _DTYPES.values():
        raise ConfigError(f"{name}: got dtype {tree.dtype}, wanted one of {', '.join(map(str, _DTYPES.values()))}")
    return {name: np.asarray(tree, order="C")}


def _check_masks(masks: Arrays, leaves: Arrays) -> None:
    for name, mask in masks.items():
        weight = leaves.get("params/" + name.removeprefix("masks/"))
        if weight is None:
            raise ConfigError(f"{name}: got a mask without weights, wanted the path of an array in params")
        if (mask.shape, mask.dtype) != (weight.shape, weight.dtype):
            raise ConfigError(
                f"{name}: got shape {mask.shape} and dtype {mask.dtype}, wanted {weight.shape} and {weight.dtype}, "
                "those of its weights"
            )


def _mask_scale(masks: Arrays, given: Any) -> float:
    """The one value of all kept entries, as it is in the most precise masks; `given` where none is kept."""
    kept = {name: mask[mask != 0] for name, mask in masks.items() if np.any(mask != 0)}
    if not kept:
        if given is None:
            raise ConfigError("mask_scale: got nothing and masks that are all empty, wanted it in metadata")
        return float(given)
    precise = max(kept, key=lambda name: jnp.finfo(kept[name].dtype).nmant)
    scale = float(kept[precise][0])
    for name, entries in kept.items():
        others = entries[entries != _rounded(scale, entries.dtype)]
        if others.size or not (scale > 0 and math.isfinite(scale)):
            entry = float(others[0]) if others.size else scale
            raise ConfigError(f"{name}: got the entry {entry}, wanted 0 or one finite scale above 0, here {scale}")
    if given is not None and not math.isclose(given, scale, rel_tol=4 * float(jnp.finfo(kept[precise].dtype).eps)):
        raise ConfigError(f"mask_scale: got {given} in metadata, wanted {scale}, as in the masks")
    return scale


def _rounded(scale: float, dtype: DTypeLike) -> np.ndarray:
    """A mask scale in the dtype of a mask; infinite or 0 where it is too large or small for it."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(scale, np.float64).astype(dtype)


def _densities(bits: Arrays) -> dict[str, Any]:
    """What the metadata say of masks: their shapes and densities."""
    size, kept = sum(mask.size for mask in bits.values()), sum(map(np.count_nonzero, bits.values()))
    if size == 0:
        raise ConfigError("masks: got none, wanted at least one entry")
    layers = {
        name: {"density": np.count_nonzero(mask) / max(mask.size, 1), "shape": list(mask.shape)}
        for name, mask in bits.items()
    }
    return {"density": kept / size, "layers": layers}


def _pack(leaves: Arrays, bits: Arrays, *, compact: bool) -> Arrays:
    """Arrays as they are stored, of whole ones and masks of True and False."""
    stored = {name: leaf for name, leaf in leaves.items() if not (compact and name.startswith(_REWOUND))}
    for name, mask in bits.items():
        weight = leaves["params/" + name]
        stored["masks/" + name] = np.packbits(mask)
        stored["params/" + name] = weight[mask] if compact else _scattered(weight[mask], mask)
    return stored


def _unpack(stored: Arrays, about: Mapping[str, Any]) -> Arrays:
    """Whole weights and masks of what is stored, once that was checked."""
    arrays = dict(stored)
    for name, layer in about["layers"].items():
        mask_name, weight_name = "masks/" + name, "params/" + name
        mask = _unpacked_bits(stored[mask_name], tuple(layer["shape"]))
        weight = stored[weight_name]
        arrays[mask_name] = _scattered(_rounded(about["mask_scale"], weight.dtype), mask)
        if about["form"] == COMPACT:
            arrays[weight_name] = _scattered(weight, mask)
    return arrays


def _unpacked_bits(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(packed, count=math.prod(shape)).reshape(shape).view(bool)


def _scattered(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Zeros of the mask's shape with `values` where it is True, in C order."""
    array = np.zeros(mask.shape, values.dtype)
    array[mask] = values
    return array


def _to_jax(array: np.ndarray) -> Any:
    """The array on JAX's default device, or as it is where JAX would narrow it."""
    return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array


def _nest(arrays: Mapping[str, Any], prefix: str) -> PyTree:
    leaves = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return trees.nest({tuple(name.split("/")): array for name, array in leaves.items()})


# What is stored, checked. All of it also goes for what `save_ticket` is about to write.


def _check_layout(arrays: Arrays, about: Mapping[str, Any]) -> None:
    """Names, shapes and dtypes of stored arrays against each other and the metadata; then the masks' bits."""
    _check_names(arrays)
    layers, scale = about["layers"], about["mask_scale"]
    masks = [name for name in arrays if name.startswith("masks/")]
    alone = sorted(set(layers).symmetric_difference(name.removeprefix("masks/") for name in masks))
    if alone:
        raise ConfigError(f"mask {_quoted(alone[0])}: got it in one of file and metadata, wanted both or neither")
    kept = sum(_check_mask(arrays, name, layer, about["form"], scale) for name, layer in layers.items())
    size = sum(math.prod(layer["shape"]) for layer in layers.values())
    if size == 0 or about["density"] != kept / size:
        raise ConfigError(f"density: got {about['density']} in the metadata, wanted {kept} of {size} entries")
    rewound = _kinds(arrays, _REWOUND)
    if rewound and about["form"] == COMPACT:
        raise ConfigError("got rewound weights in the compact form, wanted none")
    if rewound:
        _check_same("rewound", rewound, _kinds(arrays, ""), "trained network")


def _check_names(arrays: Arrays) -> None:
    """Every name is a path below a group, and none is a folder of another."""
    folders = set()
    for name in arrays:
        parts = name.split("/")
        depth = 2 if parts[0] == "rewound" else 1
        usual = "/".join(parts[:depth]) in _GROUPS and len(parts) > depth
        if not usual or {"", ".", ".."} & set(parts) or "\\" in name or not name.isprintable():
            raise ConfigError(f"the name {_quoted(name)}: wanted a path of dictionary keys below {', '.join(_GROUPS)}")
        folders |= {"/".join(parts[:end]) for end in range(1, len(parts))}
    both = sorted(folders & set(arrays))
    if both:
        raise ConfigError(f"the name {_quoted(both[0])}: got an array and a folder of arrays, wanted one of them")


def _kinds(arrays: Arrays, prefix: str) -> dict[str, tuple]:
    """Shape and dtype by name, of the trained or, with the prefix, of the rewound network."""
    groups = (prefix + "params/", prefix + "batch_stats/")
    own = {name: array for name, array in arrays.items() if name.startswith(groups)}
    return {name.removeprefix(prefix): (array.shape, str(array.dtype)) for name, array in own.items()}


def _check_same(what: str, got: Mapping[str, tuple], wanted: Mapping[str, tuple], where: str) -> None:
    """Raises where leaves differ, and names the first of them."""
    for name in sorted({*got, *wanted}):
        if got.get(name) != wanted.get(name):
            shown = [" ".join(map(str, kinds[name])) if name in kinds else "nothing" for kinds in (got, wanted)]
            raise ConfigError(f"{what} {_quoted(name)}: got {shown[0]}, wanted {shown[1]}, as in the {where}")


def _check_mask(arrays: Arrays, name: str, layer: Mapping[str, Any], form: str, scale: float) -> int:
    """Checks a packed mask against its weights and metadata; returns how many it keeps."""
    packed, weight = arrays["masks/" + name], arrays.get("params/" + name)
    where, shape = f"mask {_quoted(name)}", tuple(layer["shape"])
    size = math.prod(shape)
    if weight is None or weight.dtype not in _FLOATS.values():
        raise ConfigError(f"{where}: got {'nothing' if weight is None else weight.dtype} to mask, wanted float weights")
    if packed.dtype != np.uint8 or packed.shape != (-(-size // 8),):
        raise ConfigError(
            f"{where}: got {packed.dtype} of shape {packed.shape}, wanted {-(-size // 8)} bytes for the shape {shape}"
        )
    if size % 8 and packed[-1] & (255 >> size % 8):
        raise ConfigError(f"{where}: got a bit set behind its last entry, wanted zeros")
    kept = int(np.bitwise_count(packed).sum(dtype=np.int64))
    if layer["density"] != kept / max(size, 1):
        raise ConfigError(f"{where}: got the density {layer['density']} in the metadata, wanted {kept} of {size}")
    wanted = (kept,) if form == COMPACT else shape
    if weight.shape != wanted:
        raise ConfigError(f"{where}: got weights of shape {weight.shape}, wanted {wanted}")
    if form == FULL and np.any(weight.view(f"u{weight.itemsize}")[~_unpacked_bits(packed, shape)]):
        raise ConfigError(f"{where}: got weights other than 0 where it removes them, wanted zeros")
    if not (0 < _rounded(scale, weight.dtype) < math.inf):
        raise ConfigError(f"mask_scale: got {scale}, wanted a finite number above 0 in {weight.dtype}")
    return kept


def _check_model(about: Mapping[str, Any], arrays: Arrays, model: nn.Module | None) -> nn.Module | None:
    """The model that was given or is named, after a look whether it has the ticket's leaves; None if there is none."""
    entry = about.get("model") or {}
    name, image_shape = entry.get("name"), tuple(entry.get("image_shape") or ())
    if model is not None:
        name, wanted = type(model).__name__, _shapes_of(model, image_shape) if image_shape else None
    elif name is not None:
        _check("model", name, name in MODELS, one_of(name, MODELS))
        model, wanted = _known_model(name, entry["num_classes"], image_shape)
    else:
        return None
    if wanted is not None:
        stored = {"params/" + layer: tuple(entry["shape"]) for layer, entry in about["layers"].items()}
        stored |= {"masks/" + layer: tuple(entry["shape"]) for layer, entry in about["layers"].items()}
        leaves = {key: array for key, array in arrays.items() if not key.startswith(_REWOUND)}
        got = {key: (stored.get(key, array.shape), _kind(array.dtype, key)) for key, array in leaves.items()}
        _check_same("ticket's", got, wanted, f"model {name}")
    return model


def _kind(dtype: DTypeLike, name: str) -> str:
    """ "floats", in any precision, or the dtype; packed masks stand for floats."""
    return "floats" if name.startswith("masks/") or jnp.issubdtype(dtype, jnp.floating) else str(dtype)


@functools.lru_cache(maxsize=64)
def _known_model(name: str, num_classes: int, image_shape: tuple[int, ...]) -> tuple[nn.Module, dict[str, tuple]]:
    model = MODELS[name](num_classes=num_classes)
    return model, _shapes_of(model, image_shape)


def _shapes_of(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, tuple]:
    """Shape and kind of every leaf by name; nothing is allocated."""
    modes: dict[str, Any] = {"train": False} if "train" in inspect.signature(type(model).__call__).parameters else {}
    try:
        variables = jax.eval_shape(
            lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), **modes))
        )
    except (TypeError, ValueError, ArithmeticError, LookupError, NotImplementedError, FlaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model: got {type(model).__name__}, which takes no images of shape {image_shape}: {reason}"
        ) from error
    shapes = {}
    for collection in _COLLECTIONS:
        for path, leaf in trees.leaves_by_path(dict(variables).get(collection, {})).items():
            shapes[trees.name((collection, *path))] = (leaf.shape, _kind(leaf.dtype, collection + "/"))
    return shapes


# Metadata.


def _checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's metadata as JSON gives them back."""
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"metadata: got {type(metadata).__name__}, wanted a dictionary")
    about = {key: value for key, value in metadata.items() if key not in _WRITTEN_KEYS}
    _check_json(about, "metadata")
    _check_known_keys(about)
    return json.loads(_to_json(about))


def _check_about(about: Any) -> None:
    """Types and ranges of a file's metadata."""
    _check_json(about, "metadata")
    _check_known_keys(about)
    layers = about.get("layers")
    _check("form", about.get("form"), about.get("form") in (FULL, COMPACT), f"one of {FULL}, {COMPACT}")
    _check("mask_scale", about.get("mask_scale"), about.get("mask_scale") is not None, "a number above 0")
    _check("density", about.get("density"), _is_share(about.get("density")), "a share in [0, 1]")
    _check("layers", layers, isinstance(layers, dict), "an object")
    for name, layer in layers.items():
        usual = isinstance(layer, dict) and set(layer) == {"density", "shape"} and _is_share(layer["density"])
        _check(f"layer {_quoted(name)}", layer, usual and _is_shape(layer["shape"]), "a density and a shape")


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raises unless `value` is JSON: text keys, finite numbers, not nested deeply."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: got values nested deeper than {MAX_DEPTH}, wanted fewer levels")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check(where, key, isinstance(key, str), "text as keys")
            _check_json(inner, f"{where}/{_quoted(key)[1:-1]}" if depth < 2 else where, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_json(inner, where, depth + 1)
    else:
        usual = value is None or isinstance(value, str | bool | int) or _is_number(value)
        _check(where, value, usual, "JSON values: text, finite numbers, lists, dictionaries")


def _check_known_keys(about: Mapping[str, Any]) -> None:
    if about.get("model") is not None:
        _check_model_entry(about["model"])
    scale, classes = about.get("mask_scale"), about.get("classes")
    _check("mask_scale", scale, scale is None or (_is_number(scale) and scale > 0), "a finite number above 0")
    _check("config", about.get("config"), isinstance(about.get("config"), dict | None), "a dictionary")
    _check("dataset", about.get("dataset"), isinstance(about.get("dataset"), str | None), "text")
    _check("classes", classes, classes is None or _are(classes, lambda name: isinstance(name, str)), "a list of texts")
    count = (about.get("model") or {}).get("num_classes")
    as_many = classes is None or count is None or len(classes) == count
    _check("classes", len(classes or ()), as_many, f"{count} names, as many as num_classes of the model")
    for key, wanted, holds in (
        ("versions", "texts", lambda version: isinstance(version, str)),
        ("accuracy", "shares in [0, 1]", lambda share: share is None or _is_share(share)),
        ("normalization", "lists of numbers", lambda values: _are(values, _is_number)),
    ):
        value = about.get(key)
        usual = value is None or (isinstance(value, Mapping) and all(map(holds, value.values())))
        _check(key, value, usual, f"a dictionary of {wanted}")


def _check_model_entry(entry: Mapping[str, Any]) -> None:
    """A named model has both sizes, bounded before anything is made of them; the sizes of another may be left out."""
    usual = isinstance(entry, Mapping) and set(entry) <= {"name", "num_classes", "image_shape"}
    _check("model", entry, usual, "a dictionary of name, num_classes and image_shape")
    named = entry.get("name") is not None
    axes = "(height, width, channels)" if named else "a shape"
    for key, holds, wanted in (
        ("name", lambda name: isinstance(name, str), "text"),
        ("num_classes", lambda count: _is_count(count) and 0 < count <= MAX_CLASSES, f"1 to {MAX_CLASSES:,}"),
        (
            "image_shape",
            lambda shape: (
                _is_shape(shape) and 0 < math.prod(shape) <= MAX_IMAGE_ENTRIES and not (named and len(shape) != 3)
            ),
            f"{axes} of 1 to {MAX_IMAGE_ENTRIES:,} entries",
        ),
    ):
        value = entry.get(key)
        _check(f"model {key}", value, holds(value) or (value is None and not named), wanted)


def _check(where: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{where}: got {reprlib.repr(value)}, wanted {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float(np.finfo("f8").max)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_shape(value: Any) -> bool:
    """Whether a list or tuple is a shape whose sizes, and those of views of it, can be counted."""
    return _are(value, _is_count) and len(value) <= MAX_RANK and math.prod(n or 1 for n in value) <= MAX_ENTRIES


def _are(values: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, list | tuple) and all(map(holds, values))


def _quoted(name: str) -> str:
    """A name of a file in quotes, on one line and not endless."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _parse_json(text: str, what: str) -> Any:
    """The value of a JSON text in which no key comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: got no proper JSON: {str(error)[:80]}") from error


# Files.


def _content_hash(arrays: Arrays, about: Mapping[str, Any]) -> str:
    """SHA-256 of metadata, names, dtypes and shapes as one JSON text, then of the arrays' bytes in the names' order."""
    names = sorted(arrays)
    content = {key: value for key, value in about.items() if key != "sha256"}
    kinds = [[name, str(arrays[name].dtype), list(arrays[name].shape)] for name in names]
    digest = hashlib.sha256(_to_json([content, kinds]).encode())
    for name in names:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and metadata of a file whose hash is right."""
    header, data = _read_bytes(path)
    about = _parse_json(header["__metadata__"][_METADATA_KEY], "metadata")
    _check("metadata", about, isinstance(about, dict), "an object")
    _check("format", about.get("format"), about.get("format") == FORMAT, f"{FORMAT}, or a later version of cs_jax")
    _check_about(about)
    if _to_json(about) != header["__metadata__"][_METADATA_KEY]:
        raise ConfigError("metadata: got JSON that is not sorted and compact, wanted what save_ticket writes")
    try:
        stored = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"got no safetensors file: {_printable(str(error))[:200]}") from error
    arrays = {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"]) for name, entry in stored
    }
    if about.get("sha256") != _content_hash(arrays, about):
        raise ConfigError("got content that does not match its hash, wanted the file as it was saved: it is damaged")
    return arrays, about


def _read_bytes(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and all bytes of a file, which is read no further than its header is right."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait
            raise ConfigError("got a folder or a device, wanted a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            header_size = int.from_bytes(start, "little")
            if len(start) < 8 or header_size > min(MAX_HEADER_BYTES, size - 8):
                raise ConfigError(f"got {size:,} bytes, {header_size:,} of them header, wanted a file of save_ticket")
            text = file.read(header_size)
            header, end = _parse_header(text)
            if 8 + header_size + end != size:
                raise ConfigError(f"got {size:,} bytes, wanted {8 + header_size + end:,}: it is cut off or continued")
            file.seek(0)
            return header, file.read(size)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error


def _parse_header(text: bytes) -> tuple[dict[str, Any], int]:
    """A header and how many bytes of data it speaks of.

    The safetensors library sees to it that arrays fill the data without gap or overlap. It takes names that come twice,
    names and shapes of any kind, and headers that are slow to read, so these are checked here.
    """
    try:
        header = _parse_json(text.decode(), "header")
    except UnicodeDecodeError as error:
        raise ConfigError("header: got bytes that are no UTF-8 text") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    texts = metadata if isinstance(metadata, dict) else {}
    if set(texts) != {_METADATA_KEY} or not isinstance(texts[_METADATA_KEY], str):
        raise ConfigError(f"got no metadata called {_METADATA_KEY}, wanted a file of save_ticket")
    if len(header) > MAX_ARRAYS:
        raise ConfigError(f"got {len(header):,} arrays, wanted at most {MAX_ARRAYS:,}")
    ends = [_end_of(name, entry) for name, entry in header.items() if name != "__metadata__"]
    return header, max(ends, default=0)


def _end_of(name: str, entry: Any) -> int:
    """Where an array ends in the data, after a check of its entry in the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{_quoted(name)}: got {reprlib.repr(entry)}, wanted dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _check(_quoted(name), dtype, isinstance(dtype, str) and dtype in _DTYPES, f"one of {', '.join(_DTYPES)}")
    _check(_quoted(name), shape, _is_shape(shape), f"up to {MAX_RANK} sizes, {MAX_ENTRIES:,} entries")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    usual = _are(offsets, _is_count) and len(offsets) == 2 and offsets[1] - offsets[0] == size
    _check(_quoted(name), offsets, usual, f"offsets of {size} bytes")
    return offsets[1]


def _write(path: Path, data: bytes) -> None:
    """Puts a whole file in place of what is there."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
