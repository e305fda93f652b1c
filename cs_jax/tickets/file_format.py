"""File format of a ticket: packing of weights and masks, and a safetensors file with a hash of its content.

Array names are "params/...", "batch_stats/..." and "masks/..." followed by the path of the leaf, and
"rewound/params/..." and "rewound/batch_stats/..." for the network before retraining. All metadata is JSON under the
single key "cs_jax", because safetensors writes multiple keys in random order. The format adds no path, host name or
time, so equal content gives equal bytes.
"""

import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree
from msgspec import Struct

from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError
from cs_jax.core.schema import convert
from cs_jax.tickets import checks
from cs_jax.tickets.checks import DTYPES, Arrays
from cs_jax.tickets.metadata import COMPACT, FULL, Count, Shape, check, check_metadata, check_size, quoted

FORMAT = 1
MAX_HEADER_BYTES = 2**21
MAX_ARRAYS = 2**13


class Entry(Struct, forbid_unknown_fields=True):
    """Header entry of an array."""

    dtype: Literal[tuple(DTYPES)]  # pyright: ignore[reportInvalidTypeForm]
    shape: Shape
    data_offsets: tuple[Count, Count]

    def __post_init__(self) -> None:
        check_size(self.shape)
        size = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        if self.data_offsets[1] - self.data_offsets[0] != size:
            raise ValueError(f"data_offsets must span {size:,} bytes")


def leaves(tree: PyTree, name: str) -> Arrays:
    """Leaves of nested dictionaries as NumPy arrays in C order, by name.

    Args:
        tree: nested dictionaries of arrays, with strings as keys.
        name: name of the tree, the first part of all names.

    Raises:
        ConfigError: a key is not a string or contains "/", or a leaf is not an array with a dtype of `DTYPES`.
    """
    if isinstance(tree, Mapping):
        arrays = {}
        for key, branch in tree.items():
            if not isinstance(key, str) or "/" in key:
                raise ConfigError(f"{name}: key {reprlib.repr(key)}: must be text without '/'")
            arrays |= leaves(branch, f"{name}/{key}")
        return arrays
    if name in checks.GROUPS or not hasattr(tree, "dtype"):
        raise ConfigError(f"{name} of type {type(tree).__name__}: must be nested dictionaries of arrays")
    if tree.dtype not in DTYPES.values():
        raise ConfigError(f"{name} of dtype {tree.dtype}: must be one of {', '.join(map(str, DTYPES.values()))}")
    return {name: np.asarray(on_host(tree), order="C")}


def pack(leaves: Arrays, masks: Arrays, scale: float | None, *, compact: bool) -> tuple[Arrays, dict[str, Any]]:
    """Arrays as they are stored, and the metadata of the masks.

    Args:
        leaves: all arrays except masks, by name.
        masks: masks by name; entries are 0 or the mask scale.
        scale: mask scale from the caller's metadata; required if no mask keeps a weight.
        compact: store only kept weights, without the rewound network.

    Returns:
        Arrays by name, and a dictionary of "mask_scale", "form", "density" and "layers".

    Raises:
        ConfigError: a mask does not fit its weights or has other entries, the scale is missing or wrong, or the masks
            have no entries.
    """
    _check_masks(masks, leaves)
    bits = {name.removeprefix("masks/"): mask != 0 for name, mask in masks.items()}
    about = {"mask_scale": _mask_scale(masks, scale), "form": COMPACT if compact else FULL}
    stored = {name: leaf for name, leaf in leaves.items() if not (compact and name.startswith(checks.REWOUND))}
    for name, mask in bits.items():
        weight = leaves["params/" + name]
        stored["masks/" + name] = np.packbits(mask)
        stored["params/" + name] = weight[mask] if compact else _scattered(weight[mask], mask)
    return stored, {**about, **_densities(bits)}


def unpack(stored: Arrays, about: Mapping[str, Any]) -> Arrays:
    """Weights and masks in their full shapes, from stored arrays that passed `check_layout`."""
    arrays = dict(stored)
    for name, layer in about["layers"].items():
        mask_name, weight_name = "masks/" + name, "params/" + name
        mask = checks.unpacked_bits(stored[mask_name], tuple(layer["shape"]))
        weight = stored[weight_name]
        arrays[mask_name] = _scattered(checks.rounded(about["mask_scale"], weight.dtype), mask)
        if about["form"] == COMPACT:
            arrays[weight_name] = _scattered(weight, mask)
    return arrays


def _check_masks(masks: Arrays, leaves: Arrays) -> None:
    """Raises unless every mask has the shape and dtype of its weights."""
    for name, mask in masks.items():
        weight = leaves.get("params/" + name.removeprefix("masks/"))
        if weight is None:
            raise ConfigError(f"{name}: has no weights; params must have an array of the same path")
        if (mask.shape, mask.dtype) != (weight.shape, weight.dtype):
            raise ConfigError(
                f"{name} of shape {mask.shape} and dtype {mask.dtype}: must have shape {weight.shape} and dtype "
                f"{weight.dtype}, like its weights"
            )


