"""Any Flax Linen module made sparse as it is: rules select its weights, which it then reads multiplied by masks.

A Linen module reads and makes variables through its scope. A sparse module is of a subclass that puts a `_View` in the
place of its scope: there the weights are masked already, and all that is written goes where it would have gone. So
whatever the module does, it does with masked weights: in methods, in submodules taken out of it, and in lifted
transforms inside it, which need not carry masks.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope, meta
from flax.core.scope import subtract_filters
from jaxtyping import PyTree

from cs_jax.core import trees
from cs_jax.core.rules import Rule, Where, as_rules, select, selected_by
from cs_jax.core.trees import Path

M = TypeVar("M", bound=nn.Module)
Rules = tuple[Rule, ...]

Owner = tuple[Path, Rules]
"""Path and rules of a sparse module."""

# Flag of scopes: the owners whose weights are masked there. Lifted transforms inside a sparse module make copies of it,
# on copies of its scope that keep the flags; there it must not mask once more.
_FLAG = "cs_jax_masked"

# The mixin is no module itself, so that Flax does not wrap its methods; type checkers see one.
_Mixin = nn.Module if TYPE_CHECKING else object


def sparsify(module: M, where: Where = None) -> M:
    """A module like `module`, in which the weights that rules select are multiplied by masks.

    It is an instance of a subclass, with the same fields, methods, variables and paths. `init` makes one collection
    more, "masks": nested dictionaries with ones of the shape, dtype and partitioning of every selected weight, as
    masked layers make them, so that a fresh sparse network *is* the dense network. Every `apply` needs them. Masked
    layers inside keep masks of their own in the same collection.

    Inside another module, masks are looked for under the paths of the weights. Transforms around the sparse module, as
    in `nn.scan(type(sparse), ...)` or `nn.RNN(sparse)`, have to carry "masks" beside "params"; transforms inside it
    need not. In a compact method, make the plain module with `parent=None` and a name; without one it is SparseMLP_0.

    `apply` cannot change "params" and "masks"; where they are mutable it gives them back as they were. `variables` of a
    bound sparse module has the masked weights in it, `unbind` gives the plain ones.

    Args:
        module: stays as it is; not bound to variables.
        where: rules over the module's own "params", as for `select`; the default masks weights of two or more axes
            that are no biases, embeddings, norms or classifier heads. Groups and target densities matter to scores
            alone. Equal modules and rules make equal sparse modules; two lambdas are never equal.

    Returns:
        The sparse module: not bound, or in a method of another module, the submodule that any module made there is.

    Raises:
        TypeError: `module` is no instance of `nn.Module` or is bound, or `where` is no rule.
        ValueError: `module` is sparse already. In `init`, but in `apply` where it is inside another module: a glob or
            rule selects nothing. In `init`: a selected weight is no float array, or masked by its layer already. In
            `apply`: a mask is missing or has another shape than its weight. All but the first name the weights.

    >>> sparse = sparsify(nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(1)]), where="**/kernel")
    >>> variables = sparse.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> jax.tree.map(jnp.shape, variables["masks"])
    {'layers_0': {'kernel': (2, 3)}, 'layers_2': {'kernel': (3, 1)}}
    >>> masks = jax.tree.map(jnp.zeros_like, variables["masks"])
    >>> sparse.apply({"params": variables["params"], "masks": masks}, jnp.ones((1, 2)))
    Array([[0.]], dtype=float32)
    """
    _check_module(module)
    rules = tuple(Rule(rule.where) for rule in as_rules(where))
    fields = [field.name for field in dataclasses.fields(module) if field.init and field.name != "parent"]
    sparse: Any = _sparse_class(type(module), rules)
    return sparse(**{name: getattr(module, name) for name in fields})


def _check_module(module: Any) -> None:
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise TypeError(f"module: got the class {module.__name__}, wanted an instance, as in sparsify(MLP(...))")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {module!r}, wanted an instance of flax.linen.Module, as in sparsify(MLP(...))")
    name = type(module).__name__
    if isinstance(module, _Sparse):
        raise ValueError(f"module: {name} is sparse already; wanted the plain module, and all rules at once")
    if module.scope is not None:
        raise TypeError(
            f"module: {name} is bound to variables, wanted one that is not; where it is made in a method of another "
            f"module, make it with parent=None, as in sparsify({name}(..., parent=None))"
        )


@functools.cache
def _sparse_class(dense: type[nn.Module], rules: Rules) -> type[nn.Module]:
    """The sparse subclass of a class: one for equal rules, so that its instances can be equal."""
    namespace = {
        "_dense_class": dense,
        "_rules": rules,
        "__eq__": dense.__eq__,
        "__hash__": dense.__hash__,
        "__module__": dense.__module__,
        "__qualname__": f"Sparse{dense.__qualname__}",
        "__doc__": f"`{dense.__name__}` with masked weights, made by `cs_jax.sparsify`.\n\n{dense.__doc__}",
    }
    sparse = types.new_class(f"Sparse{dense.__name__}", (_Sparse, dense), {}, lambda body: body.update(namespace))
    # Afterwards: Flax sets it to None in every new class, also in those that lifted transforms make of this one. They
    # have to see the plain scope, so that inside the transform this class sees, and masks, what they carry.
    sparse.scope = _ViewedScope()  # pyright: ignore[reportAttributeAccessIssue]
    return sparse


class _Sparse(_Mixin):
    """What a sparse class has in front of the plain one."""

    _dense_class: ClassVar[type[nn.Module]]
    _rules: ClassVar[Rules]

    def _call_wrapped_method(self, fun: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls a method of the module: Flax does it here for all of them.

        An instance of a class that was made of the sparse class, by a lifted transform or by inheritance, has a plain
        scope; methods that are not transformed are called in a view of it.
        """
        plain, view = self.scope, _viewed(self.scope, self._rules)
        if plain is None or view is plain:
            return super()._call_wrapped_method(fun, args, kwargs)
        object.__setattr__(self, "scope", view)
        try:
            return super()._call_wrapped_method(fun, args, kwargs)
        finally:
            object.__setattr__(self, "scope", plain if self.scope is view else plain.rewound())

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.init_with_output`; an error if rules select nothing."""
        output, variables = super().init_with_output(*args, **kwargs)
        complete = kwargs.get("method") is None and not self._is_derived()
        if complete or "masks" not in variables:
            select(variables.get("params", {}), self._rules)
        return output, variables

    def unbind(self) -> Any:
        """`nn.Module.unbind`, with the weights as they were before they were masked."""
        module, variables = super().unbind()
        return module, vars(self)["_plain_scope"].variables() if "_plain_scope" in vars(self) else variables

    def _is_derived(self) -> bool:
        """Whether its class was made of the sparse class, so that its weights may be stacked."""
        return "_rules" not in vars(type(self))

    def __repr__(self) -> str:
        where = tuple(rule.where for rule in self._rules)
        return f"sparsify({super().__repr__().removeprefix('Sparse')}, where={where if where[1:] else where[0]!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._is_derived():
            return super().__reduce_ex__(protocol)
        return _unpickled, (self._dense_class, self._rules), vars(self)


def _unpickled(dense: type[nn.Module], rules: Rules) -> nn.Module:
    """An empty instance, whose attributes pickle sets."""
    return object.__new__(_sparse_class(dense, rules))


class _ViewedScope:
    """The attribute `scope` of sparse modules: a view of the scope that Flax sets."""

    def __get__(self, module: Any, owner: Any = None) -> Scope | None:
        return None if module is None else vars(module).get("scope")

    def __set__(self, module: Any, scope: Scope | None) -> None:
        view = _viewed(scope, module._rules)
        if view is not scope:
            vars(module)["_plain_scope"] = scope
        vars(module)["scope"] = view


class _View(Scope):
    """A scope in which weights are masked already, or in `init`, in which a mask is made with every weight.

    Attributes:
        owners: the sparse module that it belongs to, after sparse modules around that one.
    """

    owners: tuple[Owner, ...]

    @classmethod
    def of(cls, scope: Scope, owners: tuple[Owner, ...], **changes: Any) -> "_View":
        """A view that has all in common with `scope` but `changes`, as in `Scope.rewound`."""
        names = ("rngs", "name", "mutable", "parent", "path", "debug_path", "flags")
        same = {"variables": scope._variables, **{name: getattr(scope, name) for name in names}}
        view = cls(**(same | changes))
        view.rng_counters = scope.rng_counters
        view.reservations = scope.reservations
        view.owners = owners
        return view

    def push(self, name: str | None = None, prefix: str = "", reuse: bool = False) -> Scope:
        return _View.of(super().push(name, prefix, reuse), self.owners)

    def rewound(self, rewind_rngs: bool = False) -> Scope:
        return _View.of(super().rewound(rewind_rngs), self.owners)

    def put_variable(self, col: str, name: str, value: Any) -> None:
        if col != "params":
            return super().put_variable(col, name, value)
        before = _boxed_leaves({name: self.get_variable(col, name)})
        super().put_variable(col, name, value)
        for path, boxed in _boxed_leaves({name: self.get_variable(col, name)}).items():
            if path not in before:
                self._make_mask(path, boxed)

    def has_variable(self, col: str, name: str) -> bool:
        # A masked layer asks for its mask before it reads or makes it.
        weights = trees.leaves_by_path({name: self.get_variable("params", name)}) if col == "masks" else {}
        if (name,) in weights and self._times_selected((name,), weights[(name,)]):
            raise ValueError(self._already_masked((name,)))
        return super().has_variable(col, name)

    def _make_mask(self, path: Path, boxed: Any) -> None:
        """Puts ones in "masks" for a new weight, if a sparse module selects it."""
        (weight,) = jax.tree.leaves(boxed)
        times = self._times_selected(path, weight)
        if times == 0:
            return
        if times > 1 or path in trees.leaves_by_path(_collection(self, "masks")):
            raise ValueError(self._already_masked(path))
        full = (*self.path, *path)
        trees.check_float(weight, full)
        if not self.is_mutable_collection("masks"):
            raise ValueError(
                f"{trees.name(full)} cannot get its mask: a lifted transform around the sparse module does not carry "
                "the collection 'masks'; name it beside 'params', as in variable_axes={'params': 0, 'masks': 0} (or "
                "in mutable=, where that was given)"
            )
        mask = jax.tree.map(jnp.ones_like, boxed)
        super().put_variable("masks", path[0], trees.nest({path[1:]: mask}))

    def _times_selected(self, path: Path, weight: Any) -> int:
        """How many sparse modules, one inside the other, select the weight under `path` from here."""
        full = (*self.path, *path)
        return sum(len(_selected({full[len(origin) :]: weight}, rules)) for origin, rules in self.owners)

    def _already_masked(self, path: Path) -> str:
        return (
            f"{trees.name((*self.path, *path))} is already masked, by its layer or by a sparse module around or inside "
            "this one; wanted `where` to leave it out, as a glob after '!' does"
        )


def _viewed(scope: Scope | None, rules: Rules) -> Scope | None:
    """The view that a sparse module at `scope` gets, or `scope` itself where its weights are masked already."""
    if scope is None or type(scope) not in (Scope, _View):  # Flax tries out `setup` on one of another type
        return scope
    owner = (scope.path, rules)
    masked: tuple[Owner, ...] = scope.flags.get(_FLAG, ())  # pyright: ignore[reportAssignmentType]
    if owner in masked:
        return scope
    flags = {**scope.flags, _FLAG: (*masked, owner)}
    owners = (*getattr(scope, "owners", ()), owner)
    empty = scope.is_mutable_collection("params") and not _collection(scope, "params")
    if empty or scope.get_flag("initializing", False):
        return _View.of(scope, owners, flags=flags)
    changes = {
        "variables": _masked_variables(scope, rules),
        "mutable": subtract_filters(scope.mutable, ("params", "masks")),
        "flags": flags,
    }
    if scope.parent is None:
        changes |= {"parent": _Above(scope), "name": _Above.name_below}
    return _View.of(scope, owners, **changes)


class _Above:
    """The parent of a root scope's view: through it the view finds, and makes, collections other than its own."""

    name_below = "root"
    name = None
    parent = None

    def __init__(self, root: Scope) -> None:
        self.root = root

    def _collection(self, col: str) -> Any:
        found = self.root._variables
        return {self.name_below: found[col]} if col in found else {}

    def _mutable_collection(self, col: str) -> Any:
        return {self.name_below: self.root._mutable_collection(col)}


def _masked_variables(scope: Scope, rules: Rules) -> dict[str, Any]:
    """The weights at `scope`, those that rules select masked, and the masks that are left for layers inside."""
    params, masks = _collection(scope, "params"), _collection(scope, "masks")
    weights, found = trees.leaves_by_path(params), trees.leaves_by_path(masks)
    selected = _selected(weights, rules)
    if weights and (scope.path or not selected):
        select(params, rules)  # a part of the weights may be missing, but hardly inside another module
    for path in selected:
        if path not in found:
            if isinstance(scope, _View) and scope._times_selected(path, weights[path]):
                raise ValueError(scope._already_masked(path))
            raise ValueError(
                f"{trees.name((*scope.path, *path))} has no mask: the collection 'masks' is missing or does not hold "
                "it; apply the model to {'params': ..., 'masks': ...}"
            )
    # With their whole paths, for errors to name.
    chosen = trees.nest({(*scope.path, *path): found[path] for path in selected})
    masked = trees.apply_masks(trees.nest({scope.path: params}), chosen)
    for key in scope.path:
        masked = masked[key]
    left = {path: mask for path, mask in _boxed_leaves(masks).items() if path not in selected}
    return {"params": masked, "masks": trees.nest(left)}


def _selected(weights: Mapping[Path, Any], rules: Rules) -> list[Path]:
    """What rules select of some of the weights."""
    found = {path for rule in rules for path in selected_by(rule, weights, {})}
    return [path for path in weights if path in found]


def _collection(scope: Scope, col: str) -> PyTree:
    """A collection's variables at `scope`; empty where it has none."""
    return scope._collection(col)


def _boxed_leaves(tree: PyTree) -> dict[Path, Any]:
    """Leaves by path, in the boxes that hold their partitioning where they have some."""
    boxed = jax.tree.leaves(tree, is_leaf=meta.is_axis_metadata)
    return dict(zip(trees.leaves_by_path(tree), boxed, strict=True))
