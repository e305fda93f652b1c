"""What gets masked: rules by path, their default, and the table that shows what they do to a model."""

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
from cs_jax.core.groups import LAYOUTS, NM, Group, Grouping, Layout, check_group, grouping
from cs_jax.core.selection import Budget, Selection
from cs_jax.core.trees import Path

Predicate = Callable[[str, Any], bool]


@dataclass(frozen=True)
class Rule:
    """Which weights are masked, what one score of theirs stands for, and how many of them are kept.

    Attributes:
        where: None, a glob or several, or a function. None is the default: weights of two or more axes that are no
            biases, embeddings, norms or classifier heads, by their names. Globs are compared with the weights' paths,
            as in "encoder/layers/0/kernel": `*` is one part of a path, `**` any number of parts, `{a,b}` either;
            without a slash a glob is compared with the last part alone. A glob after `!` takes out what the others
            select, or what the default selects if there are no others. A function gets a weight's path, as text, and
            the array or what stands for it, and says whether it is masked.
        group: what one score stands for: "entry", "output_channel", "input_channel", or one of `Axes`, `Block`,
            `Head` and `NM`.
        layout: where input and output axes lie: "auto" goes by the library's names, "in_out" is (..., input, output)
            as in Flax and Haiku, "out_in" (output, input, ...) as in Equinox and PyTorch.
        stacked: leading axes along which layers are stacked, as `nn.scan` and `eqx.filter_vmap` make them; groups do
            not reach across layers. None is none, but weights of three axes have to be told: they could be either.
        target_density: share of the rule's weights that the ticket keeps, in (0, 1]; None leaves it to the network's.

    Raises:
        TypeError: `where` or `group` is none of these.
        ValueError: an attribute is out of range.
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
        texts = bool(patterns) and all(isinstance(pattern, str) for pattern in patterns)
        if not (texts or self.where is None or callable(self.where)):
            raise TypeError(f"where: got {self.where!r}, wanted a glob, several, or a function of path and array")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: got {self.layout!r}, wanted one of {', '.join(LAYOUTS)}")
        if self.stacked is not None and (type(self.stacked) is not int or self.stacked < 0):
            raise ValueError(f"stacked: got {self.stacked!r}, wanted a number of axes, or None")
        check_group(self.group)
        if self.target_density is not None:
            check_density(self.target_density)
            if isinstance(self.group, NM):
                raise ValueError(
                    f"target_density: got {self.target_density:g} for {self.group.n}:{self.group.m}, whose density is "
                    f"{self.group.n / self.group.m:g}; wanted none"
                )


Where = None | str | Predicate | Rule | Sequence[str] | Sequence[Rule]
"""What `where` arguments take: what `Rule.where` takes, a rule, or several rules, the first of which that selects a
weight decides about it."""


def select(
    params: PyTree, where: Where = None, *, target_density: float | None = None, allow_empty_layers: bool = False
) -> Selection:
    """The weights of `params` that rules mask.

    Args:
        params: weights of any model: arrays, tracers or `jax.ShapeDtypeStruct` in any pytree.
        where: rules; the default masks weights of two or more axes that are no biases, embeddings, norms or
            classifier heads, by their names.
        target_density: share of all masked weights that the ticket keeps, in (0, 1]. Where rules have targets of
            their own too, the other rules' weights share what these leave.
        allow_empty_layers: whether a ticket may leave a masked array without any weight.

    Raises:
        TypeError: `where` is no rule, or `target_density` is traced.
        ValueError: a glob or rule selects nothing, or everything down to biases; what it selects is no float array;
            a group does not fit; a target cannot be met; names the weights or the argument.
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
        raise ValueError(f"found no weights to mask among {_listed(leaves)}; wanted `where` to name some")
    for index, rule in enumerate(rules):
        if index not in chosen.values():
            raise ValueError(f"rule {rule.where!r} selects nothing that the rules before it leave")
    ordered = [path for path in leaves if path in chosen]
    masked = tuple(_grouping(path, leaves, rules[chosen[path]]) for path in ordered)
    owners = [chosen[path] for path in ordered]
    budgets = _budgets(masked, owners, rules, target_density, allow_empty_layers)
    return Selection(masked, budgets, allow_empty_layers)


