"""The report page of a sweep: accuracy against density, differences and significance, masks, cost, missing runs."""

from collections.abc import Sequence

from cs_jax.report import overlap_sections
from cs_jax.report.overlap_sections import shown_share
from cs_jax.report.pages import Page, Section, Table, points
from cs_jax.report.sweep_cells import (
    SweepResults,
    at_target,
    counted,
    methods_of,
    most_accurate,
    show_accuracy,
    show_density,
    show_target,
    targets_of,
    tickets_of,
)
from cs_jax.report.sweep_cost import cost
from cs_jax.report.sweep_plots import accuracy_plots, bands, control_plots
from cs_jax.sweep.statistics import (
    LEVEL,
    Cell,
    count_tests,
    is_reference,
    pareto_front,
    reference_methods,
    shown_epochs,
    shown_p,
)

LONG_LIST = 10  # missing runs; longer lists are a folded table


def page(sweep: SweepResults) -> Page:
    """Page of a sweep. Call inside `plots.style()`."""
    lead = counted(len(sweep.results), "network")
    lead += f"; {counted(len(sweep.missing), 'run')} not finished" * bool(sweep.missing)
    sections = [
        _accuracies(sweep),
        _controls(sweep),
        _differences(sweep.cells),
        *overlap_sections.sections(sweep.tickets),
        cost(sweep.cells),
        _missing(sweep.cells, sweep.missing),
    ]
    return Page(f"Sweep {sweep.name}", lead, [], [*filter(None, sections)])


def _accuracies(sweep: SweepResults) -> Section:
    section, cells = Section("Accuracy against density"), sweep.cells
    if not cells:
        section.notes.append("No network has been trained yet: there is nothing to draw.")
        return section
    section.notes += _gaps(tickets_of(cells), sweep.reference)
    section.texts.append(
        "Curves are means over seeds. ± and error bars are the sample standard deviation (n - 1); error bars are cut "
        "off at 0% and 100%. Dots are single networks. Networks with equal densities are drawn next to each other. "
        + ("Grey: mean and standard deviation of the dense network. " if bands(cells) else "")
        + "The most accurate tickets and the Pareto front are selected by test accuracy, so the accuracies of these "
        "tickets are biased upwards."
    )
    section.parts += accuracy_plots(sweep)
    if targets_of(cells):
        section.parts.append(_best_table(cells))
    if tickets_of(cells):
        section.parts.append(_front_table(cells))
    return section


def _gaps(tickets: Sequence[Cell], reference: str) -> list[str]:
    """Note on why there are no tickets, or why no ticket is compared with the reference; empty otherwise."""
    if not tickets:
        return ["No ticket has been trained yet."]
    methods = methods_of(tickets)
    if len(methods) == 1 or reference_methods(tickets):
        return []
    if reference not in methods:
        return [f"Methods are not compared: there are no tickets of {reference}, the sweep's reference."]
    return [
        f"Methods are not compared: no ticket of another method has the target and seed of a ticket of {reference}, "
        "the sweep's reference."
    ]


def _best_table(cells: Sequence[Cell]) -> Table:
    head = ("Target", "Most accurate", "Test accuracy", "Seeds", "Compared with", "Difference (points)", "p (Holm)")
    head += (f"At level {LEVEL:g}",)
    rows = []
    for target in targets_of(cells):
        tickets = at_target(cells, target)
        for cell in most_accurate(tickets):
            figures = [shown_share(target), cell.method, show_accuracy(cell), str(cell.n)]
            rows.append([*figures, *_lead(cell, tickets, cells)])
    return Table("Most accurate ticket at each target", head, rows, words=2, wide=True)


def _lead(cell: Cell, tickets: Sequence[Cell], cells: Sequence[Cell]) -> list[str]:
    """Comparison of the most accurate ticket with the reference, or of the reference with the second best ticket."""
    if cell.compared_with:
        return [cell.compared_with, points(cell.difference, 0), shown_p(cell.p_adjusted), _significance(cell)]
    others = [other for other in tickets if other.method != cell.method]
    if not is_reference(cell, cells):
        return ["-"] * 4
    if not others or len(most_accurate(tickets)) > 1:
        return ["reference", "-", "-", "-"]
    second = most_accurate(others)[0]
    difference = points(0, second.difference) or "-"
    return [f"{second.method} (second best)", difference, shown_p(second.p_adjusted), _significance(second, -1)]


def _significance(cell: Cell, sign: int = 1) -> str:
    """Cell text: whether `sign * difference` is significantly above 0.

    `difference` is over the common seeds of two tickets, so its sign may differ from the sign over all seeds.
    """
    if cell.p_adjusted is None or cell.difference is None:
        return "not tested"
    return "significant" if cell.p_adjusted < LEVEL and sign * cell.difference > 0 else "not significant"


