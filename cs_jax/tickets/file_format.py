"""The bytes of a ticket: arrays and masks as they are stored, and the file that they are in.

Arrays are called "params/...", "batch_stats/..." and "masks/..." after their paths, and "rewound/params/..." and
"rewound/batch_stats/..." for the network before it was retrained. All else is JSON under the one metadata key "cs_jax":
safetensors writes several keys in random order. Nothing of the place or time is in the file, so equal content gives
equal bytes.
"""

import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError
from cs_jax.tickets import checks
from cs_jax.tickets.checks import DTYPES, Arrays, check, quoted

FORMAT = 1
MAX_HEADER_BYTES = 2**21
MAX_ARRAYS = 2**13


def leaves(tree: PyTree, name: str) -> Arrays:
    """Leaves of nested dictionaries by name, in C order."""
    if isinstance(tree, Mapping):
        arrays = {}
        for key, branch in tree.items():
            if not isinstance(key, str) or "/" in key:
                raise ConfigError(f"{name}: got the key {reprlib.repr(key)}, wanted text without '/'")
            arrays |= leaves(branch, f"{name}/{key}")
        return arrays
    if name in checks.GROUPS or not hasattr(tree, "dtype"):
        raise ConfigError(f"{name}: got {type(tree).__name__}, wanted nested dictionaries of arrays")
    if tree.dtype not in DTYPES.values():
        raise ConfigError(f"{name}: got dtype {tree.dtype}, wanted one of {', '.join(map(str, DTYPES.values()))}")
    return {name: np.asarray(on_host(tree), order="C")}


def pack(leaves: Arrays, masks: Arrays, scale: float | None, *, compact: bool) -> tuple[Arrays, dict[str, Any]]:
    """Arrays as they are stored, and what the metadata say of the masks.

    Args:
        leaves: all others by name, whole.
        masks: by name, entries 0 or their scale.
        scale: that of the masks, where it is known; needed where none keeps anything.
        compact: store kept weights alone, without the rewound network.
    """
    _check_masks(masks, leaves)
    bits = {name.removeprefix("masks/"): mask != 0 for name, mask in masks.items()}
    about = {"mask_scale": _mask_scale(masks, scale), "form": checks.COMPACT if compact else checks.FULL}
    stored = {name: leaf for name, leaf in leaves.items() if not (compact and name.startswith(checks.REWOUND))}
    for name, mask in bits.items():
        weight = leaves["params/" + name]
        stored["masks/" + name] = np.packbits(mask)
        stored["params/" + name] = weight[mask] if compact else _scattered(weight[mask], mask)
    return stored, {**about, **_densities(bits)}


def unpack(stored: Arrays, about: Mapping[str, Any]) -> Arrays:
    """Whole weights and masks of what is stored, once that was checked."""
    arrays = dict(stored)
    for name, layer in about["layers"].items():
        mask_name, weight_name = "masks/" + name, "params/" + name
        mask = checks.unpacked_bits(stored[mask_name], tuple(layer["shape"]))
        weight = stored[weight_name]
        arrays[mask_name] = _scattered(checks.rounded(about["mask_scale"], weight.dtype), mask)
        if about["form"] == checks.COMPACT:
            arrays[weight_name] = _scattered(weight, mask)
    return arrays


def _check_masks(masks: Arrays, leaves: Arrays) -> None:
    """Raises unless every mask has weights of its shape and dtype."""
    for name, mask in masks.items():
        weight = leaves.get("params/" + name.removeprefix("masks/"))
        if weight is None:
            raise ConfigError(f"{name}: got a mask without weights, wanted the path of an array in params")
        if (mask.shape, mask.dtype) != (weight.shape, weight.dtype):
            raise ConfigError(
                f"{name}: got shape {mask.shape} and dtype {mask.dtype}, wanted {weight.shape} and {weight.dtype}, "
                "those of its weights"
            )


def _mask_scale(masks: Arrays, given: float | None) -> float:
    """The one value of all kept entries, as it is in the most precise masks; `given` where none is kept."""
    kept = {name: mask[mask != 0] for name, mask in masks.items() if np.any(mask != 0)}
    if not kept:
        if given is None:
            raise ConfigError("mask_scale: got nothing and masks that are all empty, wanted it in metadata")
        return float(given)
    precise = max(kept, key=lambda name: jnp.finfo(kept[name].dtype).nmant)
    scale = float(kept[precise][0])
    for name, entries in kept.items():
        others = entries[entries != checks.rounded(scale, entries.dtype)]
        if others.size or not (scale > 0 and math.isfinite(scale)):
            entry = float(others[0]) if others.size else scale
            raise ConfigError(f"{name}: got the entry {entry}, wanted 0 or one finite scale above 0, here {scale}")
    if given is not None and not math.isclose(given, scale, rel_tol=4 * float(jnp.finfo(kept[precise].dtype).eps)):
        raise ConfigError(f"mask_scale: got {given} in metadata, wanted {scale}, as in the masks")
    return scale


