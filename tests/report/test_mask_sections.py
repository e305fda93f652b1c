"""Report sections on masks: flip rate, overlap of rounds, methods and seeds, and linear connectivity."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from test_report import edit, files, make_run, page, words

from cs_jax import commands, report, save_ticket
from cs_jax.core.errors import ConfigError
from cs_jax.experiment.storage.paths import MASKS_FILE, METRICS_FILE, SUMMARY_FILE, TICKET_FILE
from cs_jax.report import overlap_sections, plots, read_run
from cs_jax.report.epoch_sections import spans
from cs_jax.report.pages import Plot, Section, Table
from cs_jax.sweep import storage
from cs_jax.sweep.results import SweptTicket, read_tickets
from cs_jax.sweep.spec import make_spec

CONV, BLOCK, CLASSIFIER = "conv0/kernel", "block/conv1/kernel", "classifier/kernel"
SIZES = {CONV: 200, BLOCK: 400, CLASSIFIER: 600}
FIRST = {CONV: (0, 100), BLOCK: (0, 400), CLASSIFIER: (0, 300)}
SECOND = {CONV: (50, 150), BLOCK: (0, 100), CLASSIFIER: (0, 100)}
TICKET = {**SECOND, CLASSIFIER: (0, 88)}


def kept(layers: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Masks that keep the weights with index in [first, last)."""
    return {
        name: (np.arange(SIZES[name]) >= start) & (np.arange(SIZES[name]) < stop)
        for name, (start, stop) in layers.items()
    }


def write_masks(run: Path, *rounds: dict[str, tuple[int, int]]) -> None:
    arrays = {
        f"{number}/{name}": np.packbits(mask)
        for number, layers in enumerate(rounds)
        for name, mask in kept(layers).items()
    }
    safetensors.numpy.save_file(arrays, run / MASKS_FILE)


def write_ticket(folder: Path, layers: dict[str, tuple[int, int]] = TICKET) -> None:
    """Writes a ticket of a custom model, with masks of 0 and 2."""
    flat = {name: 2 * mask.astype(np.float32).reshape(2, -1) for name, mask in kept(layers).items()}
    masks: dict[str, Any] = {
        "conv0": {"kernel": flat[CONV]},
        "block": {"conv1": {"kernel": flat[BLOCK]}},
        "classifier": {"kernel": flat[CLASSIFIER]},
    }
    save_ticket(folder / TICKET_FILE, params=masks, batch_stats={}, masks=masks, metadata={})


LINE = {
    "points": [{"share": 0.0, "error": 0.1, "loss": 0.5}, {"share": 0.5, "error": 0.25, "loss": 2.0},
               {"share": 1.0, "error": 0.2, "loss": 0.7}],
    "barrier": 0.1,
    "loss_barrier": 1.4,
    "children": [{"test_accuracy": 0.9}, {"test_accuracy": 0.81}],
}  # fmt: skip


def write_line(run: Path, **changes: Any) -> None:
    (run / "connectivity.json").write_text(json.dumps(LINE | changes))


