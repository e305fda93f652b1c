"""Values computed and stored in bfloat16, values kept in float32, and the effect on training."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from small import SEARCH

from cs_jax.commands import parser
from cs_jax.commands.ticket import measure_test_accuracy
from cs_jax.core import masks
from cs_jax.core.arrays import DTYPES, stochastic_round
from cs_jax.data.images import ImageSet
from cs_jax.experiment import search
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import Observer, Progress
from cs_jax.experiment.run import run
from cs_jax.experiment.storage import progress_file
from cs_jax.layers.masked import MaskedDense
from cs_jax.models import MODELS, BatchNorm, ResNet
from cs_jax.tickets.ticket import load_ticket
from cs_jax.training import compiled
from cs_jax.training import step as training_step
from cs_jax.training.problem import Problem
from cs_jax.training.step import Hyperparams, LossInputs, Recipe, StepInputs, TrainState

KEY = jax.random.key(7)
HYPER = Hyperparams(*(jnp.float32(value) for value in (2.0, 0.1, 0.1, 0.5, 1e-3)))
FLOAT32, BFLOAT16 = np.dtype(np.float32), jnp.dtype(jnp.bfloat16)


def small_resnet(dtype: Any) -> Recipe:
    return Recipe(ResNet(num_classes=4, stage_sizes=(1, 1), widths=(4, 8), dtype=dtype))


def search_state(recipe: Recipe, data: ImageSet, *, dtype: Any = None, value: float = 0.1) -> TrainState:
    variables = training_step.init_variables(recipe, jax.random.key(0), data.images.shape[1:])
    scores = masks.init_scores(variables["masks"], value, dtype=dtype)
    return training_step.init_state(recipe, variables["params"], variables["batch_stats"], scores=scores, masks={})


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All equations, also those inside of others."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def product_dtypes(recipe: Recipe, data: ImageSet) -> dict[str, set[Any]]:
    """Dtypes of the operands of a step's products, by the primitive."""
    state = search_state(recipe, data)
    inputs = StepInputs(data, jnp.arange(8), KEY, HYPER)
    jaxpr = jax.make_jaxpr(lambda state: training_step.step(recipe, state, inputs))(state)
    found: dict[str, set[Any]] = {"conv_general_dilated": set(), "dot_general": set()}
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in found:
            found[equation.primitive.name] |= {atom.aval.dtype for atom in equation.invars}
    return found


def test_convolutions_are_bfloat16_forward_and_backward_and_the_classifier_is_float32(synthetic: ImageSet) -> None:
    narrow = product_dtypes(small_resnet(jnp.bfloat16), synthetic)
    assert narrow == {"conv_general_dilated": {BFLOAT16}, "dot_general": {FLOAT32}}
    wide = product_dtypes(small_resnet(None), synthetic)
    assert wide == {"conv_general_dilated": {FLOAT32}, "dot_general": {FLOAT32}}


def test_hidden_products_of_a_transformer_are_bfloat16() -> None:
    data = ImageSet(jnp.zeros((8, 8, 8, 3), jnp.uint8), jnp.zeros(8, jnp.int32), jnp.zeros(3), jnp.ones(3))
    model = MODELS["vit_tiny"](num_classes=4, depth=1, width=8, num_heads=2, patch_size=4, dtype=jnp.bfloat16)
    found = product_dtypes(Recipe(model), data)
    assert found["conv_general_dilated"] == {BFLOAT16}
    assert BFLOAT16 in found["dot_general"]


@pytest.mark.slow
def test_weights_momentum_scores_and_statistics_stay_float32(synthetic: ImageSet) -> None:
    recipe = small_resnet(jnp.bfloat16)
    state = search_state(recipe, synthetic)
    for _ in range(2):
        state, metrics = compiled.compiled_step(recipe, state, StepInputs(synthetic, np.arange(16), KEY, HYPER))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {FLOAT32, np.dtype(np.int32)}
        assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {FLOAT32}
    variables = {"params": state.params, "batch_stats": state.batch_stats, "masks": state.scores}
    assert recipe.model.apply(variables, jnp.zeros((2, 6, 6, 1)), train=False).dtype == FLOAT32  # pyright: ignore


def test_statistics_of_a_batch_in_bfloat16_are_computed_in_float32() -> None:
    """4,096 values, most of which a sum in bfloat16 would lose."""
    x = (100 + jax.random.normal(KEY, (64, 8, 8, 1))).astype(jnp.bfloat16)
    norm = BatchNorm(use_running_average=False, momentum=0.0, dtype=jnp.bfloat16)
    variables = norm.init(KEY, x)
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    assert y.dtype == BFLOAT16  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(updates["batch_stats"]["mean"], exact.mean(), rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], exact.var(ddof=1), rtol=1e-2)


def gradients(recipe: Recipe, data: ImageSet) -> Any:
    state = search_state(recipe, data)
    inputs = training_step.normalize(data.images, data.mean, data.std)
    differentiate = jax.jit(jax.grad(training_step.loss_fn, argnums=(1, 2), has_aux=True), static_argnums=0)
    batch = LossInputs(inputs, data.labels, KEY, HYPER)
    return differentiate(recipe, state.params, state.scores, state, batch)[0]


