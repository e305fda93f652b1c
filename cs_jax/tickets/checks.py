"""What a ticket may hold: metadata, and arrays that agree with them.

A stranger's file is checked by this before anything is made of it, and so is what `save_ticket` is about to write. All
that is wrong is a ConfigError of one line.
"""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from cs_jax.core import arrays as precision
from cs_jax.core.errors import ConfigError

Arrays = dict[str, np.ndarray]
"""Arrays by name, "params/conv0/kernel"."""

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is as it should be, and how that is."""

FULL, COMPACT = "full", "compact"
REWOUND = "rewound/"
COLLECTIONS = ("params", "batch_stats", "masks")
GROUPS = (*COLLECTIONS, REWOUND + "params", REWOUND + "batch_stats")

_FLOATS = {"F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16), "F32": np.dtype("f4"), "F64": np.dtype("f8")}
DTYPES = _FLOATS | {f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)}

MAX_RANK = 16
MAX_ENTRIES = 2**40
MAX_DEPTH = 16
MAX_CLASSES = 2**20
MAX_FEATURES = 2**20
MAX_IMAGE_ENTRIES = 2**28


def check(where: str, value: Any, holds: bool, wanted: str) -> None:
    """Raises a ConfigError, unless it holds."""
    if not holds:
        raise ConfigError(f"{where}: got {reprlib.repr(value)}, wanted {wanted}")


def quoted(name: str) -> str:
    """A name of a file in quotes, on one line and not endless."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_shape(value: Any) -> bool:
    """Whether a list or tuple is a shape whose sizes, and those of views of it, can be counted."""
    return are(value, is_count) and len(value) <= MAX_RANK and math.prod(n or 1 for n in value) <= MAX_ENTRIES


def are(values: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, list | tuple) and all(map(holds, values))


def _dictionary_of(holds: Callable[[Any], bool], wanted: str) -> Rule:
    return lambda values: isinstance(values, dict) and all(map(holds, values.values())), f"a dictionary of {wanted}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float(np.finfo("f8").max)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


_GIVEN: dict[str, Rule] = {
    "mask_scale": (lambda scale: _is_number(scale) and scale > 0, "a finite number above 0"),
    "config": (lambda config: isinstance(config, dict), "a dictionary"),
    "dataset": (_is_text, "text"),
    "classes": (lambda names: are(names, _is_text), "a list of texts"),
    "versions": _dictionary_of(_is_text, "texts"),
    "accuracy": _dictionary_of(lambda share: share is None or _is_share(share), "shares in [0, 1]"),
    "unmasked": (lambda names: are(names, _is_text), "a list of names of weights"),
    "normalization": _dictionary_of(lambda numbers: are(numbers, _is_number), "lists of numbers"),
}
_MODEL: dict[str, Rule] = {
    "name": (_is_text, "text"),
    "num_classes": (lambda count: is_count(count) and 0 < count <= MAX_CLASSES, f"1 to {MAX_CLASSES:,}"),
    "image_shape": (
        lambda shape: is_shape(shape) and 0 < math.prod(shape) <= MAX_IMAGE_ENTRIES,
        f"a shape, as (height, width, channels), of 1 to {MAX_IMAGE_ENTRIES:,} entries",
    ),
}
_MODEL_MAY: dict[str, Rule] = {
    "dtype": (lambda name: _is_text(name) and name in precision.DTYPES, f"one of {', '.join(precision.DTYPES)}"),
    "features": _dictionary_of(lambda count: is_count(count) and 0 < count <= MAX_FEATURES, f"1 to {MAX_FEATURES:,}"),
}
_WRITTEN: dict[str, Rule] = {
    "form": (lambda form: form in (FULL, COMPACT), f"one of {FULL}, {COMPACT}"),
    "mask_scale": _GIVEN["mask_scale"],
    "density": (_is_share, "a share in [0, 1]"),
    "layers": (lambda layers: isinstance(layers, dict), "an object"),
}
_OURS = ("format", "form", "density", "layers", "sha256")  # a caller's are not looked at


def given_metadata(metadata: Any) -> dict[str, Any]:
    """A caller's metadata as JSON gives them back, without what `save_ticket` writes itself."""
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"metadata: got {type(metadata).__name__}, wanted a dictionary")
    about = {key: value for key, value in metadata.items() if key not in _OURS}
    _check_given(about)
    return json.loads(json.dumps(about))


def check_metadata(about: Mapping[str, Any]) -> None:
    """Types and ranges of a file's metadata."""
    _check_given(about)
    _check_values(about, _WRITTEN, needed=True)
    for name, layer in about["layers"].items():
        usual = isinstance(layer, dict) and set(layer) == {"density", "shape"} and _is_share(layer["density"])
        check(f"layer {quoted(name)}", layer, usual and is_shape(layer["shape"]), "a density and a shape")


