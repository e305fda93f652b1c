"""Sparse export: dense layers as compressed sparse rows, other arrays unchanged, in one .npz file without pickle."""

import io
import json
import math
import reprlib
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_array

from cs_jax.core import trees
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError
from cs_jax.models import wiring
from cs_jax.models.wiring import Attention
from cs_jax.tickets.export.plain_network import PlainNetwork
from cs_jax.tickets.metadata import is_shape

SUFFIX = ".npz"

PARTS = ("data", "indices", "indptr", "shape")
"""Suffixes of the arrays that store a sparse matrix; "shape" is the shape of the kernel."""

ABOUT = "cs_jax"
"""Name of the array that holds a JSON text with image shape and normalisation constants."""


def export_sparse(network: PlainNetwork) -> bytes:
    """Content of an .npz file with the arrays of the network by name, "params/conv0/kernel".

    The kernel of a dense layer is stored as a matrix (in, out) in compressed sparse rows, in arrays with the suffixes
    `PARTS`. Kernels of attention are stored in the same form, with the axes of heads and head size flattened.
    """
    outs = _attention_outs(network)
    arrays: dict[str, np.ndarray] = {ABOUT: np.array(json.dumps(network.about, sort_keys=True))}
    for path, leaf in trees.leaves_by_path(network.variables).items():
        name, array = trees.name(path), np.asarray(on_host(leaf))
        if path[-1] != "kernel" or array.ndim == 4:
            arrays[name] = array
            continue
        rows = array.shape[: 2 if name in outs else 1]
        matrix = csr_array(array.reshape(int(np.prod(rows)), -1))
        parts = (matrix.data, matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32), np.array(array.shape))
        arrays |= {f"{name}.{part}": value for part, value in zip(PARTS, parts, strict=True)}
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def read_sparse(file: str | Path | io.BytesIO) -> tuple[dict[str, csr_array | np.ndarray], dict[str, Any]]:
    """Matrices and arrays of a file in the sparse format, and its image shape and normalisation constants.

    Args:
        file: path or content of the file. Code from a file is never executed.

    Returns:
        Kernels of dense layers as SciPy's `csr_array` (in, out) and all other arrays as NumPy arrays, by name; and a
        dictionary of "image_shape" and "normalization".

    Raises:
        ConfigError: the file cannot be read, is damaged, or is not in the sparse format.
    """
    arrays, about = _read(file)
    stems = {stem for stem, _, part in (name.rpartition(".") for name in arrays) if stem and part in PARTS}
    parts = {f"{stem}.{part}" for stem in stems for part in PARTS}
    try:
        matrices = {stem: _matrix(*(arrays[f"{stem}.{part}"] for part in PARTS)) for stem in sorted(stems)}
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise _refused(file, error) from error
    return {name: array for name, array in arrays.items() if name not in parts} | matrices, about


def _matrix(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: np.ndarray) -> csr_array:
    """Matrix from its parts, after checks, because SciPy reads outside the arrays if an index is wrong."""
    sizes = shape.tolist()
    if indptr.ndim != 1 or shape.ndim != 1 or not is_shape(sizes):
        raise ValueError(f"matrix with indptr of shape {indptr.shape} and kernel shape {reprlib.repr(sizes)}")
    rows, size = len(indptr) - 1, math.prod(sizes)
    if rows < 1 or size % rows:
        raise ValueError(f"matrix with {rows} rows and {size} entries")
    matrix = csr_array((data, indices, indptr), shape=(rows, size // rows))
    matrix.check_format(full_check=True)
    return matrix


def logits(content: bytes, network: PlainNetwork, images: np.ndarray) -> np.ndarray:
    """Logits of a network with the arrays of a file, for images with pixels of 0 to 255."""
    arrays, _ = _read(io.BytesIO(content))
    leaves = {}
    for name, array in read_sparse(io.BytesIO(content))[0].items():
        whole = array.toarray().reshape(arrays[f"{name}.shape"]) if isinstance(array, csr_array) else array
        leaves[tuple(name.split("/"))] = jnp.asarray(whole)
    read = PlainNetwork(network.model, trees.nest(leaves), network.image_shape, network.normalization)
    return np.asarray(jax.jit(read.logits)(images))


def _read(file: str | Path | io.BytesIO) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and the dictionary of image shape and normalisation constants."""
    try:
        with zipfile.ZipFile(file) as archive:  # `np.load` accepts other files too, and members that are not arrays
            members = {member.filename: archive.read(member) for member in archive.infolist()}
        arrays = {
            name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            for name, content in members.items()
        }
        about = json.loads(str(arrays.pop(ABOUT)))
        if not isinstance(about, dict) or not {"image_shape", "normalization"} <= about.keys():
            raise ValueError(f"{ABOUT!r} must be a dictionary with image_shape and normalization")
        return arrays, about
    except _UNREADABLE as error:
        raise _refused(file, error) from error


_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, MemoryError, RecursionError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, TypeError),
    *(RuntimeError, NotImplementedError),  # members that are encrypted or have another compression
)
"""Exceptions of zipfile, NumPy and json for files that are truncated, damaged or in another format."""


def _refused(file: str | Path | io.BytesIO, error: Exception) -> ConfigError:
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
    where = f"{file}: " if isinstance(file, str | Path) else ""
    return ConfigError(f"{where}not a file of the sparse export: {reason.splitlines()[0]}")


def _attention_outs(network: PlainNetwork) -> set[str]:
    """Names of kernels whose first two axes are inputs."""
    nodes = wiring.wiring_of(network.model)[0].nodes if isinstance(network.model, wiring.Wired) else []
    return {f"params/{node.name}/out/kernel" for node in nodes if isinstance(node, Attention)}
