"""Groups of weights with a common score (entries, channels, blocks, attention heads), and N:M patterns.

Every group except N:M is a block: the weight array is cut into equal boxes with one score each. A score array has the
same number of axes as its weight array. Along each axis, the number of scores divides the number of weights, and the
mask repeats each score.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from cs_jax.core import trees
from cs_jax.core.trees import Path

Layout = Literal["auto", "in_out", "out_in"]
LAYOUTS = ("auto", "in_out", "out_in")


@dataclass(frozen=True)
class Axes:
    """One score for every combination of indices along these axes; entries that differ only along other axes share one.

    Attributes:
        axes: axes of the weight array, from 0; negative axes count from the last.
    """

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One score for every box of entries.

    Attributes:
        shape: size of the box along every axis of the weight array, each at least 1 and a divisor of the axis. For an
            array with more than two axes, also (input, output): the sizes along these two axes; along the other axes,
            the box has size 1.
    """

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """One score for every attention head of a query, key, value or output projection.

    Attributes:
        num_heads: number of heads, at least 1; None if the weights have an axis of heads, as in Flax's attention.
    """

    num_heads: int | None = None


@dataclass(frozen=True)
class NM:
    """One score for every entry; exactly `n` of every `m` consecutive entries along the input axis are kept.

    Attributes:
        n: kept entries in a group, from 1 to `m`.
        m: entries in a group; divides the size of the input axis.
    """

    n: int
    m: int


Group = Literal["entry", "output_channel", "input_channel"] | Axes | Block | Head | NM


@dataclass(frozen=True)
class Grouping:
    """Groups of one masked weight array.

    Attributes:
        path: path of the weights, the scores and the mask.
        shape: shape of the weights.
        dtype: dtype of the weights.
        block: size of a group along each axis; divides `shape`.
        pattern: N:M pattern of the mask, or None.
        pattern_axis: axis along which the m consecutive entries of a pattern lie.
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
        """Number of weights in the array."""
        return math.prod(self.shape)

    @property
    def group_size(self) -> int:
        """Number of weights that share a score."""
        return math.prod(self.block)


@dataclass(frozen=True)
class AxisHints:
    """Hints for finding the input and output axes of a weight array.

    Attributes:
        layout: "in_out" means (..., input, output), as in Flax and Haiku; "out_in" means (output, input, ...), as in
            Equinox and PyTorch. "auto" decides by the name of the array: `kernel`, `w` and `w_*` are "in_out", names
            with the word "weight" are "out_in". Other names and transposed convolutions raise an error. In Flax's
            attention, query, key and value are (input, heads, size), and out is (heads, size, output).
        stacked: number of leading axes along which layers are stacked, as by `nn.scan`; no group spans several layers.
            None means 0, but raises an error for an array of three axes outside Flax's attention, because the array
            could be a 1D convolution kernel or a stack of dense kernels.
        in_attention: whether the weights are a projection in Flax's attention.
    """

    layout: Layout = "auto"
    stacked: int | None = None
    in_attention: bool = False


_NO_HINTS = AxisHints()


def grouping(path: Path, weights: Any, group: Group, hints: AxisHints = _NO_HINTS) -> Grouping:
    """Groups of the weights under `path`.

    Args:
        path: path of the weights; its names indicate the layout and the role in an attention layer.
        weights: array, tracer or `jax.ShapeDtypeStruct`.
        group: kind of group that shares a score.
        hints: position of the input and output axes.

    Raises:
        ValueError: the group does not fit the shape, or its axes are ambiguous. The message names the weights.
    """
    shape, dtype = tuple(weights.shape), np.dtype(weights.dtype)
    single_entries = (1,) * len(shape)
    if group == "entry":
        return Grouping(path, shape, dtype, single_entries)
    if isinstance(group, Axes):
        return Grouping(path, shape, dtype, _blocks_along(path, shape, group.axes))
    if isinstance(group, Block) and len(group.shape) == len(shape):
        return Grouping(path, shape, dtype, _checked_block(path, shape, group, group.shape))
    roles = _axis_roles(path, shape, hints)
    if isinstance(group, NM):
        _check_pattern(path, shape, group, roles.inputs[-1])
        return Grouping(path, shape, dtype, single_entries, group, roles.inputs[-1])
    if isinstance(group, Block):
        return Grouping(path, shape, dtype, _input_output_block(path, shape, group, roles))
    if isinstance(group, Head):
        return Grouping(path, shape, dtype, _head_block(path, shape, group, roles))
    channels = roles.outputs if group == "output_channel" else roles.inputs
    return Grouping(path, shape, dtype, _blocks_along(path, shape, roles.stacked + channels))


def check_group(group: Group) -> None:
    """Raises a TypeError or ValueError if `group` is not a valid group."""
    if isinstance(group, NM):
        _check_whole_numbers("NM", "n and m", (group.n, group.m))
        if not 1 <= group.n <= group.m:
            raise ValueError(f"NM n={group.n}, m={group.m}: must have 1 <= n <= m")
    elif isinstance(group, Block):
        _check_whole_numbers("Block", "shape", group.shape)
        if not group.shape or min(group.shape) < 1:
            raise ValueError(f"Block shape {group.shape}: must have sizes of at least 1")
    elif isinstance(group, Head):
        if type(group.num_heads or 1) is not int:
            raise TypeError(f"Head num_heads {group.num_heads!r}: must be a whole number, or None")
        if group.num_heads is not None and group.num_heads < 1:
            raise ValueError(f"Head num_heads {group.num_heads}: must be at least 1")
    elif isinstance(group, Axes):
        _check_whole_numbers("Axes", "axes", group.axes)
    elif group not in ("entry", "output_channel", "input_channel"):
        raise TypeError(f"group {group!r}: must be 'entry', 'output_channel', 'input_channel', Axes, Block, Head or NM")


def _check_whole_numbers(kind: str, name: str, values: Any) -> None:
    if not isinstance(values, tuple) or not all(type(value) is int for value in values):
        rule = "a tuple of whole numbers" if name in ("shape", "axes") else "whole numbers"
        raise TypeError(f"{kind} {name} {values!r}: must be {rule}")


def words(text: str) -> list[str]:
    """Words in a name, in lower case: "MultiHeadAttention_0" gives multi, head, attention, 0."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]


