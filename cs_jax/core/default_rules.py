"""What is masked by default: weights told by their own names and those of their layers, since libraries do not tell."""

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
    """Weight matrices and convolution kernels by name and shape, without embeddings, norms and classifier heads.

    These are left out because they have few weights to win and much to lose: a row of an embedding is seen only with
    its token, a norm scales whole channels, a class can lose all its evidence in the head. What a layer is goes by its
    own name, and in trees of objects by its class; the modules around it have no say.
    """
    return [path for path, leaf in leaves.items() if _is_weight(path, leaf) and not _is_special(path, kinds)]


def _is_weight(path: Path, leaf: Any) -> bool:
    if not (is_float(leaf) and jnp.ndim(leaf) >= 2):
        return False
    if not path or path[-1].isdigit():  # a bare array, or one of a list: there is no name to go by
        return sum(size > 1 for size in leaf.shape) >= 2
    named = words(path[-1])
    return bool(_WEIGHT_NAMES & set(named)) or bool(named and _SHORT_WEIGHT.fullmatch(named[0]))


def _is_special(path: Path, kinds: Mapping[Path, str]) -> bool:
    layer = trees.name(path[:-1]).split("/")[-1]  # Haiku's keys have several parts
    kind = kinds.get(path[:-1], "")
    own = path[-1].lower() if path else ""
    return _is_special_name(layer) or _is_special_name(kind) or own in _EMBEDDING_NAMES


def _is_special_name(part: str) -> bool:
    named = [word for word in words(part) if not word.isdigit()]
    norm = any(word in _NORM_NAMES or word.endswith("norm") for word in named)
    embedding = any(word in _EMBEDDING_NAMES or "embed" in word for word in named)
    head = bool(named) and named[-1] in _HEAD_NAMES and not {"multi", "attention"} & set(named)
    return norm or embedding or head


def module_kinds(params: PyTree) -> dict[Path, str]:
    """Class names of the objects along the paths, for trees made of objects, as Equinox's are."""
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
    """Whether this is an array of real floats."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
