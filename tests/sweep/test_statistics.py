"""Sweeps in figures: means, paired differences, their tests, the front, the table and the page."""

import html
import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from cs_jax.commands.sweep import print_cells
from cs_jax.report import density_plots, pages, plots, sweep_page, sweep_plots
from cs_jax.report.density_plots import Band, Curves
from cs_jax.report.pages import Page, Plot, Table
from cs_jax.report.sweep_cells import SweepResults
from cs_jax.sweep import statistics
from cs_jax.sweep.statistics import Cell, Result


def made(
    method: str,
    accuracy: float,
    *,
    control: str | None = None,
    target: float | None = 0.1,
    initial_score: float | None = None,
    seed: int = 0,
    density: float = 0.1,
    epochs: int = 60,
    flops: float = 1.5e12,
) -> Result:
    return Result(method, control, target, initial_score, seed, density, accuracy, None, epochs, flops, 30.0)


def trio(method: str, accuracies: tuple[float, ...], **fields) -> list[Result]:
    return [made(method, accuracy, seed=seed, **fields) for seed, accuracy in enumerate(accuracies)]


IMP = trio("imp", (0.90, 0.91, 0.92))
CS = trio("cs", (0.91, 0.93, 0.95))  # 0.01, 0.02 and 0.03 above


def sweep(methods: int, targets: tuple[float, ...], controls: tuple[str, ...]) -> list[Result]:
    """Invented results of methods at targets, three seeds each, with controls and a dense network."""
    rng = np.random.default_rng(0)
    names = ["imp", *(f"method-{number}" for number in range(1, methods))]
    results = trio("dense", (0.95, 0.94, 0.96), control="dense", target=None, density=1.0)
    for (place, name), target, control in itertools.product(enumerate(names), targets, (None, *controls)):
        mean = 0.93 - 0.02 * math.log2(1 / target) - 0.005 * place - 0.02 * (control is not None)
        accuracies = tuple(rng.normal(mean, 0.003, 3).tolist())
        results += trio(name, accuracies, control=control, target=target, density=target, epochs=60 + 60 * (place == 0))
    return results


def built(results: list[Result], missing: tuple[str, ...] = ()) -> Page:
    with plots.style():
        return sweep_page.page(SweepResults("some", results, missing))


def tables(page: Page) -> dict[str, Table]:
    return {part.caption: part for section in page.sections for part in section.parts if isinstance(part, Table)}


def drawn(page: Page) -> dict[str, Plot]:
    return {part.name: part for section in page.sections for part in section.parts if isinstance(part, Plot)}


def best(page: Page) -> list[list[str]]:
    """Rows of the most accurate ticket at each target."""
    return [[*row] for row in tables(page)["Most accurate ticket at each target"].rows]


def front(page: Page) -> list[list[str]]:
    """Rows of the Pareto front."""
    (table,) = (table for caption, table in tables(page).items() if caption.startswith("Pareto front"))
    return [[*row] for row in table.rows]


def cost(page: Page) -> str:
    """First text on costs."""
    (section,) = (section for section in page.sections if section.title == "Cost")
    return section.texts[0]


def test_a_cell_has_means_over_seeds_and_the_deviation_of_a_sample():
    results = [
        Result("imp", None, 0.1, None, 0, 0.10, 0.90, 0.91, 60, 1e12, 30.0),
        Result("imp", None, 0.1, None, 1, 0.12, 0.91, None, 90, 3e12, 40.0),
        Result("imp", None, 0.1, None, 2, 0.14, 0.95, 0.92, 60, 2e12, 20.0),
    ]
    (cell,) = statistics.summarize(results)
    assert cell[:5] == ("imp", None, 0.1, None, 3)
    assert (cell.epochs, cell.training_flops, cell.seconds) == (70, 2e12, 30)
    assert cell.density == pytest.approx(0.12, abs=1e-15)
    assert cell.density_deviation == pytest.approx(0.02, abs=1e-15)
    assert cell.accuracy == pytest.approx(0.92, abs=1e-15)
    assert cell.deviation == pytest.approx(math.sqrt((0.02**2 + 0.01**2 + 0.03**2) / 2), abs=1e-15)
    assert cell[12:] == ("", 0, None, None, None, None)


