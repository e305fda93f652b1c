"""A ticket for other programs: one module a format."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cs_jax.core import files
from cs_jax.core.errors import ConfigError, one_of
from cs_jax.tickets.export import onnx, sparse, stablehlo, state_dict
from cs_jax.tickets.export.plain_network import Served, masked_logits, serve
from cs_jax.tickets.export.sparse import read_sparse
from cs_jax.tickets.export.state_dict import load_state_dict
from cs_jax.tickets.ticket import LoadedTicket, dense_sizes

AGREEMENT = 1e-4
"""Difference of logits, relative to the largest, beyond which an export is not written: it is rounding below."""


class Format(NamedTuple):
    """How a network is written, and what a file computes."""

    suffix: str  # of a ticket's file, in place of ".safetensors"
    export: Callable[[Served], bytes]
    logits: Callable[[bytes, Served, np.ndarray], np.ndarray]  # of images of 0 to 255


FORMATS = {
    "safetensors": Format(state_dict.SUFFIX, state_dict.export_state_dict, state_dict.logits),
    "onnx": Format(onnx.SUFFIX, onnx.export_onnx, onnx.logits),
    "stablehlo": Format(stablehlo.SUFFIX, stablehlo.export_stablehlo, stablehlo.logits),
    "sparse": Format(sparse.SUFFIX, sparse.export_sparse, sparse.logits),
}
"""What `--to` can name."""


class Exported(NamedTuple):
    """What was written."""

    size: int  # of the file, in bytes
    dense_size: int  # of the weights and BatchNorm statistics of the dense network, in bytes of float32
    difference: float  # of the logits, relative to the largest
    served: Served


def export_ticket(
    ticket: LoadedTicket,
    to: str,
    path: str | Path,
    *,
    keep_shapes: bool = False,
    fold: bool = False,
) -> Exported:
    """Writes a ticket in another format, once what was read back computes the same as the masked network.

    Everything is float32, whatever the ticket was trained in.

    Args:
        ticket: with a model; see `load_ticket`.
        to: one of `FORMATS`.
        path: file to write, replaced where it exists; its folder must exist.
        keep_shapes: do not take out channels that no longer matter.
        fold: fold BatchNorm into the convolutions before it.

    Returns:
        Sizes, and the largest difference.

    Raises:
        ConfigError: the format is not known or wants a library that is missing; the path is a folder or in none; the
            ticket cannot be shrunk or folded; or what was read back computes something else.
        OSError: the file cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to: got {to!r}, wanted {one_of(to, FORMATS)}")
    files.check_out(Path(path))
    served = serve(ticket, keep_shapes=keep_shapes, fold_batch_norm=fold)
    images = np.random.default_rng(0).integers(0, 256, (4, *served.image_shape)).astype(np.float32)
    with jax.default_matmul_precision("highest"):  # accelerators multiply float32 with fewer bits otherwise
        content = FORMATS[to].export(served)
        wanted, got = masked_logits(ticket, images), FORMATS[to].logits(content, served, images)
    difference = float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    if not difference <= AGREEMENT:
        raise ConfigError(f"--to {to}: got logits that differ by {difference:.1e} of the largest, wanted {AGREEMENT:g}")
    files.write_whole(Path(path), content)
    return Exported(len(content), 4 * sum(dense_sizes(ticket).values()), difference, served)


__all__ = ["FORMATS", "Exported", "Format", "Served", "export_ticket", "load_state_dict", "read_sparse"]