def write_flips(run: Path, rates: list[float | None]) -> None:
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    flips = iter(rates)
    lines = [line | {"flip_rate": next(flips) if line["phase"] == "search" else None} for line in lines]
    (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def z(both: int, layers: list[tuple[int, int, int]]) -> float:
    """Z-score from the counts of two masks in layers of n weights."""
    mean = sum(a * b / n for a, b, n in layers)
    variance = sum(a * b * (n - a) * (n - b) / (n * n * (n - 1)) for a, b, n in layers)
    return (both - mean) / math.sqrt(variance)


def test_rounds_and_the_ticket_have_their_overlaps(run: Path) -> None:
    write_masks(run, FIRST, SECOND)
    write_ticket(run)
    report.write_report(run)
    # Of 800 and 300 weights 250 are in both, 50 + 100 + 50 by chance; 1,200 - 2 * 250 - 100 of 1,200 differ.
    rounds = z(250, [(100, 100, 200), (400, 100, 400), (300, 100, 600)])
    # The ticket has 12 of 300 less; by chance 50 + 25 + 14.67 of its 288 would be in both.
    last = z(288, [(100, 100, 200), (100, 100, 400), (100, 88, 600)])
    text = words(page(run))
    assert f"round 0 round 1 250 83.33% 66.67% +{rounds:.1f} 50.00%" in text
    assert f"round 1 ticket 288 100.00% 31.13% +{last:.1f} 1.00%" in text
    assert "round 0 ticket" not in text


def test_without_masks_the_section_says_so(run: Path) -> None:
    report.write_report(run)
    assert f"{MASKS_FILE} is missing" in words(page(run))
    assert not {"flip-rate.png", "connectivity.png"} & set(files(run))


def test_a_method_without_a_search_misses_no_masks(run: Path) -> None:
    edit(run / "config.json", method="random", target_density=0.1)
    lines = [line for line in (run / METRICS_FILE).read_text().splitlines() if '"search"' not in line]
    (run / METRICS_FILE).write_text("\n".join(lines) + "\n")
    report.write_report(run)
    text = words(page(run))
    assert "masks were chosen before training, without a search" in text and f"{MASKS_FILE} is missing" not in text


def test_a_method_without_scores_has_no_section_on_them(run: Path) -> None:
    (run / "scores.json").unlink()
    report.write_report(run)
    assert "scores.json is missing" in words(page(run))
    edit(run / "config.json", method="imp")
    report.write_report(run)
    text = words(page(run))
    assert "scores.json" not in text and "Scores" not in text


def test_a_method_without_scores_whose_file_has_no_round_has_no_section_on_them(run: Path) -> None:
    edit(run / "scores.json", rounds=[])
    report.write_report(run)
    assert "scores.json is missing or has no round yet" in words(page(run))
    edit(run / "config.json", method="imp")
    report.write_report(run)
    assert "Scores" not in words(page(run)) and "scores.json" not in words(page(run))


@pytest.mark.slow
def test_a_page_says_of_rounds_and_scores_what_is_true_of_its_method(run: Path) -> None:
    said = {}
    for method in ("cs", "iss", "gmp", "imp"):
        edit(run / "config.json", method=method, **({} if method in ("cs", "iss") else {"target_density": 0.1}))
        report.write_report(run)
        said[method] = words(page(run)), (run / "scores-round-1.png").read_bytes()
    for method, (text, _) in said.items():
        assert ("A weight is kept if its score is above 0" in text) is (method != "iss")
        assert ("Soft masks are computed at the round's final temperature" in text) is (method == "cs")
        assert ("Weights are pruned at the end of every epoch" in text) is (method == "gmp")
        assert ("Weights are pruned at the end of a round's last epoch" in text) is (method == "imp")
        assert ("a weight is kept with probability sigmoid(score)" in text) is (method == "iss")
    assert said["iss"][1] != said["cs"][1] == said["imp"][1]  # no line at 0, and one colour


def test_what_follows_a_search_without_retraining_is_not_called_that(run: Path) -> None:
    lines = [line for line in (run / METRICS_FILE).read_text().splitlines() if '"ticket"' not in line]
    for kept, labels in ((None, "retraining"), (lines, "controls")):
        if kept is not None:
            (run / METRICS_FILE).write_text("\n".join(kept) + "\n")
        assert [span.label for span in spans(read_run.read(run))] == ["round 0", "round 1", labels]


def test_without_scores_the_ticket_tells_how_many_weights_each_layer_has(run: Path) -> None:
    (run / "scores.json").unlink()
    report.write_report(run)
    assert " of 400 " not in words(page(run))
    write_ticket(run)
    report.write_report(run)
    assert re.search(r"block/conv1/kernel \d+ of 400 \d", words(page(run)))


def test_rounds_wait_for_the_sizes_of_layers(run: Path) -> None:
    write_masks(run, FIRST, SECOND)
    (run / "scores.json").unlink()
    report.write_report(run)
    assert "Rounds are not compared yet" in words(page(run))
    write_ticket(run)
    report.write_report(run)
    assert "round 0 round 1 250 83.33%" in words(page(run))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rates, log, alt",
    [
        ([None, 0.5, 0.25, 0.2, 0.2, 0.1, 0.09, 0.08], False, "50.00% in epoch 2, 8.00% in epoch 8"),
        ([None, 0.5, 0.25, None, 0.1, 0.01, 0.001, None], True, "50.00% in epoch 2, 0.10% in epoch 7"),
        ([None, 0.5, 0.0, 0.0, 0.1, 0.01, 0.001, 0.0], True, "50.00% in epoch 2, 0.10% in epoch 7"),
        ([None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], False, "0.00% in epoch 2, 0.00% in epoch 8"),
    ],
)
def test_flips_are_drawn_where_they_are_known(run: Path, rates: list[float | None], log: bool, alt: str) -> None:
    write_flips(run, rates)
    report.write_report(run)
    assert f'alt="Flip rate by epoch. search: {alt}."' in page(run)
    assert ("epochs without a flip are not drawn" in page(run)) == (log and 0.0 in rates)
    assert (run / "flip-rate.png").exists()


