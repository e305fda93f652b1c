"""Sparse forms of any Flax NNX model: in every call, the weights that rules select are multiplied by `Mask` variables.

`import cs_jax` does not import this module, because this module imports NNX: write `import cs_jax.nnx`.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from cs_jax.core import trees
from cs_jax.core.rules import Where, select

M = TypeVar("M", bound=nnx.Module)
Keys = tuple[Any, ...]
"""Attribute names, keys and indices on the path to a variable, as in NNX's paths."""


class Mask(nnx.Variable):
    """Mask of a Param in a sparse model, an array of the Param's shape; filters select it: `nnx.state(model, Mask)`.

    >>> sparse = sparsify(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    >>> nnx.to_pure_dict(nnx.state(sparse, Mask))
    {'masks': {'kernel': Array([[1.], [1.]], dtype=float32)}}
    """


def sparsify(model: M, where: Where = None) -> M:
    """Sparse copy of a model: every call of a public method multiplies the selected Params by their `Mask`.

    The copy is an instance of a subclass of the model's class, with the same attributes and the attribute `masks`:
    nested dictionaries along the paths of the Params, with the `Mask` of each selected Param. The first masks are ones
    with the Param's shape, dtype and sharding. The Params with a Mask in `masks` are masked, also after `nnx.split` and
    `nnx.merge`. A Param that several attributes share is masked in all these attributes, by one Mask.

    Masks act in calls of the model's public methods, also inside another model. A call may change everything that a
    call of the plain model may change, except masked Params (which `nnx.WeightNorm` and `nnx.SpectralNorm` change).
    Masks do not act

    - on attributes and properties: these are the plain weights, for optimizers to update;
    - in a submodule taken out of the model, as in `sparse.encoder(x)` (masks act in submodules that methods return);
    - in methods of the plain class, as in `nnx.jit(Model.encode)(sparse, x)`: write `nnx.jit(type(sparse).encode)`.

    `nnx.capture(..., method_outputs=...)` captures only the method that is called, not methods that this method calls.

    Args:
        model: NNX module; it is not changed. The copy has new variables, as from `nnx.clone`. The arrays are shared
            until one of the two models is updated; before that, do not donate the arrays of either model.
        where: rules for `nnx.state(model, nnx.Param)`, as for `cs_jax.select`; None selects the default of
            `cs_jax.Rule`. Groups and target densities of rules apply to scores only.

    Returns:
        The copy; with the first masks, its results are exactly the results of `model`.

    Raises:
        TypeError: `model` is not an `nnx.Module` or has no public method. In a call: `masks` contains another object
            than a Mask.
        ValueError: `model` or a part of `model` is already sparse; `model` has an attribute `masks`; rules select
            nothing, or an array that is only a part of a Param. In a call: masks are missing, a mask has no Param or
            another shape than its Param, or the call sets a masked Param.

    >>> import cs_jax
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    >>> sparse = sparsify(model, where="**/kernel")
    >>> graphdef, params, masks, rest = nnx.split(sparse, nnx.Param, Mask, ...)
    >>> scores = cs_jax.init_scores(masks, 0.0)
    >>> def loss_fn(params, scores, temperature):
    ...     masks = cs_jax.soft_mask(scores, temperature, init_value=0.0)
    ...     outputs = nnx.merge(graphdef, params, masks, rest)(jnp.ones((1, 2)))
    ...     return jnp.sum(outputs**2) + 1e-3 * cs_jax.mask_penalty(masks)
    >>> grads = jax.grad(loss_fn, argnums=(0, 1))(params, scores, 1.0)
    >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(grads[1]))
    {'masks': {'layers': {0: {'kernel': (2, 3)}, 2: {'kernel': (3, 1)}}}}
    """
    _check_model(model)
    selected = {leaf.path for leaf in select(nnx.state(model, nnx.Param), where).masked}
    sparse: Any = nnx.clone(model)
    weights = dict(_weights(sparse))
    chosen = {id(weight): _new_mask(weight) for keys, weight in weights.items() if tuple(map(str, keys)) in selected}
    partial = selected - {tuple(map(str, keys)) for keys in weights}
    if partial:
        raise ValueError(f"weights {trees.name(min(partial))!r}: must be a whole Param, not an array inside one")
    object.__setattr__(sparse, "__class__", _sparse_class(type(sparse)))
    masks = {keys: chosen[id(weight)] for keys, weight in weights.items() if id(weight) in chosen}
    sparse.masks = nnx.data(trees.nest(masks))
    return sparse