def _layer_name(path: Path) -> str:
    """Name of the layer that contains the weights; a Haiku key contains several names, separated by slashes."""
    return trees.name(path[:-1]).split("/")[-1]


class _AxisRoles(NamedTuple):
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stacked: tuple[int, ...]  # axes along which whole layers are stacked


def _axis_roles(path: Path, shape: tuple[int, ...], hints: AxisHints) -> _AxisRoles:
    first, layout = hints.stacked or 0, hints.layout
    ndim = len(shape) - first
    if ndim < 2:
        raise ValueError(f"weights {trees.name(path)!r} of shape {shape}: must have an input and an output axis")
    stacked = tuple(range(first))
    if layout == "auto" and hints.in_attention and ndim == 3:
        if _layer_name(path) == "out":
            return _AxisRoles((first, first + 1), (first + 2,), stacked)
        return _AxisRoles((first,), (first + 1, first + 2), stacked)
    if hints.stacked is None and ndim == 3:
        raise ValueError(
            f"weights {trees.name(path)!r} of shape {shape}: ambiguous: a 1D convolution kernel (set stacked=0 in the "
            "rule), or dense kernels stacked along the first axis (set stacked=1 in the rule)"
        )
    if layout == "auto":
        layout = _layout_by_name(path)
    if layout == "in_out":
        return _AxisRoles((len(shape) - 2,), (len(shape) - 1,), stacked)
    return _AxisRoles((first + 1,), (first,), stacked)


