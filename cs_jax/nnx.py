"""Masks for Flax NNX: any model, the weights that rules select multiplied by `Mask` variables whenever it is called.

Flax's NNX is imported with this module and not with `cs_jax`: write `import cs_jax.nnx`.
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
"""Attribute names, keys and indices on the way to a variable, as in NNX's own paths."""


class Mask(nnx.Variable):
    """What multiplies a Param of a sparse model, an array of its shape: for filters, as in `nnx.state(model, Mask)`.

    >>> sparse = sparsify(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    >>> nnx.to_pure_dict(nnx.state(sparse, Mask))
    {'masks': {'kernel': Array([[1.], [1.]], dtype=float32)}}
    """


def sparsify(model: M, where: Where = None) -> M:
    """A sparse copy of a model: selected Params are multiplied by their `Mask` in every call of a public method.

    The copy is an instance of a subclass of the model's class, with the same attributes and one more, `masks`:
    dictionaries nested as the Params are, which hold the `Mask` of each selected Param, at first ones of its shape,
    dtype and sharding. They alone say what is masked, so that it lasts through `nnx.split` and `nnx.merge`. A Param
    that several attributes share is masked in all of them, by one Mask.

    Masks act in calls of the model's public methods, on their own or inside another model's; a call may change what the
    plain model's may, except masked Params (which `nnx.WeightNorm` and `nnx.SpectralNorm` do). They do not act

    - on attributes and properties, which are the plain weights, for optimizers to update;
    - in a submodule taken out of the model, as in `sparse.encoder(x)`, though they do in one that a method returns;
    - in methods of the plain class, as in `nnx.jit(Model.encode)(sparse, x)`: write `nnx.jit(type(sparse).encode)`.

    Of the model's own methods, `nnx.capture(..., method_outputs=...)` sees only the one that is called.

    Args:
        model: stays as it is. The copy has its own variables, as one by `nnx.clone` has: arrays are shared until
            one of the two is updated, so donate neither before.
        where: rules over `nnx.state(model, nnx.Param)`, as for `cs_jax.select`; the default masks weights of two or
            more axes that are no biases, embeddings, norms or classifier heads. Groups matter to scores alone.

    Returns:
        The copy, at first with the very results of `model`.

    Raises:
        TypeError: `model` is no `nnx.Module`, or has no public method that could be called; in a call, `masks` holds
            what is no Mask.
        ValueError: `model` or a part of it is sparse already; it has an attribute `masks`; rules select nothing, or
            what is no array but part of a Param. In a call, masks are missing, or one has no Param or another shape; or
            the call sets a masked Param.

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
    chosen = {id(weight): _ones(weight) for keys, weight in weights.items() if tuple(map(str, keys)) in selected}
    inside = selected - {tuple(map(str, keys)) for keys in weights}
    if inside:
        raise ValueError(f"weights {trees.name(min(inside))!r} are inside a Param, wanted Params of one array each")
    object.__setattr__(sparse, "__class__", _sparse_class(type(sparse)))
    masks = {keys: chosen[id(weight)] for keys, weight in weights.items() if id(weight) in chosen}
    sparse.masks = nnx.data(trees.nest(masks))
    return sparse


def _check_model(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model: got {model!r}, wanted an instance of nnx.Module")
    for path, module in nnx.iter_modules(model):
        if hasattr(type(module), "_dense_class"):
            place = f" at {trees.name(tuple(map(str, path)))!r}" if path else ""
            raise ValueError(f"model{place}: {type(module).__name__} is sparse already, wanted the plain model")
    if hasattr(model, "masks"):
        raise ValueError(f"model: {type(model).__name__} has an attribute 'masks', which is wanted for its masks")
    if not _methods(type(model)):
        raise TypeError(f"model: {type(model).__name__} has no public method, wanted one to multiply by masks in")


def _ones(weight: nnx.Variable[Any]) -> Mask:
    mask = Mask(jnp.ones_like(_raw_value(weight)), hijax=weight.hijax, ref=weight.ref)
    metadata = weight.get_metadata()
    sharding = {name: metadata[name] for name in ("out_sharding", "sharding_rules", "mesh") if name in metadata}
    if sharding:
        mask.set_metadata(**sharding)
    return mask


def _raw_value(variable: nnx.Variable[Any]) -> Any:
    """Its array as it is stored, before any hook that reading runs."""
    value = variable.get_raw_value()
    return value[...] if variable.ref else value


def _weights(tree: Any, path: Keys = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Keys, nnx.Variable[Any]]]:
    """Params in `tree` with their paths; one that is shared comes once for each path."""
    for keys, leaf in jax.tree.leaves_with_path(tree, is_leaf=_is_object):
        here = (*path, *map(_key, keys))
        if isinstance(leaf, nnx.Param):
            yield here, leaf
        elif isinstance(leaf, nnx.Pytree) and id(leaf) not in above:  # a part may hold its owner
            for name, value in vars(leaf).items():
                if _is_data(leaf, name):
                    index = isinstance(leaf, nnx.List) and name.isdigit()
                    yield from _weights(value, (*here, int(name) if index else name), (*above, id(leaf)))


def _is_object(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _is_data(node: nnx.Pytree, name: str) -> bool:
    """Whether an attribute may hold variables, and is not static."""
    return not node._pytree__is_pytree or node._pytree__nodes.get(name, False)


def _key(key: Any) -> Any:
    """A key of JAX's paths as one of NNX's."""
    for attribute in ("idx", "key", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


@functools.cache
def _sparse_class(dense: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass whose public methods mask: one for each class, so that graph definitions are equal."""
    namespace = {name: _masking(dense, name, method) for name, method in _methods(dense).items()}
    namespace |= {
        "_dense_class": dense,
        "__reduce__": _reduce,
        "__module__": dense.__module__,
        "__doc__": dense.__doc__,
    }
    keywords = {} if dense._pytree__is_pytree else {"pytree": False}
    return types.new_class(f"Sparse{dense.__name__}", (dense,), keywords, lambda body: body.update(namespace))


