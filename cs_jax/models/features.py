"""Numbers of features that a network has in some of its layers, in place of those of its family."""

from collections.abc import Mapping

from flax.core import FrozenDict

Features = Mapping[str, int]
"""Output features by the name of the layer, heads by that of their block. Modules want it hashable."""

NONE: Features = FrozenDict()


def within(features: Features, name: str) -> Features:
    """Those of the layers inside of a module, by their names there."""
    inside = {layer.removeprefix(f"{name}/"): size for layer, size in features.items() if layer.startswith(f"{name}/")}
    return FrozenDict(inside)