def test_without_a_known_rate_no_flips_are_drawn(run: Path) -> None:
    write_flips(run, [None] * 8)
    report.write_report(run)
    assert not (run / "flip-rate.png").exists()


def broken(run: Path, **changes: np.ndarray | None) -> None:
    """Masks with changed or missing arrays."""
    write_masks(run, FIRST, SECOND)
    arrays = safetensors.numpy.load_file(run / MASKS_FILE) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    safetensors.numpy.save_file(arrays, run / MASKS_FILE)


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda run: (run / MASKS_FILE).write_bytes(b"masks"), f"{MASKS_FILE}: not a valid safetensors file"),
        (lambda run: (run / MASKS_FILE).mkdir(), f"{MASKS_FILE}: not a file"),
        (
            lambda run: broken(run, **{"first/a": np.zeros(1, np.uint8)}),
            "'first/a' of shape (1,), dtype uint8: must be ROUND/LAYER",
        ),
        (
            lambda run: broken(run, **{f"1/{CONV}": np.zeros(25, np.int8)}),
            f"'1/{CONV}' of shape (25,), dtype int8: must be",
        ),
        (
            lambda run: broken(run, **{f"1/{CONV}": np.zeros((25, 1), np.uint8)}),
            f"'1/{CONV}' of shape (25, 1), dtype uint8: must",
        ),
        (
            lambda run: broken(run, **{f"1/{CONV}": np.zeros(26, np.uint8)}),
            f"round 1: '{CONV}' of 26 bytes: must have 25 bytes",
        ),
        (lambda run: broken(run, **{f"1/{CONV}": None}), f"round 1: '{CONV}': missing"),
        (lambda run: broken(run, **{"1/other": np.zeros(1, np.uint8)}), "round 1: 'other': unknown layer"),
        (
            lambda run: (broken(run), (run / TICKET_FILE).write_bytes(b"ticket")),
            f"{TICKET_FILE}: not a ticket file: 6 bytes",
        ),
    ],
)
def test_damaged_masks_are_refused_by_name(run: Path, damage: Callable[[Path], Any], text: str) -> None:
    damage(run)
    with pytest.raises(ConfigError) as error:
        report.write_report(run)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not (run / "report.html").exists()


def test_masks_of_layers_that_nothing_else_tells_of_have_to_fit_each_other(run: Path) -> None:
    (run / "scores.json").unlink()
    broken(run, **{f"1/{CONV}": np.zeros(26, np.uint8)})
    with pytest.raises(ConfigError, match=f"round 1: '{CONV}' of 26 bytes: must have 25 bytes$"):
        report.write_report(run)


def test_bits_beyond_a_layers_weights_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=("a",))
    scores = json.loads((run / "scores.json").read_text())
    for entry in scores["rounds"]:  # 195 weights, so that 5 bits are left over
        for counts in (entry["start"]["a"], entry["end"]["a"]):
            counts[int(np.argmax(counts))] -= 5
    edit(run / "scores.json", **scores)
    bits = np.zeros(25, np.uint8)
    safetensors.numpy.save_file({"0/a": bits}, run / MASKS_FILE)
    report.write_report(run)
    bits[-1] = 1
    safetensors.numpy.save_file({"0/a": bits}, run / MASKS_FILE)
    with pytest.raises(ConfigError, match="round 0: 'a': bits after the 195 weights must be 0"):
        report.write_report(run)


def test_a_ticket_of_other_layers_than_the_scores_is_refused(run: Path) -> None:
    write_masks(run, FIRST)
    masks = {"conv0": {"kernel": np.ones(8, np.float32)}}
    save_ticket(run / TICKET_FILE, params=masks, batch_stats={}, masks=masks, metadata={})
    with pytest.raises(ConfigError, match="layers have other sizes than in the scores"):
        report.write_report(run)