def _methods(dense: type[nnx.Module]) -> dict[str, Any]:
    """Public methods of a class that are its own and not those of NNX's modules and containers."""
    bound = (functools.partialmethod, functools.singledispatchmethod)
    found = {}
    for name in dir(dense):
        value = inspect.getattr_static(dense, name)
        inherited = any(value is inspect.getattr_static(base, name, None) for base in (nnx.Module, nnx.List, nnx.Dict))
        if inherited or (name.startswith("_") and name != "__call__"):
            continue
        if isinstance(value, bound) or (callable(value) and hasattr(value, "__get__")):
            if not isinstance(value, staticmethod | classmethod | type):
                found[name] = value
    return found


def _reduce(self: Any) -> tuple:
    return _empty, (self._dense_class,), self.__getstate__()


def _empty(dense: type[nnx.Module]) -> nnx.Module:
    return object.__new__(_sparse_class(dense))


def _masking(dense: type[nnx.Module], name: str, method: Any) -> Callable:
    """A method that calls the one of the plain class on a copy of the model that holds masked weights.

    Nothing of the model is changed before and put back afterwards: calls that fail, nest, or run in several threads do
    each other no harm, and methods that the method calls are plain, so that nothing is masked twice.
    """

    @functools.wraps(method, updated=())
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        copies = _Copies(self)
        copy = copies.of(self)
        object.__setattr__(copy, "__class__", dense)
        try:
            result = getattr(copy, name)(*args, **kwargs)
        finally:
            copies.hand_back()
        copies.check_weights_are_kept()
        return _with_owner(result, copy, self)

    return call


def _with_owner(result: Any, copy: Any, owner: Any) -> Any:
    """A result, with the model itself where the method returned its `self`, also in a tuple."""
    if type(result) is tuple:
        return tuple(_with_owner(part, copy, owner) for part in result)
    return owner if result is copy else result


