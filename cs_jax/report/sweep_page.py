"""The page of a sweep: accuracy against density, with error bars, tests of the differences, cost and gaps."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from cs_jax.methods.controls import DENSE
from cs_jax.report import density_plots, overlap_sections, plots
from cs_jax.report.overlap_sections import shown_share
from cs_jax.report.pages import Page, Plot, Section, Table, percent, plot, points
from cs_jax.report.plots import Band, Series
from cs_jax.sweep.results import SweptTicket
from cs_jax.sweep.statistics import (
    CONTROL_EPOCHS_NOTE,
    LEVEL,
    Cell,
    Result,
    count_tests,
    counterpart,
    epoch_ratios,
    is_reference,
    pareto_front,
    reference_methods,
    shown_epochs,
    shown_p,
    shown_target,
)

SECONDS = (
    "Seconds are those of all epochs, with evaluation, and with compilation where a network is the first of its kind "
    "in its process: they say little of short runs."
)
TIE = 1e-9  # means of the same accuracies in another order may differ by their last digit

COLORS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE, plots.INK, plots.SKY, "#e69f00", "#882255")
CONTROL_DASHES = ("--", ":", "-.")
FEW_CONTROLS = 4  # lines; more of them hide the methods, and have plots of their own
LONG_LIST = 10  # runs that are missing; more of them are folded
LABEL = 22  # letters of a method in a legend


def page(
    title: str,
    cells: Sequence[Cell],
    results: Sequence[Result],
    missing: Sequence[str],
    lead: str,
    tickets: Sequence[SweptTicket] = (),
    reference: str = "imp",
) -> Page:
    """What a sweep has found, section by section. Called inside `plots.style()`.

    Args:
        title: heads the page.
        cells: of `pareto.summarize`.
        results: that the cells were made of; drawn as dots.
        missing: a line for each run that has not finished.
        lead: stands under the title.
        tickets: whose masks are compared.
        reference: method that the others are compared with.
    """
    figures = [_front(cells, results), _controls(cells, results), _differences(cells)]
    sections = [*figures, *overlap_sections.sections(tickets), _cost(cells)]
    gaps = f" {_counted(len(missing), 'run')} of the sweep {'have' if len(missing) > 1 else 'has'} not finished."
    verdict = _verdict(cells, reference) + gaps * bool(missing)
    return Page(title, lead, verdict, [], [*filter(None, sections), _missing(cells, missing)])


def _tickets(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.control is None]


def _methods(cells: Iterable[Cell]) -> list[str]:
    return [*dict.fromkeys(cell.method for cell in cells)]


def _targets(cells: Iterable[Cell]) -> list[float]:
    """Targets of the tickets, falling."""
    return sorted({cell.target for cell in _tickets(cells) if cell.target is not None}, reverse=True)


def _of_target(cells: Iterable[Cell], target: float) -> list[Cell]:
    return [cell for cell in _tickets(cells) if cell.target == target]


def _best(tickets: Sequence[Cell]) -> list[Cell]:
    """The most accurate tickets: one, or several that are equal."""
    highest = max(cell.accuracy for cell in tickets)
    return [cell for cell in tickets if cell.accuracy > highest - TIE]


def _verdict(cells: Sequence[Cell], reference: str) -> str:
    tickets = _tickets(cells)
    if not tickets:
        return "No ticket has been trained yet."
    methods = _methods(tickets)
    contested = [target for target in _targets(cells) if len(_methods(_of_target(cells, target))) > 1]
    if contested:
        told = [f"Most accurate on the test set: {_winners(cells, contested)}.", *_leads(cells, contested, reference)]
    elif len(methods) == 1:
        ends = (max(tickets, key=lambda cell: cell.accuracy), min(tickets, key=lambda cell: cell.density))
        kinds = [f"the most accurate ticket is right on {_at(ends[0])}", f"the sparsest on {_at(ends[1])}"]
        told = [f"{methods[0]} is the only method: {'; '.join(kinds[: len({*ends})])}."]
    else:
        told = ["No target has tickets of two methods, so none is the best of its density."]
    free = _methods(cell for cell in tickets if cell.target is None)
    if free and len(methods) > 1:
        told.append(f"Left to the dial, tickets of {_joined(free)} have densities of their own and stand beside none.")
    dense = {_accuracy(cell) for cell in cells if cell.control == DENSE}
    if len(dense) == 1:
        told.append(f"The dense network is right on {dense.pop()} of the test set.")
    return " ".join(told)


def _at(cell: Cell) -> str:
    return f"{_accuracy(cell)} of the test set at density {_density(cell)}"


def _density(cell: Cell) -> str:
    return percent(cell.density) + (f" ± {percent(cell.density_deviation)}" if cell.density_deviation else "")


def _accuracy(cell: Cell) -> str:
    return percent(cell.accuracy) + (f" ± {cell.deviation:.2%}" if cell.deviation is not None else "")


def _winners(cells: Sequence[Cell], targets: Sequence[float]) -> str:
    by_winner: dict[str, list[float]] = {}
    for target in targets:
        by_winner.setdefault(_joined(_methods(_best(_of_target(cells, target)))), []).append(target)
    return "; ".join(f"{winner} at {_joined([*map(shown_share, where)])}" for winner, where in by_winner.items())


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _leads(cells: Sequence[Cell], targets: Sequence[float], reference: str) -> list[str]:
    """What the lead of the most accurate tickets over the reference is worth, or the reference's over the next."""
    if not reference_methods(cells):
        if reference not in _methods(_tickets(cells)):
            return [f"None of them has been compared: there are no tickets of {reference}, the sweep's reference."]
        return [f"None of them has been compared: they share no target and seed with those of {reference}."]
    tests = count_tests(cells, False)
    found: dict[str, dict[str, list[str]]] = {}
    for target in targets:
        tickets = _of_target(cells, target)
        best, others = _best(tickets), [cell for cell in tickets if cell.method != reference]
        if reference not in _methods(best):
            found.setdefault(f"The lead over {reference}", {}).setdefault(_worth(best[0]), []).append(
                shown_share(target)
            )
        elif len(best) == 1:
            lead, next_best = f"The lead of {reference} over the next best", _best(others)[0]
            found.setdefault(lead, {}).setdefault(_worth(next_best, -1), []).append(shown_share(target))
    told = [
        f"{lead} is {_joined([f'{worth} at {_joined(where)}' for worth, where in sorted(by_worth.items())])}"
        for lead, by_worth in found.items()
    ]
    if told:
        told[-1] += f" ({LEVEL:g} level, Holm's correction for {_counted(tests, 'test')})"
    if epoch_ratios(cells, False):
        told.append("They were not all trained for as long (see Cost)")
    return [f"{sentence}." for sentence in told]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _worth(cell: Cell, sign: int = 1) -> str:
    """What a lead is worth; seeds that only one network has may turn the sign of the difference around."""
    if cell.p_adjusted is None or cell.difference is None:
        return "not tested"
    return "significant" if cell.p_adjusted < LEVEL and sign * cell.difference > 0 else "not significant"


