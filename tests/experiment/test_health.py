"""Warnings at the end of a round: each given once, and none for a healthy run."""

import dataclasses
import warnings
from typing import Any

import pytest
import small

from cs_jax import CollapsedLayerWarning, UnfinishedSearchWarning
from cs_jax.experiment import search
from cs_jax.experiment.config import Config
from cs_jax.experiment.observers.health import Health, StuckDensityWarning
from cs_jax.experiment.progress import EpochRecord, Progress
from cs_jax.training.problem import Problem

CONFIG = dataclasses.replace(small.SEARCH, epochs=3, rounds=4, lmbda=1e-8)


def end(number: int, layers: dict[str, float], soft: float | None = 0.9, hard: float | None = 0.9) -> EpochRecord:
    """Record of a round's last epoch; all layers have one size."""
    density = sum(layers.values()) / len(layers)
    return small.RECORD._replace(
        round=number, density=density, layer_density=layers, soft_accuracy=soft, hard_accuracy=hard
    )


def told(*ends: EpochRecord, examples: int = 100, first: int = 0, **changes: Any) -> list[list[tuple[type, str]]]:
    """Warnings at the end of each round, from round `first` on."""
    health = Health(dataclasses.replace(CONFIG, **changes), examples)
    lists = []
    for number in range(first, len(ends)):
        progress = Progress("search", number, 3, 0, None, None, ends[: number + 1])  # pyright: ignore[reportArgumentType]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            health.on_phase_end(progress)
        lists.append([(warning.category, str(warning.message)) for warning in caught])
    return lists


def falling(*densities: float, **figures: Any) -> list[EpochRecord]:
    return [end(number, {"a": density, "b": density}, **figures) for number, density in enumerate(densities)]


def test_a_search_that_prunes_and_hardens_is_told_nothing() -> None:
    assert told(*falling(0.5, 0.2, 0.1, 0.05)) == [[], [], [], []]
    assert told(*falling(0.5, 0.6)) == [[], []]  # pruned weights may come back


def test_an_empty_layer_is_told_once_and_named_with_those_that_are_new() -> None:
    ends = [
        end(0, {"a": 0.5, "b": 0.0, "c": 0.4, "d": 0.5}),
        end(1, {"a": 0.4, "b": 0.0, "c": 0.3, "d": 0.4}),
        end(2, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.3}),
    ]
    advice = "use a higher --mask-initial-value, a lower --lmbda, or --target-density, which empties no layer"
    assert told(*ends) == [
        [(CollapsedLayerWarning, f"round 0 left no weight in b; {advice}")],
        [],
        [(CollapsedLayerWarning, f"round 2 left no weight in a, c; {advice}")],
    ]


@pytest.mark.parametrize(
    "allowed, advice",
    [(False, "a higher --target-density"), (True, "a higher --target-density, or omit --allow-empty-layers")],
)
def test_what_to_change_for_an_empty_layer_follows_the_target_density(allowed: bool, advice: str) -> None:
    found = told(end(0, {"a": 0.5, "b": 0.0}), target_density=0.01, allow_empty_layers=allowed)
    assert found == [[(CollapsedLayerWarning, f"round 0 left no weight in b; use {advice}")]]


def test_layers_that_the_ticket_leaves_empty_are_not_told_by_the_last_round() -> None:
    assert told(end(0, {"a": 0.5, "b": 0.0}), rounds=1) == [[]]


@pytest.mark.parametrize(
    "soft, hard, examples, is_told",
    [
        (0.95, 0.60, 1000, True),
        (0.60, 0.95, 1000, True),
        (0.921, 0.90, 1000, True),
        (0.92, 0.90, 1000, False),
        (0.90, 0.80, 20, False),  # 2 of 20 examples
        (0.90, 0.75, 20, True),  # 3 of 20
        (None, None, 0, False),
        (0.90, None, 1000, False),  # an empty network is told as such
    ],
)
def test_a_gap_between_soft_and_hard_accuracy_is_told(
    soft: float | None, hard: float | None, examples: int, is_told: bool
) -> None:
    [found] = told(end(0, {"a": 0.5}, soft, hard), examples=examples)
    assert [category for category, _ in found] == [UnfinishedSearchWarning] * is_told