def _check_maskable(weight: Any, path: Path) -> None:
    trees.check_float(weight, path)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weights {trees.name(path)!r}: got dtype {weight.dtype}, wanted a real float dtype")
    if 0 in weight.shape:
        raise ValueError(f"weights {trees.name(path)!r}: shape {weight.shape} has no entries to mask")


def _grouping(path: Path, leaves: Mapping[Path, Any], rule: Rule) -> Grouping:
    projections = ((*path[:-2], name, "kernel") for name in ("query", "key", "value", "out"))
    in_attention = path[-1:] == ("kernel",) and all(projection in leaves for projection in projections)
    return grouping(path, leaves[path], rule.group, rule.layout, stacked=rule.stacked, in_attention=in_attention)


def by_entry(weights: PyTree) -> Selection:
    """Every array of `weights`, scored by entry, without budgets: for the masks or scores of a network.

    Args:
        weights: arrays, tracers or `jax.ShapeDtypeStruct`, each of the shape of masked weights.
    """
    return Selection(
        tuple(grouping(path, leaf, "entry", "auto") for path, leaf in trees.leaves_by_path(weights).items())
    )


def with_budgets(
    selection: Selection,
    *,
    target_density: float | None = None,
    per_layer: bool = False,
    allow_empty_layers: bool = False,
) -> Selection:
    """A selection of the same arrays and groups, of which a density may be kept.

    Args:
        selection: without budgets.
        target_density: as for `select`.
        per_layer: whether each array has the target density, instead of all together.
        allow_empty_layers: as for `select`.

    Raises:
        TypeError, ValueError: as `select`.
    """
    masked = selection.masked
    if per_layer:
        rules = [Rule(target_density=target_density) for _ in masked]
        budgets = _budgets(masked, range(len(masked)), rules, None, allow_empty_layers)
    else:
        budgets = _budgets(masked, [0] * len(masked), [Rule()], target_density, allow_empty_layers)
    return Selection(masked, budgets, allow_empty_layers)


def as_rules(where: Where) -> tuple[Rule, ...]:
    """`where` as rules, the first of which that selects a weight decides about it."""
    if isinstance(where, Rule):
        return (where,)
    if isinstance(where, Sequence) and not isinstance(where, str):
        if not where:
            raise ValueError("where: got an empty sequence, wanted globs or rules")
        rules = [entry for entry in where if isinstance(entry, Rule)]
        if rules and len(rules) < len(where):
            raise TypeError("where: got globs and rules mixed, wanted one kind: Rule(glob) makes a glob a rule")
        if rules:
            return tuple(rules)
        return (Rule(tuple(entry for entry in where if not isinstance(entry, Rule))),)
    return (Rule(where),)


def check_density(value: Any, name: str = "target_density") -> None:
    """Raises unless `value` is a number in (0, 1]."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced, wanted a number: it decides how many weights are kept")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(f"{name}: got {value!r}, wanted a number")
    if not 0 < value <= 1:
        raise ValueError(f"{name}: got {value:g}, wanted a share above 0 and at most 1")


def selected_by(rule: Rule, leaves: Mapping[Path, Any], kinds: Mapping[Path, str]) -> list[Path]:
    """Paths that a rule selects of some leaves, in order; globs may match none of them.

    Args:
        rule: its `where` decides.
        leaves: arrays, or what stands for them, by path.
        kinds: class names of the objects at the beginning of the paths, where they are known.
    """
    if rule.where is None:
        return default_weights(leaves, kinds)
    if callable(rule.where):
        return [path for path, leaf in leaves.items() if rule.where(trees.name(path), leaf)]
    positive, negative = _globs(rule.where)
    found = {path for pattern in positive for path in _matches(pattern, leaves)}
    if not positive:
        found = default_weights(leaves, kinds)
    without = {path for pattern in negative for path in _matches(pattern, leaves)}
    return [path for path in leaves if path in found and path not in without]


def _globs(where: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Globs that select, and those that take out, without their `!`."""
    patterns = (where,) if isinstance(where, str) else where
    return [p for p in patterns if not p.startswith("!")], [p[1:] for p in patterns if p.startswith("!")]


def _matches(pattern: str, leaves: Mapping[Path, Any]) -> list[Path]:
    flags = glob.GLOBSTAR | glob.BRACE | glob.FORCEUNIX | glob.DOTGLOB | glob.CASE | glob.MATCHBASE
    return [path for path in leaves if glob.globmatch(trees.name(path), pattern, flags=flags)]


