"""Statistics of a sweep: means, standard deviations, and paired differences of accuracy with significance tests.

Runs with the same seed share the data split, the initial weights and, in rounds with the same number, the order of
batches. Paired differences between networks with the same seed therefore exclude effects that both networks share.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05  # significance level of p
CONFIDENCE = 0.95
TOLERANCE = 1e-6
"""Differences that vary by less are treated as equal: one image in a million. Rounding of float32 is smaller."""

HEADER = ("method", "control", "target", "n", "density", "test accuracy", "epochs", "training FLOPs", "seconds",
        "difference", "p (Holm)")  # fmt: skip
ABSENT = "-"  # shown for a missing value
CONTROL_EPOCHS_NOTE = "Controls are trained for the epochs of the retraining only, without the search epochs."


class Result(NamedTuple):
    """Result of one trained network of a sweep."""

    method: str  # name in the spec
    control: str | None  # "reinit", "shuffled", "random" or "dense"; None for the ticket itself
    target: float | None  # target density, or target share of multiply-adds; None without a target
    initial_score: float | None  # None unless the sweep varies initial scores
    seed: int
    density: float  # share of maskable weights kept, in [0, 1]
    test_accuracy: float  # in [0, 1]
    val_accuracy: float | None  # in [0, 1]; None without a validation set
    epochs: int  # epochs of search and retraining together
    training_flops: float
    seconds: float


class Cell(NamedTuple):
    """Statistics of networks that differ only in the seed. Values are means over seeds unless noted."""

    method: str
    control: str | None
    target: float | None
    initial_score: float | None
    n: int  # number of seeds
    density: float
    density_deviation: float | None  # sample standard deviation; 0 if all densities are equal, None for one seed
    accuracy: float  # on the test set, in [0, 1]
    deviation: float | None  # sample standard deviation of the accuracy; None for one seed
    epochs: float
    training_flops: float
    seconds: float
    compared_with: str  # the reference method; "cs ticket" for a control of cs; "" for no comparison
    pairs: int  # number of seeds that both networks have
    difference: float | None  # difference of accuracies, mean over the pairs
    interval: float | None  # half width of the 95% t interval of the difference
    p: float | None  # p-value of the two-sided paired t-test
    p_adjusted: float | None  # p adjusted by Holm's method, over all tickets (or controls) with at least two pairs


class Key(NamedTuple):
    """Fields that identify a cell."""

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
    """Cells of the results, ordered by first appearance of the method, then tickets before controls, then target.

    A ticket is compared with the reference method's ticket at the same target. A control is compared with the ticket of
    the same method, target and initial score. Differences are taken over the seeds that both networks have. A ticket
    without a target is not compared, because its density differs from the reference's density.

    With fewer than two pairs, there is no interval and no p. If all differences are 0, p is 1. If all differences are
    equal and not 0, there is no interval and no p, because their sample variance is 0 and t would be infinite.

    Args:
        results: results of networks, at most one for each network.
        reference: method with which the other methods are compared; may be missing from the results.

    Returns:
        One cell for each method, control, target and initial score; targets in falling order.

    Raises:
        ValueError: a network has two results, or a density or accuracy is outside [0, 1].
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
    """p-values that are adjusted together: of all tickets, or of all controls."""
    return [cell.p for cell in cells if cell.p is not None and (cell.control is not None) == is_control]


def count_tests(cells: Iterable[Cell], is_control: bool) -> int:
    """Number of comparisons over at least two seeds, of tickets or of controls. Includes comparisons without a p."""
    return sum(cell.pairs > 1 and (cell.control is not None) == is_control for cell in cells)


def holm(values: Sequence[float], tests: int | None = None) -> list[float]:
    """p-values adjusted by Holm's method, which controls the family-wise error rate; in the order of `values`.

    Args:
        values: p-values in [0, 1].
        tests: number of tests in the family, including tests without a p-value. None means the number of values.

    References:
        Holm, 1979, A simple sequentially rejective multiple test procedure.

    >>> holm([0.03, 0.01, 0.04])
    [0.06, 0.03, 0.06]
    """
    adjusted, least, tests = [0.0] * len(values), 0.0, max(len(values), tests or 0)
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (tests - rank) * values[index]))
        adjusted[index] = least
    return adjusted


def pareto_front(cells: Sequence[Cell]) -> list[Cell]:
    """Tickets on the Pareto front, in order of falling density.

    A ticket is on the front unless another network is at least as sparse, at least as accurate, and strictly better in
    density or accuracy. Controls count too: a ticket is not on the front if a random mask of the same density is more
    accurate.
    """
    tickets = [cell for cell in cells if cell.control is None and not any(_beats(other, cell) for other in cells)]
    return sorted(tickets, key=lambda cell: -cell.density)