def test_one_seed_has_a_difference_and_no_deviation_interval_or_p():
    _, cell = statistics.summarize([made("imp", 0.90), made("cs", 0.93)])
    assert (cell.n, cell.deviation, cell.compared_with, cell.pairs) == (1, None, "imp", 1)
    assert cell.density_deviation is None
    assert cell.difference == pytest.approx(0.03, abs=1e-15)
    assert (cell.interval, cell.p, cell.p_adjusted) == (None, None, None)


def test_paired_differences_have_the_interval_and_p_of_a_t_test():
    _, cell = statistics.summarize([*IMP, *CS])
    assert (cell.compared_with, cell.pairs) == ("imp", 3)
    assert cell.difference == pytest.approx(0.02, abs=1e-12)
    # t = 2 sqrt(3) with 2 degrees of freedom, where p = 1 - t / sqrt(t^2 + 2) and t(0.975) = 4.302653.
    assert cell.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)
    assert cell.interval == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    theirs = stats.ttest_rel([0.91, 0.93, 0.95], [0.90, 0.91, 0.92])
    assert cell.p == pytest.approx(theirs.pvalue, rel=1e-9)
    low, high = theirs.confidence_interval(0.95)
    assert (cell.difference - cell.interval, cell.difference + cell.interval) == pytest.approx((low, high), rel=1e-9)


def test_pairs_are_of_common_seeds_whatever_their_order():
    ours = [made("cs", accuracy, seed=seed) for seed, accuracy in ((7, 0.99), (2, 0.95), (0, 0.91))]
    _, cell = statistics.summarize([*IMP, *ours])
    assert (cell.n, cell.pairs) == (3, 2)
    assert cell.difference == pytest.approx(0.02, abs=1e-12)
    assert cell.p == pytest.approx(stats.ttest_rel([0.95, 0.91], [0.92, 0.90]).pvalue, rel=1e-9)


def test_networks_without_common_seeds_are_not_compared():
    _, cell = statistics.summarize([made("imp", 0.9, seed=0), made("cs", 0.9, seed=1)])
    assert cell[12:] == ("", 0, None, None, None, None)


def test_differences_that_are_all_zero_have_p_one():
    _, cell = statistics.summarize([*IMP, *trio("cs", (0.90, 0.91, 0.92))])
    assert (cell.difference, cell.interval, cell.p, cell.p_adjusted) == (0, 0, 1, 1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_equal_differences_have_no_p_whatever_the_rounding(dtype):
    accuracies = [float(dtype(value)) for value in (0.93, 0.94, 0.95)]
    _, cell = statistics.summarize([*IMP, *trio("cs", tuple(accuracies))])
    assert cell.difference == pytest.approx(0.03, abs=1e-7)
    assert (cell.interval, cell.p, cell.p_adjusted) == (None, None, None)


def test_controls_are_compared_with_the_ticket_of_their_own_method_target_and_initial_score():
    results = [
        *IMP,
        *trio("cs", (0.5, 0.5, 0.5), target=0.2),
        *CS,
        *trio("cs", (0.90, 0.91, 0.95), control="random"),
        *trio("cs", (0.6, 0.6, 0.6), target=None, initial_score=0.05),
        *trio("cs", (0.4, 0.5, 0.6), control="random", target=None, initial_score=0.05),
        *trio("cs", (0.4, 0.5, 0.6), control="random", target=None, initial_score=0.1),
    ]
    cells = {
        (cell.target, cell.initial_score): cell for cell in statistics.summarize(results) if cell.control == "random"
    }
    keys = ((0.1, None), (None, 0.05), (None, 0.1))
    assert [cells[key].compared_with for key in keys] == ["cs ticket", "cs ticket", ""]
    assert cells[0.1, None].difference == pytest.approx((-0.01 - 0.02 + 0) / 3, abs=1e-12)
    assert cells[None, 0.05].difference == pytest.approx(-0.1, abs=1e-12)
    assert statistics.counterpart(cells[None, 0.1], [*cells.values()]) is None


def test_tickets_without_a_target_or_a_reference_at_it_are_not_compared():
    free = trio("imp", (0.9, 0.9, 0.9), target=None) + trio("cs", (0.8, 0.8, 0.9), target=None)
    elsewhere = trio("imp", (0.9, 0.9, 0.9), target=0.5) + CS
    for results in (free, elsewhere, CS):
        assert {cell.compared_with for cell in statistics.summarize(results)} == {""}
    assert [cell.compared_with for cell in statistics.summarize([*IMP, *CS], reference="cs")] == ["cs", ""]


def test_a_reference_without_an_initial_score_is_compared_with_every_initial_score():
    cells = statistics.summarize([*IMP, *trio("cs", (0.9, 0.92, 0.9), initial_score=0.05)])
    assert cells[1].compared_with == "imp"
    assert statistics.counterpart(cells[1], cells) == cells[0]


def test_holm_multiplies_by_the_tests_left_and_never_falls():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-15)
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_differences_without_a_spread_count_among_the_tests():
    cells = statistics.summarize([*IMP, *CS, *trio("iss", [entry.test_accuracy - 0.4 for entry in IMP])])
    alone = statistics.summarize([*IMP, *CS])
    (p,) = (cell.p for cell in alone if cell.method == "cs")
    assert [cell.p_adjusted for cell in cells if cell.method in ("cs", "iss")] == [pytest.approx(2 * p), None]


