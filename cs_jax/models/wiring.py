"""Wiring of a network: which layer reads the output of which layer. With a declared wiring, channels can be removed.

A module declares its wiring in a method `wire(self, net, x)`, which follows its `__call__` line by line. `net` is a
`Wiring`, with one method for each kind of layer. `x` represents the images; the return value represents the output. A
second method, `resize(self, features)`, returns the same module with other numbers of features in the named layers.

    class Small(nn.Module):
        hidden: int = 100

        @nn.compact
        def __call__(self, x):
            x = nn.relu(MaskedConv(self.hidden, (3, 3), name="conv")(x))
            return nn.Dense(10, name="classifier")(x.mean(axis=(1, 2)))

        def wire(self, net, x):
            x = net.activation(net.conv(x, "conv", zero_padded=True), nn.relu)
            return net.dense(net.pool(x), "classifier")

        def resize(self, features):
            return self.clone(hidden=features["conv"])

A module without these methods raises an error. A wiring that omits a layer also raises an error.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NewType, Protocol, runtime_checkable

import jax
from flax import linen as nn

from cs_jax.core.errors import CsJaxWarning


class WiringWarning(CsJaxWarning):
    """A trained ticket cannot be shrunk, because its network's `wire` method is wrong."""


Signal = NewType("Signal", int)
"""Output of a node: the index of the node in `Wiring.nodes`."""


@dataclass(frozen=True)
class Input:
    """The images."""


@dataclass(frozen=True)
class Linear:
    """A convolution or dense layer.

    Attributes:
        source: input of the layer.
        name: path of the layer; the last two axes of its kernel are input and output features.
        zero_padded: a convolution that pads its input with zeros.
    """

    source: Signal
    name: str
    zero_padded: bool


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNorm with running averages; `epsilon` is added to the variance."""

    source: Signal
    name: str
    epsilon: float


@dataclass(frozen=True)
class Activation:
    """A function applied to every entry separately."""

    source: Signal
    function: Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Pool:
    """A pool of each channel separately, over image positions."""

    source: Signal


@dataclass(frozen=True)
class Add:
    """A sum of two signals."""

    left: Signal
    right: Signal


PROJECTIONS = ("query", "key", "value", "out")
"""Names of the layers in an attention module."""


@dataclass(frozen=True)
class Attention:
    """A self-attention module, with layers named as in `PROJECTIONS`."""

    source: Signal
    name: str


@dataclass(frozen=True)
class Fixed:
    """Layers or parameters that need all features; input and output have the same number of features."""

    source: Signal
    names: tuple[str, ...]


Node = Input | Linear | BatchNorm | Activation | Pool | Add | Attention | Fixed


def sources(node: Node) -> tuple[Signal, ...]:
    """The signals that a node reads."""
    match node:
        case Input():
            return ()
        case Add(left, right):
            return left, right
        case _:
            return (node.source,)


def names(node: Node) -> tuple[str, ...]:
    """Paths of the layers in a node."""
    match node:
        case Fixed(names=layers):
            return layers
        case Linear(name=name) | BatchNorm(name=name):
            return (name,)
        case Attention(name=name):
            return tuple(f"{name}/{layer}" for layer in PROJECTIONS)
        case _:
            return ()


class Wiring:
    """The layers of a network in the order of their application.

    Each method adds one layer: its first argument is the layer's input, its return value the layer's output. The name
    of a layer is its path in the variables, as in "stage1_block1/conv_a". Each layer is named exactly once.

    Attributes:
        nodes: the images and the layers added so far; the node at index `i` makes the signal `i`.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = [Input()]
        self._names: set[str] = set()

    def conv(self, x: Signal, name: str, *, zero_padded: bool) -> Signal:
        """A convolution with one group, whose kernel is `(*window, in, out)`, with or without a bias.

        Args:
            x: input of the layer.
            name: path of the layer.
            zero_padded: the convolution pads its input with zeros. A channel with a constant value is then not constant
                at the border.
        """
        return self._add(Linear(x, name, zero_padded))

    def dense(self, x: Signal, name: str) -> Signal:
        """A dense layer along the last axis, whose kernel is (in, out), with or without a bias.

        The input may be (batch, height, width, channels) reshaped to (batch, features).
        """
        return self._add(Linear(x, name, zero_padded=False))

    def batch_norm(self, x: Signal, name: str, *, epsilon: float = 1e-5) -> Signal:
        """A BatchNorm with scale and bias, and running averages in "batch_stats"."""
        return self._add(BatchNorm(x, name, epsilon))

    def activation(self, x: Signal, function: Callable[[jax.Array], jax.Array]) -> Signal:
        """A function applied to every entry separately, such as ReLU."""
        return self._add(Activation(x, function))

    def pool(self, x: Signal) -> Signal:
        """A maximum or mean of each channel over image positions, without padding by zeros.

        A channel with a constant value keeps this value.
        """
        return self._add(Pool(x))

    def add(self, x: Signal, y: Signal) -> Signal:
        """A sum, as in residual networks. The same channels are then kept or removed in both inputs."""
        return self._add(Add(x, y))

    def attention(self, x: Signal, name: str) -> Signal:
        """Self-attention by the module `name`; a residual connection around it is a separate `add`.

        The layers query, key and value have kernels (in, heads, size); out has (heads, size, out). All four have
        biases.
        """
        return self._add(Attention(x, name))

    def fixed(self, x: Signal, *names: str) -> Signal:
        """Any other operation that needs all features, such as a LayerNorm. Its input and output keep all channels.

        Args:
            x: input of the operation.
            names: paths of the layers or parameters in the operation, if any.
        """
        return self._add(Fixed(x, names))

    def _add(self, node: Node) -> Signal:
        for name in names(node):
            if name in self._names:
                raise ValueError(f"wiring of layer {name!r}: named twice; name each layer once in `wire`")
            self._names.add(name)
        self.nodes.append(node)
        return Signal(len(self.nodes) - 1)