def _densities(bits: Arrays) -> dict[str, Any]:
    """What the metadata say of masks: their shapes and densities."""
    size, kept = sum(mask.size for mask in bits.values()), sum(map(np.count_nonzero, bits.values()))
    if size == 0:
        raise ConfigError("masks: got none, wanted at least one entry")
    shares = {name: np.count_nonzero(mask) / max(mask.size, 1) for name, mask in bits.items()}
    layers = {name: {"density": share, "shape": list(bits[name].shape)} for name, share in shares.items()}
    return {"density": kept / size, "layers": layers}


def _scattered(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Zeros of the mask's shape with `values` where it is True, in C order."""
    array = np.zeros(mask.shape, values.dtype)
    array[mask] = values
    return array


def encode_ticket(arrays: Arrays, about: Mapping[str, Any]) -> bytes:
    """A file with these stored arrays and metadata, and the hash of both.

    Raises:
        ConfigError: `read` would not take so many arrays, or so long a text.
    """
    about = {**about, "format": FORMAT}
    about["sha256"] = _content_hash(arrays, about)
    data = safetensors.numpy.save(arrays, {"cs_jax": _to_json(about)})
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES or len(arrays) >= MAX_ARRAYS:
        raise ConfigError(
            f"got {len(arrays):,} arrays, or long metadata: wanted fewer than {MAX_ARRAYS:,}, and at most "
            f"{MAX_HEADER_BYTES:,} bytes of names and metadata"
        )
    return data


def read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and metadata of a file whose hash is right."""
    text, data = _read_bytes(path)
    about = _parse_json(text, "metadata")
    check("metadata", about, isinstance(about, dict), "an object")
    check("format", about.get("format"), about.get("format") == FORMAT, f"{FORMAT}, or a later version of cs_jax")
    checks.check_metadata(about)
    if _to_json(about) != text:
        raise ConfigError("metadata: got JSON that is not sorted and compact, wanted what save_ticket writes")
    try:
        stored = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"got no safetensors file: {quoted(str(error))}") from error
    arrays = {
        name: np.frombuffer(array["data"], DTYPES[array["dtype"]]).reshape(array["shape"]) for name, array in stored
    }
    if about.get("sha256") != _content_hash(arrays, about):
        raise ConfigError("got content that does not match its hash, wanted the file as it was saved: it is damaged")
    return arrays, about


def _read_bytes(path: Path) -> tuple[str, bytes]:
    """Metadata and all bytes of a file, which is read no further than its header is right."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait
            raise ConfigError("got a folder or a device, wanted a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            header_size = int.from_bytes(start, "little")
            if len(start) < 8 or header_size > min(MAX_HEADER_BYTES, size - 8):
                raise ConfigError(f"got {size:,} bytes, {header_size:,} of them header, wanted a file of save_ticket")
            metadata, end = _parse_header(file.read(header_size))
            if 8 + header_size + end != size:
                raise ConfigError(f"got {size:,} bytes, wanted {8 + header_size + end:,}: it is cut off or continued")
            file.seek(0)
            return metadata, file.read(size)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error


def _parse_header(text: bytes) -> tuple[str, int]:
    """Metadata in a header, and how many bytes of data it speaks of.

    The safetensors library sees to it that arrays fill the data without gap or overlap. It takes names that come twice,
    names and shapes of any kind, and headers that are slow to read, so these are checked here.
    """
    try:
        header = _parse_json(text.decode(), "header")
    except UnicodeDecodeError as error:
        raise ConfigError("header: got bytes that are no UTF-8 text") from error
    match header:
        case {"__metadata__": {"cs_jax": str(metadata), **others}, **entries} if not others:
            pass
        case {"__metadata__": {"cs_jax": _, "format": "pt"}}:
            raise ConfigError("got an exported state dict, wanted a ticket: `python -m cs_jax import` makes one of it")
        case _:
            raise ConfigError("got no metadata called cs_jax, wanted a file of save_ticket")
    if len(header) > MAX_ARRAYS:
        raise ConfigError(f"got {len(header):,} arrays, wanted at most {MAX_ARRAYS:,}")
    return metadata, max((_end_of(name, entry) for name, entry in entries.items()), default=0)


def _end_of(name: str, entry: Any) -> int:
    """Where an array ends in the data, after a check of its entry in the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{quoted(name)}: got {reprlib.repr(entry)}, wanted dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    check(quoted(name), dtype, isinstance(dtype, str) and dtype in DTYPES, f"one of {', '.join(DTYPES)}")
    check(quoted(name), shape, checks.is_shape(shape), f"up to {checks.MAX_RANK} sizes, {checks.MAX_ENTRIES:,} entries")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    usual = checks.are(offsets, checks.is_count) and len(offsets) == 2 and offsets[1] - offsets[0] == size
    check(quoted(name), offsets, usual, f"offsets of {size} bytes")
    return offsets[1]


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


def _content_hash(arrays: Arrays, about: Mapping[str, Any]) -> str:
    """SHA-256 of metadata, names, dtypes and shapes as one JSON text, then of the arrays' bytes in the names' order."""
    names = sorted(arrays)
    content = {key: value for key, value in about.items() if key != "sha256"}
    kinds = [[name, str(arrays[name].dtype), list(arrays[name].shape)] for name in names]
    digest = hashlib.sha256(_to_json([content, kinds]).encode())
    for name in names:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