def test_tickets_and_controls_are_adjusted_as_two_families():
    random = trio("cs", (0.80, 0.83, 0.81), control="random")
    once = made("snip", 0.9)
    cells = statistics.summarize([*IMP, *CS, *random, once])
    tested = [cell for cell in cells if cell.p is not None]
    assert [(cell.method, cell.control) for cell in tested] == [("cs", None), ("cs", "random")]
    p, q = (cell.p for cell in tested)
    assert q < p
    assert [cell.p_adjusted for cell in tested] == pytest.approx([p, q])
    assert cells[-1].p_adjusted is None


def test_cells_are_ordered_by_method_control_and_falling_target():
    results = [
        made("cs", 0.9, target=None, initial_score=-0.1),
        made("cs", 0.9, control="random", target=0.1),
        made("cs", 0.9, target=0.1),
        made("cs", 0.9, target=None, initial_score=0.1),
        made("imp", 0.9, target=0.05),
        made("cs", 0.9, control="reinit", target=0.1),
        made("cs", 0.9, target=0.5),
        made("imp", 0.9, target=0.2),
    ]
    assert [cell[:4] for cell in statistics.summarize(results)] == [
        ("cs", None, 0.5, None),
        ("cs", None, 0.1, None),
        ("cs", None, None, 0.1),
        ("cs", None, None, -0.1),
        ("cs", "random", 0.1, None),
        ("cs", "reinit", 0.1, None),
        ("imp", None, 0.2, None),
        ("imp", None, 0.05, None),
    ]


def test_a_result_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match=r"^cs, random, target 0\.1, s0 -0\.05, seed 3: two results; give one$"):
        statistics.summarize(
            [made("cs", accuracy, control="random", initial_score=-0.05, seed=3) for accuracy in (0.8, 0.9)]
        )


@pytest.mark.parametrize("accuracy", [98.9, -0.1, math.nan])
def test_an_accuracy_that_is_no_share_is_refused(accuracy):
    with pytest.raises(ValueError, match=r"^imp, ticket, target 0\.1, seed 0: test_accuracy .*: must be in \[0, 1\]$"):
        statistics.summarize([made("imp", accuracy)])


def test_no_results_make_no_cells():
    assert statistics.summarize([]) == []


def test_the_front_has_the_tickets_that_no_other_network_beats():
    results = [
        made("imp", 0.95, target=0.5, density=0.5),
        made("imp", 0.90, target=0.1, density=0.1),
        made("cs", 0.94, target=0.5, density=0.5),  # beaten at its density
        made("cs", 0.90, target=0.2, density=0.2),  # beaten at its accuracy
        made("twin", 0.90, target=0.1, density=0.1),  # equal in both: beaten by none
        made("cs", 0.80, target=0.05, density=0.05),  # beaten by the control below
        made("cs", 0.85, control="random", target=0.05, density=0.05),
        made("cs", 0.70, target=0.01, density=0.01),
    ]
    found = statistics.pareto_front(statistics.summarize(results))
    assert [(cell.method, cell.target) for cell in found] == [("imp", 0.5), ("imp", 0.1), ("twin", 0.1), ("cs", 0.01)]


