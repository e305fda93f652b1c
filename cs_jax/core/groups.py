"""What one score stands for: an entry, a channel, a block, an attention head, or an entry of an N:M pattern.

Every kind but N:M is a block: the weight array is cut into equal boxes, one score each, so a score array has the
number of axes of its weights and divides their shape, and is repeated along each axis to make a mask.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cs_jax.core import trees
from cs_jax.core.trees import Path

Layout = Literal["auto", "in_out", "out_in"]
LAYOUTS = ("auto", "in_out", "out_in")


@dataclass(frozen=True)
class Axes:
    """A score for every index along these axes; entries that differ only along the others share it.

    Attributes:
        axes: axes of the weight array, negative ones counted from the last.
    """

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A score for every box of entries.

    Attributes:
        shape: size along every axis of the weight array, dividing it; or two sizes, (input, output), for an array of
            more axes, whose others are then cut into single entries.
    """

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """A score for every attention head of a query, key, value or output projection.

    Attributes:
        num_heads: heads; None where the weights have an axis for them, as Flax's attention has.
    """

    num_heads: int | None = None


@dataclass(frozen=True)
class NM:
    """A score for every entry, of which exactly `n` of every `m` neighbours along the input axis are kept.

    Attributes:
        n: entries kept, from 1 to `m`.
        m: entries in a group; divides the input axis.
    """

    n: int
    m: int


Group = Literal["entry", "output_channel", "input_channel"] | Axes | Block | Head | NM


@dataclass(frozen=True)
class Grouping:
    """How one weight array is scored.

    Attributes:
        path: of the weights, and of their scores and mask.
        shape: of the weights.
        dtype: of the weights.
        block: size of a group along each axis; divides `shape`.
        pattern: the N:M pattern to which entries are kept; None without one.
        pattern_axis: along which the pattern goes.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    block: tuple[int, ...]
    pattern: NM | None = None
    pattern_axis: int = 0

    @property
    def name(self) -> str:
        return trees.name(self.path)

    @property
    def score_shape(self) -> tuple[int, ...]:
        return tuple(size // step for size, step in zip(self.shape, self.block, strict=True))

    @property
    def size(self) -> int:
        """Weights in the array."""
        return math.prod(self.shape)

    @property
    def group_size(self) -> int:
        """Weights that share a score."""
        return math.prod(self.block)


def grouping(
    path: Path, weights: Any, group: Group, layout: Layout, *, stacked: int | None = None, in_attention: bool = False
) -> Grouping:
    """How the weights under `path` are scored by `group`.

    Args:
        path: of the weights; its names tell the layout and the role in an attention layer.
        weights: array, or what stands for one.
        group: what one score stands for.
        layout: where input and output axes lie. "in_out" is (..., input, output), as in Flax and Haiku; "out_in" is
            (output, input, ...), as in Equinox and PyTorch; "auto" goes by the library's names: `kernel` and `w` are
            the first, `weight` the second, and Flax's attention has (input, heads, size) and (heads, size, output).
        stacked: leading axes along which layers are stacked, as by `nn.scan`: each has groups of its own.
        in_attention: whether these are the weights of a projection in Flax's attention.

    Raises:
        ValueError: the group does not fit the shape, or the axes that it needs cannot be told; names the weights.
    """
    shape, dtype = tuple(weights.shape), np.dtype(weights.dtype)
    alone = (1,) * len(shape)
    if group == "entry":
        return Grouping(path, shape, dtype, alone)
    if isinstance(group, Axes):
        return Grouping(path, shape, dtype, _blocks_along(path, shape, group.axes))
    if isinstance(group, Block) and len(group.shape) == len(shape):
        return Grouping(path, shape, dtype, _checked_block(path, shape, group, group.shape))
    inputs, outputs, stack = _layout_axes(path, shape, layout, stacked, in_attention)
    if isinstance(group, NM):
        _check_pattern(path, shape, group, inputs[-1])
        return Grouping(path, shape, dtype, alone, group, inputs[-1])
    if isinstance(group, Block):
        return Grouping(path, shape, dtype, _block_in_layout(path, shape, group, inputs, outputs))
    if isinstance(group, Head):
        return Grouping(path, shape, dtype, _head_block(path, shape, group, inputs, outputs, stack))
    channels = outputs if group == "output_channel" else inputs
    return Grouping(path, shape, dtype, _blocks_along(path, shape, stack + channels))


def check_group(group: Group) -> None:
    """Raises a TypeError or ValueError for what is no group."""
    if isinstance(group, NM):
        _check_whole("NM", "n and m", (group.n, group.m))
        if not 1 <= group.n <= group.m:
            raise ValueError(f"NM: got n={group.n} of m={group.m}, wanted 1 <= n <= m")
    elif isinstance(group, Block):
        _check_whole("Block", "shape", group.shape)
        if not group.shape or min(group.shape) < 1:
            raise ValueError(f"Block: got shape {group.shape}, wanted sizes of at least 1")
    elif isinstance(group, Head):
        _check_whole("Head", "num_heads", (group.num_heads or 1,))
        if group.num_heads is not None and group.num_heads < 1:
            raise ValueError(f"Head: got num_heads={group.num_heads}, wanted at least 1")
    elif isinstance(group, Axes):
        _check_whole("Axes", "axes", group.axes)
    elif group not in ("entry", "output_channel", "input_channel"):
        raise TypeError(
            f"group: got {group!r}, wanted 'entry', 'output_channel', 'input_channel', Axes, Block, Head or NM"
        )


def _check_whole(kind: str, name: str, values: Any) -> None:
    if not isinstance(values, tuple) or not all(type(value) is int for value in values):
        wanted = "a tuple of whole numbers" if name in ("shape", "axes") else "whole numbers"
        raise TypeError(f"{kind}: got {name} {values!r}, wanted {wanted}")


def words(text: str) -> list[str]:
    """Lower-case words of a name: "MultiHeadAttention_0" is multi, head, attention, 0."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]


