"""How a network is wired: what a module says of its layers, so that channels can be taken out of it.

A module tells it in a method `wire(self, net, x)`, which reads like its `__call__`: `net` is a `Wiring`, whose methods
are the kinds of layers there are, `x` stands for the images, and what is returned for the output. In a second method,
`resize(self, features)`, it returns the same module with other numbers of features in some of its layers.

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

Nothing is guessed: a module without these methods is refused, and so is a wiring that leaves out a layer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NewType, Protocol, runtime_checkable

import jax
from flax import linen as nn

from cs_jax.core.errors import CsJaxWarning


class WiringWarning(CsJaxWarning):
    """A trained ticket cannot be made smaller, because its network is not wired as it says."""


Signal = NewType("Signal", int)
"""What flows between two layers: the number of the node that makes it."""


@dataclass(frozen=True)
class Input:
    """The images."""


@dataclass(frozen=True)
class Linear:
    """A convolution or dense layer: the last two axes of its kernel are input and output features."""

    source: Signal
    name: str
    zero_padded: bool


@dataclass(frozen=True)
class BatchNorm:
    source: Signal
    name: str
    epsilon: float


@dataclass(frozen=True)
class Activation:
    source: Signal
    function: Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Pool:
    source: Signal


@dataclass(frozen=True)
class Add:
    left: Signal
    right: Signal


PROJECTIONS = ("query", "key", "value", "out")
"""Layers of an attention module."""


@dataclass(frozen=True)
class Attention:
    """Heads of self-attention, whose `PROJECTIONS` are layers of the module."""

    source: Signal
    name: str


@dataclass(frozen=True)
class Fixed:
    """Layers that want every feature as it is, and give back as many."""

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
    """Layers that a node consists of."""
    match node:
        case Fixed(names=found):
            return found
        case Linear(name=name) | BatchNorm(name=name):
            return (name,)
        case Attention(name=name):
            return tuple(f"{name}/{layer}" for layer in PROJECTIONS)
        case _:
            return ()


class Wiring:
    """The layers of a network in the order in which they are applied.

    Names are paths of layers among the variables, as in "stage1_block1/conv_a", each of which is told once. Each method
    takes what flows into a layer, and returns what flows out of it.

    Attributes:
        nodes: what the module has told, each by the number of the signal that it makes.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = [Input()]
        self._told: set[str] = set()

    def conv(self, x: Signal, name: str, *, zero_padded: bool) -> Signal:
        """A convolution with one group, whose kernel is `(*window, in, out)`, with or without a bias.

        Args:
            x: what it is applied to.
            name: of the layer.
            zero_padded: whether zeros are put around the image: a constant in a channel is then none at the border.
        """
        return self._add(Linear(x, name, zero_padded))

    def dense(self, x: Signal, name: str) -> Signal:
        """A dense layer along the last axis, whose kernel is (in, out), with or without a bias.

        It may follow on (batch, height, width, channels) reshaped to (batch, features).
        """
        return self._add(Linear(x, name, zero_padded=False))

    def batch_norm(self, x: Signal, name: str, *, epsilon: float = 1e-5) -> Signal:
        """A BatchNorm with scale and bias, and running averages in "batch_stats"."""
        return self._add(BatchNorm(x, name, epsilon))

    def activation(self, x: Signal, function: Callable[[jax.Array], jax.Array]) -> Signal:
        """A function of every entry by itself."""
        return self._add(Activation(x, function))

    def pool(self, x: Signal) -> Signal:
        """A maximum or mean of every channel by itself that leaves a constant as it is: not over zeros of a padding."""
        return self._add(Pool(x))

    def add(self, x: Signal, y: Signal) -> Signal:
        """A sum, as in residual networks: channels of both belong together from there on."""
        return self._add(Add(x, y))

    def attention(self, x: Signal, name: str) -> Signal:
        """Self-attention of the module called `name`, before anything is added to it.

        Its layers query, key and value have kernels (in, heads, size), out has (heads, size, out), all with biases.
        """
        return self._add(Attention(x, name))

    def fixed(self, x: Signal, *names: str) -> Signal:
        """Anything else that wants every feature, as a LayerNorm does: neither its input nor its output gets smaller.

        Args:
            x: what it is applied to.
            names: of its layers or parameters, if it has any.
        """
        return self._add(Fixed(x, names))

    def _add(self, node: Node) -> Signal:
        for name in names(node):
            if name in self._told:
                raise ValueError(f"wiring: names {name!r} twice, wanted every layer once: it would be changed twice")
            self._told.add(name)
        self.nodes.append(node)
        return Signal(len(self.nodes) - 1)


@runtime_checkable
class Wired(Protocol):
    """A Linen module that says how it is wired."""

    def wire(self, net: Wiring, x: Signal) -> Signal:
        """Tells `net` every layer that `x` goes through, and returns the output."""
        ...

    def resize(self, features: dict[str, int]) -> Any:
        """The same module with these numbers of output features, or heads, in place of those that it has.

        Args:
            features: by the name of the layer, all that can change; heads by that of their module.
        """
        ...


def wiring_of(model: nn.Module) -> tuple[Wiring, Signal]:
    """What a module says of its layers, and its output.

    Raises:
        TypeError: it does not say.
    """
    if not isinstance(model, Wired):
        raise TypeError(
            f"model: got {type(model).__name__}, which does not say how it is wired; wanted methods `wire` and `resize`"
        )
    net = Wiring()
    return net, model.wire(net, Signal(0))


def check_names(net: Wiring, arrays: Iterable[str]) -> None:
    """Raises a ValueError unless a wiring names every layer, and no others.

    Args:
        net: what a module has told.
        arrays: their names by collection and path, "params/conv0/kernel".
    """
    known, told = list(arrays), [name for node in net.nodes for name in names(node)]
    for name in told:
        if not any(key.startswith(f"params/{name}/") or key == f"params/{name}" for key in known):
            raise ValueError(f"wiring: names {name!r}, but there is no such layer among the params")
    for key in known:
        path = key.partition("/")[2]
        if not any(path == name or path.startswith(f"{name}/") for name in told):
            raise ValueError(f"wiring: says nothing of {path!r}, wanted every layer")


def norm_after(nodes: Sequence[Node], signal: Signal) -> BatchNorm | None:
    """The BatchNorm that reads a signal, if nothing else does."""
    followers = [node for node in nodes if signal in sources(node)]
    return followers[0] if len(followers) == 1 and isinstance(followers[0], BatchNorm) else None


def spaces(net: Wiring) -> list[int]:
    """The space of every signal, called by the first signal in it.

    Signals whose channels go together, because nothing but entry by entry functions and sums are between them, are one
    space.
    """
    found = list(range(len(net.nodes)))
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Linear | Attention | Input):
            continue
        joined = {found[source] for source in sources(node)} | {found[signal]}
        found = [min(joined) if space in joined else space for space in found]
    return found


def fixed_spaces(net: Wiring, output: Signal) -> set[int]:
    """Spaces whose channels all have to stay: of the images, of the output, and around what wants every feature."""
    space = spaces(net)
    fixed = {space[output]}
    for signal, node in enumerate(net.nodes):
        if isinstance(node, Input | Attention | Fixed):
            fixed.add(space[signal])
        if isinstance(node, Attention | Fixed):
            fixed.add(space[node.source])
    return fixed
