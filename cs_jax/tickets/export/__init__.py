"""Export of tickets to other programs: one module per format."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cs_jax.core import files
from cs_jax.core.errors import ConfigError, one_of
from cs_jax.tickets.export import onnx, sparse, stablehlo, state_dict
from cs_jax.tickets.export.plain_network import PlainNetwork, make_plain_network, masked_logits
from cs_jax.tickets.export.sparse import read_sparse
from cs_jax.tickets.export.state_dict import load_state_dict
from cs_jax.tickets.ticket import LoadedTicket, dense_sizes

AGREEMENT = 1e-4
"""Largest allowed difference of logits, relative to the largest logit; smaller differences are rounding."""


class Format(NamedTuple):
    """An export format."""

    suffix: str  # replaces ".safetensors" in the name of the ticket file
    export: Callable[[PlainNetwork], bytes]  # content of a file
    logits: Callable[[bytes, PlainNetwork, np.ndarray], np.ndarray]  # from content and pixels of 0 to 255 to logits


FORMATS = {
    "safetensors": Format(state_dict.SUFFIX, state_dict.export_state_dict, state_dict.logits),
    "onnx": Format(onnx.SUFFIX, onnx.export_onnx, onnx.logits),
    "stablehlo": Format(stablehlo.SUFFIX, stablehlo.export_stablehlo, stablehlo.logits),
    "sparse": Format(sparse.SUFFIX, sparse.export_sparse, sparse.logits),
}
"""Formats by name; the names are the values of `--to`."""


class Exported(NamedTuple):
    """Result of an export."""

    size: int  # bytes of the file
    dense_size: int  # bytes of the weights and BatchNorm statistics of the dense network in float32
    difference: float  # largest difference of logits, relative to the largest logit
    network: PlainNetwork


def export_ticket(
    ticket: LoadedTicket,
    to: str,
    path: str | Path,
    *,
    keep_shapes: bool = False,
    fold: bool = False,
) -> Exported:
    """Writes a ticket in another format, after a check that the written network has the logits of the masked network.

    All arrays are float32, for every training dtype.

    Args:
        ticket: a ticket with a model; see `load_ticket`.
        to: name of a format in `FORMATS`.
        path: file to write; replaced if it exists. Its folder must exist.
        keep_shapes: do not remove channels without effect.
        fold: fold BatchNorm into the convolutions before it.

    Returns:
        Sizes, the largest difference of logits, and the exported network.

    Raises:
        ConfigError: the format is unknown or its library is missing; `path` is a folder, or its folder does not exist;
            the ticket cannot be shrunk or folded; or the logits differ.
        OSError: the file cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: must be {one_of(to, FORMATS)}")
    files.check_out(Path(path))
    network = make_plain_network(ticket, keep_shapes=keep_shapes, fold_batch_norm=fold)
    images = np.random.default_rng(0).integers(0, 256, (4, *network.image_shape)).astype(np.float32)
    with jax.default_matmul_precision("highest"):  # by default, accelerators multiply float32 in lower precision
        content = FORMATS[to].export(network)
        wanted, got = masked_logits(ticket, images), FORMATS[to].logits(content, network, images)
    difference = float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    if not difference <= AGREEMENT:
        raise ConfigError(
            f"--to {to}: logits of the export differ by {difference:.1e} of the largest logit; must be at most "
            f"{AGREEMENT:g}"
        )
    files.write_whole(Path(path), content)
    return Exported(len(content), 4 * sum(dense_sizes(ticket).values()), difference, network)


__all__ = ["FORMATS", "Exported", "Format", "PlainNetwork", "export_ticket", "load_state_dict", "read_sparse"]