@runtime_checkable
class Wired(Protocol):
    """Protocol of a Linen module that declares its wiring."""

    def wire(self, net: Wiring, x: Signal) -> Signal:
        """Adds every layer between the images `x` and the output to `net`; returns the output."""
        ...

    def resize(self, features: dict[str, int]) -> Any:
        """Returns the same module with other numbers of output features or heads.

        Args:
            features: output features by path of the layer; heads by path of the attention module.
        """
        ...


def wiring_of(model: nn.Module) -> tuple[Wiring, Signal]:
    """The wiring that a module declares, and the output of the network.

    Raises:
        TypeError: the module has no methods `wire` and `resize`.
    """
    if not isinstance(model, Wired):
        raise TypeError(f"model {type(model).__name__}: does not declare its wiring; add methods `wire` and `resize`")
    net = Wiring()
    return net, model.wire(net, Signal(0))


def check_names(net: Wiring, arrays: Iterable[str]) -> None:
    """Raises a ValueError unless a wiring names every layer of the network, and no other layers.

    Args:
        net: wiring that the module declares.
        arrays: names of all variables, with their collection, as in "params/conv0/kernel".
    """
    known, wired = list(arrays), [name for node in net.nodes for name in names(node)]
    for name in wired:
        if not any(key.startswith(f"params/{name}/") or key == f"params/{name}" for key in known):
            raise ValueError(f"wiring of layer {name!r}: no such layer in the params; correct `wire`")
    for key in known:
        path = key.partition("/")[2]
        if not any(path == name or path.startswith(f"{name}/") for name in wired):
            raise ValueError(f"wiring: misses {path!r}; name every layer in `wire`")


def norm_after(nodes: Sequence[Node], signal: Signal) -> BatchNorm | None:
    """The BatchNorm that reads a signal, if no other node reads the signal; otherwise None."""
    followers = [node for node in nodes if signal in sources(node)]
    return followers[0] if len(followers) == 1 and isinstance(followers[0], BatchNorm) else None


def spaces(net: Wiring) -> list[int]:
    """The channel space of every signal, identified by the first signal in it.

    Signals are in one channel space if they share their channels, so that a channel is removed from all of them or from
    none. BatchNorms, activations, pools, sums and fixed layers keep the channel space of their inputs. Convolutions,
    dense layers and attention start a new channel space.
    """
    space_of = list(range(len(net.nodes)))
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear | Attention | Input):
            continue
        joined = {space_of[source] for source in sources(node)} | {space_of[signal]}
        space_of = [min(joined) if space in joined else space for space in space_of]
    return space_of


def fixed_spaces(net: Wiring, output: Signal) -> set[int]:
    """Channel spaces that must keep all channels: images, output, and inputs and outputs of `Attention` and `Fixed`."""
    space_of = spaces(net)
    fixed = {space_of[output]}
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Input | Attention | Fixed):
            fixed.add(space_of[signal])
        if isinstance(node, Attention | Fixed):
            fixed.add(space_of[node.source])
    return fixed
