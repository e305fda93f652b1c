"""Rules that select the weights to mask, by path or by a function, and set groups and target densities."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree
from wcmatch import glob

from cs_jax.core import trees
from cs_jax.core.default_rules import default_weights, module_kinds
from cs_jax.core.groups import LAYOUTS, NM, AxisHints, Group, Grouping, Layout, check_group, grouping
from cs_jax.core.selection import Budget, Selection
from cs_jax.core.trees import Path

Predicate = Callable[[str, Any], bool]


@dataclass(frozen=True)
class Rule:
    """Selection of weights to mask, with the group of weights per score and an optional target density.

    Attributes:
        where: None, a glob, a sequence of globs, or a function.
            None selects the default: float arrays of two or more axes with a usual name for weights, such as `kernel`,
            `weight` or `w`, except in embeddings, norms and classifier heads, which are recognized by name.
            A glob is compared with the path of a weight, such as "encoder/layers/0/kernel". `*` matches one part of a
            path, `**` any number of parts, `{a,b}` matches a or b. A glob without a slash is compared only with the
            last part. A glob that starts with `!` excludes weights that the other globs select; if all globs start with
            `!`, they exclude weights from the default.
            A function receives the path as text and the array (or a tracer or `jax.ShapeDtypeStruct`), and returns
            whether to mask the weight.
        group: weights that share a score: "entry", "output_channel", "input_channel", `Axes`, `Block`, `Head` or `NM`.
        layout: position of the input and output axes: "auto" decides by the name of the array, "in_out" means
            (..., input, output) as in Flax and Haiku, "out_in" means (output, input, ...) as in Equinox and PyTorch.
        stacked: number of leading axes along which layers are stacked, as by `nn.scan` and `eqx.filter_vmap`; a group
            never spans several layers. None means 0, but if the group depends on the input or output axis, weights of
            three axes outside Flax's attention raise an error: they could be a 1D convolution kernel or a stack of
            dense kernels.
        target_density: share of the rule's weights that the ticket keeps, in (0, 1]; None means that only the target
            of the whole network applies.

    Raises:
        TypeError: `where`, `group` or `target_density` has a wrong type.
        ValueError: an attribute is out of range, or an N:M group has a target density.
    """

    where: str | Sequence[str] | Predicate | None = None
    group: Group = "entry"
    layout: Layout = "auto"
    stacked: int | None = None
    target_density: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.where, Sequence) and not isinstance(self.where, str):
            object.__setattr__(self, "where", tuple(self.where))
        patterns = self.where if isinstance(self.where, tuple) else (self.where,)
        are_globs = bool(patterns) and all(isinstance(pattern, str) for pattern in patterns)
        if not (are_globs or self.where is None or callable(self.where)):
            raise TypeError(f"where {self.where!r}: must be a glob, a list of globs, or a function of path and array")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r}: must be one of {', '.join(LAYOUTS)}")
        if self.stacked is not None and (type(self.stacked) is not int or self.stacked < 0):
            raise ValueError(f"stacked {self.stacked!r}: must be a whole number of at least 0, or None")
        check_group(self.group)
        if self.target_density is not None:
            check_density(self.target_density)
            if isinstance(self.group, NM):
                raise ValueError(
                    f"target_density {self.target_density:g}: must be None for group NM({self.group.n}, "
                    f"{self.group.m}), whose density is {self.group.n / self.group.m:g}"
                )


Where = None | str | Predicate | Rule | Sequence[str] | Sequence[Rule]
"""Type of `where` arguments: a value of `Rule.where`, a rule, or a sequence of rules. If several rules select a weight,
the first of these rules applies."""


def select(
    params: PyTree, where: Where = None, *, target_density: float | None = None, allow_empty_layers: bool = False
) -> Selection:
    """Selection of the weights of `params` to mask.

    Args:
        params: weights of any model: arrays, tracers or `jax.ShapeDtypeStruct` in any pytree.
        where: rules; None selects the default of `Rule.where`.
        target_density: share of all masked weights that the ticket keeps, in (0, 1]. Rules with targets and N:M groups
            keep their densities; the other masked weights are pruned so that the total is met. None sets no target.
        allow_empty_layers: whether a ticket may prune all weights of a masked array.

    Returns:
        The selection, with the masked arrays in the order of the leaves of `params`.

    Raises:
        TypeError: `where` has a wrong type, or `target_density` is traced or not a number.
        ValueError: a glob or rule selects nothing, or everything including biases; a selected leaf is not a real float
            array, or is empty; a group does not fit; a target is out of range or cannot be met. The message names the
            weights or the argument.
    """
    leaves = trees.leaves_by_path(params)
    rules = as_rules(where)
    kinds = module_kinds(params)
    chosen: dict[Path, int] = {}
    for index, rule in enumerate(rules):
        _check_rule(rule, leaves)
        for path in selected_by(rule, leaves, kinds):
            _check_maskable(leaves[path], path)
            chosen.setdefault(path, index)
    if not chosen:
        raise ValueError(f"params with {_listed(leaves)}: the rules select no weights to mask; set `where`")
    for index, rule in enumerate(rules):
        if index not in chosen.values():
            raise ValueError(
                f"rule {rule.where!r}: must select a weight that no earlier rule selects; remove the rule, or "
                "move it to the front"
            )
    ordered = [path for path in leaves if path in chosen]
    masked = tuple(_grouping(path, leaves, rules[chosen[path]]) for path in ordered)
    owners = [chosen[path] for path in ordered]
    budgets = _budgets(masked, owners, rules, target_density, allow_empty_layers)
    return Selection(masked, budgets, allow_empty_layers)


def _check_maskable(weight: Any, path: Path) -> None:
    trees.check_float(weight, path)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weights {trees.name(path)!r} of dtype {weight.dtype}: must have a real float dtype")
    if 0 in weight.shape:
        raise ValueError(f"weights {trees.name(path)!r} of shape {weight.shape}: must have an entry to mask")


def _grouping(path: Path, leaves: Mapping[Path, Any], rule: Rule) -> Grouping:
    projections = ((*path[:-2], name, "kernel") for name in ("query", "key", "value", "out"))
    in_attention = path[-1:] == ("kernel",) and all(projection in leaves for projection in projections)
    return grouping(path, leaves[path], rule.group, AxisHints(rule.layout, rule.stacked, in_attention))


def by_entry(weights: PyTree) -> Selection:
    """Selection of all arrays in `weights`, with one score per entry and without budgets.

    Args:
        weights: arrays, tracers or `jax.ShapeDtypeStruct` with the shapes of the masked weights, such as the masks or
            scores of a network.
    """
    return Selection(tuple(grouping(path, leaf, "entry") for path, leaf in trees.leaves_by_path(weights).items()))


def with_budgets(
    selection: Selection,
    *,
    target_density: float | None = None,
    per_layer: bool = False,
    allow_empty_layers: bool = False,
) -> Selection:
    """The selection with budgets for a target density.

    Args:
        selection: masked arrays and groups, without budgets.
        target_density: share of the masked weights that the ticket keeps, in (0, 1]; None sets no target.
        per_layer: whether the target density applies to each array separately, instead of to all arrays together.
        allow_empty_layers: whether a ticket may prune all weights of a masked array.

    Raises:
        TypeError: `target_density` is traced or not a number.
        ValueError: `target_density` is out of range or cannot be met.
    """
    masked = selection.masked
    if per_layer:
        rules = [Rule(target_density=target_density) for _ in masked]
        budgets = _budgets(masked, range(len(masked)), rules, None, allow_empty_layers)
    else:
        budgets = _budgets(masked, [0] * len(masked), [Rule()], target_density, allow_empty_layers)
    return Selection(masked, budgets, allow_empty_layers)


def as_rules(where: Where) -> tuple[Rule, ...]:
    """`where` as a tuple of rules; if several rules select a weight, the first of these rules applies."""
    if isinstance(where, Rule):
        return (where,)
    if isinstance(where, Sequence) and not isinstance(where, str):
        if not where:
            raise ValueError(f"where {where!r}: must contain a glob or rule")
        rules = [entry for entry in where if isinstance(entry, Rule)]
        if rules and len(rules) < len(where):
            raise TypeError("where: must not mix globs and rules; write Rule(glob) for a glob")
        if rules:
            return tuple(rules)
        return (Rule(tuple(entry for entry in where if not isinstance(entry, Rule))),)
    return (Rule(where),)


def check_density(value: Any, name: str = "target_density") -> None:
    """Raises a TypeError or ValueError unless `value` is a number in (0, 1]; `name` is the argument in the message."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name}: must not be traced, because it fixes the number of kept weights; pass a number")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(f"{name} {value!r}: must be a number")
    if not 0 < value <= 1:
        raise ValueError(f"{name} {value:g}: must be a share above 0 and at most 1")


