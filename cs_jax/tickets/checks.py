"""Checks of a ticket's arrays against each other and the metadata.

`load_ticket` checks a file before it builds a network from the content, because the file may be hostile. `save_ticket`
checks the arrays before it writes a file. A failed check raises a one-line ConfigError.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cs_jax.core.errors import ConfigError
from cs_jax.tickets.metadata import COMPACT, FULL, check, quoted

Arrays = dict[str, np.ndarray]
"""Arrays by name, "params/conv0/kernel"."""

REWOUND = "rewound/"
COLLECTIONS = ("params", "batch_stats", "masks")
GROUPS = (*COLLECTIONS, REWOUND + "params", REWOUND + "batch_stats")

_FLOATS = {"F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16), "F32": np.dtype("f4"), "F64": np.dtype("f8")}
DTYPES = _FLOATS | {f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)}


def check_layout(arrays: Arrays, about: Mapping[str, Any]) -> None:
    """Checks stored arrays against each other and the metadata: names, shapes, dtypes, mask bits.

    Args:
        arrays: stored arrays, by name.
        about: metadata that passed `check_metadata`.

    Raises:
        ConfigError: names the array or field that does not fit.
    """
    _check_names(arrays)
    _check_masks(arrays, about)
    for name in about.get("unmasked") or ():
        usual = name not in about["layers"] and "params/" + name in arrays
        check("metadata: unmasked", name, usual, "must be the name of an array in params without a stored mask")
    kinds = {name: (array.shape, str(array.dtype)) for name, array in arrays.items() if not name.startswith("masks/")}
    rewound = {name.removeprefix(REWOUND): kind for name, kind in kinds.items() if name.startswith(REWOUND)}
    if rewound and about["form"] == COMPACT:
        raise ConfigError("rewound arrays: not allowed in the compact form")
    if rewound:
        trained = {name: kind for name, kind in kinds.items() if not name.startswith(REWOUND)}
        check_same_shapes("rewound array", rewound, trained, "the trained network")


def _check_names(arrays: Arrays) -> None:
    """Every name is a path below a group, and no array is also a folder of arrays."""
    folders = set()
    for name in arrays:
        parts = name.split("/")
        depth = 2 if parts[0] == "rewound" else 1
        usual = "/".join(parts[:depth]) in GROUPS and len(parts) > depth
        if not usual or {"", ".", ".."} & set(parts) or "\\" in name or not name.isprintable():
            raise ConfigError(f"array {quoted(name)}: name must be a path of dictionary keys below {', '.join(GROUPS)}")
        folders |= {"/".join(parts[:end]) for end in range(1, len(parts))}
    both = sorted(folders & set(arrays))
    if both:
        raise ConfigError(f"array {quoted(both[0])}: is also a folder of arrays; rename one of them")


def check_same_shapes(what: str, got: Mapping[str, tuple], wanted: Mapping[str, tuple], where: str) -> None:
    """Raises a ConfigError that names the first array that is missing, unknown, or of another shape or dtype.

    Args:
        what: noun for the arrays in the message.
        got: shape and dtype of each array, by name; the dtype may be "floats" for any float dtype.
        wanted: shape and dtype of each array of the network that the arrays must fit, by name.
        where: name of this network, for the message.
    """
    for name in sorted({*got, *wanted}):
        found, expected = (" ".join(map(str, kinds[name])) if name in kinds else None for kinds in (got, wanted))
        if found is None:
            raise ConfigError(f"{what} {quoted(name)}: missing; {where} has {expected}")
        if expected is None:
            raise ConfigError(f"{what} {quoted(name)} {found}: unknown; {where} has no such array")
        if found != expected:
            raise ConfigError(f"{what} {quoted(name)} {found}: must be {expected}, as in {where}")


def _check_masks(arrays: Arrays, about: Mapping[str, Any]) -> None:
    """Checks all packed masks against their weights and the metadata."""
    layers = about["layers"]
    names = {name.removeprefix("masks/") for name in arrays if name.startswith("masks/")}
    for name in sorted(names.symmetric_difference(layers)):
        raise ConfigError(f"mask {quoted(name)}: must be both among the arrays and in the metadata")
    kept = sum(_check_mask(arrays, name, layer, about["form"], about["mask_scale"]) for name, layer in layers.items())
    size = sum(math.prod(layer["shape"]) for layer in layers.values())
    if size == 0 or about["density"] != kept / size:
        raise ConfigError(f"metadata: density {about['density']}: must be {kept} of {size}, the share of kept entries")


def _check_mask(arrays: Arrays, name: str, layer: Mapping[str, Any], form: str, scale: float) -> int:
    """Number of kept entries of a packed mask, after checks against the weights and metadata."""
    packed, weight = arrays["masks/" + name], arrays.get("params/" + name)
    where, shape = f"mask {quoted(name)}", tuple(layer["shape"])
    size = math.prod(shape)
    if weight is None or weight.dtype not in _FLOATS.values():
        raise ConfigError(f"{where}: its weights are {'missing' if weight is None else weight.dtype}; must be floats")
    if packed.dtype != np.uint8 or packed.shape != (-(-size // 8),):
        raise ConfigError(
            f"{where} of dtype {packed.dtype} and shape {packed.shape}: must be {-(-size // 8)} bytes ({size} bits)"
        )
    if size % 8 and packed[-1] & (255 >> size % 8):
        raise ConfigError(f"{where}: bits after the last entry must be 0")
    kept = int(np.bitwise_count(packed).sum(dtype=np.int64))
    if layer["density"] != kept / max(size, 1):
        raise ConfigError(f"{where}: density {layer['density']} in the metadata; must be {kept} of {size}")
    wanted = (kept,) if form == COMPACT else shape
    if weight.shape != wanted:
        raise ConfigError(f"{where}: its weights have shape {weight.shape}; must be {wanted}")
    if form == FULL and np.any(weight.view(f"u{weight.itemsize}")[~unpacked_bits(packed, shape)]):
        raise ConfigError(f"{where}: pruned weights must be 0")
    if not (0 < rounded(scale, weight.dtype) < math.inf):
        raise ConfigError(f"metadata: mask_scale {scale}: must be a finite number above 0 in {weight.dtype}")
    return kept


def rounded(scale: float, dtype: DTypeLike) -> np.ndarray:
    """Mask scale in the dtype of a mask; infinity or 0 if it is outside the range of the dtype."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(scale, np.float64).astype(dtype)


def unpacked_bits(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Boolean mask of a shape from its packed bits, in C order."""
    return np.unpackbits(packed, count=math.prod(shape)).reshape(shape).view(bool)