def _front(cells: Sequence[Cell], results: Sequence[Result]) -> Section:
    section = Section("Accuracy against density")
    if not cells:
        section.notes.append("No network has been trained yet: there is nothing to draw.")
        return section
    lines = _series(_tickets(cells), results, cells)
    controls = _series([cell for cell in cells if cell.control not in (None, DENSE)], results, cells)
    drawn = [*lines, *(controls if len(controls) <= FEW_CONTROLS else [])]
    bands = _bands(cells)
    section.texts.append(
        "Means over seeds; of methods, bars are one standard deviation up and down, at most to 100%, and dots are "
        "single networks. ± and bars are the standard deviation of a sample (n - 1). What is most accurate, and the "
        "front, are chosen on the test set, which is optimistic: on other images they would do a little worse. "
        "Networks of one density are drawn side by side. " + ("Grey: dense, mean and deviation." if bands else "")
    )
    caveat = "; methods were not all trained for as long (see Cost)" if epoch_ratios(cells, False) else ""
    if drawn or bands:
        section.parts.append(_plot("accuracy-density", "Test accuracy against density", drawn, bands, caveat=caveat))
    floor = _floor(drawn, bands)
    if floor is not None:
        title = f"The same above {percent(floor)}"
        section.parts.append(_plot("accuracy-density-closer", title, drawn, bands, floor=floor, caveat=caveat))
    if _targets(cells):
        section.parts.append(_best_table(cells))
    if _tickets(cells):
        section.parts.append(_front_table(cells))
    return section


