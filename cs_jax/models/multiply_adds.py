"""Multiply-adds of a network's forward pass, in total and by masked array.

Multiply-adds are counted in the jaxpr, without running the network, so any Linen module works. Matrix products and
convolutions count. Sums, norms, activations and pools do not count, as in published numbers.
"""

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import PyTree

from cs_jax.core import trees

Origin: TypeAlias = frozenset[str] | None
"""Names of the masks or weights that a value is computed from; None if it depends on the image."""

VARIABLES: Origin = frozenset()
"""Origin of a value that depends neither on the image nor on an array of the counted collection."""

REST = ""
"""Key of the multiply-adds that belong to no array; no array has an empty name."""


def multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiply-adds of one image's forward pass in evaluation mode.

    Pruned weights count, too. The window of a convolution counts in full at the edge of the image. In a
    transposed convolution, the zeros between the input's entries do not count.

    Args:
        model: any Linen module whose call accepts images, with or without an argument `train`.
        image_shape: shape of one image, as in (32, 32, 3).

    Returns:
        The sum over all matrix products and convolutions, including those inside `jit`, `scan` (multiplied by its
        length), `cond` (the most expensive branch) and other functions.

    Raises:
        ValueError: a while loop contains products; its number of iterations is unknown.

    >>> multiply_adds(nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)]), (3,))
    25
    """
    return _count(model, image_shape).total()


def layer_multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> dict[str, int]:
    """Multiply-adds of each masked array: the products and convolutions with this array as one factor.

    All uses of an array are added. An array that is only used in look-ups, sums or entrywise products has 0. A product
    with a value computed from several masked arrays counts for none of these arrays.

    Args:
        model: as for `multiply_adds`.
        image_shape: shape of one image.

    Returns:
        Multiply-adds for one image, by array name in the collection "masks", as in "stage1_block1/conv_a/kernel".

    Raises:
        ValueError: a while loop contains products.

    >>> from cs_jax.models import LeNet300100
    >>> layer_multiply_adds(LeNet300100(), (28, 28, 1))
    {'hidden0/kernel': 235200, 'hidden1/kernel': 30000}
    """
    counts = _count(model, image_shape)
    return {name: counts[name] for name in sorted(set(counts) - {REST})}


def weight_multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> dict[str, int]:
    """Multiply-adds of each weight array, with or without a mask; under `REST`, of products without a weight array.

    Args:
        model: as for `multiply_adds`.
        image_shape: shape of one image.

    Returns:
        Multiply-adds for one image, by array name in the collection "params"; they add up to `multiply_adds`.

    Raises:
        ValueError: a while loop contains products.
    """
    return {REST: 0, **_count(model, image_shape, "params")}


def evaluation_mode(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for a call in evaluation mode: `train=False` if the module's `__call__` has `train`."""
    return {"train": False} if "train" in inspect.signature(type(model).__call__).parameters else {}


def abstract_variables(model: nn.Module, image_shape: Sequence[int]) -> PyTree:
    """Shapes and dtypes of a module's variables, for one image of this shape."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: nn.unbox(model.init(jax.random.key(0), x, **evaluation_mode(model))), image)


def _count(model: nn.Module, image_shape: Sequence[int], collection: str = "masks") -> Counter[str]:
    """Multiply-adds by array name in the collection, also where they are 0, and under `REST`."""
    modes, variables = evaluation_mode(model), abstract_variables(model, image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    closed = jax.make_jaxpr(lambda variables, x: model.apply(variables, x, **modes))(variables, image)
    origins = [
        frozenset([trees.name(path[1:])]) if path[0] == collection else VARIABLES
        for path in trees.leaves_by_path(variables)
    ]
    counts: Counter[str] = Counter({name: 0 for origin in origins for name in origin or ()})
    _walk(closed.jaxpr, [*origins, None], counts)
    return counts


def _walk(jaxpr: Jaxpr, origins: Sequence[Origin], counts: Counter[str], times: int = 1) -> list[Origin]:
    """Adds `times` the multiply-adds of a jaxpr to `counts`; maps origins of its inputs to origins of its outputs."""
    known: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=True))

    def origin(atom: Any) -> Origin:
        return VARIABLES if isinstance(atom, Literal) else known.get(atom, VARIABLES)

    for eqn in jaxpr.eqns:
        inputs = [origin(atom) for atom in eqn.invars]
        if eqn.primitive.name in PRODUCTS:
            counts[_counted_array(inputs)] += times * PRODUCTS[eqn.primitive.name](eqn)
            # A product of variables is not a masked array: later products with it do not count for the array.
            outputs = [None if None in inputs else VARIABLES]
        else:
            outputs = _walk_inner(eqn, inputs, counts, times)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [origin(atom) for atom in jaxpr.outvars]


def _counted_array(factors: Sequence[Origin]) -> str:
    """Name of the only array among the factors of a product, or `REST`."""
    names = _merge([factor for factor in factors if factor is not None])
    return next(iter(names)) if names is not None and len(names) == 1 else REST


def _merge(origins: Sequence[Origin]) -> Origin:
    """Origin of a value computed from values with these origins."""
    return None if None in origins else frozenset().union(*(origin or () for origin in origins))


def _walk_inner(eqn: JaxprEqn, inputs: list[Origin], counts: Counter[str], times: int) -> list[Origin]:
    """Counts the products inside an equation that is not a product itself; returns the origins of its outputs."""
    match eqn.primitive.name:
        case "scan":
            consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
            # The carry may depend on the image from the second iteration on.
            inputs = [*inputs[:consts], *[None] * carried, *inputs[consts + carried :]]
            return _walk(eqn.params["jaxpr"].jaxpr, inputs, counts, times * eqn.params["length"])
        case "while":
            found: Counter[str] = Counter()
            for inner in _jaxprs(eqn):
                _walk(inner, [None] * len(inner.invars), found)
            if found.total():
                raise ValueError(
                    "model: cannot count products in a while loop; use lax.scan or another loop of known length"
                )
            return [None] * len(eqn.outvars)
        case "cond":
            branches = [(Counter(), branch.jaxpr) for branch in eqn.params["branches"]]
            outputs = [_walk(inner, inputs[1:], found, times) for found, inner in branches]
            counts.update(max((found for found, _ in branches), key=Counter.total))
            return [_merge([inputs[0], *each]) for each in zip(*outputs, strict=True)]
    for inner in _jaxprs(eqn):
        if len(inner.invars) == len(inputs) and len(inner.outvars) == len(eqn.outvars):
            return _walk(inner, inputs, counts, times)
        _walk(inner, [None] * len(inner.invars), counts, times)
    return [_merge(inputs)] * len(eqn.outvars)


def _jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: isinstance(value, ClosedJaxpr | Jaxpr))
    found = [value for value in values if isinstance(value, ClosedJaxpr | Jaxpr)]
    return [value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in found]


def _dot_general(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = _shape(eqn.invars[0])
    return math.prod(_shape(eqn.outvars[0])) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: JaxprEqn) -> int:
    images, kernel, out = map(_shape, (*eqn.invars, *eqn.outvars))
    # Output features, then input features of one group, then the window.
    features, per_group, *window = (kernel[axis] for axis in eqn.params["dimension_numbers"].rhs_spec)
    if max(eqn.params["lhs_dilation"], default=1) > 1:
        return math.prod(images) * math.prod(window) * features // eqn.params["feature_group_count"]
    return math.prod(out) * math.prod(window) * per_group


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _convolution}
"""Functions that count the multiply-adds of an equation, by name of its primitive."""