def test_a_gap_is_told_once_with_its_figures_and_also_after_the_last_round() -> None:
    gap = end(0, {"a": 0.5}, 0.9512, 0.6), end(1, {"a": 0.4}, 0.95, 0.6)
    assert told(*gap, examples=10000, rounds=2) == [
        [
            (
                UnfinishedSearchWarning,
                "round 0 left masks that have not hardened: validation accuracy is 95.12% with soft masks and "
                "60.00% with hard masks; use more --epochs, or a higher --score-lr or --final-temp",
            )
        ],
        [],
    ]
    assert len(told(gap[0], examples=10000, rounds=1)[0]) == 1


@pytest.mark.parametrize(
    "density, text",
    [
        (
            0.0,
            "round 0 left no weight: no score is above 0; use a higher --mask-initial-value, --score-lr or "
            "--final-temp, a lower --lmbda, or --target-density",
        ),
        (
            1.0,
            "round 0 pruned nothing: every score is above 0; use a lower --mask-initial-value, "
            "a higher --score-lr or --lmbda, or --target-density",
        ),
    ],
)
def test_a_round_that_leaves_or_prunes_nothing_is_told_once(density: float, text: str) -> None:
    assert told(*falling(density, density)) == [[(StuckDensityWarning, text)], []]


def test_what_is_next_to_nothing_is_told_too() -> None:
    ((category, text),) = told(*falling(0.9984))[0]
    assert category is StuckDensityWarning
    assert text.startswith("round 0 pruned almost nothing: most scores are above 0; use a lower ")
    assert [kind for kind, _ in told(*falling(0.5, 0.4999))[1]] == [StuckDensityWarning]
    assert told(*falling(0.98, 0.96)) == [[], []]


def test_a_further_round_that_prunes_nothing_is_told_once() -> None:
    text = "round 1 changed the density by less than 1%; use fewer --rounds, or a higher --score-lr or --lmbda"
    assert told(*falling(0.5, 0.5, 0.5, 0.1)) == [[], [(StuckDensityWarning, text)], [], []]


def test_each_kind_of_a_stuck_density_is_told() -> None:
    found = told(*falling(1.0, 0.5, 0.5, 0.0))
    assert [len(warned) for warned in found] == [1, 0, 1, 1]


def test_a_density_that_was_asked_for_is_not_told() -> None:
    assert told(*falling(1.0, 1.0), target_density=1.0) == [[], []]


def test_nothing_is_told_after_the_last_round_under_a_target_density() -> None:
    assert told(end(0, {"a": 0.2, "b": 0.0}, 0.9, 0.1), target_density=0.1, rounds=1) == [[]]


def test_scores_that_a_target_density_cannot_tell_apart_are_told_before_the_last_round() -> None:
    found = told(*falling(0.0, 0.0), target_density=0.1, rounds=2)
    assert [[category for category, _ in warned] for warned in found] == [[StuckDensityWarning], []]
    assert found[0][0][1] == (
        "round 0 left no weight: scores have hardly changed; use a higher --score-lr or more --epochs"
    )


def test_a_resumed_run_is_not_told_again() -> None:
    bad = [end(number, {"a": 1.0, "b": 1.0}, 0.9, 0.1) for number in range(2)]
    assert [len(warned) for warned in told(*bad)] == [2, 0]
    assert told(*bad, first=1) == [[]]


def run(config: Config, problem: Problem) -> None:
    health = Health(config, 48)
    start = search.begin_search(search.init_state(config, problem))
    ticket, _ = search.search_ticket(config, problem, start, health)
    search.retrain(config, problem, search.begin_retraining(problem, ticket), health)


def test_a_run_whose_scores_do_not_move_is_told_at_the_end_of_its_first_round(problem: Problem) -> None:
    config = dataclasses.replace(CONFIG, score_lr=1e-9, rounds=2)
    with pytest.warns(StuckDensityWarning) as caught:
        run(config, problem)
    assert [str(warning.message).split(":")[0] for warning in caught] == ["round 0 pruned nothing"]


def test_a_run_that_goes_well_is_told_nothing(problem: Problem) -> None:
    run(dataclasses.replace(CONFIG, rounds=2), problem)  # warnings are errors