class _Copies:
    """Copies of the objects that make up a model: variables are shared, all but masked Params."""

    def __init__(self, model: nnx.Module) -> None:
        self.by_id: dict[int, tuple[Any, Any]] = {}  # originals, which live as long as their ids are used, and copies
        for weight, masked in _masked_weights(model):
            self.by_id[id(weight)] = weight, masked
        self.products = [(masked, masked.get_raw_value(), masked.on_set_value) for _, masked in self.by_id.values()]
        self.masks = id(model), "masks"  # what the copy is without
        self.of(model)
        self.contents = {number: _contents(copy) for number, (_, copy) in self.by_id.items()}

    def of(self, tree: Any) -> Any:
        """`tree` itself where it holds no object that has a copy."""
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
        self.by_id[id(leaf)] = leaf, copy  # before its parts, which may hold it
        for name, value in vars(leaf).items():
            if (id(leaf), name) != self.masks:
                vars(copy)[name] = self.of(value) if _is_data(leaf, name) else value
        return copy

    def hand_back(self) -> None:
        """Sets and deletes on the originals what a call set and deleted on the copies."""
        originals = {id(copy): original for original, copy in self.by_id.values()}
        for number, (original, copy) in self.by_id.items():
            before, after = self.contents[number], _contents(copy)
            for name in before.keys() - after.keys():
                vars(original).pop(name, None)
            for name, (leaves, treedef) in after.items():
                if name not in before or not _same(before[name], (leaves, treedef)):
                    owned = [originals.get(id(leaf), leaf) for leaf in leaves]
                    vars(original)[name] = owned[0] if treedef is None else treedef.unflatten(owned)

    def check_weights_are_kept(self) -> None:
        """Raises where a call changed masked weights past the hook, as `nnx.update` does."""
        for masked, product, kept in self.products:
            value = masked.get_raw_value()
            if masked.get_metadata("on_set_value", None) != kept or not _equal(value, product):
                kept(masked, value)


def _equal(value: Any, product: Any) -> bool:
    """Whether an array is the product that it was, or `nnx.jit` inside the call put a copy of it there."""
    if value is product:
        return True
    traced = [isinstance(array, Tracer) for array in (value, product)]
    return all(traced) if any(traced) else bool(jnp.array_equal(value, product, equal_nan=True))


Contents = tuple[list[Any], Any]


def _contents(node: Any) -> dict[str, Contents]:
    """What the attributes of an object hold: leaves and tree structure, or what is static and None."""
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
    """The masked Params of a model, each with one that holds its product with its mask."""
    masks = {}
    for keys, mask in jax.tree.leaves_with_path(getattr(model, "masks", None), is_leaf=_is_object):
        name = trees.name(tuple(str(_key(key)) for key in keys))
        if not isinstance(mask, Mask):
            raise TypeError(f"masks {name!r}: got {type(mask).__name__}, wanted a Mask")
        masks[name] = mask.get_value()
    if not masks:
        raise ValueError(f"{type(model).__name__} has no masks: wanted its attribute 'masks' as `sparsify` makes it")
    weights = {trees.name(tuple(map(str, keys))): weight for keys, weight in _weights(model)}
    values = {name: _raw_value(weights[name]) for name in masks if name in weights}
    for name, value in trees.apply_masks(values, masks).items():
        kept = _RefusesToBeSet(name)
        yield weights[name], weights[name].copy(value, hijax=False, ref=False, on_set_value=kept)


@dataclass(frozen=True)
class _RefusesToBeSet:
    """Hook of a Param for which a product with its mask stands in: what is set there would be lost."""

    name: str

    def __call__(self, variable: nnx.Variable[Any], value: Any) -> Any:
        raise ValueError(f"weights {self.name!r} are masked and are set in a call: set them outside, or mask others")
