"""Sparse forms of any Flax Linen module: rules select weights, and the module reads weights multiplied by masks.

A Linen module reads and makes variables through its scope. The class of a sparse module is a subclass that replaces the
scope by a `_View`. In the view, weights are already masked; variables are written as in the original scope. All code of
the module therefore computes with masked weights: methods, submodules taken out of the module, and lifted transforms
inside the module, which need not carry masks.
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

# Flag of a scope: the owners whose weights the scope has masked. Lifted transforms inside a sparse module copy the
# module and its scope with the flags; the copy must not mask the weights again.
_FLAG = "cs_jax_masked"

# At run time the mixin is not a module, so that Flax does not wrap its methods. Type checkers see a module.
_Mixin = nn.Module if TYPE_CHECKING else object


def sparsify(module: M, where: Where = None) -> M:
    """Sparse form of a Linen module: multiplies the weights that rules select by masks.

    The sparse module is an instance of a subclass, with the same fields, methods, variables and paths. `init` makes one
    more collection, "masks": nested dictionaries with ones of the shape, dtype and partitioning of every selected
    weight. A new sparse network therefore computes exactly the same as the dense network. Every `apply` needs the
    masks. Masked layers inside the module have their masks in the same collection.

    Inside another module, masks have the paths of the weights. Transforms around the sparse module, as in
    `nn.scan(type(sparse), ...)` or `nn.RNN(sparse)`, must carry "masks" with "params"; transforms inside it need not.
    In a compact method, make the plain module with `parent=None` and a name; Flax's default name is like
    SparseMLP_0.

    `apply` cannot change "params" and "masks"; if they are mutable, it returns them unchanged. `variables` of a bound
    sparse module contains masked weights; `unbind` returns the plain weights.

    Args:
        module: module that is not bound to variables; it is not changed.
        where: rules for the "params" of the module, as for `select`; None selects the default of `cs_jax.Rule`. Groups
            and target densities of rules apply to scores only. Equal modules and rules make equal sparse modules; two
            lambdas are never equal.

    Returns:
        The sparse module, not bound to variables. In a method of another module, it is a submodule, like every module
        that the method makes.

    Raises:
        TypeError: `module` is not an instance of `nn.Module` or is bound, or `where` has a wrong type.
        ValueError: `module` is already sparse. In `init`, or in `apply` if the module is inside another module: a glob
            or rule selects nothing. In `init`: a selected weight is not a float array, its layer already masks it, or
            its mask cannot be made. In `apply`: a mask is missing or has another shape than its weight. All messages
            except the first name the weights.

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
        raise TypeError(f"module {module.__name__}: must be an instance, not a class, as in sparsify(MLP(...))")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module {module!r}: must be an instance of flax.linen.Module, as in sparsify(MLP(...))")
    name = type(module).__name__
    if isinstance(module, _Sparse):
        raise ValueError(f"module {name}: must not be sparse already; pass the plain module with all rules at once")
    if module.scope is not None:
        raise TypeError(
            f"module {name}: must not be bound to variables; in a method of another module, make it with parent=None, "
            f"as in sparsify({name}(..., parent=None))"
        )


@functools.cache
def _sparse_class(dense: type[nn.Module], rules: Rules) -> type[nn.Module]:
    """The sparse subclass of a class; cached, so that instances with equal rules can be equal."""
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
    # Set after the class is made, because Flax sets `scope` to None in every new class. Classes that lifted transforms
    # derive from this one keep Flax's None: they need the plain scope. Inside the transform, this class masks the
    # variables that the transform carries.
    sparse.scope = _ScopeDescriptor()  # pyright: ignore[reportAttributeAccessIssue]
    return sparse


