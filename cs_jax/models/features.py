"""Numbers of output features for single layers of a network, where they differ from the network's defaults."""

from collections.abc import Mapping

from flax.core import FrozenDict

Features = Mapping[str, int]
"""Output features by layer name; number of attention heads by block name. Hashable where it is a module's field."""

DEFAULT_FEATURES: Features = FrozenDict()
"""Every layer has its default number of features."""


def submodule_features(features: Features, name: str) -> Features:
    """The entries for layers inside the submodule `name`, keyed by their names there.

    >>> submodule_features({"conv0": 8, "stage1_block1/conv_a": 3}, "stage1_block1")
    FrozenDict({
        conv_a: 3,
    })
    """
    inside = {layer.removeprefix(f"{name}/"): size for layer, size in features.items() if layer.startswith(f"{name}/")}
    return FrozenDict(inside)
