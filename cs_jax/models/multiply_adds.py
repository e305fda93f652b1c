"""What a network's forward pass costs: multiply-adds, in all and by masked array. Nothing is computed to count them.

The count is read off the jaxpr, so it holds for any Linen module, whatever its layers are made of. Products of
matrices and convolutions count; sums, norms, activations and pools do not, as published figures have it.
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

from cs_jax.core import trees

Origin: TypeAlias = frozenset[str] | None
"""Names of the masks, or weights, that a value is made of, if it is made of variables alone; None if the image is in
it."""

VARIABLES: Origin = frozenset()

REST = ""
"""What multiply-adds without a masked array count under; no array has an empty name."""


def multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiply-adds of one image's forward pass in evaluation mode, with every weight counted, masked to 0 or not.

    A convolution's window counts in full at the image's edge, and of an input dilated with zeros (a transposed
    convolution) only the input's own entries count.

    Args:
        model: any Linen module that is called with images, and with `train` if its `__call__` has that.
        image_shape: of one image, as in (32, 32, 3).

    Returns:
        The sum over all matrix products and convolutions, also inside `jit`, `scan` (times its length), `cond` (the
        dearest branch) and so on.

    Raises:
        ValueError: there are products in a while loop, which says nothing of how often it runs.

    >>> multiply_adds(nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)]), (3,))
    25
    """
    return _count(model, image_shape).total()


def layer_multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> dict[str, int]:
    """Multiply-adds of each masked array: those of the products that it is one side of, as in `multiply_adds`.

    An array that is used more than once has them all; one that is only looked up, added or multiplied entry by entry
    has 0. A product with an array that was put together from several masked ones is none of theirs.

    Args:
        model: as for `multiply_adds`.
        image_shape: of one image.

    Returns:
        A number for every array of the collection "masks", by its name, as in "stage1_block1/conv_a/kernel".

    Raises:
        ValueError: as `multiply_adds`.

    >>> from cs_jax.models import LeNet300100
    >>> layer_multiply_adds(LeNet300100(), (28, 28, 1))
    {'hidden0/kernel': 235200, 'hidden1/kernel': 30000}
    """
    counts = _count(model, image_shape)
    return {name: counts[name] for name in sorted(set(counts) - {REST})}


def weight_multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> dict[str, int]:
    """Multiply-adds of each array of weights, masked or not, and of products without one under `REST`.

    Args:
        model: as for `multiply_adds`.
        image_shape: of one image.

    Returns:
        A number for every array of the collection "params", by its name; in all those of `multiply_adds`.

    Raises:
        ValueError: as `multiply_adds`.
    """
    return {REST: 0, **_count(model, image_shape, "params")}


def evaluation_mode(model: nn.Module) -> dict[str, Any]:
    """Keywords that a module is called with to evaluate it: `train=False` if its `__call__` has that."""
    return {"train": False} if "train" in inspect.signature(type(model).__call__).parameters else {}


def _count(model: nn.Module, image_shape: Sequence[int], collection: str = "masks") -> Counter[str]:
    """Multiply-adds by the name of the collection's array, 0 included, or `REST`."""
    modes = evaluation_mode(model)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: nn.unbox(model.init(jax.random.key(0), x, **modes)), image)
    closed = jax.make_jaxpr(lambda variables, x: model.apply(variables, x, **modes))(variables, image)
    origins = [
        frozenset([trees.name(path[1:])]) if path[0] == collection else VARIABLES
        for path in trees.leaves_by_path(variables)
    ]
    counts: Counter[str] = Counter({name: 0 for origin in origins for name in origin or ()})
    _walk(closed.jaxpr, [*origins, None], counts)
    return counts


def _walk(jaxpr: Jaxpr, origins: Sequence[Origin], counts: Counter[str], times: int = 1) -> list[Origin]:
    """Adds `times` a jaxpr's multiply-adds to `counts`; returns the origins of its outputs, given its inputs'."""
    known: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=True))

    def origin(atom: Any) -> Origin:
        return VARIABLES if isinstance(atom, Literal) else known.get(atom, VARIABLES)

    for eqn in jaxpr.eqns:
        inputs = [origin(atom) for atom in eqn.invars]
        if eqn.primitive.name in PRODUCTS:
            counts[_owner(inputs)] += times * PRODUCTS[eqn.primitive.name](eqn)
            # A product is no weight: what it is multiplied by next is not a cost of the mask.
            outputs = [None if None in inputs else VARIABLES]
        else:
            outputs = _walk_inner(eqn, inputs, counts, times)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [origin(atom) for atom in jaxpr.outvars]


def _owner(sides: Sequence[Origin]) -> str:
    names = _together([side for side in sides if side is not None])
    return next(iter(names)) if names is not None and len(names) == 1 else REST


def _together(origins: Sequence[Origin]) -> Origin:
    return None if None in origins else frozenset().union(*(origin or () for origin in origins))


def _walk_inner(eqn: JaxprEqn, inputs: list[Origin], counts: Counter[str], times: int) -> list[Origin]:
    """Counts what is inside an equation that is no product itself; returns the origins of its outputs."""
    match eqn.primitive.name:
        case "scan":
            consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
            # What is carried may have the image in it from the second iteration on.
            inputs = [*inputs[:consts], *[None] * carried, *inputs[consts + carried :]]
            return _walk(eqn.params["jaxpr"].jaxpr, inputs, counts, times * eqn.params["length"])
        case "while":
            found: Counter[str] = Counter()
            for inner in _jaxprs(eqn):
                _walk(inner, [None] * len(inner.invars), found)
            if found.total():
                raise ValueError("model: got products in a while loop, wanted a loop of known length, as of lax.scan")
            return [None] * len(eqn.outvars)
        case "cond":
            branches = [(Counter(), branch.jaxpr) for branch in eqn.params["branches"]]
            outputs = [_walk(inner, inputs[1:], found, times) for found, inner in branches]
            counts.update(max((found for found, _ in branches), key=Counter.total))
            return [_together([inputs[0], *each]) for each in zip(*outputs, strict=True)]
    for inner in _jaxprs(eqn):
        if len(inner.invars) == len(inputs) and len(inner.outvars) == len(eqn.outvars):
            return _walk(inner, inputs, counts, times)
        _walk(inner, [None] * len(inner.invars), counts, times)
    return [_together(inputs)] * len(eqn.outvars)


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
"""How the multiply-adds of an equation are counted, by its primitive."""
