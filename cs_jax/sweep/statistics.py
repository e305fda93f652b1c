"""Accuracy against density over a sweep: means, deviations, paired differences and what they are worth.

Equal seeds share the split of the data, the initial weights and, in equal rounds, the order of batches, so two networks
are compared seed by seed, which takes out most of what seeds differ in.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05  # of p, below which a difference is called significant
CONFIDENCE = 0.95
EQUAL = 1e-6
"""Accuracies this near are one: float32 is off by less, and an image of a million by as much."""

HEAD = ("method", "control", "target", "n", "density", "test accuracy", "epochs", "training FLOPs", "seconds",
        "difference", "p (Holm)")  # fmt: skip
ABSENT = "-"  # of what is compared with nothing
CONTROL_EPOCHS_NOTE = (
    "Controls are trained for as long as a ticket's retraining, not as its search and retraining together."
)


class Result(NamedTuple):
    """One trained network of a sweep."""

    method: str
    control: str | None  # None is the ticket itself; else "reinit", "shuffled", "random" or "dense"
    target: float | None  # density that was asked for; None where it was left to the dial
    initial_score: float | None  # initial score, where it was the axis of the sweep
    seed: int
    density: float  # found, of the maskable weights
    test_accuracy: float
    val_accuracy: float | None
    epochs: int  # trained in all for it: search and retraining
    training_flops: float
    seconds: float


class Cell(NamedTuple):
    """The networks that differ in their seed alone; figures are means over seeds unless they say otherwise."""

    method: str
    control: str | None
    target: float | None
    initial_score: float | None
    n: int  # seeds
    density: float
    density_deviation: float | None  # as that of the accuracy; 0 where a target was met
    accuracy: float  # on the test set
    deviation: float | None  # of the accuracy, that of a sample; None for one seed
    epochs: float
    training_flops: float
    seconds: float
    compared_with: str  # what the difference is to: the reference, "cs ticket" for a control of cs, or "" for nothing
    pairs: int  # seeds that both have
    difference: float | None  # of accuracies, over the pairs
    interval: float | None  # half the width of the 95% t interval of the difference
    p: float | None  # two-sided paired t-test
    p_adjusted: float | None  # by Holm, over all tickets that have a p, or over all controls


class Key(NamedTuple):
    """What the networks of a cell have in common."""

    method: str
    control: str | None
    target: float | None
    initial_score: float | None


class _Comparison(NamedTuple):
    pairs: int
    difference: float | None = None
    interval: float | None = None
    p: float | None = None


def summarize(results: Sequence[Result], *, reference: str = "imp") -> list[Cell]:
    """Cells of the results: by method as they first appear, tickets before controls, then by falling target.

    A ticket stands beside the reference's ticket of the same target, a control beside the ticket of its own method,
    target and dial. Differences are taken over the seeds that both have. A ticket left to the dial stands beside
    none: its density is its own.

    With fewer than two pairs there is no interval and no p. Differences that are all 0 have p 1. Differences that are
    all the same and not 0 have neither interval nor p: the seeds are too few to show a spread, and t would be
    infinite.

    Args:
        results: of networks that are all different.
        reference: the method that others are compared with; it need not be there.

    Returns:
        One cell for each method, control, target and dial.

    Raises:
        ValueError: a result comes twice, or a density or an accuracy is not in [0, 1].
    """
    groups = _grouped(results)
    cells = [_cell(key, groups, reference) for key in _ordered(groups)]
    families = {
        is_control: iter(holm(p_values(cells, is_control), tests=count_tests(cells, is_control)))
        for is_control in (False, True)
    }
    return [
        cell if cell.p is None else cell._replace(p_adjusted=next(families[cell.control is not None])) for cell in cells
    ]


def p_values(cells: Iterable[Cell], is_control: bool) -> list[float]:
    """The p-values that are adjusted together: those of all tickets beside the reference, or of all controls."""
    return [cell.p for cell in cells if cell.p is not None and (cell.control is not None) == is_control]


def count_tests(cells: Iterable[Cell], is_control: bool) -> int:
    """Comparisons of a family over two seeds at least: also those whose differences have no spread to test them by."""
    return sum(cell.pairs > 1 and (cell.control is not None) == is_control for cell in cells)


def holm(values: Sequence[float], tests: int | None = None) -> list[float]:
    """p-values adjusted for their number, in their order: below 0.05, no more than one family in twenty errs at all.

    Args:
        values: p-values.
        tests: how many there would be; those that are not among the values count as well. None is their number.

    References:
        Holm, 1979, A simple sequentially rejective multiple test procedure.

    >>> holm([0.03, 0.01, 0.04])
    [0.06, 0.03, 0.06]
    """
    adjusted, least, tests = [0.0] * len(values), 0.0, max(len(values), tests or 0)
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (tests - place) * values[index]))
        adjusted[index] = least
    return adjusted


def pareto_front(cells: Sequence[Cell]) -> list[Cell]:
    """Tickets that nothing beats, by falling density: no other cell is as sparse and as accurate, and more so in one.

    A control is such a cell too: a ticket is not worth its search where a random one of its density does better.
    """
    tickets = [cell for cell in cells if cell.control is None and not any(_beats(other, cell) for other in cells)]
    return sorted(tickets, key=lambda cell: -cell.density)


def counterpart(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell that this one's difference is to; None where it has no difference."""
    if not cell.compared_with:
        return None
    known = {_key(other): other for other in cells}
    found = _counterpart(_key(cell), known, cell.compared_with)
    return known[found] if found else None


