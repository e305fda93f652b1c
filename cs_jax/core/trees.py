"""Leaves of a pytree by path: masks belong to weights by path, and rules select weights by path.

The name of a leaf is its path as text: dictionary keys, attribute names and indices, as in "encoder/layers/0/kernel". A
weight in a Flax, Haiku, NNX or Equinox tree has the same name as its mask in nested dictionaries.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.meta import AxisMetadata
from jaxtyping import PyTree

from cs_jax.core.arrays import map_leaves

Path = tuple[str, ...]
"""Keys on the path from the root to a leaf, as text."""


def leaves_by_path(tree: PyTree) -> dict[Path, Any]:
    """Leaves of `tree` by path, in the order of `jax.tree.leaves`.

    None contains no leaves. An array in an `nnx.Variable` or a Linen box (such as `nn.Partitioned`) has the path of its
    container.

    Raises:
        ValueError: two leaves have the same path, as under the keys 0 and "0" of one dictionary.

    >>> leaves_by_path({"layers": [{"kernel": 3.0}, None]})
    {('layers', '0', 'kernel'): 3.0}
    """
    leaves = {}
    for keys, node in jax.tree.leaves_with_path(tree, is_leaf=_is_container):
        path = tuple(map(_key_name, keys))
        contents = jax.tree.leaves_with_path(node)
        for inner_keys, leaf in contents:
            leaf_path = path if len(contents) == 1 else (*path, *map(_key_name, inner_keys))
            if leaf_path in leaves:
                raise ValueError(f"path {name(leaf_path)!r}: must belong to one leaf, not to two; rename one of them")
            leaves[leaf_path] = leaf
    return leaves


def _is_container(node: Any) -> bool:
    """Whether `node` is a Linen box or an `nnx.Variable`."""
    return isinstance(node, AxisMetadata) or is_variable(node)


def is_variable(node: Any) -> bool:
    """Whether `node` is an `nnx.Variable`; recognized by its methods, because NNX is not imported here."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def name(path: Path) -> str:
    """A path as text, such as "layers/0/kernel"."""
    return "/".join(path)


def nest(leaves: Mapping[Path, Any]) -> PyTree:
    """Nested dictionaries with the leaves under their paths; the leaf itself if its path is empty.

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
    """Results of `function(key, leaf)` for every leaf, each with its PRNG key, in nested dictionaries by path."""
    leaves = leaves_by_path(tree)
    keys = jax.random.split(key, len(leaves))
    return nest({path: function(keys[index], leaf) for index, (path, leaf) in enumerate(leaves.items())})


def replace_leaves(tree: PyTree, leaves: Mapping[Path, Any]) -> PyTree:
    """`tree` with the leaves under the paths in `leaves` replaced; other leaves are unchanged."""
    treedef = jax.tree.structure(tree)
    return jax.tree.unflatten(treedef, [leaves.get(path, leaf) for path, leaf in leaves_by_path(tree).items()])


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Weights multiplied by the masks under the same paths; weights without a mask are returned unchanged.

    Args:
        params: weights, any pytree of float arrays; leaves without a mask may have any type.
        masks: arrays under the paths of the weights that they multiply, with the shapes of these weights. A weight
            without a mask is absent from this tree. Nested dictionaries fit every kind of `params`.

    Returns:
        Tree like `params` (structure, shapes, dtypes).

    Raises:
        ValueError: a mask is not an array; no weight has the path of a mask; a mask and its weight have different
            shapes; or the weight is not a float array.

    >>> params = {"dense": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([1.0])}}
    >>> apply_masks(params, {"dense": {"kernel": jnp.array([0.0, 1.0])}})
    {'dense': {'bias': Array([1.], dtype=float32), 'kernel': Array([0., 4.], dtype=float32)}}
    """
    weights = leaves_by_path(params)
    masked = {}
    for path, mask in leaves_by_path(masks).items():
        if not hasattr(mask, "dtype"):
            raise ValueError(f"masks {name(path)!r} {mask!r}: must be an array")
        if path not in weights:
            raise ValueError(f"masks {name(path)!r}: must have the path of a weight; params have {names(weights)}")
        weight = weights[path]
        if mask.shape != jnp.shape(weight):
            raise ValueError(
                f"masks {name(path)!r} of shape {mask.shape}: must have the shape of the weights, {jnp.shape(weight)}"
            )
        check_float(weight, path)
        masked[path] = map_leaves(lambda array, mask=mask: array * mask.astype(array.dtype), weight)
    return replace_leaves(params, masked)


def check_float(weight: Any, path: Path) -> None:
    """Raises a ValueError with the name of the leaf unless it is a float array, real or complex."""
    if not hasattr(weight, "dtype"):
        raise ValueError(f"weights {name(path)!r} {weight!r}: must be a float array")
    if not jnp.issubdtype(weight.dtype, jnp.inexact):
        raise ValueError(f"weights {name(path)!r} of dtype {weight.dtype}: must have a float dtype")


def names(leaves: Mapping[Path, Any]) -> str:
    """Names of all leaves in one string, for a message; "nothing" if there are none."""
    return ", ".join(map(name, leaves)) or "nothing"


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)