class _Sparse(_Mixin):
    """Mixin of all sparse classes; comes before the plain class in the list of base classes."""

    _dense_class: ClassVar[type[nn.Module]]
    _rules: ClassVar[Rules]

    def _call_wrapped_method(self, fun: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls a method of the module; Flax calls every method of a module through this hook.

        An instance of a class that a lifted transform or a user derives from the sparse class has a plain scope. Its
        methods without a transform run in a view of that scope.
        """
        plain, view = self.scope, _view_of(self.scope, self._rules)
        if plain is None or view is plain:
            return super()._call_wrapped_method(fun, args, kwargs)
        object.__setattr__(self, "scope", view)
        try:
            return super()._call_wrapped_method(fun, args, kwargs)
        finally:
            object.__setattr__(self, "scope", plain if self.scope is view else plain.rewound())

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.init_with_output`, with a ValueError if rules select nothing."""
        output, variables = super().init_with_output(*args, **kwargs)
        complete = kwargs.get("method") is None and not self._is_derived()
        if complete or "masks" not in variables:
            select(variables.get("params", {}), self._rules)
        return output, variables

    def unbind(self) -> Any:
        """`nn.Module.unbind`, with the weights before masking."""
        module, variables = super().unbind()
        return module, vars(self)["_plain_scope"].variables() if "_plain_scope" in vars(self) else variables

    def _is_derived(self) -> bool:
        """Whether the class is derived from the sparse class, so that its weights may be stacked."""
        return "_rules" not in vars(type(self))

    def __repr__(self) -> str:
        where = tuple(rule.where for rule in self._rules)
        return f"sparsify({super().__repr__().removeprefix('Sparse')}, where={where if where[1:] else where[0]!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._is_derived():
            return super().__reduce_ex__(protocol)
        return _empty_instance, (self._dense_class, self._rules), vars(self)


def _empty_instance(dense: type[nn.Module], rules: Rules) -> nn.Module:
    """Instance without attributes, for pickle to fill."""
    return object.__new__(_sparse_class(dense, rules))


class _ScopeDescriptor:
    """Descriptor of the attribute `scope` of sparse modules: replaces the scope that Flax sets by a view of it."""

    def __get__(self, module: Any, owner: Any = None) -> Scope | None:
        return None if module is None else vars(module).get("scope")

    def __set__(self, module: Any, scope: Scope | None) -> None:
        view = _view_of(scope, module._rules)
        if view is not scope:
            vars(module)["_plain_scope"] = scope
        vars(module)["scope"] = view


class _View(Scope):
    """Scope in which weights are already masked; in `init`, a scope that makes a mask for every new selected weight.

    Attributes:
        owners: sparse modules that select weights here, from the outermost module to the module of the view.
    """

    owners: tuple[Owner, ...]

    @classmethod
    def of(cls, scope: Scope, owners: tuple[Owner, ...], **changes: Any) -> "_View":
        """View with the attributes of `scope`, except `changes`; like `Scope.rewound`."""
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
        # A masked layer calls this method before reading or making its mask, so this error is raised first.
        weights = trees.leaves_by_path({name: self.get_variable("params", name)}) if col == "masks" else {}
        if (name,) in weights and self._times_selected((name,), weights[(name,)]):
            raise ValueError(self._already_masked((name,)))
        return super().has_variable(col, name)

    def _make_mask(self, path: Path, boxed: Any) -> None:
        """Makes the mask of a new weight, ones in "masks", if a sparse module selects the weight."""
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
                f"{trees.name(full)}: cannot make its mask, because a lifted transform around the sparse module does "
                "not carry the collection 'masks'; name 'masks' with 'params', as in variable_axes={'params': 0, "
                "'masks': 0}, and in mutable= if you set mutable="
            )
        mask = jax.tree.map(jnp.ones_like, boxed)
        super().put_variable("masks", path[0], trees.nest({path[1:]: mask}))

    def _times_selected(self, path: Path, weight: Any) -> int:
        """Number of nested sparse modules that select the weight under `path`, relative to this scope."""
        full = (*self.path, *path)
        return sum(len(_selected({full[len(origin) :]: weight}, rules)) for origin, rules in self.owners)

    def _already_masked(self, path: Path) -> str:
        return (
            f"{trees.name((*self.path, *path))}: already has a mask, from its layer or from a sparse module around "
            "or inside this module; exclude the weight in `where`, with a glob that starts with '!'"
        )


def _view_of(scope: Scope | None, rules: Rules) -> Scope | None:
    """View of the scope of a sparse module, or the scope itself if its weights are already masked."""
    if scope is None or type(scope) not in (Scope, _View):  # Flax runs `setup` once on a scope of another type
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
        changes |= {"parent": _RootParent(scope), "name": _RootParent.child_name}
    return _View.of(scope, owners, **changes)


class _RootParent:
    """Parent for the view of a root scope: the view reads and makes all other collections in the root."""

    child_name = "root"
    name = None
    parent = None

    def __init__(self, root: Scope) -> None:
        self.root = root

    def _collection(self, col: str) -> Any:
        found = self.root._variables
        return {self.child_name: found[col]} if col in found else {}

    def _mutable_collection(self, col: str) -> Any:
        return {self.child_name: self.root._mutable_collection(col)}


def _masked_variables(scope: Scope, rules: Rules) -> dict[str, Any]:
    """Variables at `scope`: weights, where selected weights are masked, and the masks of masked layers inside."""
    params, masks = _collection(scope, "params"), _collection(scope, "masks")
    weights, found = trees.leaves_by_path(params), trees.leaves_by_path(masks)
    selected = _selected(weights, rules)
    if weights and (scope.path or not selected):
        # Raises if a rule selects nothing. At the root, "params" may contain only the weights of one method.
        select(params, rules)
    for path in selected:
        if path not in found:
            if isinstance(scope, _View) and scope._times_selected(path, weights[path]):
                raise ValueError(scope._already_masked(path))
            raise ValueError(
                f"{trees.name((*scope.path, *path))}: needs a mask in the collection 'masks'; apply the model to "
                "{'params': ..., 'masks': ...}"
            )
    # Under full paths, for the error messages of apply_masks.
    chosen = trees.nest({(*scope.path, *path): found[path] for path in selected})
    masked = trees.apply_masks(trees.nest({scope.path: params}), chosen)
    for key in scope.path:
        masked = masked[key]
    others = {path: mask for path, mask in _boxed_leaves(masks).items() if path not in selected}
    return {"params": masked, "masks": trees.nest(others)}


def _selected(weights: Mapping[Path, Any], rules: Rules) -> list[Path]:
    """Paths of the weights that rules select; rules may select nothing."""
    found = {path for rule in rules for path in selected_by(rule, weights, {})}
    return [path for path in weights if path in found]


def _collection(scope: Scope, col: str) -> PyTree:
    """Variables of a collection at `scope`; empty if it has none."""
    return scope._collection(col)


def _boxed_leaves(tree: PyTree) -> dict[Path, Any]:
    """Leaves by path, each in the Linen box with its partitioning if it has one."""
    boxed = jax.tree.leaves(tree, is_leaf=meta.is_axis_metadata)
    return dict(zip(trees.leaves_by_path(tree), boxed, strict=True))