def _layout_by_name(path: Path) -> Layout:
    leaf = path[-1] if path else ""
    if "transpose" in words(_layer_name(path)):
        raise ValueError(
            f"weights {trees.name(path)!r}: ambiguous: libraries differ in the input axis of a transposed convolution; "
            "set layout='in_out' or 'out_in' in the rule"
        )
    if "weight" in words(leaf):
        return "out_in"
    if leaf == "kernel" or leaf == "w" or leaf.startswith("w_"):
        return "in_out"
    raise ValueError(
        f"weights {trees.name(path)!r}: ambiguous: the name does not indicate the input axis; "
        "set layout='in_out' or 'out_in' in the rule"
    )


def _blocks_along(path: Path, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Block of size 1 along `axes`, and of full size along the other axes."""
    wrong = [axis for axis in axes if not -len(shape) <= axis < len(shape)]
    if wrong:
        raise ValueError(
            f"weights {trees.name(path)!r} of shape {shape}: Axes names axis {wrong[0]}; use axes from "
            f"{-len(shape)} to {len(shape) - 1}"
        )
    single = {axis % len(shape) for axis in axes}
    return tuple(1 if axis in single else size for axis, size in enumerate(shape))


def _checked_block(path: Path, shape: tuple[int, ...], group: Block, block: tuple[int, ...]) -> tuple[int, ...]:
    if any(size % step for size, step in zip(shape, block, strict=True)):
        raise ValueError(
            f"weights {trees.name(path)!r} of shape {shape}: blocks of {group.shape} must divide the shape"
        )
    return block


def _input_output_block(path: Path, shape: tuple[int, ...], group: Block, roles: _AxisRoles) -> tuple[int, ...]:
    if len(group.shape) != 2 or len(roles.inputs) + len(roles.outputs) != 2:
        raise ValueError(
            f"weights {trees.name(path)!r} of shape {shape}: blocks of {group.shape} must have {len(shape)} sizes, or "
            "two if input and output have one axis each"
        )
    sizes = {roles.inputs[0]: group.shape[0], roles.outputs[0]: group.shape[1]}
    return _checked_block(path, shape, group, tuple(sizes.get(axis, 1) for axis in range(len(shape))))


def _head_block(path: Path, shape: tuple[int, ...], group: Head, roles: _AxisRoles) -> tuple[int, ...]:
    layer = set(words(_layer_name(path)))
    if layer & {"query", "key", "value", "q", "k", "v"}:
        axes = roles.outputs
    elif layer & {"out", "output", "o", "linear"}:
        axes = roles.inputs
    else:
        raise ValueError(
            f"weights {trees.name(path)!r}: Head requires a query, key, value or output projection, and the "
            f"layer name {_layer_name(path)!r} does not indicate one; use Axes or Block as the group"
        )
    axis, num_heads = axes[0], group.num_heads
    if len(axes) == 2:  # the weights have an axis of heads
        if num_heads not in (None, shape[axis]):
            raise ValueError(
                f"weights {trees.name(path)!r} of shape {shape}: Head num_heads {num_heads} must be {shape[axis]}, the "
                "size of the axis of heads; or leave num_heads out"
            )
        return _blocks_along(path, shape, (*roles.stacked, axis))
    if num_heads is None:
        raise ValueError(
            f"weights {trees.name(path)!r} of shape {shape}: must have an axis of heads; or give the number of "
            "heads, as in Head(8)"
        )
    if shape[axis] % num_heads:
        raise ValueError(
            f"weights {trees.name(path)!r} of shape {shape}: Head num_heads {num_heads} must divide {shape[axis]}, "
            f"the size of axis {axis}"
        )
    return tuple(shape[axis] // num_heads if index == axis else size for index, size in enumerate(shape))


def _check_pattern(path: Path, shape: tuple[int, ...], pattern: NM, axis: int) -> None:
    if shape[axis] % pattern.m:
        raise ValueError(
            f"weights {trees.name(path)!r} of shape {shape}: axis {axis} has size {shape[axis]}; for a "
            f"{pattern.n}:{pattern.m} pattern, the size of the input axis must be a multiple of {pattern.m}"
        )