def test_markdown_is_the_table_that_a_reader_sees():
    results = [
        *trio("imp", (0.90, 0.91, 0.92), epochs=180, flops=4.5e12),
        *CS,
        *trio("cs", (0.90, 0.91), control="random"),
        made("snip", 0.93, density=0.1234),
        made("cs", 0.9, target=None, initial_score=-0.05),
    ]
    head = "method | control | target | n | density | test accuracy | epochs | training FLOPs | seconds"
    first = "imp |  | 0.1 | 3 | 0.1000 | 0.9100 ± 0.0100 | 180 | 4.5e+12 | 30.0 | reference | reference"
    assert statistics.to_markdown(statistics.summarize(results)).splitlines() == [
        f"| {head} | difference | p (Holm) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| {first} |",
        "| cs |  | 0.1 | 3 | 0.1000 | 0.9300 ± 0.0200 | 60 (imp 180) | 1.5e+12 | 30.0 "
        "| +0.0200 [-0.0048, +0.0448] vs imp | 0.074 |",
        "| cs |  | s0 -0.05 | 1 | 0.1000 | 0.9000 | 60 | 1.5e+12 | 30.0 | - | - |",
        "| cs | random | 0.1 | 2 | 0.1000 | 0.9050 ± 0.0071 | 60 | 1.5e+12 | 30.0 "
        "| -0.0150 [-0.0785, +0.0485] vs cs ticket | 0.205 |",
        "| snip |  | 0.1 | 1 | 0.1234 | 0.9300 | 60 (imp 180) | 1.5e+12 | 30.0 | +0.0300 vs imp | - |",
    ]


def test_markdown_says_where_pairs_are_fewer_than_seeds():
    text = statistics.to_markdown(statistics.summarize([*IMP[:2], *CS]))
    assert "+0.0150 [-0.0485, +0.0785] vs imp, over 2 of 3 seeds | 0.205 |" in text


def test_densities_that_differ_between_seeds_have_their_deviation_everywhere():
    results = [
        made("cs", accuracy, seed=seed, target=None, initial_score=0.05, density=density)
        for seed, (accuracy, density) in enumerate([(0.9, 0.1), (0.91, 0.12), (0.92, 0.14)])
    ]
    cells = statistics.summarize([*IMP, *results])
    (_, same), (_, found) = ((cell.method, cell.density_deviation) for cell in cells)
    assert (same, found) == (0, pytest.approx(0.02))
    assert [row.split(" | ")[4] for row in statistics.to_markdown(cells).splitlines()[2:]] == [
        "0.1000",
        "0.1200 ± 0.0200",
    ]
    assert statistics.to_json(cells)[1]["density_deviation"] == found
    assert tables(built([*IMP, *results]))["cs"].rows[0][3] == "12.00% ± 2.00%"
    assert front(built([*results]))[0][2] == "12.00% ± 2.00%"


def test_what_is_not_tested_is_not_adjusted_for():
    def told(results: list[Result]) -> list[str]:
        return next(section.texts for section in built(results).sections if section.title == "Results and differences")

    assert told(CS) == ["No networks are compared, so nothing is tested."]
    assert told([IMP[0], CS[0]])[1] == "No two compared networks have two seeds in common, so nothing is tested."
    assert told([*IMP, *CS])[0].endswith("p (Holm): p adjusted for 1 test of tickets.")
    controls = [*trio("cs", (0.8, 0.81, 0.8), control="random"), *trio("cs", (0.8, 0.81, 0.8), control="reinit")]
    assert told([*CS, *controls])[0].endswith("p (Holm): p adjusted for 2 tests of controls.")
    assert told([*IMP, *CS, *controls])[0].endswith("adjusted for 1 test of tickets and for 2 tests of controls.")


def test_the_page_says_why_no_method_is_compared():
    page = built([*CS, *trio("snip", (0.8, 0.8, 0.9))])
    assert page.sections[0].notes == ["Methods are not compared: there are no tickets of imp, the sweep's reference."]
    assert best(page) == [["10%", "cs", "93.00% ± 2.00%", "3", "-", "-", "-", "-"]]
    elsewhere = built([*CS, *trio("snip", (0.8, 0.8, 0.9)), *trio("imp", (0.8, 0.8, 0.9), target=0.5)])
    assert elsewhere.sections[0].notes == [
        "Methods are not compared: no ticket of another method has the target and seed of a ticket of imp, the sweep's "
        "reference."
    ]


