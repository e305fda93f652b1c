"""Readers of a run's array files, with checks: predictions on the test set, and masks as bits."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from cs_jax.core.errors import ConfigError
from cs_jax.experiment.storage.paths import SUMMARY_FILE
from cs_jax.tickets import checks, file_format

Bits = dict[str, np.ndarray]
"""Masks as bits: a uint8 array of shape (bytes,) for each masked array, by name.

One bit for each weight in C order, 1 for kept weights; padded with 0 to whole bytes.
"""


class Masks(NamedTuple):
    """Masks found by a run."""

    rounds: dict[int, Bits]  # at the end of each round
    ticket: Bits | None  # None if there is no ticket yet
    sizes: dict[str, int] | None  # number of weights in each layer; None if no file contains the numbers


def read_content(path: Path) -> bytes | None:
    """Content of a file; None if the file does not exist.

    Raises:
        ConfigError: the path is not a file, or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: not a file; remove it")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def read_predictions(path: Path, classes: Sequence[str] | None) -> dict[str, np.ndarray] | None:
    """Predictions of the ticket on the test set; None if the file does not exist.

    Args:
        path: file of the predictions.
        classes: names of the classes, to check labels and predictions; None if unknown.

    Returns:
        "labels" and "predicted": integers (examples,). "confidence": floats (examples,). "mistakes": integers
        (mistakes,), indices into the test set. "images": uint8 (mistakes, height, width, channels).

    Raises:
        ConfigError: the file cannot be read or is damaged.
    """
    arrays = _load(path)
    if arrays is None:
        return None
    kinds = {"labels": "i", "predicted": "i", "confidence": "f", "mistakes": "i", "images": "u"}
    for name, kind in kinds.items():
        dimensions = 4 if kind == "u" else 1
        if name not in arrays:
            raise ConfigError(f"{path}: {name}: missing")
        if arrays[name].dtype.kind != kind or arrays[name].ndim != dimensions:
            numbers = {"i": "integers", "f": "floats", "u": "unsigned integers"}[kind]
            raise ConfigError(
                f"{path}: {name} of shape {arrays[name].shape}, dtype {arrays[name].dtype}: must be {numbers} of "
                f"{dimensions} dimension{'s' * (dimensions > 1)}"
            )
    labels, predicted, confidence, mistakes = (arrays[name] for name in list(kinds)[:4])
    images = arrays["images"]
    fits = (
        len(labels) == len(predicted) == len(confidence)
        and len(mistakes) == len(images)
        and 0 not in images.shape[1:]
        and images.dtype == np.uint8
        and np.isfinite(confidence).all()
        and _inside(mistakes, len(labels))
        and all(_inside(codes, len(classes) if classes else None) for codes in (labels, predicted))
    )
    if not fits:
        raise ConfigError(f"{path}: the arrays do not fit each other or the classes of {SUMMARY_FILE}")
    return arrays


def read_masks(path: Path, ticket: Path, sizes: Mapping[str, int]) -> Masks | None:
    """Masks at the end of each round, and masks of the ticket; None if both files do not exist.

    Args:
        path: file with the masks of the rounds; may be missing.
        ticket: ticket file; may be missing.
        sizes: number of weights in each layer; empty if unknown.

    Raises:
        ConfigError: a file cannot be read or is damaged, or masks do not fit the layers or each other.
    """
    arrays = _load(path)
    if arrays is None and not ticket.exists():
        return None
    rounds: dict[int, Bits] = {}
    for name, bits in (arrays or {}).items():
        found = re.fullmatch(r"(0|[1-9]\d{0,8})/(.+)", name, re.DOTALL)
        if found is None or bits.dtype != np.uint8 or bits.ndim != 1:
            raise ConfigError(
                f"{path}: {name!r} of shape {bits.shape}, dtype {bits.dtype}: must be ROUND/LAYER, with bits as a "
                "uint8 array of 1 dimension"
            )
        rounds.setdefault(int(found[1]), {})[found[2]] = bits
    rounds = dict(sorted(rounds.items()))
    ticket_bits, ticket_sizes = _read_ticket(ticket)
    known = ticket_sizes or dict(sizes) or None
    if known is not None and sizes and dict(sizes) != known:
        raise ConfigError(f"{ticket}: layers have other sizes than in the scores; all files must be from one run")
    for number, bits in rounds.items():
        _check_bits(f"{path}: round {number}", bits, known, next(iter(rounds.values())))
    return Masks(rounds, ticket_bits, known)


def _read_ticket(path: Path) -> tuple[Bits | None, dict[str, int]]:
    """Masks of a ticket and the number of weights in each layer, for any model."""
    if not path.exists():
        return None, {}
    try:
        arrays, about = file_format.read(path)
        checks.check_layout(arrays, about)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    sizes = {name: int(np.prod(layer["shape"], dtype=int)) for name, layer in about["layers"].items()}
    return {name: arrays[f"masks/{name}"] for name in sizes}, sizes


def _check_bits(source: str, bits: Bits, sizes: Mapping[str, int] | None, first: Bits) -> None:
    """Raises a ConfigError if a round's masks do not fit `sizes` or, if the sizes are unknown, the first round."""
    layers = first if sizes is None else sizes
    for name in {**layers, **bits}:
        if name not in bits:
            raise ConfigError(f"{source}: {name!r}: missing")
        if name not in layers:
            raise ConfigError(f"{source}: {name!r}: unknown layer")
        length = len(first[name]) if sizes is None else -(-sizes[name] // 8)
        if len(bits[name]) != length:
            raise ConfigError(f"{source}: {name!r} of {len(bits[name])} bytes: must have {length} bytes")
        if sizes is not None and np.unpackbits(bits[name])[sizes[name] :].any():
            raise ConfigError(f"{source}: {name!r}: bits after the {sizes[name]} weights must be 0")


def _load(path: Path) -> dict[str, np.ndarray] | None:
    content = read_content(path)
    if content is None:
        return None
    try:
        return safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: not a valid safetensors file") from error


def _inside(indices: np.ndarray, end: int | None) -> bool:
    """True if all indices are in [0, end); None for `end` means no upper limit."""
    return not indices.size or bool(indices.min() >= 0 and (end is None or indices.max() < end))