def _parent(path: Path) -> str:
    """Name of the layer that holds the weights; Haiku's have slashes in them."""
    return trees.name(path[:-1]).split("/")[-1]


def _layout_axes(
    path: Path, shape: tuple[int, ...], layout: Layout, stacked: int | None, in_attention: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Input axes, output axes, and axes along which whole layers are stacked."""
    first = stacked or 0
    ndim = len(shape) - first
    if ndim < 2:
        raise ValueError(f"weights {trees.name(path)!r}: shape {shape} has no input and output axes to group along")
    stack = tuple(range(first))
    if layout == "auto" and in_attention and ndim == 3:
        out = _parent(path) == "out"
        inputs, outputs = ((0, 1), (2,)) if out else ((0,), (1, 2))
        return tuple(first + axis for axis in inputs), tuple(first + axis for axis in outputs), stack
    if stacked is None and ndim == 3:
        raise ValueError(
            f"weights {trees.name(path)!r}: shape {shape} may be a convolution along one axis or layers that are "
            "stacked along the first; wanted stacked=0 or stacked=1 in the rule"
        )
    if layout == "auto":
        layout = _layout_of_name(path)
    if layout == "in_out":
        return (len(shape) - 2,), (len(shape) - 1,), stack
    return (first + 1,), (first,), stack


def _layout_of_name(path: Path) -> Layout:
    leaf = path[-1] if path else ""
    if "transpose" in words(_parent(path)):
        raise ValueError(
            f"weights {trees.name(path)!r}: libraries differ in where a transposed convolution has its input; "
            "wanted layout='in_out' or 'out_in' in the rule"
        )
    if "weight" in words(leaf):
        return "out_in"
    if leaf == "kernel" or leaf == "w" or leaf.startswith("w_"):
        return "in_out"
    raise ValueError(
        f"weights {trees.name(path)!r}: their name does not tell which axis is the input; "
        "wanted layout='in_out' or 'out_in' in the rule"
    )


def _blocks_along(path: Path, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks that are single along `axes` and whole along the others."""
    wrong = [axis for axis in axes if not -len(shape) <= axis < len(shape)]
    if wrong:
        raise ValueError(f"weights {trees.name(path)!r}: shape {shape} has no axis {wrong[0]}")
    single = {axis % len(shape) for axis in axes}
    return tuple(1 if axis in single else size for axis, size in enumerate(shape))


def _checked_block(path: Path, shape: tuple[int, ...], group: Block, block: tuple[int, ...]) -> tuple[int, ...]:
    if any(size % step for size, step in zip(shape, block, strict=True)):
        raise ValueError(
            f"weights {trees.name(path)!r}: blocks of {group.shape} do not divide shape {shape}; wanted sizes that do"
        )
    return block


def _block_in_layout(
    path: Path, shape: tuple[int, ...], group: Block, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> tuple[int, ...]:
    if len(group.shape) != 2 or len(inputs) + len(outputs) != 2:
        raise ValueError(
            f"weights {trees.name(path)!r}: got blocks of {group.shape} for shape {shape}, "
            f"wanted {len(shape)} sizes, or two where input and output have one axis each"
        )
    sizes = {inputs[0]: group.shape[0], outputs[0]: group.shape[1]}
    return _checked_block(path, shape, group, tuple(sizes.get(axis, 1) for axis in range(len(shape))))


def _head_block(
    path: Path,
    shape: tuple[int, ...],
    group: Head,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    stacked: tuple[int, ...],
) -> tuple[int, ...]:
    role = set(words(_parent(path)))
    if role & {"query", "key", "value", "q", "k", "v"}:
        axes = outputs
    elif role & {"out", "output", "o", "linear"}:
        axes = inputs
    else:
        raise ValueError(
            f"weights {trees.name(path)!r}: {_parent(path)!r} does not tell whether heads are its input or output; "
            "wanted a query, key, value or output projection, or Axes or Block as the group"
        )
    axis, num_heads = axes[0], group.num_heads
    if len(axes) == 2:  # an axis of its own
        if num_heads not in (None, shape[axis]):
            raise ValueError(f"weights {trees.name(path)!r}: shape {shape} has {shape[axis]} heads, not {num_heads}")
        return _blocks_along(path, shape, (*stacked, axis))
    if num_heads is None:
        raise ValueError(f"weights {trees.name(path)!r}: shape {shape} has no axis of heads; wanted Head(num_heads)")
    if shape[axis] % num_heads:
        raise ValueError(f"weights {trees.name(path)!r}: {num_heads} heads do not divide axis {axis} of shape {shape}")
    return tuple(shape[axis] // num_heads if index == axis else size for index, size in enumerate(shape))


def _check_pattern(path: Path, shape: tuple[int, ...], pattern: NM, axis: int) -> None:
    if shape[axis] % pattern.m:
        raise ValueError(
            f"weights {trees.name(path)!r}: {pattern.n}:{pattern.m} wants an input axis that {pattern.m} divides, "
            f"got {shape[axis]}, axis {axis} of shape {shape}"
        )