def reference_methods(cells: Iterable[Cell]) -> list[str]:
    """Methods that tickets stand beside: one or none, unless cells of several summaries are mixed."""
    return [*dict.fromkeys(cell.compared_with for cell in cells if cell.control is None and cell.compared_with)]


def is_reference(cell: Cell, cells: Iterable[Cell]) -> bool:
    """Whether tickets of the same target stand, or would stand, beside this one."""
    return cell.control is None and cell.method in reference_methods(cells) and cell.target is not None


def has_no_spread(cell: Cell) -> bool:
    """Whether all differences are the same and not 0, so that there is nothing to test them by."""
    return cell.p is None and cell.pairs > 1


def epoch_ratios(cells: Sequence[Cell], is_control: bool) -> dict[str, list[float]]:
    """Epochs as a ratio to those of what cells stand beside, where they are not the same: "cs beside imp" to [0.5].

    Args:
        cells: of a sweep.
        is_control: whether of controls, which are trained as a ticket's retraining is, or of tickets.
    """
    found: dict[str, list[float]] = {}
    for cell in cells:
        other = counterpart(cell, cells)
        if other and other.epochs != cell.epochs and (cell.control is not None) == is_control:
            name = f"{cell.method}, {cell.control}" if cell.control else cell.method
            found.setdefault(f"{name} beside {cell.compared_with}", []).append(cell.epochs / other.epochs)
    return found


