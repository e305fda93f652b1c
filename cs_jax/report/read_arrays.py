"""Arrays that a run leaves behind, read back and checked: what the ticket predicts, and masks as bits."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from cs_jax.core.errors import ConfigError
from cs_jax.experiment.storage.paths import SUMMARY_FILE
from cs_jax.report.schema import content_of
from cs_jax.tickets import checks, file_format

Bits = dict[str, np.ndarray]
"""(bytes,) of each masked array by its name: a bit for each weight in C order, 1 where it is kept, then bits of 0."""


class Masks(NamedTuple):
    """Masks that a run has found."""

    rounds: dict[int, Bits]  # at the end of each round
    ticket: Bits | None  # None where there is no ticket yet
    sizes: dict[str, int] | None  # numbers of weights of each layer; None where nothing tells them


def read_predictions(path: Path, classes: Sequence[str] | None) -> dict[str, np.ndarray] | None:
    """What the ticket makes of the test set; None where there is no such file.

    Args:
        path: of the file.
        classes: their names, which codes have to lie inside; None where they are not known.

    Raises:
        ConfigError: the file is damaged.
    """
    arrays = _load(path)
    if arrays is None:
        return None
    kinds = {"labels": "i", "predicted": "i", "confidence": "f", "mistakes": "i", "images": "u"}
    for name, kind in kinds.items():
        if name not in arrays or arrays[name].dtype.kind != kind or arrays[name].ndim != (4 if kind == "u" else 1):
            raise ConfigError(f"{path}, {name}: got none or another kind of array, wanted what a run writes")
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
        raise ConfigError(f"{path}: got arrays that do not fit each other or the classes of {SUMMARY_FILE}")
    return arrays


def read_masks(path: Path, ticket: Path, sizes: Mapping[str, int]) -> Masks | None:
    """Masks at the ends of the rounds and those of the ticket; None where there are neither.

    Args:
        path: of the file that holds those of the rounds, which need not be there.
        ticket: of the ticket's file, which need not be there.
        sizes: numbers of weights of each layer, as far as they are known.

    Raises:
        ConfigError: a file is damaged, or masks do not fit the layers or each other.
    """
    arrays = _load(path)
    if arrays is None and not ticket.exists():
        return None
    rounds: dict[int, Bits] = {}
    for name, bits in (arrays or {}).items():
        found = re.fullmatch(r"(0|[1-9]\d{0,8})/(.+)", name, re.DOTALL)
        if found is None or bits.dtype != np.uint8 or bits.ndim != 1:
            raise ConfigError(f"{path}, {name!r}: got another name or kind of array, wanted what a run writes")
        rounds.setdefault(int(found[1]), {})[found[2]] = bits
    rounds = dict(sorted(rounds.items()))
    ticket_bits, ticket_sizes = _read_ticket(ticket)
    known = ticket_sizes or dict(sizes) or None
    if known is not None and sizes and dict(sizes) != known:
        raise ConfigError(f"{ticket}: got layers of other sizes than the scores have, wanted those of one run")
    for number, bits in rounds.items():
        _check_bits(path, number, bits, known, next(iter(rounds.values())))
    return Masks(rounds, ticket_bits, known)


def _read_ticket(path: Path) -> tuple[Bits | None, dict[str, int]]:
    """Masks of a ticket, of whatever model, and the numbers of weights that they are for."""
    if not path.exists():
        return None, {}
    try:
        arrays, about = file_format.read(path)
        checks.check_layout(arrays, about)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    sizes = {name: int(np.prod(layer["shape"], dtype=int)) for name, layer in about["layers"].items()}
    return {name: arrays[f"masks/{name}"] for name in sizes}, sizes


def _check_bits(path: Path, number: int, bits: Bits, sizes: Mapping[str, int] | None, like: Bits) -> None:
    """Refuses masks of a round for other layers than `sizes`, or where these are not known, than `like`."""
    layers = like if sizes is None else sizes
    for name in {**layers, **bits}:
        if name not in bits or name not in layers:
            got, wanted = ("a mask" if name in tree else "nothing" for tree in (bits, layers))
            raise ConfigError(f"{path}, round {number}, {name!r}: got {got}, wanted {wanted}")
        length = len(like[name]) if sizes is None else -(-sizes[name] // 8)
        if len(bits[name]) != length:
            raise ConfigError(f"{path}, round {number}, {name!r}: got {len(bits[name])} bytes, wanted {length}")
        if sizes is not None and np.unpackbits(bits[name])[sizes[name] :].any():
            raise ConfigError(f"{path}, round {number}, {name!r}: got bits beyond its {sizes[name]} weights")


def _load(path: Path) -> dict[str, np.ndarray] | None:
    content = content_of(path)
    if content is None:
        return None
    try:
        return safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: got a damaged file, wanted safetensors") from error


def _inside(indices: np.ndarray, end: int | None) -> bool:
    return not indices.size or bool(indices.min() >= 0 and (end is None or indices.max() < end))