def _mask_scale(masks: Arrays, given: float | None) -> float:
    """Common value of all kept mask entries, from the mask with the highest precision; `given` if none is kept."""
    kept = {name: mask[mask != 0] for name, mask in masks.items() if np.any(mask != 0)}
    if not kept:
        if given is None:
            raise ConfigError("metadata: mask_scale: missing; required because no mask keeps a weight")
        return float(given)
    precise = max(kept, key=lambda name: jnp.finfo(kept[name].dtype).nmant)
    scale = float(kept[precise][0])
    for name, entries in kept.items():
        others = entries[entries != checks.rounded(scale, entries.dtype)]
        if others.size or not (scale > 0 and math.isfinite(scale)):
            entry = float(others[0]) if others.size else scale
            raise ConfigError(f"{name}: entry {entry}: must be 0 or one finite scale above 0, here {scale}")
    if given is not None and not math.isclose(given, scale, rel_tol=4 * float(jnp.finfo(kept[precise].dtype).eps)):
        raise ConfigError(f"metadata: mask_scale {given}: must be {scale}, as in the masks")
    return scale


def _densities(bits: Arrays) -> dict[str, Any]:
    """Metadata of the masks: total density, and density and shape of each layer."""
    size, kept = sum(mask.size for mask in bits.values()), sum(map(np.count_nonzero, bits.values()))
    if size == 0:
        raise ConfigError("masks: empty; must have at least one entry")
    shares = {name: np.count_nonzero(mask) / max(mask.size, 1) for name, mask in bits.items()}
    layers = {name: {"density": share, "shape": list(bits[name].shape)} for name, share in shares.items()}
    return {"density": kept / size, "layers": layers}


def _scattered(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Array of the mask's shape with `values` where the mask is True, in C order, and 0 elsewhere."""
    array = np.zeros(mask.shape, values.dtype)
    array[mask] = values
    return array


def encode_ticket(arrays: Arrays, about: Mapping[str, Any]) -> bytes:
    """Content of a ticket file: stored arrays, metadata, and the hash of both.

    Raises:
        ConfigError: there are more arrays, or more bytes of names and metadata, than `read` accepts.
    """
    about = {**about, "format": FORMAT}
    about["sha256"] = _content_hash(arrays, about)
    data = safetensors.numpy.save(arrays, {"cs_jax": _to_json(about)})
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES or len(arrays) >= MAX_ARRAYS:
        raise ConfigError(
            f"{len(arrays):,} arrays and {int.from_bytes(data[:8], 'little'):,} bytes of names and metadata: must be "
            f"fewer than {MAX_ARRAYS:,} arrays and at most {MAX_HEADER_BYTES:,} bytes"
        )
    return data


def read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Stored arrays and metadata of a file.

    Raises:
        ConfigError: the file does not exist, is not a ticket or is damaged, or metadata has other types or ranges.
    """
    text, data = _read_bytes(path)
    about = _parse_json(text, "metadata")
    if isinstance(about, dict):
        version = about.get("format")
        check("metadata: format", version, version == FORMAT, f"must be {FORMAT}; later formats need a later cs_jax")
    check_metadata(about)
    if _to_json(about) != text:
        raise ConfigError("metadata: JSON must be sorted and compact, as save_ticket writes it")
    try:
        stored = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"not a safetensors file: {quoted(str(error))}") from error
    arrays = {
        name: np.frombuffer(array["data"], DTYPES[array["dtype"]]).reshape(array["shape"]) for name, array in stored
    }
    if about.get("sha256") != _content_hash(arrays, about):
        raise ConfigError("content does not match its hash: the file is damaged; copy or save it again")
    return arrays, about


def _read_bytes(path: Path) -> tuple[str, bytes]:
    """Metadata text and all bytes of a file. Arrays are read only after the checks of the header."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise ConfigError("is a folder or a device: must be a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            header_size = int.from_bytes(start, "little")
            if len(start) < 8 or header_size > min(MAX_HEADER_BYTES, size - 8):
                raise ConfigError(f"not a ticket file: {size:,} bytes, with a header of {header_size:,} bytes")
            metadata, end = _parse_header(file.read(header_size))
            if 8 + header_size + end != size:
                raise ConfigError(f"{size:,} bytes: must be {8 + header_size + end:,}; truncated or with extra bytes")
            file.seek(0)
            return metadata, file.read(size)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error


def _parse_header(text: bytes) -> tuple[str, int]:
    """Metadata text of a header, and the number of data bytes for the arrays in the header.

    The safetensors library ensures that the arrays cover the data without gaps or overlaps. The checks here reject
    contents that the library accepts: duplicate names, sizes out of range, and headers that are slow to parse.
    """
    try:
        header = _parse_json(text.decode(), "header")
    except UnicodeDecodeError as error:
        raise ConfigError("header: not UTF-8 text") from error
    match header:
        case {"__metadata__": {"cs_jax": str(metadata), **others}, **entries} if not others:
            pass
        case {"__metadata__": {"cs_jax": _, "format": "pt"}}:
            raise ConfigError("is an exported state dict, not a ticket; convert it with `python -m cs_jax import`")
        case _:
            raise ConfigError("not a ticket file: the metadata key cs_jax is missing")
    if len(header) > MAX_ARRAYS:
        raise ConfigError(f"{len(header):,} arrays: must be at most {MAX_ARRAYS:,}")
    found = convert(entries, dict[str, Entry], "header")
    return metadata, max((entry.data_offsets[1] for entry in found.values()), default=0)


def _parse_json(text: str, what: str) -> Any:
    """Value of a JSON text; duplicate keys are an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: not valid JSON: {str(error)[:80]}") from error


def _content_hash(arrays: Arrays, about: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON text (metadata, names, dtypes, shapes), followed by the bytes of the arrays sorted by name."""
    names = sorted(arrays)
    content = {key: value for key, value in about.items() if key != "sha256"}
    kinds = [[name, str(arrays[name].dtype), list(arrays[name].shape)] for name in names]
    digest = hashlib.sha256(_to_json([content, kinds]).encode())
    for name in names:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
