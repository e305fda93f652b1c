"""Default rule: recognizes weights by the names of arrays and layers, because a pytree does not store their roles."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.groups import words
from cs_jax.core.trees import Path

_WEIGHT_NAMES = {"kernel", "kernels", "weight", "weights", "w", "proj"}
_SHORT_WEIGHT = re.compile("w[a-z]{0,3}", re.IGNORECASE)  # wq, wqkv, W1
_HEAD_NAMES = {"head", "classifier", "logits"}
_NORM_NAMES = {"norm", "bn", "ln", "gn"}
_EMBEDDING_NAMES = {"wte", "wpe", "pos", "positional"}


def default_weights(leaves: Mapping[Path, Any], kinds: Mapping[Path, str]) -> list[Path]:
    """Paths of weight matrices and convolution kernels, except embeddings, norms and classifier heads.

    Pruning the exceptions can do much harm: a row of an embedding is trained only with its token, a norm scales whole
    channels, and a class can lose all its weights in the head. A layer is an exception because of its name or, in trees
    of objects, because of the name of its class. The names of the modules around the layer have no effect.

    Args:
        leaves: arrays, tracers or `jax.ShapeDtypeStruct`, by path.
        kinds: class names of the modules, by path, as from `module_kinds`; may be empty.
    """
    return [path for path, leaf in leaves.items() if _is_weight(path, leaf) and not _is_excepted(path, kinds)]


def _is_weight(path: Path, leaf: Any) -> bool:
    if not (is_float(leaf) and jnp.ndim(leaf) >= 2):
        return False
    if not path or path[-1].isdigit():  # a bare array, or an array in a list, has no name
        return sum(size > 1 for size in leaf.shape) >= 2
    parts = words(path[-1])
    return bool(_WEIGHT_NAMES & set(parts)) or bool(parts and _SHORT_WEIGHT.fullmatch(parts[0]))


def _is_excepted(path: Path, kinds: Mapping[Path, str]) -> bool:
    layer = trees.name(path[:-1]).split("/")[-1]  # a Haiku key contains several names
    kind = kinds.get(path[:-1], "")
    leaf = path[-1].lower() if path else ""
    return _is_excepted_layer(layer) or _is_excepted_layer(kind) or leaf in _EMBEDDING_NAMES


def _is_excepted_layer(layer: str) -> bool:
    """Whether the name of a layer or class is the name of an embedding, norm or classifier head."""
    parts = [word for word in words(layer) if not word.isdigit()]
    norm = any(word in _NORM_NAMES or word.endswith("norm") for word in parts)
    embedding = any(word in _EMBEDDING_NAMES or "embed" in word for word in parts)
    head = bool(parts) and parts[-1] in _HEAD_NAMES and not {"multi", "attention"} & set(parts)
    return norm or embedding or head


def module_kinds(params: PyTree) -> dict[Path, str]:
    """Class names of the modules in a tree of objects, such as an Equinox model, by path."""
    kinds: dict[Path, str] = {}
    for keys, _ in jax.tree.leaves_with_path(params):
        node, path = params, ()
        for key in keys[:-1]:
            if not isinstance(node, tuple | list | Mapping) and not hasattr(node, "__dict__"):
                break
            node = _child(node, key)
            path = (*path, jax.tree_util.keystr((key,), simple=True))
            if node is None:
                break
            if isinstance(key, jax.tree_util.GetAttrKey | jax.tree_util.SequenceKey) and hasattr(node, "__dict__"):
                kinds[path] = type(node).__name__
    return kinds


def _child(node: Any, key: Any) -> Any:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name, None)
    if isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.DictKey):
        index = key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key
        return node[index]
    return None


def is_float(leaf: Any) -> bool:
    """Whether `leaf` is an array of a real float dtype."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