def _check_model(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model {model!r}: must be an instance of nnx.Module")
    for path, module in nnx.iter_modules(model):
        if hasattr(type(module), "_dense_class"):
            place = f" at {trees.name(tuple(map(str, path)))!r}" if path else ""
            raise ValueError(f"model {type(module).__name__}{place}: must not be sparse already; pass the plain model")
    if hasattr(model, "masks"):
        raise ValueError(
            f"model {type(model).__name__}: must not have an attribute 'masks', because `sparsify` adds one; "
            "rename the attribute"
        )
    if not _methods(type(model)):
        raise TypeError(f"model {type(model).__name__}: must have a public method, because masks act in public methods")


def _new_mask(weight: nnx.Variable[Any]) -> Mask:
    mask = Mask(jnp.ones_like(_raw_value(weight)), hijax=weight.hijax, ref=weight.ref)
    metadata = weight.get_metadata()
    sharding = {name: metadata[name] for name in ("out_sharding", "sharding_rules", "mesh") if name in metadata}
    if sharding:
        mask.set_metadata(**sharding)
    return mask


def _raw_value(variable: nnx.Variable[Any]) -> Any:
    """The stored array of a variable, without the hooks that run on reading."""
    value = variable.get_raw_value()
    return value[...] if variable.ref else value


def _weights(tree: Any, path: Keys = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Keys, nnx.Variable[Any]]]:
    """Params in `tree` with their paths; a shared Param comes once for each of its paths.

    Args:
        tree: NNX modules, containers and variables in any pytree.
        path: path of `tree`.
        above: ids of the modules around `tree`, which are skipped: a module may refer to its owner.
    """
    for keys, leaf in jax.tree.leaves_with_path(tree, is_leaf=_is_object):
        here = (*path, *map(_key, keys))
        if isinstance(leaf, nnx.Param):
            yield here, leaf
        elif isinstance(leaf, nnx.Pytree) and id(leaf) not in above:
            for name, value in vars(leaf).items():
                if _is_data(leaf, name):
                    index = isinstance(leaf, nnx.List) and name.isdigit()
                    yield from _weights(value, (*here, int(name) if index else name), (*above, id(leaf)))