def terminal(results: list[Result]) -> list[str]:
    """Printed output of a sweep in a terminal of 80 columns."""
    file = io.StringIO()
    print_cells(Console(file=file, width=80), statistics.summarize(results))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_terminals_table_tells_the_reference_from_what_cannot_be_tested_and_says_that_budgets_differ():
    results = [
        *trio("imp", (0.98, 0.99, 1.0), epochs=180),
        *trio("magnitude", (0.89, 0.99, 0.94), epochs=1500),
        *trio("magnitude", (0.92, 0.94, 0.93), control="shuffled"),
        *trio("snip", (0.97, 0.98, 0.99), epochs=180),
        *trio("gmp", (0.97, 0.981, 0.992), epochs=180),
    ]
    assert terminal(results) == [
        "method     network   target  n  density        test %  epochs  points          p",
        "─" * 80,
        "imp        ticket    0.1     3   10.00%  99.00 ± 1.00     180    ref.",
        "magnitude  ticket    0.1     3   10.00%  94.00 ± 5.00   1,500   -5.00      0.399",
        "magnitude  shuffled  0.1     3   10.00%  93.00 ± 1.00      60   -1.00      0.707",
        "snip       ticket    0.1     3   10.00%  98.00 ± 1.00     180   -1.00  no spread",
        "gmp        ticket    0.1     3   10.00%  98.10 ± 1.10     180   -0.90     0.012*",
        "",
        "test %: accuracy ± sample standard deviation. epochs: search and retraining together.",
        "points: difference in test accuracy vs imp (ref.) at the same target; of a control, vs its ticket.",
        "p: paired t-test over at least two seeds, adjusted by Holm's method; * below 0.05. "
        "no spread: all differences are equal.",
        "Trained for different numbers of epochs: magnitude 1,500 (imp 180).",
        "Controls are trained for the epochs of the retraining only, without the search epochs.",
    ]


def test_the_terminals_table_breaks_long_names_and_cuts_nothing_off():
    results = [
        made(
            "magnitude-at-once", accuracy, seed=seed, target=None, initial_score=-0.05, density=density, control=control
        )
        for control, accuracy in ((None, 0.9), ("shuffled", 0.7))
        for seed, density in ((0, 0.1), (1, 0.2))
    ]
    assert terminal(results)[:8] == [
        "method  network   target    n      density        test %  epochs  points          p",
        "─" * 83,
        "magnit  ticket    s0 -0.05  2  15.00±7.07%  90.00 ± 0.00      60       -          -",
        "ude-at",
        "-once",
        "magnit  shuffled  s0 -0.05  2  15.00±7.07%  70.00 ± 0.00      60  -20.00  no spread",
        "ude-at",
        "-once",
    ]


def test_json_has_every_field_and_comes_back():
    cells = statistics.summarize([*IMP, *CS, made("snip", 0.9, target=None)])
    written = json.loads(json.dumps(statistics.to_json(cells), allow_nan=False))
    assert [Cell(**fields) for fields in written] == cells


def test_a_full_sweep_makes_a_page_with_plots_and_tables(tmp_path: Path):
    results = sweep(8, (0.5, 0.2, 0.1, 0.05, 0.02), ("reinit", "random"))
    page = built(results, missing=("method-3, target 0.02, seed 1: epoch 4 of 60",))
    assert [*drawn(page)] == ["accuracy-density", *(f"controls-{number}" for number in range(8))]
    assert [len(tables(page)[name].rows) for name in ("imp", "method-7", "dense")] == [15, 15, 1]
    paths = pages.write(tmp_path, page)
    text = html.unescape(paths[0].read_text())
    assert "method-7, reinit" in text and "Not finished: method-3, target 0.02, seed 1: epoch 4 of 60" in text
    assert len(paths) == 10