def _plot(
    name: str,
    title: str,
    lines: Sequence[Series],
    bands: Sequence[Band],
    *,
    floor: float | None = None,
    caveat: str = "",
) -> Plot:
    told = [_told(line) for line in lines] + [f"{band.label}: {percent(band.accuracy)}" for band in bands]
    figure = density_plots.fronts(lines, bands, floor=floor)
    remark = f"up and to the left is better{caveat}"
    return plot(name, title, remark, f"{title}. {'; '.join(told)}.", figure)


def _told(line: Series) -> str:
    known = zip(line.densities, line.accuracies, strict=True)
    return f"{line.label}: " + ", ".join(f"{percent(accuracy)} at {percent(density)}" for density, accuracy in known)


def _series(cells: Sequence[Cell], results: Sequence[Result], everything: Sequence[Cell]) -> list[Series]:
    """A line for each method and control; a method has the same look wherever it is drawn on the page."""
    methods = _methods(_tickets(everything)) or _methods(everything)
    kinds = [*dict.fromkeys(cell.control for cell in everything if cell.control not in (None, DENSE))]
    groups: dict[tuple[str, str | None], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.density):
        groups.setdefault((cell.method, cell.control), []).append(cell)
    labels = dict(zip(methods, plots.short(methods, length=LABEL, kind="method"), strict=True))
    made = []
    for method, control in dict.fromkeys((cell.method, cell.control) for cell in cells):
        group, place = groups[method, control], methods.index(method) if method in methods else len(methods)
        label = labels.get(method, method)
        made.append(
            Series(
                f"{label}, {control}" if control else label,
                [cell.density for cell in group],
                [cell.accuracy for cell in group],
                [math.nan if cell.deviation is None else cell.deviation for cell in group],
                [
                    (result.density, result.test_accuracy)
                    for result in results
                    if (result.method, result.control) == (method, control)
                ],
                COLORS[place % len(COLORS)],
                plots.MARKERS[place % len(plots.MARKERS)],
                CONTROL_DASHES[kinds.index(control) % len(CONTROL_DASHES)] if control else "-",
                control is not None,
            )
        )
    return made


def _bands(cells: Sequence[Cell]) -> list[Band]:
    """Dense networks; those of several methods that are one are drawn once."""
    found: dict[tuple[float, float], str] = {}
    for cell in cells:
        if cell.control == DENSE:
            found.setdefault((cell.accuracy, cell.deviation or 0.0), cell.method)
    alone = len(found) == 1
    names = plots.short([*found.values()], length=LABEL, kind="method")
    return [
        Band(DENSE if alone or name == DENSE else f"{DENSE}, {name}", *pair)
        for name, pair in zip(names, found, strict=True)
    ]


def _floor(lines: Sequence[Series], bands: Sequence[Band]) -> float | None:
    """Where a closer look begins, if a few collapsed networks press all others together at the top."""
    accuracies = [accuracy for line in lines for accuracy in line.accuracies]
    if len(accuracies) < 8:
        return None
    quarter, _, three_quarters = statistics.quantiles(accuracies)
    usual = min(accuracy for accuracy in accuracies if accuracy >= quarter - 1.5 * (three_quarters - quarter))
    highest = max([*accuracies, *(band.accuracy for band in bands)])
    floor = usual - 0.06 * (highest - usual)
    return floor if highest - min(accuracies) > 2 * (highest - floor) else None


