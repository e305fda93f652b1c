"""Metadata of a ticket: types, ranges and limits.

`load_ticket` checks the metadata of a file before it builds a network, because the file may be hostile. `save_ticket`
checks the metadata of the caller. A failed check raises a one-line ConfigError.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from cs_jax.core import arrays
from cs_jax.core.errors import ConfigError
from cs_jax.core.schema import convert, shortened

FULL, COMPACT = "full", "compact"

MAX_RANK = 16
MAX_ENTRIES = 2**40
MAX_DEPTH = 16
MAX_CLASSES = 2**20
MAX_FEATURES = 2**20
MAX_IMAGE_ENTRIES = 2**28

Count = Annotated[int, Meta(ge=0)]
Shape = Annotated[list[Count], Meta(max_length=MAX_RANK)]
Share = Annotated[float, Meta(ge=0, le=1)]
Scale = Annotated[float, Meta(gt=0)]


class Model(Struct, forbid_unknown_fields=True):
    """Metadata of a model. A model of `cs_jax.models` has a name; a custom model may omit every field."""

    name: str | None = None
    num_classes: Annotated[int, Meta(ge=1, le=MAX_CLASSES)] | None = None
    image_shape: Shape | None = None
    dtype: Literal[tuple(arrays.DTYPES)] | None = None  # pyright: ignore[reportInvalidTypeForm]
    features: dict[str, Annotated[int, Meta(ge=1, le=MAX_FEATURES)]] | None = None

    def __post_init__(self) -> None:
        shape = self.image_shape
        if shape is not None and not 0 < math.prod(shape) <= MAX_IMAGE_ENTRIES:
            raise ValueError(f"image_shape must have 1 to {MAX_IMAGE_ENTRIES:,} entries")
        if self.name is not None and (self.num_classes is None or shape is None or len(shape) != 3):
            raise ValueError("a model with a name must have num_classes and image_shape (height, width, channels)")


class _Common(Struct, kw_only=True):
    model: Model | None = None
    config: dict[str, Any] | None = None
    dataset: str | None = None
    classes: list[str] | None = None
    versions: dict[str, str] | None = None
    accuracy: dict[str, Share | None] | None = None
    unmasked: list[str] | None = None
    normalization: dict[str, list[float]] | None = None


class GivenMetadata(_Common, kw_only=True):
    """Metadata from the caller of `save_ticket`. Other keys are allowed, with any JSON values."""

    mask_scale: Scale | None = None


class Layer(Struct, forbid_unknown_fields=True):
    """Metadata of a masked layer."""

    density: Share
    shape: Shape

    def __post_init__(self) -> None:
        check_size(self.shape)


class StoredMetadata(_Common, kw_only=True):
    """Metadata of a file. Other keys are allowed, with any JSON values."""

    form: Literal["full", "compact"]
    mask_scale: Scale
    density: Share
    layers: dict[str, Layer]


_WRITTEN = ("format", "form", "density", "layers", "sha256")
"""Keys that `save_ticket` writes itself; a caller's values are ignored."""


def check(where: str, value: Any, holds: bool, rule: str) -> None:
    """Raises "WHERE VALUE: RULE" as a ConfigError unless `holds`."""
    if not holds:
        raise ConfigError(f"{where} {reprlib.repr(value)}: {rule}")


def quoted(name: str) -> str:
    """A name from a file in quotes, on one line, shortened if it is long."""
    return repr(shortened(name))


def is_shape(value: Any) -> bool:
    """True for a list or tuple of sizes >= 0 with at most `MAX_RANK` sizes and `MAX_ENTRIES` entries."""
    counts = isinstance(value, list | tuple) and all(map(_is_count, value))
    return counts and len(value) <= MAX_RANK and _size(value) <= MAX_ENTRIES


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_size(shape: list[int]) -> None:
    """Raises a ValueError for a shape of more entries than a ticket may have."""
    if _size(shape) > MAX_ENTRIES:
        raise ValueError(f"shape must have at most {MAX_ENTRIES:,} entries")


def _size(shape: list[int] | tuple[int, ...]) -> int:
    """Product of the sizes without zeros. NumPy limits this product for empty arrays too."""
    return math.prod(size or 1 for size in shape)


def given_metadata(metadata: Any) -> dict[str, Any]:
    """Metadata of the caller after a round trip through JSON, without the keys that `save_ticket` writes itself.

    Raises:
        ConfigError: a value is not JSON, or does not have the type and range in `GivenMetadata`.
    """
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"metadata of type {type(metadata).__name__}: must be a dictionary")
    about = {key: value for key, value in metadata.items() if key not in _WRITTEN}
    _check_json(about, "metadata")
    about = json.loads(json.dumps(about))
    _check_classes(convert(about, GivenMetadata, "metadata"))
    return about


def check_metadata(about: Any) -> None:
    """Raises a ConfigError unless the metadata of a file have the types and ranges in `StoredMetadata`."""
    _check_json(about, "metadata")
    _check_classes(convert(about, StoredMetadata, "metadata"))


def _check_classes(found: _Common) -> None:
    """Raises a ConfigError if the number of class names differs from num_classes of the model."""
    count = None if found.model is None else found.model.num_classes
    if count is not None and found.classes is not None:
        usual = len(found.classes) == count
        check("metadata: classes", found.classes, usual, f"must be {count} names, as num_classes of the model")


def _check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raises a ConfigError unless `value` is JSON with finite numbers and at most `MAX_DEPTH` levels.

    The json module silently converts keys of other types to strings, and its errors do not name the key of a value.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            check(f"{where}: key", key, isinstance(key, str), "must be text")
            name = quoted(key)[1:-1]
            place = [f"{where}: {name}", f"{where}.{name}", where][min(depth, 2)]
            _check_json(inner, place, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_json(inner, where, depth + 1)
    elif isinstance(value, float):
        check(where, value, math.isfinite(value), "must be a finite number")
    else:
        usual = value is None or isinstance(value, str | bool | int)
        check(where, value, usual, "must be JSON: text, finite number, true, false, null, list or dictionary")
