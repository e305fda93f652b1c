"""Leaves of a pytree by name: what masks find their weights by, and rules go by.

A leaf's name is its path as text, "encoder/layers/0/kernel": dictionary keys, attribute names and indices. It is the
same for a weight in a Flax, Haiku, NNX or Equinox tree and for its mask in nested dictionaries.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.meta import AxisMetadata
from jaxtyping import PyTree

from cs_jax.core.arrays import map_leaves

Path = tuple[str, ...]
"""Keys of a leaf's path as text, from the root."""


def leaves_by_path(tree: PyTree) -> dict[Path, Any]:
    """Leaves of `tree` by their path, in the order of `jax.tree.leaves`.

    None has no leaves. What an `nnx.Variable` or a box of Linen's holds has the path of its holder.

    Raises:
        ValueError: two leaves have the same path, as under the keys 0 and "0" of one dictionary.

    >>> leaves_by_path({"layers": [{"kernel": 3.0}, None]})
    {('layers', '0', 'kernel'): 3.0}
    """
    leaves = {}
    for keys, node in jax.tree.leaves_with_path(tree, is_leaf=_is_holder):
        path = tuple(map(_key_name, keys))
        held = jax.tree.leaves_with_path(node)
        for inner, leaf in held:
            own = path if len(held) == 1 else (*path, *map(_key_name, inner))
            if own in leaves:
                raise ValueError(f"two leaves are called {name(own)!r}: wanted different paths")
            leaves[own] = leaf
    return leaves


def _is_holder(node: Any) -> bool:
    """Whether this is a box of Linen's or an `nnx.Variable`, known by its methods: NNX is not imported for it."""
    return isinstance(node, AxisMetadata) or is_variable(node)


def is_variable(node: Any) -> bool:
    """Whether this is an `nnx.Variable`."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def name(path: Path) -> str:
    """A path as one text: "layers/0/kernel"."""
    return "/".join(path)


def nest(leaves: Mapping[Path, Any]) -> PyTree:
    """Nested dictionaries with `leaves` under their paths; the leaf itself where its path is empty.

    >>> nest({("dense", "kernel"): 1.0})
    {'dense': {'kernel': 1.0}}
    """
    if () in leaves:
        return leaves[()]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def map_with_keys(function: Callable[[jax.Array, Any], Any], key: jax.Array, tree: PyTree) -> PyTree:
    """`function` of a PRNG key of its own and each leaf, in nested dictionaries along the leaves' paths."""
    leaves = leaves_by_path(tree)
    keys = jax.random.split(key, len(leaves))
    return nest({path: function(keys[index], leaf) for index, (path, leaf) in enumerate(leaves.items())})


def replace_leaves(tree: PyTree, leaves: Mapping[Path, Any]) -> PyTree:
    """`tree` with those leaves that are in `leaves` in place of its own, the others as they are."""
    treedef = jax.tree.structure(tree)
    return jax.tree.unflatten(treedef, [leaves.get(path, leaf) for path, leaf in leaves_by_path(tree).items()])


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Weights multiplied by the masks found under the same path; the others are returned as they are.

    Args:
        params: weights, any pytree.
        masks: masks under the paths of the weights that they multiply, each of its weight's shape; a weight without
            a mask is absent from this tree. Nested dictionaries will do, whatever `params` is made of.

    Returns:
        Tree like `params` (structure, shapes, dtypes).

    Raises:
        ValueError: a mask has no weight under its path, or another shape than its weight, or that is no float array.

    >>> params = {"dense": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([1.0])}}
    >>> apply_masks(params, {"dense": {"kernel": jnp.array([0.0, 1.0])}})
    {'dense': {'bias': Array([1.], dtype=float32), 'kernel': Array([0., 4.], dtype=float32)}}
    """
    weights = leaves_by_path(params)
    masked = {}
    for path, mask in leaves_by_path(masks).items():
        if not hasattr(mask, "dtype"):
            raise ValueError(f"masks {name(path)!r}: got {mask!r}, wanted an array")
        if path not in weights:
            raise ValueError(f"mask {name(path)!r} has no weights: params hold {names(weights)}")
        weight = weights[path]
        if mask.shape != jnp.shape(weight):
            raise ValueError(
                f"mask {name(path)!r} has shape {mask.shape}, its weights {jnp.shape(weight)}: wanted equal shapes"
            )
        check_float(weight, path)
        masked[path] = map_leaves(lambda array, mask=mask: array * mask.astype(array.dtype), weight)
    return replace_leaves(params, masked)


def check_float(weight: Any, path: Path) -> None:
    """Raises a ValueError that names the leaf, unless it is a float array."""
    if not hasattr(weight, "dtype"):
        raise ValueError(f"weights {name(path)!r}: got {weight!r}, wanted a float array")
    if not jnp.issubdtype(weight.dtype, jnp.inexact):
        raise ValueError(f"weights {name(path)!r}: got dtype {weight.dtype}, wanted a float dtype")


def names(leaves: Mapping[Path, Any]) -> str:
    """Names of leaves, for a message."""
    return ", ".join(map(name, leaves)) or "nothing"


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)