def counterpart(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell with which `cell` is compared; None if there is no comparison."""
    if not cell.compared_with:
        return None
    known = {_key(other): other for other in cells}
    found = _counterpart(_key(cell), known, cell.compared_with)
    return known[found] if found else None


def reference_methods(cells: Iterable[Cell]) -> list[str]:
    """Methods with which tickets are compared: at most one, unless cells of several sweeps are mixed."""
    return [*dict.fromkeys(cell.compared_with for cell in cells if cell.control is None and cell.compared_with)]


def is_reference(cell: Cell, cells: Iterable[Cell]) -> bool:
    """True if `cell` is a ticket of the reference method with a target, and other tickets are compared with it."""
    return cell.control is None and cell.method in reference_methods(cells) and cell.target is not None


def has_no_spread(cell: Cell) -> bool:
    """True if all differences are equal and not 0, so that no t-test is possible."""
    return cell.p is None and cell.pairs > 1


def epoch_ratios(cells: Sequence[Cell], is_control: bool) -> dict[str, list[float]]:
    """Ratios of epochs between compared networks, where not 1: {"cs vs imp": [0.5]}.

    Args:
        cells: all cells of a sweep.
        is_control: True for the ratios of controls, which are not trained in the search; False for tickets.
    """
    found: dict[str, list[float]] = {}
    for cell in cells:
        other = counterpart(cell, cells)
        if other and other.epochs != cell.epochs and (cell.control is not None) == is_control:
            name = f"{cell.method}, {cell.control}" if cell.control else cell.method
            found.setdefault(f"{name} vs {cell.compared_with}", []).append(cell.epochs / other.epochs)
    return found


def to_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Cells as JSON objects with the fields of `Cell`."""
    return [cell._asdict() for cell in cells]


def to_markdown(cells: Sequence[Cell]) -> str:
    """Cells as a Markdown table in GitHub's format, one row for each cell.

    Accuracies are mean ± standard deviation, and so are densities if they differ between seeds. A difference is
    followed by its 95% interval in brackets and by the compared network. Epochs are followed by the epochs of the
    compared network if the two differ. A missing value is "-". "no spread" means that all differences are equal, so no
    test is possible.
    """
    rows = [HEADER, ["---"] * len(HEADER), *(_row(cell, cells) for cell in cells)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def shown_target(
    target: float | None, initial_score: float | None, show: Callable[[float], str] = "{:g}".format
) -> str:
    """Target and initial score as text, such as "0.1" or "s0 -0.05"; `show` formats the target."""
    parts = [] if target is None else [show(target)]
    return ", ".join(parts if initial_score is None else [*parts, f"s0 {initial_score:g}"]) or "none"


def shown_p(p: float | None) -> str:
    """A p-value with three decimals, "<0.001" for smaller values, or "-" for None."""
    if p is None:
        return ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def shown_epochs(cell: Cell, cells: Sequence[Cell]) -> str:
    """Epochs of a cell, followed by the compared network's epochs if they differ: "60 (imp 180)"."""
    other = counterpart(cell, cells)
    compared = f" ({cell.compared_with} {other.epochs:,.6g})" if other and other.epochs != cell.epochs else ""
    return f"{cell.epochs:,.6g}{compared}"


def _grouped(results: Sequence[Result]) -> dict[Key, dict[int, Result]]:
    """Results by key and seed."""
    groups: dict[Key, dict[int, Result]] = {}
    for result in results:
        key, name = _key(result), _name(result)
        for field in ("density", "test_accuracy"):
            if not 0 <= getattr(result, field) <= 1:
                raise ValueError(f"{name}: {field} {getattr(result, field)}: must be in [0, 1]")
        if result.seed in groups.setdefault(key, {}):
            raise ValueError(f"{name}: two results; give one")
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

    def position(key: Key) -> tuple[Any, ...]:
        return methods.index(key.method), controls.index(key.control), falling(key.target), falling(key.initial_score)

    return sorted(keys, key=position)


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
    """Key of the cell to compare with, among the known keys; None if there is none.

    A reference without an initial score is compared with the tickets of all initial scores.
    """
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
    if np.ptp(differences) < TOLERANCE:  # else rounding errors would give a huge t and a tiny p
        return _Comparison(len(seeds), mean, 0.0, 1.0) if abs(mean) < TOLERANCE else _Comparison(len(seeds), mean)
    error, freedom = differences.std(ddof=1) / len(seeds) ** 0.5, len(seeds) - 1
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom) * error)
    return _Comparison(len(seeds), mean, half, float(2 * stats.t.sf(abs(mean) / error, freedom)))


def _beats(other: Cell, cell: Cell) -> bool:
    as_good = other.density <= cell.density and other.accuracy >= cell.accuracy
    return as_good and (other.density < cell.density or other.accuracy > cell.accuracy)


def _row(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    is_ref = is_reference(cell, cells)
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
        "reference" if is_ref else _difference(cell),
        "reference" if is_ref else "no spread" if has_no_spread(cell) else shown_p(cell.p_adjusted),
    ]


def _difference(cell: Cell) -> str:
    if cell.difference is None:
        return ABSENT
    ends = ""
    if cell.interval is not None:
        ends = f" [{cell.difference - cell.interval:+.4f}, {cell.difference + cell.interval:+.4f}]"
    fewer = f", over {cell.pairs} of {cell.n} seeds" if cell.pairs < cell.n else ""
    return f"{cell.difference:+.4f}{ends} vs {cell.compared_with}{fewer}"