def _is_object(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _is_data(node: nnx.Pytree, name: str) -> bool:
    """Whether an attribute is data, which may contain variables, and not static."""
    return not node._pytree__is_pytree or node._pytree__nodes.get(name, False)


def _key(key: Any) -> Any:
    """Key of a JAX path as a key of an NNX path."""
    for attribute in ("idx", "key", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


@functools.cache
def _sparse_class(dense: type[nnx.Module]) -> type[nnx.Module]:
    """Subclass whose public methods use masked weights; cached, so that graph definitions of equal models are equal."""
    namespace = {name: _masked_method(dense, name, method) for name, method in _methods(dense).items()}
    namespace |= {
        "_dense_class": dense,
        "__reduce__": _reduce,
        "__module__": dense.__module__,
        "__doc__": dense.__doc__,
    }
    keywords = {} if dense._pytree__is_pytree else {"pytree": False}
    return types.new_class(f"Sparse{dense.__name__}", (dense,), keywords, lambda body: body.update(namespace))


def _methods(dense: type[nnx.Module]) -> dict[str, Any]:
    """Public methods of a class, except methods that it inherits unchanged from NNX's modules and containers."""
    method_types = (functools.partialmethod, functools.singledispatchmethod)
    found = {}
    for name in dir(dense):
        value = inspect.getattr_static(dense, name)
        inherited = any(value is inspect.getattr_static(base, name, None) for base in (nnx.Module, nnx.List, nnx.Dict))
        if inherited or (name.startswith("_") and name != "__call__"):
            continue
        if isinstance(value, method_types) or (callable(value) and hasattr(value, "__get__")):
            if not isinstance(value, staticmethod | classmethod | type):
                found[name] = value
    return found


def _reduce(self: Any) -> tuple:
    return _empty_instance, (self._dense_class,), self.__getstate__()


def _empty_instance(dense: type[nnx.Module]) -> nnx.Module:
    """Instance without attributes, for pickle to fill."""
    return object.__new__(_sparse_class(dense))


def _masked_method(dense: type[nnx.Module], name: str, method: Any) -> Callable:
    """Method that calls the method of the plain class on a copy of the model with masked weights.

    The model itself has plain weights at any time, so calls may fail, nest, or run in several threads. Methods that
    the method calls are plain, so nothing is masked twice.
    """

    @functools.wraps(method, updated=())
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        copies = _Copies(self)
        copy = copies.of(self)
        object.__setattr__(copy, "__class__", dense)
        try:
            result = getattr(copy, name)(*args, **kwargs)
        finally:
            copies.write_back()
        copies.check_weights_unchanged()
        return _replace_copy(result, copy, self)

    return call


def _replace_copy(result: Any, copy: Any, model: Any) -> Any:
    """The result with the model in place of the copy, which is the method's `self`; also in tuples."""
    if type(result) is tuple:
        return tuple(_replace_copy(part, copy, model) for part in result)
    return model if result is copy else result


class _Copies:
    """Copies of a model's objects: masked Params are replaced by their products with masks, other variables shared."""

    def __init__(self, model: nnx.Module) -> None:
        self.by_id: dict[int, tuple[Any, Any]] = {}  # id -> (original, copy); the reference keeps the id unique
        for weight, masked in _masked_weights(model):
            self.by_id[id(weight)] = weight, masked
        self.products = [(masked, masked.get_raw_value(), masked.on_set_value) for _, masked in self.by_id.values()]
        self.omitted = id(model), "masks"  # attribute that the copy does not have
        self.of(model)
        self.contents = {number: _contents(copy) for number, (_, copy) in self.by_id.items()}

    def of(self, tree: Any) -> Any:
        """The tree with copies in place of objects; `tree` itself if none of its objects has a copy."""
        leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_object)
        copies = [self._of_leaf(leaf) for leaf in leaves]
        unchanged = all(leaf is copy for leaf, copy in zip(leaves, copies, strict=True))
        return tree if unchanged else treedef.unflatten(copies)

    def _of_leaf(self, leaf: Any) -> Any:
        if id(leaf) in self.by_id:
            return self.by_id[id(leaf)][1]
        if not isinstance(leaf, nnx.Pytree):
            return leaf
        copy = object.__new__(type(leaf))
        self.by_id[id(leaf)] = leaf, copy  # before the attributes, which may refer to the object
        for name, value in vars(leaf).items():
            if (id(leaf), name) != self.omitted:
                vars(copy)[name] = self.of(value) if _is_data(leaf, name) else value
        return copy

    def write_back(self) -> None:
        """Sets and deletes the attributes of the originals that a call has set and deleted on the copies."""
        originals = {id(copy): original for original, copy in self.by_id.values()}
        for number, (original, copy) in self.by_id.items():
            before, after = self.contents[number], _contents(copy)
            for name in before.keys() - after.keys():
                vars(original).pop(name, None)
            for name, (leaves, treedef) in after.items():
                if name not in before or not _same(before[name], (leaves, treedef)):
                    owned = [originals.get(id(leaf), leaf) for leaf in leaves]
                    vars(original)[name] = owned[0] if treedef is None else treedef.unflatten(owned)

    def check_weights_unchanged(self) -> None:
        """Raises a ValueError if a call has changed masked weights without calling the hook, as `nnx.update` does."""
        for masked, product, refuse in self.products:
            value = masked.get_raw_value()
            if masked.get_metadata("on_set_value", None) != refuse or not _is_unchanged(value, product):
                refuse(masked, value)


def _is_unchanged(value: Any, product: Any) -> bool:
    """Whether an array is the product, or a copy of the product, as `nnx.jit` inside the call makes."""
    if value is product:
        return True
    traced = [isinstance(array, Tracer) for array in (value, product)]
    return all(traced) if any(traced) else bool(jnp.array_equal(value, product, equal_nan=True))


Contents = tuple[list[Any], Any]


def _contents(node: Any) -> dict[str, Contents]:
    """Contents of an object's attributes: leaves and tree structure, or the value and None if it is static."""
    if not isinstance(node, nnx.Pytree):
        return {}
    return {
        name: jax.tree.flatten(value, is_leaf=_is_object) if _is_data(node, name) else ([value], None)
        for name, value in vars(node).items()
    }


def _same(first: Contents, second: Contents) -> bool:
    if len(first[0]) != len(second[0]) or first[1] != second[1]:
        return False
    return all(one is other for one, other in zip(first[0], second[0], strict=True))


def _masked_weights(model: nnx.Module) -> Iterator[tuple[nnx.Variable[Any], nnx.Variable[Any]]]:
    """Masked Params of a model, each with a Param that contains the product with its mask."""
    masks = {}
    for keys, mask in jax.tree.leaves_with_path(getattr(model, "masks", None), is_leaf=_is_object):
        name = trees.name(tuple(str(_key(key)) for key in keys))
        if not isinstance(mask, Mask):
            raise TypeError(f"masks {name!r} of type {type(mask).__name__}: must be a Mask")
        masks[name] = mask.get_value()
    if not masks:
        raise ValueError(f"model {type(model).__name__}: must have the attribute 'masks' that `sparsify` makes")
    weights = {trees.name(tuple(map(str, keys))): weight for keys, weight in _weights(model)}
    values = {name: _raw_value(weights[name]) for name in masks if name in weights}
    for name, value in trees.apply_masks(values, masks).items():
        refuse = _RefuseToSet(name)
        yield weights[name], weights[name].copy(value, hijax=False, ref=False, on_set_value=refuse)


@dataclass(frozen=True)
class _RefuseToSet:
    """Hook on setting a masked Param in a call: the copy contains the product instead, so a new value would be lost."""

    name: str

    def __call__(self, variable: nnx.Variable[Any], value: Any) -> Any:
        raise ValueError(
            f"weights {self.name!r}: must not be set in a call, because they are masked; set them outside of calls, or "
            "mask other weights"
        )