def _best_table(cells: Sequence[Cell]) -> Table:
    head = ("Target", "Most accurate", "Test accuracy", "Seeds", "Beside", "Points", "p, Holm", "Difference")
    rows = []
    for target in _targets(cells):
        for cell in _best(_of_target(cells, target)):
            compared = [cell.compared_with, points(cell.difference, 0), shown_p(cell.p_adjusted), _worth(cell)]
            if not cell.compared_with:
                compared = ["the reference" if is_reference(cell, cells) else "-", "-", "-", "-"]
            rows.append([shown_share(target), cell.method, _accuracy(cell), str(cell.n), *compared])
    return Table("Best at each target", head, rows, words=2, wide=True)


def _front_table(cells: Sequence[Cell]) -> Table:
    head = ("Method", "Target", "Density", "Test accuracy", "Epochs")
    rows = [
        [cell.method, _target(cell), _density(cell), _accuracy(cell), shown_epochs(cell, cells)]
        for cell in pareto_front(cells)
    ]
    return Table("Pareto front: no network is as sparse and more accurate", head, rows, words=2, wide=True)


def _target(cell: Cell) -> str:
    return shown_target(cell.target, cell.initial_score, shown_share)


def _controls(cells: Sequence[Cell], results: Sequence[Result]) -> Section | None:
    """Methods beside their controls, a plot each where there are many."""
    controls = [cell for cell in cells if cell.control not in (None, DENSE)]
    lines = {(cell.method, cell.control) for cell in controls}
    if len(lines) <= FEW_CONTROLS:
        return None
    section = Section("Controls")
    section.texts.append(
        "Each method beside networks that lack something of its ticket: reinit has other initial weights, shuffled "
        "the same number of weights in each layer but others, random weights chosen at random."
    )
    for number, method in enumerate(_methods(controls)):
        group = [cell for cell in cells if cell.method == method and cell.control != DENSE]
        drawn = _series(group, results, cells)
        section.parts.append(_plot(f"controls-{number}", f"{method} and its controls", drawn, _bands(cells)))
    return section


def _differences(cells: Sequence[Cell]) -> Section | None:
    if not cells:
        return None
    section = Section("Figures and differences")
    section.texts += _tested(cells)
    head = (
        "Network",
        "Target",
        "Seeds",
        "Density",
        "Test accuracy",
        "Beside",
        "Points",
        "95% interval",
        "p",
        "p, Holm",
    )
    for method in _methods(cells):
        rows = [_difference_row(cell, cells) for cell in cells if cell.method == method]
        section.parts.append(Table(method, head, rows, words=2, wide=True))
    return section


def _tested(cells: Sequence[Cell]) -> list[str]:
    """What differences are, and what they are tested by, as far as there are any."""
    if not any(cell.compared_with for cell in cells):
        return ["Nothing is compared, and so nothing is tested."]
    counts = {"tickets": count_tests(cells, False), "controls": count_tests(cells, True)}
    tests = [f"{_counted(count, 'test')} of {kind}" for kind, count in counts.items() if count]
    points = "Points are the mean difference of test accuracies over the seeds that both have, in percentage points"
    paired = "Equal seeds share the split, the initial weights and, in equal rounds, the order of batches."
    if not tests:
        return [f"{points}. {paired}", "No two networks that are compared share two seeds, so nothing is tested."]
    return [
        f"{points}, with its 95% t interval; p is that of the two-sided paired t-test, then adjusted by Holm for "
        f"{', and for '.join(tests)}. {paired}",
        f"With {_counted(max(cell.n for cell in cells), 'seed')} only large differences can be told from chance: one "
        "that is not significant may still be there. Without a p there are fewer than two pairs, or their differences "
        "are all the same and not 0.",
    ]


