"""Fully connected layers as compressed sparse rows, and all other arrays beside them, in one .npz without pickle."""

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
from cs_jax.tickets.checks import is_shape
from cs_jax.tickets.export.plain_network import Served

SUFFIX = ".npz"

PARTS = ("data", "indices", "indptr", "shape")
"""Arrays that a sparse matrix is stored in, by the end of their names; the shape is that of the kernel."""

ABOUT = "cs_jax"
"""Name of the JSON text that says what the arrays do not."""


def export_sparse(served: Served) -> bytes:
    """An .npz with the arrays of the network by collection and path, "params/conv0/kernel".

    The kernel of a fully connected layer is a matrix (in, out) of compressed sparse rows, in arrays with the ends of
    `PARTS`. Kernels of attention are such matrices, with the axes of heads and their size taken together.
    """
    outs = _attention_outs(served)
    arrays: dict[str, np.ndarray] = {ABOUT: np.array(json.dumps(served.about, sort_keys=True))}
    for path, leaf in trees.leaves_by_path(served.variables).items():
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
    """Matrices and arrays of a network that was exported to `sparse`, by name, and what is known of it.

    Returns:
        Kernels of fully connected layers as SciPy's `csr_array` (in, out), all else as NumPy's arrays; and a dictionary
        of `image_shape` and `normalization`.

    Raises:
        ConfigError: it is no such file.
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
    """A matrix of its parts, which are checked: SciPy reads beyond an array where an index is wrong."""
    sizes = shape.tolist()
    if indptr.ndim != 1 or shape.ndim != 1 or not is_shape(sizes):
        raise ValueError(f"a matrix has rows that end at shape {indptr.shape} and the shape {reprlib.repr(sizes)}")
    rows, size = len(indptr) - 1, math.prod(sizes)
    if rows < 1 or size % rows:
        raise ValueError(f"a matrix has {rows} rows and {size} entries")
    matrix = csr_array((data, indices, indptr), shape=(rows, size // rows))
    matrix.check_format(full_check=True)
    return matrix


def logits(content: bytes, served: Served, images: np.ndarray) -> np.ndarray:
    """What a network with the arrays of a file computes of images of 0 to 255."""
    arrays, _ = _read(io.BytesIO(content))
    leaves = {}
    for name, array in read_sparse(io.BytesIO(content))[0].items():
        whole = array.toarray().reshape(arrays[f"{name}.shape"]) if isinstance(array, csr_array) else array
        leaves[tuple(name.split("/"))] = jnp.asarray(whole)
    read = Served(served.model, trees.nest(leaves), served.image_shape, served.normalization)
    return np.asarray(jax.jit(read.logits)(images))


def _read(file: str | Path | io.BytesIO) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and what is known of the network."""
    try:
        with zipfile.ZipFile(file) as archive:  # NumPy takes other files too, and members that are no arrays
            members = {member.filename: archive.read(member) for member in archive.infolist()}
        arrays = {
            name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            for name, content in members.items()
        }
        about = json.loads(str(arrays.pop(ABOUT)))
        if not isinstance(about, dict) or not {"image_shape", "normalization"} <= about.keys():
            raise ValueError(f"{ABOUT!r} is no dictionary of image_shape and normalization")
        return arrays, about
    except _UNREADABLE as error:
        raise _refused(file, error) from error


_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, MemoryError, RecursionError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, TypeError),
    *(RuntimeError, NotImplementedError),  # of members that are encrypted, or compressed otherwise
)
"""What is raised of files that are cut off, damaged or of another kind."""


def _refused(file: str | Path | io.BytesIO, error: Exception) -> ConfigError:
    reason = f"no {error}" if isinstance(error, KeyError) else (str(error).splitlines() or [type(error).__name__])[0]
    where = f"{file}: " if isinstance(file, str | Path) else ""
    return ConfigError(f"{where}got no network that was exported to sparse: {reason}")


def _attention_outs(served: Served) -> set[str]:
    """Kernels whose first two axes are inputs."""
    nodes = wiring.wiring_of(served.model)[0].nodes if isinstance(served.model, wiring.Wired) else []
    return {f"params/{node.name}/out/kernel" for node in nodes if isinstance(node, Attention)}