@pytest.mark.slow
def test_gradients_are_close_to_those_of_float32(synthetic: ImageSet) -> None:
    narrow, wide = (gradients(small_resnet(dtype), synthetic) for dtype in (jnp.bfloat16, None))
    for part, reference in zip(narrow, wide, strict=True):  # of weights, of scores
        part, reference = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]) for t in (part, reference))
        assert part.dtype == FLOAT32
        error = np.linalg.norm(part - reference) / np.linalg.norm(reference)
        assert 1e-4 < error < 0.05  # bfloat16 has 8 bits: 0.004 an operation


def test_a_masked_kernel_is_rounded_once() -> None:
    """The scale 1 / sigmoid(0.1) is no bfloat16 number: rounding weight, mask and product would change kernels."""
    weights = jax.random.normal(KEY, (4, 500))
    mask = masks.hard_mask(jnp.ones((4, 500)), init_value=0.1)
    layer = MaskedDense(500, use_bias=False, dtype=jnp.bfloat16)
    kernel = layer.apply({"params": {"kernel": weights}, "masks": {"kernel": mask}}, jnp.eye(4))
    np.testing.assert_array_equal(kernel, (weights * mask).astype(jnp.bfloat16))  # pyright: ignore
    coarse = weights.astype(jnp.bfloat16) * mask.astype(jnp.bfloat16)
    assert not np.array_equal(kernel, coarse)  # pyright: ignore


@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -1e-3, 3e-39, 1 + 2**-9])
def test_rounding_at_random_keeps_the_mean_and_takes_a_neighbour(value: float) -> None:
    n = 100_000
    rounded = np.asarray(stochastic_round(KEY, jnp.full(n, value)), np.float64)
    values = np.unique(rounded)
    assert len(values) <= 2
    spacing = float(np.ptp(values))
    assert spacing <= max(2**-7 * abs(value), 2.0**-133)
    assert abs(rounded.mean() - np.float32(value)) <= 5 * spacing / np.sqrt(n)


def test_rounding_at_random_keeps_what_bfloat16_has_and_what_is_not_finite() -> None:
    kept = np.array([0.0, -0.0, 1.5, -(2.0**-126), 2.0**127, np.inf, -np.inf, np.nan], np.float32)
    all_ones = np.array([-1], np.int32).view(np.float32)  # a NaN whose bits would carry over
    array = np.concatenate([kept, all_ones])
    for number in range(20):
        rounded = stochastic_round(jax.random.fold_in(KEY, number), jnp.asarray(array))
        np.testing.assert_array_equal(np.asarray(rounded, np.float32), array)
        assert np.signbit(np.asarray(rounded, np.float32)[1])


def narrow_search(config: Config, problem: Problem, steps: int, rate: float) -> TrainState:
    """A state after steps in which the penalty alone moves scores down from 1."""
    recipe = dataclasses.replace(problem.recipe, momentum=0.0)
    state = search_state(recipe, problem.train, dtype=DTYPES[config.score_dtype], value=1.0)
    hyper = Hyperparams(*(jnp.float32(value) for value in (1.0, 0.1, 0.0, rate, 1e4)))
    for _ in range(steps):
        state, _ = compiled.compiled_step(recipe, state, StepInputs(problem.train, np.arange(16), KEY, hyper))
    return state


@pytest.mark.slow
def test_tiny_updates_move_bfloat16_scores_on_average(problem: Problem) -> None:
    """Ten steps, each 1/50 of the gap between two bfloat16 numbers: rounding to nearest would lose all of them."""
    moved = {}
    for name in ("float32", "bfloat16"):
        state = narrow_search(dataclasses.replace(SEARCH, score_dtype=name), problem, 10, rate=2e-8)
        scores = np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(state.scores)])
        moved[name] = (1 - scores).mean()
    assert 1e-4 < moved["float32"] < 2**-9  # less than would round 1 down
    assert moved["bfloat16"] == pytest.approx(moved["float32"], rel=0.05)


@pytest.mark.slow
def test_a_step_with_bfloat16_scores_can_be_repeated_and_draws_anew_in_the_next(problem: Problem) -> None:
    recipe, data = problem.recipe, problem.train
    state = search_state(recipe, data, dtype=jnp.bfloat16)
    step = jax.jit(training_step.step, static_argnames="recipe")
    inputs = StepInputs(data, np.arange(16), KEY, HYPER)
    (one, _), (again, _) = (step(recipe, state, inputs) for _ in range(2))
    later, _ = step(recipe, state.replace(step=jnp.int32(1)), inputs)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), one.scores, again.scores)
    other = jax.tree.map(lambda a, b: bool((a == b).all()), one.scores, later.scores)
    assert all(jax.tree.leaves(same)) and not all(jax.tree.leaves(other))
    assert {leaf.dtype for leaf in jax.tree.leaves((one.scores, one.score_momentum))} == {BFLOAT16}