def _difference_row(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    figures = [cell.control or "ticket", _target(cell), str(cell.n), _density(cell), _accuracy(cell)]
    if cell.difference is None:
        return [*figures, "the reference" if is_reference(cell, cells) else "-", "-", "-", "-", "-"]
    fewer = f", {cell.pairs} of {cell.n} seeds" if cell.pairs < cell.n else ""
    interval = "-"
    if cell.interval is not None:
        ends = (cell.difference - cell.interval, cell.difference + cell.interval)
        interval = " to ".join(points(end, 0) for end in ends)
    tests = ["-" if p is None else shown_p(p) for p in (cell.p, cell.p_adjusted)]
    return [*figures, cell.compared_with + fewer, points(cell.difference, 0), interval, *tests]


def _cost(cells: Sequence[Cell]) -> Section | None:
    if not cells:
        return None
    section = Section("Cost", texts=[_budgets(cells), SECONDS])
    head = ("Method", "Epochs", "Training FLOPs", "Seconds")
    by_method = [[method, *_ranges([cell for cell in cells if cell.method == method])] for method in _methods(cells)]
    section.parts.append(Table("For one network, lowest to highest", head, by_method, wide=True))
    head = ("Method", "Network", "Target", "Epochs", "Training FLOPs", "Seconds", "Beside", "Times its FLOPs")
    rows = [_cost_row(cell, cells) for cell in cells]
    section.parts.append(
        Table("For each network, mean over seeds", head, rows, words=3, wide=True, folded=len(rows) > 12)
    )
    return section


def _budgets(cells: Sequence[Cell]) -> str:
    """Whether networks that are compared were trained for as long."""
    if not any(cell.compared_with for cell in cells):
        return "Nothing is compared. Epochs are those of search and retraining together."
    ratios, controls = epoch_ratios(cells, False), epoch_ratios(cells, True)
    told = [CONTROL_EPOCHS_NOTE] if controls else []
    if ratios:
        shown = [f"{name} {_range(values, '{:.2f}'.format)}" for name, values in ratios.items()]
        told[:0] = [
            "Budgets differ: a lead may be that of longer training.",
            f"Epochs of search and retraining together, as a ratio: {'; '.join(shown)}.",
        ]
    elif reference_methods(cells) or not controls:
        what = "All methods that are compared were" if controls else "All that is compared was"
        told.insert(0, f"{what} trained for the same number of epochs, search and retraining together.")
    return " ".join(told)


def _ranges(cells: Sequence[Cell]) -> list[str]:
    return [
        _range([cell.epochs for cell in cells], "{:,.6g}".format),
        _range([cell.training_flops for cell in cells], "{:.3g}".format),
        _range([cell.seconds for cell in cells], "{:,.1f}".format),
    ]


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _cost_row(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    other = counterpart(cell, cells)
    times = f"{cell.training_flops / other.training_flops:.2f}" if other and other.training_flops else "-"
    figures = [shown_epochs(cell, cells), f"{cell.training_flops:.3g}", f"{cell.seconds:,.1f}"]
    return [cell.method, cell.control or "ticket", _target(cell), *figures, cell.compared_with or "-", times]


def _missing(cells: Sequence[Cell], missing: Sequence[str]) -> Section:
    section = Section("What is missing")
    if not missing:
        section.texts.append("All runs of the sweep have finished.")
    elif len(missing) <= LONG_LIST:
        section.notes += [f"Not finished: {line}" for line in missing]
    else:
        section.notes.append(f"{len(missing)} runs have not finished.")
        section.parts.append(Table("Runs that have not finished", ("Run",), [[line] for line in missing], folded=True))
    most = max((cell.n for cell in cells), default=0)
    rows = [[cell.method, cell.control or "ticket", _target(cell), str(cell.n)] for cell in cells if cell.n < most]
    for method in _methods(cell for cell in _tickets(cells) if cell.target is not None):
        known = {cell.target for cell in _tickets(cells) if cell.method == method}
        rows += [[method, "ticket", shown_share(target), "0"] for target in _targets(cells) if target not in known]
    if rows:
        section.parts.append(Table(f"Fewer than {most} seeds", ("Method", "Network", "Target", "Seeds"), rows, words=3))
    return section