def test_the_line_between_two_trainings_has_a_section(run: Path) -> None:
    write_line(run)
    report.write_report(run)
    text = words(page(run))
    assert "Test accuracy of the two networks: 90.00% and 81.00%." in text
    assert "10.00 percentage points for the error and 1.4000 for the loss" in text
    assert "error 10.00% and 20.00% at the ends, 25.00% at most; loss 0.5 and 0.7 at the ends, 2 at most" in page(run)
    assert (run / "connectivity.png").exists()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"barrier": 0.2}, "barrier 0.2: must be 0.1, the barrier of the points"),
        ({"loss_barrier": 0.0}, "loss_barrier 0: must be 1.4, the barrier of the points"),
        ({"barrier": None}, "barrier None: must be a number"),
        ({"points": []}, "points: must have increasing shares from 0 to 1"),
        ({"points": LINE["points"][::-1]}, "points: must have increasing shares from 0 to 1"),
        ({"points": LINE["points"][:2]}, "points: must have increasing shares from 0 to 1"),
        ({"points": [{"share": 0.0, "error": 1.5, "loss": 0.5}]}, "points[0].error 1.5: must be a number <= 1.0"),
        ({"points": [{"share": 0.0, "error": 0.5}]}, "points[0].loss: missing"),
        ({"children": LINE["children"][:1]}, "children: must have 2 entries, not 1"),
    ],
)
def test_a_damaged_line_is_refused(run: Path, changes: dict[str, Any], text: str) -> None:
    write_line(run, **changes)
    with pytest.raises(ConfigError) as error:
        report.write_report(run)
    assert text in str(error.value) and "connectivity.json" in str(error.value)


@pytest.mark.slow
def test_a_real_run_has_all_of_its_masks_in_its_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = "--model lenet300100 --epochs 2 --rounds 2 --rewind-epoch 1 --max-train-examples 100 --controls"
    given = ["train", "digits", *asked.split(), "--target-density", "0.1", "--out", str(out)]
    assert commands.main(given) == 0
    flips = [json.loads(line)["flip_rate"] for line in (out / METRICS_FILE).read_text().splitlines()]
    assert flips[0] is None and None not in flips[1:4] and flips[4:] == [None, None]
    bits = safetensors.numpy.load_file(out / MASKS_FILE)
    first, last = (
        np.concatenate([np.unpackbits(bits[name]) for name in sorted(bits) if name.startswith(f"{number}/")])
        for number in (0, 1)
    )
    both, size = int((first & last).sum()), 64 * 300 + 300 * 100
    shared, flipped = both / min(first.sum(), last.sum()), (first ^ last).sum() / size
    found = re.search(r"round 0 round 1 ([\d,]+) ([\d.]+)% ([\d.]+)% \S+ ([\d.]+)%", words(page(out)))
    assert found is not None and found[1] == f"{both:,}"
    assert (found[2], found[4]) == (f"{100 * shared:.2f}", f"{100 * flipped:.2f}")
    assert (out / "flip-rate.png").exists()


def swept(method: str, seed: int, start: int, stop: int, **fields: Any) -> SweptTicket:
    masks = {"conv0/kernel": (np.arange(100) >= start) & (np.arange(100) < stop)}
    return SweptTicket(
        **{"method": method, "target": 0.2, "initial_score": None, "seed": seed, "masks": masks, **fields}
    )


def built(tickets: list[SweptTicket]) -> dict[str, Section]:
    with plots.style():
        return {section.title: section for section in overlap_sections.sections(tickets)}


def table(section: Section) -> list[list[str]]:
    return [list(row) for part in section.parts if isinstance(part, Table) for row in part.rows]


CS = [swept("cs", 0, 0, 20), swept("cs", 1, 10, 30)]
IMP = [swept("imp", 0, 0, 20), swept("imp", 1, 30, 50)]


def test_methods_are_compared_at_equal_seeds_and_each_with_itself_between_seeds() -> None:
    found = built([*CS, *IMP])
    half, none, whole = (z(both, [(20, 20, 100)]) for both in (10, 0, 20))
    assert table(found["Overlap of masks"]) == [
        ["cs", "other seeds", "1", "50.00%", "20.00%", f"+{half:.1f}"],
        ["cs", "imp", "2", "50.00%", "20.00%", f"−{-none:.1f} to +{whole:.1f}"],
        ["imp", "other seeds", "1", "0.00%", "20.00%", f"−{-none:.1f}"],
    ]
    (drawn,) = (part for part in found["Overlap of masks"].parts if isinstance(part, Plot))
    assert drawn.alt == (
        "Mask overlap, density 20%: cs and cs 50.00%, by chance 20.00%; cs and imp 50.00%, by chance 20.00%; "
        "imp and imp 0.00%, by chance 20.00%."
    )
    assert drawn.png.startswith(b"\x89PNG")


def test_layers_have_their_mean_density_over_seeds_by_method() -> None:
    found = built([*CS, swept("imp", 0, 0, 10), swept("imp", 1, 0, 40)])
    (drawn,) = found["Density of layers"].parts
    assert isinstance(drawn, Plot)
    assert drawn.alt.endswith("minimum to maximum density: cs 20.00% to 20.00%; imp 25.00% to 25.00%.")