def selected_by(rule: Rule, leaves: Mapping[Path, Any], kinds: Mapping[Path, str]) -> list[Path]:
    """Paths of the leaves that a rule selects, in the order of `leaves`; globs may match nothing.

    Args:
        rule: rule whose `where` selects.
        leaves: arrays, tracers or `jax.ShapeDtypeStruct`, by path.
        kinds: class names of the modules, by path, as from `module_kinds`; may be incomplete.
    """
    if rule.where is None:
        return default_weights(leaves, kinds)
    if callable(rule.where):
        return [path for path, leaf in leaves.items() if rule.where(trees.name(path), leaf)]
    positive, negative = _globs(rule.where)
    found = {path for pattern in positive for path in _matches(pattern, leaves)}
    if not positive:
        found = default_weights(leaves, kinds)
    excluded = {path for pattern in negative for path in _matches(pattern, leaves)}
    return [path for path in leaves if path in found and path not in excluded]


def _globs(where: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Globs that select, and globs that exclude; `!` is removed from globs that exclude."""
    patterns = (where,) if isinstance(where, str) else where
    return [p for p in patterns if not p.startswith("!")], [p[1:] for p in patterns if p.startswith("!")]


def _matches(pattern: str, leaves: Mapping[Path, Any]) -> list[Path]:
    flags = glob.GLOBSTAR | glob.BRACE | glob.FORCEUNIX | glob.DOTGLOB | glob.CASE | glob.MATCHBASE
    return [path for path in leaves if glob.globmatch(trees.name(path), pattern, flags=flags)]


def _check_rule(rule: Rule, leaves: Mapping[Path, Any]) -> None:
    """Raises a ValueError if a function or a glob selects nothing, or everything including biases."""
    if rule.where is None:
        return
    if callable(rule.where):
        found = selected_by(rule, leaves, {})
        if not found:
            raise ValueError(f"rule {rule.where!r}: selects none of {_listed(leaves)}")
        _check_not_everything(rule.where, found, leaves)
        return
    positive, negative = _globs(rule.where)
    for pattern in (*positive, *negative):
        if not _matches(pattern, leaves):
            raise ValueError(f"glob {pattern!r}: matches none of {_listed(leaves)}{_suggestions(pattern, leaves)}")
    for pattern in positive:
        _check_not_everything(pattern, _matches(pattern, leaves), leaves)


def _suggestions(pattern: str, leaves: Mapping[Path, Any]) -> str:
    """Hint of a message: leaves in a module with this name, or leaves with similar names; "" if there are none."""
    names = list(map(trees.name, leaves))
    inside = [name for name in names if name.startswith(pattern.rstrip("/") + "/")][:3]
    close = inside or difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _check_not_everything(where: Any, found: Sequence[Path], leaves: Mapping[Path, Any]) -> None:
    """Raises a ValueError if a rule selects all leaves, including biases; a rule that names biases is accepted."""
    flat = [trees.name(path) for path in found if jnp.ndim(leaves[path]) < 2]
    if callable(where):
        everything = len(found) == len(leaves)
    else:
        everything = where.split("/")[-1] in ("*", "**")
    if everything and 0 < len(flat) < len(found):
        raise ValueError(
            f"rule {where!r}: selects all {len(found)} leaves, including {', '.join(flat[:3])}; "
            "name the arrays to mask, as in '**/kernel'"
        )


def _listed(leaves: Mapping[Path, Any]) -> str:
    return f"{len(leaves)} leaves ({_first(map(trees.name, leaves), 8)})" if leaves else "no leaves"


def _first(names: Iterable[str], most: int) -> str:
    """The first `most` names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _budgets(
    masked: tuple[Grouping, ...],
    owners: Sequence[int],
    rules: Sequence[Rule],
    target_density: float | None,
    allow_empty_layers: bool,
) -> tuple[Budget, ...]:
    """Budgets from the targets of rules and of the whole network; arrays with an N:M pattern are in no budget.

    Args:
        masked: all masked arrays.
        owners: index of the rule of each masked array.
        rules: rules, with or without targets.
        target_density: share of all masked weights, in (0, 1], or None.
        allow_empty_layers: whether a budget may be too small for one score of every array.
    """
    budgets = []
    without_pattern = [index for index, leaf in enumerate(masked) if leaf.pattern is None]
    for number, rule in enumerate(rules):
        if rule.target_density is not None:
            members = [index for index in without_pattern if owners[index] == number]
            size = sum(masked[index].size for index in members)
            budgets.append(Budget(tuple(members), round(float(rule.target_density) * size), size))
    if target_density is not None:
        check_density(target_density)
        in_budget = {index for budget in budgets for index in budget.members}
        members = [index for index in without_pattern if index not in in_budget]
        if (rest := _rest(masked, members, budgets, target_density)) is not None:
            budgets.append(rest)
    for budget in budgets:
        _check_budget(budget, masked, allow_empty_layers)
    return tuple(budgets)


def _rest(
    masked: tuple[Grouping, ...], members: Sequence[int], budgets: Sequence[Budget], target_density: float
) -> Budget | None:
    """Budget of the arrays `members`, for which no rule and no pattern sets a density; None if `members` is empty."""
    by_pattern = sum(leaf.size * leaf.pattern.n // leaf.pattern.m for leaf in masked if leaf.pattern)
    fixed = by_pattern + sum(budget.keep for budget in budgets)
    keep = round(float(target_density) * sum(leaf.size for leaf in masked))
    size = sum(masked[index].size for index in members)
    if not fixed <= keep <= fixed + size:
        raise ValueError(
            f"target_density {target_density:g}: cannot keep exactly {keep} weights; rules with targets and N:M "
            f"patterns keep {fixed}, and the other arrays have {size} weights; change one of the targets"
        )
    return Budget(tuple(members), keep - fixed, size) if members else None


def _check_budget(budget: Budget, masked: tuple[Grouping, ...], allow_empty_layers: bool) -> None:
    needed = sum(masked[index].group_size for index in budget.members)
    if budget.keep < needed and not allow_empty_layers:
        names = _first((masked[index].name for index in budget.members), 4)
        covers_all = budget.size == sum(leaf.size for leaf in masked)
        least = f"at least {needed / budget.size:.3g}" if covers_all else f"a density that keeps {needed} weights"
        raise ValueError(
            f"target_density: keeps {budget.keep} of {budget.size} weights, but one score in each layer of {names} "
            f"needs {needed} weights; use {least}, or allow_empty_layers=True"
        )