def _front_table(cells: Sequence[Cell]) -> Table:
    head = ("Method", "Target", "Density", "Test accuracy", "Epochs")
    rows = [
        [cell.method, show_target(cell), show_density(cell), show_accuracy(cell), shown_epochs(cell, cells)]
        for cell in pareto_front(cells)
    ]
    caption = "Pareto front: tickets that no network dominates in density and accuracy"
    return Table(caption, head, rows, words=2, wide=True)


def _controls(sweep: SweepResults) -> Section | None:
    """Section with the controls of each method; None if the first section shows the controls."""
    drawn = control_plots(sweep)
    if not drawn:
        return None
    text = (
        "Each method and its controls. reinit: the ticket's masks with other initial weights. shuffled: masks shuffled "
        "within each layer, so that each layer keeps its density. random: random masks with the ticket's total density."
    )
    return Section("Controls", texts=[text], parts=[*drawn])


def _differences(cells: Sequence[Cell]) -> Section | None:
    if not cells:
        return None
    section = Section("Results and differences", texts=_tests(cells))
    head = ("Network", "Target", "Seeds", "Density", "Test accuracy")
    head += ("Compared with", "Difference (points)", "95% interval", "p", "p (Holm)")
    for method in methods_of(cells):
        rows = [_difference_row(cell, cells) for cell in cells if cell.method == method]
        section.parts.append(Table(method, head, rows, words=2, wide=True))
    return section


def _tests(cells: Sequence[Cell]) -> list[str]:
    """Definitions of the differences, intervals and tests in the tables."""
    if not any(cell.compared_with for cell in cells):
        return ["No networks are compared, so nothing is tested."]
    counts = {"tickets": count_tests(cells, False), "controls": count_tests(cells, True)}
    tests = [f"{counted(count, 'test')} of {kind}" for kind, count in counts.items() if count]
    difference = (
        "Difference: mean difference of test accuracies over the seeds that both networks have, in percentage points. "
        "Networks with equal seeds share the data split, the initial weights and, in rounds with the same number, the "
        "order of batches."
    )
    if not tests:
        return [difference, "No two compared networks have two seeds in common, so nothing is tested."]
    return [
        f"{difference} 95% interval: t interval of the difference. p: two-sided paired t-test. "
        f"p (Holm): p adjusted for {' and for '.join(tests)}.",
        f"With {counted(max(cell.n for cell in cells), 'seed')}, the tests detect only large differences: a difference "
        "that is not significant may be real. There is no p if the networks have fewer than two seeds in common, or "
        "if the differences of all seeds are equal and not 0.",
    ]


def _difference_row(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    figures = [cell.control or "ticket", show_target(cell), str(cell.n), show_density(cell), show_accuracy(cell)]
    if cell.difference is None:
        return [*figures, "reference" if is_reference(cell, cells) else "-", "-", "-", "-", "-"]
    fewer = f", {cell.pairs} of {cell.n} seeds" if cell.pairs < cell.n else ""
    interval = "-"
    if cell.interval is not None:
        ends = (cell.difference - cell.interval, cell.difference + cell.interval)
        interval = " to ".join(points(end, 0) for end in ends)
    tests = ["-" if p is None else shown_p(p) for p in (cell.p, cell.p_adjusted)]
    return [*figures, cell.compared_with + fewer, points(cell.difference, 0), interval, *tests]


def _missing(cells: Sequence[Cell], missing: Sequence[str]) -> Section:
    section = Section("Missing runs")
    if not missing:
        section.texts.append("All runs of the sweep have finished.")
    elif len(missing) <= LONG_LIST:
        section.notes += [f"Not finished: {line}" for line in missing]
    else:
        section.notes.append(f"{len(missing)} runs have not finished.")
        section.parts.append(Table("Runs not finished", ("Run",), [[line] for line in missing], folded=True))
    most = max((cell.n for cell in cells), default=0)
    rows = [[cell.method, cell.control or "ticket", show_target(cell), str(cell.n)] for cell in cells if cell.n < most]
    for method in methods_of(cell for cell in tickets_of(cells) if cell.target is not None):
        known = {cell.target for cell in tickets_of(cells) if cell.method == method}
        rows += [[method, "ticket", shown_share(target), "0"] for target in targets_of(cells) if target not in known]
    if rows:
        section.parts.append(Table(f"Fewer than {most} seeds", ("Method", "Network", "Target", "Seeds"), rows, words=3))
    return section