def test_masks_of_bfloat16_scores_are_float32_with_the_scale_exact(problem: Problem) -> None:
    config = dataclasses.replace(SEARCH, mask_initial_value=0.1, score_dtype="bfloat16")
    state = search.init_state(config, problem)
    hyper = search.hyperparams(config, "search", 0)
    method = config.pruning_method
    assert {leaf.dtype for leaf in jax.tree.leaves(state.scores)} == {BFLOAT16}
    scale = np.float32(1 + np.exp(-0.1))
    for found in (method.hard_masks(state, hyper), method.ticket_masks(state)):
        for mask in jax.tree.leaves(found):
            np.testing.assert_allclose(mask, scale, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(method.soft_masks(state, hyper))} == {FLOAT32}


class Dtypes(Observer):
    """Dtypes of scores and of their momentum at every phase's start and epoch's end."""

    def __init__(self) -> None:
        self.found: set[Any] = set()

    def on_phase_start(self, progress: Progress) -> None:
        self.found |= {leaf.dtype for leaf in jax.tree.leaves((progress.state.scores, progress.state.score_momentum))}

    def on_epoch_end(self, record: Any, progress: Progress) -> None:
        self.on_phase_start(progress)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, target", [("cs", None), ("cs", 0.25), ("iss", 0.25), ("supermask", None), ("supermask-iss", None)]
)
def test_every_method_with_scores_keeps_them_in_their_dtype(
    problem: Problem, method: str, target: float | None
) -> None:
    config = dataclasses.replace(SEARCH, method=method, target_density=target, score_dtype="bfloat16", score_lr=50.0)
    config = dataclasses.replace(config, epochs=1, rewind_epoch=0)
    seen = Dtypes()
    progress = search.begin_search(search.init_state(config, problem))
    ticket, ends = search.search_ticket(config, problem, progress, seen)
    assert seen.found == {BFLOAT16}
    assert {leaf.dtype for leaf in jax.tree.leaves(ticket.masks)} == {FLOAT32}
    density = masks.density(ticket.masks)
    assert 0 < density < 1 and len(ends) == 2
    if target is not None:
        entries = sum(leaf.size for leaf in jax.tree.leaves(ticket.masks))
        assert density * entries == round(target * entries)


@pytest.mark.slow
def test_weights_that_a_stochastic_search_pruned_stay_pruned_in_bfloat16(problem: Problem) -> None:
    """The score of a pruned weight is no bfloat16 number; rounding must not raise it."""
    config = dataclasses.replace(
        SEARCH, method="iss", target_density=0.25, score_dtype="bfloat16", epochs=1, rewind_epoch=0
    )
    state = search.init_state(config, problem)
    method = config.pruning_method
    pruned = method.end_epoch(state, 0, 0)
    density = masks.density(method.hard_masks(pruned, search.hyperparams(config, "search", 0)))
    assert density == pytest.approx(0.5, abs=1e-4)
    recipe = method.recipe(problem.recipe)
    after, _ = training_step.step(recipe, pruned, StepInputs(problem.train, jnp.arange(16), KEY, HYPER))
    assert masks.density(method.ticket_masks(after)) == density


@pytest.mark.parametrize("phase", ["search", "ticket"])
def test_checkpoints_expect_scores_of_the_dtype(problem: Problem, phase: str) -> None:
    config = dataclasses.replace(SEARCH, score_dtype="bfloat16")
    state = progress_file.abstract_state(config, problem, phase)
    real = (
        search.init_state(config, problem) if phase == "search" else search.fixed_state(problem, problem.init_ticket())
    )
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, real)


WORDS = "digits --no-report --controls --seed 3".split()


@pytest.mark.slow
def test_a_run_in_bfloat16_writes_a_ticket_that_knows_it(tmp_path: Path) -> None:
    words = f"--epochs 1 --rounds 1 --rewind-epoch 0 --max-train-examples 128 --out {tmp_path}/run".split()
    settings = parser.parse([*WORDS, *words, "--dtype", "bfloat16", "--score-dtype", "bfloat16", "--score-lr", "20"])
    summary = run(settings)
    ticket = load_ticket(tmp_path / "run" / "ticket.safetensors")
    assert ticket.model == MODELS["resnet6"](num_classes=10, dtype=jnp.bfloat16)
    assert ticket.metadata["model"]["dtype"] == "bfloat16"
    assert measure_test_accuracy(settings, ticket, "ticket") == summary["ticket"]["test_accuracy"]
    stored = {leaf.dtype for leaf in jax.tree.leaves(ticket.variables)}
    assert stored == {FLOAT32}


@pytest.mark.slow
def test_digits_train_as_well_in_bfloat16(tmp_path: Path) -> None:
    accuracies = []
    for number, flags in enumerate(([], ["--dtype", "bfloat16", "--score-dtype", "bfloat16"])):
        config = parser.parse([*WORDS, "--out", str(tmp_path / str(number)), *flags])
        accuracies.append(run(config)["ticket"]["test_accuracy"])
    assert accuracies[1] >= accuracies[0] - 0.01