def test_few_controls_are_drawn_beside_their_methods_and_not_apart():
    page = built(sweep(2, (0.5, 0.1), ("reinit", "random")))
    assert [*drawn(page)] == ["accuracy-density"]
    assert "method-1, random: " in drawn(page)["accuracy-density"].alt
    assert "dense: 95.00%" in drawn(page)["accuracy-density"].alt


def test_a_single_cell_makes_a_page(tmp_path: Path):
    page = built([made("imp", 0.99)])
    assert (page.title, page.lead, page.sections[0].notes) == ("Sweep some", "1 network", [])
    assert front(page) == [["imp", "10%", "10.00%", "99.00%", "60"]]
    assert best(page) == [["10%", "imp", "99.00%", "1", "-", "-", "-", "-"]]
    assert len(pages.write(tmp_path, page)) == 2


def test_a_page_without_results_says_so():
    page = built([], missing=("imp, seed 0",))
    assert page.lead == "0 networks; 1 run not finished"
    assert page.sections[0].notes == ["No network has been trained yet: there is nothing to draw."]
    assert page.sections[-1].notes == ["Not finished: imp, seed 0"]


def test_an_empty_ticket_is_drawn_at_density_zero():
    assert [*drawn(built([made("imp", 0.1, density=0.0), made("cs", 0.9)]))] == ["accuracy-density"]


def test_a_page_of_dense_networks_alone_says_that_there_is_no_ticket():
    page = built(trio("dense", (0.9, 0.9, 0.9), control="dense", target=None, density=1.0))
    assert page.sections[0].notes == ["No ticket has been trained yet."]


@pytest.mark.parametrize(
    "ours, rows",
    [
        (
            (0.91, 0.93, 0.95),
            [["10%", "cs", "93.00% ± 2.00%", "3", "imp", "+2.00", "0.074", "not significant"]],
        ),
        (
            (0.92, 0.931, 0.942),
            [["10%", "cs", "93.10% ± 1.10%", "3", "imp", "+2.10", "<0.001", "significant"]],
        ),
        (
            (0.88, 0.889, 0.898),
            [["10%", "imp", "91.00% ± 1.00%", "3", "cs (second best)", "+2.10", "<0.001", "significant"]],
        ),
        (
            (0.93, 0.94, 0.95),
            [["10%", "cs", "94.00% ± 1.00%", "3", "imp", "+3.00", "-", "not tested"]],
        ),
        (
            (0.92, 0.91, 0.90),
            [
                ["10%", "imp", "91.00% ± 1.00%", "3", "reference", "-", "-", "-"],
                ["10%", "cs", "91.00% ± 1.00%", "3", "imp", "+0.00", "1.000", "not significant"],
            ],
        ),
    ],
)
def test_the_page_says_which_ticket_is_best_and_what_its_lead_is_worth(ours, rows):
    page = built([*IMP, *trio("cs", ours)])
    assert best(page) == rows
    assert tables(page)["Most accurate ticket at each target"].head[-1] == "At level 0.05"


def test_tickets_left_to_the_dial_are_called_best_at_no_target():
    page = built([*IMP, *trio("cs", (0.95, 0.96, 0.97), target=None, initial_score=0.05)])
    assert [row[:2] for row in best(page)] == [["10%", "imp"]]
    assert [note.split(":")[0] for note in page.sections[0].notes] == ["Methods are not compared"]
    assert tables(page)["cs"].rows[0][1] == "s0 0.05" and tables(page)["cs"].rows[0][5:] == ["-"] * 5


def test_cost_says_that_budgets_differ():
    short, long = trio("imp", (0.9, 0.91, 0.92), epochs=30), trio("imp", (0.9, 0.91, 0.92), target=0.5, epochs=6)
    page = built([*short, *long, *CS, *trio("cs", (0.9, 0.9, 0.91), target=0.5)])
    assert cost(page) == (
        "Training budgets differ: a higher accuracy may come from longer training. "
        "Ratio of epochs, search and retraining together: cs vs imp 2.00 to 10.00."
    )
    caveat = "up and to the left is better; methods were trained for different numbers of epochs (see Cost)"
    assert drawn(page)["accuracy-density"].remark == caveat
    same = built([*IMP, *CS])
    assert cost(same).startswith("All compared networks were trained for the same number of epochs")
    assert drawn(same)["accuracy-density"].remark == "up and to the left is better"