def to_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Cells as objects of JSON, a field each."""
    return [cell._asdict() for cell in cells]


def to_markdown(cells: Sequence[Cell]) -> str:
    """Cells as a table of GitHub's Markdown, one row each.

    Accuracy is mean ± deviation, and density too where it differs between seeds; the difference is followed by its 95%
    interval in brackets and by what it is to. Epochs are followed by those of the other network where they are not the
    same. What is compared with nothing has "-"; "no spread" stands where all differences are the same, and a test has
    nothing to go by.
    """
    rows = [HEAD, ["---"] * len(HEAD), *(_row(cell, cells) for cell in cells)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def shown_target(
    target: float | None, initial_score: float | None, show: Callable[[float], str] = "{:g}".format
) -> str:
    """Target and dial in words, such as "0.1" or "s0 -0.05"; `show` formats the target."""
    parts = [] if target is None else [show(target)]
    return ", ".join(parts if initial_score is None else [*parts, f"s0 {initial_score:g}"]) or "none"


def shown_p(p: float | None) -> str:
    """A p-value with three digits after the point."""
    if p is None:
        return ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def shown_epochs(cell: Cell, cells: Sequence[Cell]) -> str:
    """Epochs, and those of the network that it stands beside where they are not the same."""
    other = counterpart(cell, cells)
    beside = f" ({cell.compared_with} {other.epochs:,.6g})" if other and other.epochs != cell.epochs else ""
    return f"{cell.epochs:,.6g}{beside}"


def _grouped(results: Sequence[Result]) -> dict[Key, dict[int, Result]]:
    """Results by key and seed."""
    groups: dict[Key, dict[int, Result]] = {}
    for result in results:
        key, name = _key(result), _name(result)
        for field in ("density", "test_accuracy"):
            if not 0 <= getattr(result, field) <= 1:
                raise ValueError(f"{name}: got {field} {getattr(result, field)}, wanted a share in [0, 1]")
        if result.seed in groups.setdefault(key, {}):
            raise ValueError(f"{name}: got two results, wanted one")
        groups[key][result.seed] = result
    return groups


def _key(entry: Result | Cell) -> Key:
    return Key(entry.method, entry.control, entry.target, entry.initial_score)


def _name(result: Result) -> str:
    target = shown_target(result.target, result.initial_score)
    return f"{result.method}, {result.control or 'ticket'}, target {target}, seed {result.seed}"


def _ordered(keys: Iterable[Key]) -> list[Key]:
    keys = list(keys)
    methods = [*dict.fromkeys(key.method for key in keys)]
    controls = [None, *dict.fromkeys(key.control for key in keys if key.control is not None)]

    def falling(value: float | None) -> tuple[bool, float]:
        return value is None, -(value or 0)

    def place(key: Key) -> tuple[Any, ...]:
        return methods.index(key.method), controls.index(key.control), falling(key.target), falling(key.initial_score)

    return sorted(keys, key=place)


def _cell(key: Key, groups: Mapping[Key, Mapping[int, Result]], reference: str) -> Cell:
    results = [*groups[key].values()]
    other = _counterpart(key, groups, reference)
    comparison = _compare(groups[key], groups[other]) if other else _Comparison(0)
    compared_with = "" if not other or not comparison.pairs else f"{key.method} ticket" if key.control else reference
    accuracies, densities = [result.test_accuracy for result in results], [result.density for result in results]
    return Cell(
        *key,
        n=len(results),
        density=statistics.fmean(densities),
        density_deviation=statistics.stdev(densities) if len(results) > 1 else None,
        accuracy=statistics.fmean(accuracies),
        deviation=statistics.stdev(accuracies) if len(results) > 1 else None,
        epochs=statistics.fmean(result.epochs for result in results),
        training_flops=statistics.fmean(result.training_flops for result in results),
        seconds=statistics.fmean(result.seconds for result in results),
        compared_with=compared_with,
        **comparison._asdict(),
        p_adjusted=None,
    )


def _counterpart(key: Key, known: Iterable[Key], reference: str) -> Key | None:
    """What a cell is compared with, of those known. A reference that had no dial to turn stands beside all dials."""
    if key.control is not None:
        candidates = [key._replace(control=None)]
    elif key.method == reference or key.target is None:
        candidates = []
    else:
        candidates = [key._replace(method=reference), key._replace(method=reference, initial_score=None)]
    known = set(known)
    return next((candidate for candidate in candidates if candidate in known), None)


def _compare(ours: Mapping[int, Result], others: Mapping[int, Result]) -> _Comparison:
    seeds = [seed for seed in ours if seed in others]
    if not seeds:
        return _Comparison(0)
    differences = np.array([ours[seed].test_accuracy - others[seed].test_accuracy for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) == 1:
        return _Comparison(1, mean)
    if np.ptp(differences) < EQUAL:  # rounding alone would make t huge and p tiny
        return _Comparison(len(seeds), mean, 0.0, 1.0) if abs(mean) < EQUAL else _Comparison(len(seeds), mean)
    error, freedom = differences.std(ddof=1) / len(seeds) ** 0.5, len(seeds) - 1
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom) * error)
    return _Comparison(len(seeds), mean, half, float(2 * stats.t.sf(abs(mean) / error, freedom)))


def _beats(other: Cell, cell: Cell) -> bool:
    as_good = other.density <= cell.density and other.accuracy >= cell.accuracy
    return as_good and (other.density < cell.density or other.accuracy > cell.accuracy)


def _row(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    compared = is_reference(cell, cells)
    return [
        cell.method,
        cell.control or "",
        shown_target(cell.target, cell.initial_score),
        str(cell.n),
        f"{cell.density:.4f}" + (f" ± {cell.density_deviation:.4f}" if cell.density_deviation else ""),
        f"{cell.accuracy:.4f}" + (f" ± {cell.deviation:.4f}" if cell.deviation is not None else ""),
        shown_epochs(cell, cells),
        f"{cell.training_flops:.3g}",
        f"{cell.seconds:,.1f}",
        "reference" if compared else _difference(cell),
        "reference" if compared else "no spread" if has_no_spread(cell) else shown_p(cell.p_adjusted),
    ]


def _difference(cell: Cell) -> str:
    if cell.difference is None:
        return ABSENT
    ends = ""
    if cell.interval is not None:
        ends = f" [{cell.difference - cell.interval:+.4f}, {cell.difference + cell.interval:+.4f}]"
    fewer = f", over {cell.pairs} of {cell.n} seeds" if cell.pairs < cell.n else ""
    return f"{cell.difference:+.4f}{ends} beside {cell.compared_with}{fewer}"