def _check_rule(rule: Rule, leaves: Mapping[Path, Any]) -> None:
    """Raises where a function or any glob selects nothing, or everything."""
    if rule.where is None:
        return
    if callable(rule.where):
        found = selected_by(rule, leaves, {})
        if not found:
            raise ValueError(f"rule {rule.where!r} selects none of {_listed(leaves)}")
        _check_not_everything(rule.where, found, leaves)
        return
    positive, negative = _globs(rule.where)
    for pattern in (*positive, *negative):
        if not _matches(pattern, leaves):
            raise ValueError(f"glob {pattern!r} matches none of {_listed(leaves)}{_hint(pattern, leaves)}")
    for pattern in positive:
        _check_not_everything(pattern, _matches(pattern, leaves), leaves)


def _hint(pattern: str, leaves: Mapping[Path, Any]) -> str:
    """What may have been meant: what is inside a module of this name, or what is alike."""
    names = list(map(trees.name, leaves))
    inside = [name for name in names if name.startswith(pattern.rstrip("/") + "/")][:3]
    close = inside or difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    return f"; close to it are {', '.join(close)}" if close else ""


def _check_not_everything(where: Any, found: Sequence[Path], leaves: Mapping[Path, Any]) -> None:
    """A rule that takes biases and norms along with the rest was hardly meant, unless it names them."""
    flat = [trees.name(path) for path in found if jnp.ndim(leaves[path]) < 2]
    if callable(where):
        anything = len(found) == len(leaves)
    else:
        anything = where.split("/")[-1] in ("*", "**")
    if anything and 0 < len(flat) < len(found):
        raise ValueError(
            f"rule {where!r} selects all {len(found)} leaves there, {', '.join(flat[:3])} among them; "
            "wanted the arrays to mask, as in '**/kernel'"
        )


def _listed(leaves: Mapping[Path, Any]) -> str:
    return f"{len(leaves)} leaves ({_first(map(trees.name, leaves), 8)})" if leaves else "no leaves"


def _first(names: Iterable[str], most: int) -> str:
    """Some of the names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _budgets(
    masked: tuple[Grouping, ...],
    owners: Sequence[int],
    rules: Sequence[Rule],
    target_density: float | None,
    allow_empty_layers: bool,
) -> tuple[Budget, ...]:
    """Counts to keep, from targets of rules and of the whole; N:M arrays keep what their pattern says."""
    patterned = sum(leaf.size * leaf.pattern.n // leaf.pattern.m for leaf in masked if leaf.pattern)
    free = [index for index, leaf in enumerate(masked) if leaf.pattern is None]
    budgets = []
    for number, rule in enumerate(rules):
        if rule.target_density is not None:
            members = [index for index in free if owners[index] == number]
            size = sum(masked[index].size for index in members)
            budgets.append(Budget(tuple(members), round(float(rule.target_density) * size), size))
    if target_density is not None:
        check_density(target_density)
        taken = {index for budget in budgets for index in budget.members}
        members = [index for index in free if index not in taken]
        keep = round(float(target_density) * sum(leaf.size for leaf in masked))
        rest = keep - patterned - sum(budget.keep for budget in budgets)
        size = sum(masked[index].size for index in members)
        if not 0 <= rest <= size or (size == 0 and rest):
            raise ValueError(
                f"target_density: got {target_density:g}, {keep} weights, which cannot be met: rules with targets or "
                f"N:M patterns keep {keep - rest}, and the others have {size}"
            )
        if members:
            budgets.append(Budget(tuple(members), rest, size))
    for budget in budgets:
        _check_budget(budget, masked, allow_empty_layers)
    return tuple(budgets)


def _check_budget(budget: Budget, masked: tuple[Grouping, ...], allow_empty_layers: bool) -> None:
    needed = sum(masked[index].group_size for index in budget.members)
    if budget.keep < needed and not allow_empty_layers:
        names = _first((masked[index].name for index in budget.members), 4)
        alone = budget.size == sum(leaf.size for leaf in masked)
        least = f"at least {needed / budget.size:.3g}" if alone else f"enough for {needed} weights there"
        raise ValueError(
            f"target_density: {budget.keep} of {budget.size} weights would empty a layer of {names}, which need "
            f"{needed} for one score each; wanted {least}, or allow_empty_layers=True"
        )