def _check_given(about: Mapping[str, Any]) -> None:
    """What a caller may give: JSON, of which some keys have a meaning."""
    _check_json(about, "metadata")
    model = about.get("model")
    if model is not None:
        _check_model_entry(model)
    _check_values(about, _GIVEN, needed=False)
    count, classes = (model or {}).get("num_classes"), about.get("classes")
    if count is not None and classes is not None:
        check("classes", len(classes), len(classes) == count, f"{count} names, as many as num_classes of the model")


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raises unless `value` is JSON: text keys, finite numbers, not nested deeply.

    The json module itself makes text of other keys, and does not say where something else stands.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: got values nested deeper than {MAX_DEPTH}, wanted fewer levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            check(where, key, _is_text(key), "text as keys")
            _check_json(inner, f"{where}/{quoted(key)[1:-1]}" if depth < 2 else where, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_json(inner, where, depth + 1)
    else:
        usual = value is None or isinstance(value, str | bool | int) or _is_number(value)
        check(where, value, usual, "JSON values: text, finite numbers, lists, dictionaries")


def _check_model_entry(entry: Any) -> None:
    """A named model has both sizes, bounded before anything is made of them; the sizes of another may be left out."""
    usual = isinstance(entry, dict) and set(entry) <= {*_MODEL, *_MODEL_MAY}
    check("model", entry, usual, "a dictionary of name, num_classes, image_shape, dtype and features")
    named = entry.get("name") is not None
    _check_values(entry, _MODEL, needed=named, where="model ")
    _check_values(entry, _MODEL_MAY, needed=False, where="model ")
    if named:
        shape = entry["image_shape"]
        check("model image_shape", shape, len(shape) == 3, "(height, width, channels)")


def _check_values(values: Mapping[str, Any], rules: Mapping[str, Rule], *, needed: bool, where: str = "") -> None:
    """Raises where a value breaks its rule, or is not there and is needed."""
    for key, (holds, wanted) in rules.items():
        value = values.get(key)
        check(where + key, value, (value is None and not needed) or holds(value), wanted)


def check_layout(arrays: Arrays, about: Mapping[str, Any]) -> None:
    """Names, shapes and dtypes of stored arrays against each other and the metadata; then the masks' bits."""
    _check_names(arrays)
    layers, scale = about["layers"], about["mask_scale"]
    masks = [name for name in arrays if name.startswith("masks/")]
    alone = sorted(set(layers).symmetric_difference(name.removeprefix("masks/") for name in masks))
    if alone:
        raise ConfigError(f"mask {quoted(alone[0])}: got it in one of file and metadata, wanted both or neither")
    kept = sum(_check_mask(arrays, name, layer, about["form"], scale) for name, layer in layers.items())
    size = sum(math.prod(layer["shape"]) for layer in layers.values())
    if size == 0 or about["density"] != kept / size:
        raise ConfigError(f"density: got {about['density']} in the metadata, wanted {kept} of {size} entries")
    for name in about.get("unmasked") or ():
        usual = name not in layers and "params/" + name in arrays
        check("unmasked", name, usual, "names of weights of the file that have no mask there")
    kinds = {name: (array.shape, str(array.dtype)) for name, array in arrays.items() if not name.startswith("masks/")}
    rewound = {name.removeprefix(REWOUND): kind for name, kind in kinds.items() if name.startswith(REWOUND)}
    if rewound and about["form"] == COMPACT:
        raise ConfigError("got rewound weights in the compact form, wanted none")
    if rewound:
        trained = {name: kind for name, kind in kinds.items() if not name.startswith(REWOUND)}
        check_same_shapes("rewound", rewound, trained, "trained network")


def _check_names(arrays: Arrays) -> None:
    """Every name is a path below a group, and none is a folder of another."""
    folders = set()
    for name in arrays:
        parts = name.split("/")
        depth = 2 if parts[0] == "rewound" else 1
        usual = "/".join(parts[:depth]) in GROUPS and len(parts) > depth
        if not usual or {"", ".", ".."} & set(parts) or "\\" in name or not name.isprintable():
            raise ConfigError(f"the name {quoted(name)}: wanted a path of dictionary keys below {', '.join(GROUPS)}")
        folders |= {"/".join(parts[:end]) for end in range(1, len(parts))}
    both = sorted(folders & set(arrays))
    if both:
        raise ConfigError(f"the name {quoted(both[0])}: got an array and a folder of arrays, wanted one of them")


def check_same_shapes(what: str, got: Mapping[str, tuple], wanted: Mapping[str, tuple], where: str) -> None:
    """Raises where leaves differ, and names the first of them."""
    for name in sorted({*got, *wanted}):
        if got.get(name) != wanted.get(name):
            shown = [" ".join(map(str, kinds[name])) if name in kinds else "nothing" for kinds in (got, wanted)]
            raise ConfigError(f"{what} {quoted(name)}: got {shown[0]}, wanted {shown[1]}, as in the {where}")


def _check_mask(arrays: Arrays, name: str, layer: Mapping[str, Any], form: str, scale: float) -> int:
    """Checks a packed mask against its weights and metadata; returns how many it keeps."""
    packed, weight = arrays["masks/" + name], arrays.get("params/" + name)
    where, shape = f"mask {quoted(name)}", tuple(layer["shape"])
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
    if form == FULL and np.any(weight.view(f"u{weight.itemsize}")[~unpacked_bits(packed, shape)]):
        raise ConfigError(f"{where}: got weights other than 0 where it removes them, wanted zeros")
    if not (0 < rounded(scale, weight.dtype) < math.inf):
        raise ConfigError(f"mask_scale: got {scale}, wanted a finite number above 0 in {weight.dtype}")
    return kept


def rounded(scale: float, dtype: DTypeLike) -> np.ndarray:
    """A mask scale in the dtype of a mask; infinite or 0 where it is too large or small for it."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(scale, np.float64).astype(dtype)


def unpacked_bits(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(packed, count=math.prod(shape)).reshape(shape).view(bool)