def test_cost_says_once_that_controls_are_trained_as_long_as_the_retraining():
    retrained = "Controls are trained for the epochs of the retraining only, without the search epochs."
    controls = [
        *trio("cs", (0.9, 0.9, 0.9), control="random", epochs=15),
        *trio("imp", (0.9, 0.9, 0.9), control="random", epochs=15),
    ]
    assert cost(built([*IMP, *CS, *controls])) == (
        "All compared methods were trained for the same number of epochs, search and retraining together. " + retrained
    )
    assert cost(built([*IMP, *trio("snip", (0.9, 0.9, 0.9), epochs=20), *controls])) == (
        "Training budgets differ: a higher accuracy may come from longer training. "
        f"Ratio of epochs, search and retraining together: snip vs imp 0.33. {retrained}"
    )
    assert cost(built([*CS, *controls[:3]])) == retrained
    assert cost(built(CS)) == "No networks are compared. Epochs: search and retraining together."


def test_seeds_and_targets_that_are_missing_are_listed():
    page = built([*IMP, *CS[:2], *trio("imp", (0.9, 0.8, 0.7), target=0.5)])
    assert tables(page)["Fewer than 3 seeds"].rows == [["cs", "ticket", "10%", "2"], ["cs", "ticket", "50%", "0"]]


def test_collapsed_networks_get_the_others_a_closer_look():
    results = sweep(3, (0.5, 0.2, 0.1), ())
    assert "accuracy-density-closer" not in drawn(built(results))
    results += trio("method-2", (0.1, 0.1, 0.1), target=0.02, density=0.02)
    closer = drawn(built(results))["accuracy-density-closer"]
    floor = float(re.findall(r"[\d.]+", closer.title)[0]) / 100
    usual = [result.test_accuracy for result in results if result.target != 0.02]
    assert 0.5 < floor < min(usual)


def test_a_method_looks_the_same_in_every_plot_and_no_two_look_alike():
    results = sweep(8, (0.5, 0.1), ("random",))
    swept = SweepResults("some", results)
    tickets = sweep_plots.series([cell for cell in swept.cells if cell.control is None], swept)
    alone = sweep_plots.series([cell for cell in swept.cells if cell.method == "method-5"], swept)
    assert len({line.color for line in tickets}) == len({line.marker for line in tickets}) == 8
    assert {(line.color, line.marker) for line in alone} == {(tickets[5].color, tickets[5].marker)}
    assert [(line.dashes, line.thin) for line in alone] == [("-", False), ("--", True)]
    assert [len(line.seeds) for line in tickets] == [6] * 8


def test_bars_reach_one_deviation_up_and_down_and_dots_are_single_networks():
    swept = SweepResults("some", IMP)
    with plots.style():
        figure = density_plots.accuracy_by_density(Curves(sweep_plots.series(swept.cells, swept)))
    axes = figure.axes[0]
    (bar,) = axes.collections
    assert bar.get_paths()[0].vertices[:, 1] == pytest.approx([0.90, 0.92])
    assert sorted(axes.lines[0].get_ydata()) == [0.90, 0.91, 0.92]
    assert axes.get_xscale() == "log"


def test_no_bar_or_band_leaves_the_accuracies_that_there_are():
    swept = SweepResults("some", [*trio("imp", (0.98, 1.0, 1.0)), *trio("cs", (0.0, 0.0, 0.3))])
    cells = swept.cells
    with plots.style():
        curves = Curves(sweep_plots.series(cells, swept), [Band("dense", 0.99, 0.02)])
        figure = density_plots.accuracy_by_density(curves)
    axes = figure.axes[0]
    high, low = (bar.get_paths()[0].vertices[:, 1] for bar in axes.collections)
    assert high == pytest.approx([cells[0].accuracy - (cells[0].deviation or 0), 1])
    assert low == pytest.approx([0, cells[1].accuracy + (cells[1].deviation or 0)])
    (band,) = axes.patches
    assert (band.get_extents().transformed(axes.transData.inverted()).y1) == pytest.approx(1)


def test_the_page_says_what_deviations_are_and_where_the_best_were_chosen():
    text = built([*IMP, *CS]).sections[0].texts[0]
    assert "the sample standard deviation (n - 1)" in text and "selected by test accuracy" in text