def test_one_seed_has_no_pair_with_itself_and_other_networks_none_at_all() -> None:
    other = swept("imp", 0, 0, 20, masks={"dense/kernel": np.arange(10) < 2})
    assert [*built([CS[0], IMP[0]])["Overlap of masks"].parts[-1].rows] == [  # pyright: ignore
        ["cs", "imp", "1", "100.00%", "20.00%", f"+{z(20, [(20, 20, 100)]):.1f}"]
    ]
    assert [*built([CS[0], other])] == ["Density of layers"]


def test_each_target_has_its_own_plots_densest_first_and_tickets_without_one_none() -> None:
    tickets = [swept("cs", seed, 0, 20, target=target) for target in (0.005, 0.5) for seed in (0, 1)]
    dials = [swept("cs", seed, 0, 20, target=None, initial_score=-0.1) for seed in (0, 1)]
    found = built([*tickets, *dials])["Overlap of masks"].parts
    titles = [part.title for part in found if isinstance(part, Plot)]
    assert titles == [f"Mask overlap, {target}" for target in ("density 50%", "density 0.5%", "s0 -0.1")]
    assert [part.name for part in found if isinstance(part, Plot)] == ["overlap-0", "overlap-1", "overlap-2"]
    assert built([swept("cs", seed, 0, 20, target=None) for seed in (0, 1)]) == {}


def test_figures_name_their_density_where_they_are_looked_at_without_the_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    titles = []
    monkeypatch.setattr(plots, "images", lambda figure: titles.append(figure.axes[0].get_title()) or (b"", b""))
    built([*CS, *IMP])
    assert titles == ["Mask overlap, density 20%", "Layer densities, density 20%"]


def test_masks_that_are_empty_or_full_everywhere_are_drawn() -> None:
    found = built([swept("cs", 0, 0, 0), swept("cs", 1, 0, 0), swept("imp", 0, 0, 100), swept("imp", 1, 0, 100)])
    assert [row[-1] for row in table(found["Overlap of masks"])] == ["-", "-", "-"]


@pytest.mark.parametrize("methods, layers", [(12, 2), (2, 60), (1, 1)])
def test_many_methods_or_layers_fit_a_plot(methods: int, layers: int) -> None:
    masks = {f"block{layer}/kernel": np.arange(50) < layer % 50 for layer in range(layers)}
    found = built([swept(f"method-{number}", seed, 0, 0, masks=masks) for number in range(methods) for seed in (0, 1)])
    assert all(
        part.png.startswith(b"\x89PNG") for one in found.values() for part in one.parts if isinstance(part, Plot)
    )


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Folder of a sweep with two finished runs."""
    spec = make_spec("some", SPEC)
    for planned in spec.runs[:2]:
        folder = storage.folder_of(tmp_path, planned)
        folder.mkdir(parents=True)
        (folder / SUMMARY_FILE).write_text("{}")
        write_ticket(folder)
    return tmp_path


SPEC = {"methods": ["imp", "dense"], "densities": [0.1], "seeds": [0, 1]}


def test_tickets_are_those_of_the_runs_that_have_ended(sweep: Path) -> None:
    spec = make_spec("some", SPEC)
    found = [*read_tickets(spec, sweep)]
    assert [ticket[:4] for ticket in found] == [("imp", 0.1, None, 0), ("imp", 0.1, None, 1)]
    for name, mask in kept(TICKET).items():
        np.testing.assert_array_equal(found[0].masks[name].ravel(), mask)
    folder = storage.folder_of(sweep, spec.runs[2])  # the dense network is no ticket
    folder.mkdir()
    (folder / SUMMARY_FILE).write_text("{}")
    assert len([*read_tickets(spec, sweep)]) == 2


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"ticket")])
def test_a_ticket_that_cannot_be_loaded_is_refused_by_its_file(sweep: Path, damage: Callable[[Path], Any]) -> None:
    path = storage.folder_of(sweep, make_spec("some", SPEC).runs[1]) / TICKET_FILE
    damage(path)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: "):
        list(read_tickets(make_spec("some", SPEC), sweep))


def test_a_sweeps_page_has_the_overlaps_before_the_cost(tmp_path: Path) -> None:
    report.write_pareto(report.SweepResults("some", [], tickets=[*CS, *IMP]), tmp_path)
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", page(tmp_path))
    assert headings == ["Accuracy against density", "Overlap of masks", "Density of layers", "Missing runs"]
    assert {"overlap-0.png", "layer-density-0.png"} <= set(files(tmp_path))
