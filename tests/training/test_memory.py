"""Batches in parts, activations computed again: the same step, for less memory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cs_jax.commands import parser
from cs_jax.core import masks
from cs_jax.core.errors import ConfigError
from cs_jax.data.images import ImageSet
from cs_jax.experiment.config import Config
from cs_jax.experiment.pipeline import search
from cs_jax.experiment.prepare import make_recipe, prepare
from cs_jax.experiment.run import run
from cs_jax.methods.stochastic import draw_masks
from cs_jax.models import MODELS, VGG, BottleneckResNet, ConvNet, ResNet, VisionTransformer, has_field
from cs_jax.training import accumulation
from cs_jax.training import compiled as compiled_programs
from cs_jax.training import step as training_step
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import Executor
from cs_jax.training.step import Hyperparams, LossInputs, Recipe, StepInputs, TrainState

KEY = jax.random.key(7)


def make_data(n: int, size: int, dtype: Any = None) -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(
        images=jnp.asarray(rng.integers(0, 256, (n, size, size, 3)), jnp.uint8),
        labels=jnp.asarray(np.arange(n) % 4, jnp.int32),
        mean=jnp.full(3, 120.0, dtype),
        std=jnp.full(3, 64.0, dtype),
    )


def search_state(recipe: Recipe, data: ImageSet) -> TrainState:
    variables = training_step.init_variables(recipe, jax.random.key(0), data.images.shape[1:])
    scores = masks.init_scores(variables["masks"], 0.1)
    return training_step.init_state(recipe, variables["params"], variables["batch_stats"], scores=scores, masks={})


def hyperparams() -> Hyperparams:
    return Hyperparams(*(jnp.asarray(value, float) for value in (2.0, 0.1, 0.1, 0.5, 1e-3)))


def distance(a: Any, b: Any) -> float:
    """Largest difference of two trees, over the largest entry of its array."""
    ratios = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y)) / (jnp.max(jnp.abs(y)) + 1e-30)), a, b)
    return max(jax.tree.leaves(ratios))


def two_steps(recipe: Recipe, data: ImageSet, batch_size: int) -> tuple[TrainState, list[training_step.StepMetrics]]:
    state, figures = search_state(recipe, data), []
    step = jax.jit(training_step.step, static_argnames="recipe")
    for _ in range(2):
        state, metrics = step(recipe, state, StepInputs(data, np.arange(batch_size), KEY, hyperparams()))
        figures.append(metrics)
    return state, figures


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "part_size, batch_size, step_masks",
    [
        (4, 16, training_step.soft_masks),
        (4, 13, training_step.soft_masks),
        (1, 3, draw_masks),
    ],
)
@pytest.mark.usefixtures("x64")
def test_a_step_in_parts_is_the_step_of_the_whole_batch(
    backend: str, part_size: int, batch_size: int, step_masks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With augmentation and momentum, in the CPU's form and in that of accelerators."""
    data = make_data(16, 8, float)
    model = ConvNet(num_classes=4, widths=(4,), param_dtype=jnp.float64)
    whole = Recipe(model, augment="flip-crop", step_masks=step_masks)
    expected, figures = two_steps(whole, data, batch_size)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    found, part_figures = two_steps(dataclasses.replace(whole, part_size=part_size), data, batch_size)
    assert distance(found, expected) <= 1e-12
    assert distance(part_figures, figures) <= 1e-12


@pytest.mark.parametrize(
    "count, part_size, sizes", [(16, 4, [4, 4, 4, 4]), (13, 4, [4, 3, 3, 3]), (9, 8, [5, 4]), (3, 8, [3])]
)
def test_parts_are_as_few_as_fit_and_take_every_example_once(count: int, part_size: int, sizes: list[int]) -> None:
    seen = []

    def compute(carry: int, part: jax.Array) -> tuple[int, jax.Array]:
        seen.append(np.asarray(part).tolist()) if not isinstance(part, jax.core.Tracer) else None
        return carry, part.astype(float).mean()

    _, mean = accumulation.mean_over_parts(part_size, compute, 0, jnp.arange(count))
    assert [len(part) for part in seen] == sizes
    assert sorted(sum(seen, [])) == list(range(count))
    assert float(mean) == pytest.approx((count - 1) / 2)
    assert accumulation.num_parts(count, part_size) == len(sizes)


@pytest.mark.slow
def test_statistics_of_batch_norm_take_the_parts_in_turn(synthetic: ImageSet) -> None:
    recipe = Recipe(ResNet(num_classes=4, stage_sizes=(1,), widths=(2,)), part_size=8)
    state = search_state(recipe, synthetic)
    after, _ = training_step.step(recipe, state, StepInputs(synthetic, jnp.arange(16), KEY, hyperparams()))
    expected = state
    for part in (np.arange(0, 16, 2), np.arange(1, 16, 2)):
        inputs = training_step.normalize(synthetic.images[part], synthetic.mean, synthetic.std)
        soft = masks.soft_mask(state.scores, 2.0, init_value=0.1)
        variables = {"params": state.params, "batch_stats": expected.batch_stats, "masks": soft}
        _, batch_stats = training_step.cross_entropy(recipe, variables, inputs, synthetic.labels[part])
        expected = expected.replace(batch_stats=batch_stats)
    assert distance(after.batch_stats, expected.batch_stats) <= 1e-5


def test_an_epoch_in_parts_is_that_of_whole_batches(lenet: Recipe, synthetic: ImageSet) -> None:
    """The last batch has 5 of 37 examples: one part."""
    states, losses = [], []
    for recipe in (lenet, dataclasses.replace(lenet, part_size=8)):
        state = search_state(recipe, synthetic)
        epoch = Epoch(synthetic, np.arange(37), KEY, hyperparams(), batch_size=16)
        calls = Executor().train_epoch(recipe, state, epoch)
        for _, state, metrics in calls:  # noqa: B007
            losses.append(float(metrics.loss))
        states.append(state)
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *states)


BLOCKS = {
    "resnet": ResNet(num_classes=4, stage_sizes=(1, 1), widths=(2, 4), param_dtype=jnp.float64),
    "bottleneck": BottleneckResNet(num_classes=4, stage_sizes=(1,), widths=(2,), param_dtype=jnp.float64),
    "vgg": VGG(num_classes=4, stage_sizes=(1, 2), widths=(2, 4), param_dtype=jnp.float64),
    "conv": ConvNet(num_classes=4, widths=(2, 4), param_dtype=jnp.float64),
    "vit": VisionTransformer(num_classes=4, depth=1, width=8, num_heads=2, param_dtype=jnp.float64),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "conv" else name for name in BLOCKS]
)
@pytest.mark.usefixtures("x64")
def test_gradients_are_the_same_where_activations_are_computed_again(name: str) -> None:
    data = make_data(6, 16, float)
    model = BLOCKS[name]
    results = []
    for again in (False, True):
        recipe = Recipe(model.clone(remat=again))
        state = search_state(recipe, data)
        inputs = training_step.normalize(data.images, data.mean, data.std)
        differentiate = jax.jit(jax.grad(training_step.loss_fn, argnums=(1, 2), has_aux=True), static_argnums=0)
        batch = LossInputs(inputs, data.labels, KEY, hyperparams())
        results.append(differentiate(recipe, state.params, state.scores, state, batch))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    assert distance(results[1], results[0]) <= 1e-12


def test_every_model_with_blocks_takes_remat() -> None:
    with_blocks = {name for name in MODELS if has_field(name, "remat")}
    assert set(MODELS) - with_blocks == {"lenet300100"}
    for name in with_blocks:
        assert MODELS[name](remat=True).remat  # pyright: ignore[reportAttributeAccessIssue]


def temporaries(recipe: Recipe, data: ImageSet) -> int:
    """Bytes that a compiled step needs beside what goes in and comes out."""
    state, inputs = search_state(recipe, data), StepInputs(data, jnp.arange(len(data)), KEY, hyperparams())
    compiled = compiled_programs.compiled(recipe)[0].lower(recipe, state, inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_less_memory_is_needed_in_parts_and_where_activations_are_computed_again() -> None:
    data = make_data(32, 24)
    fields: dict[str, Any] = {"num_classes": 4, "stage_sizes": (3,), "widths": (8,)}
    whole = temporaries(Recipe(ResNet(**fields)), data)
    assert temporaries(Recipe(ResNet(**fields), part_size=8, in_order=True), data) < 0.4 * whole
    assert temporaries(Recipe(ResNet(**fields, remat=True), in_order=True), data) < 0.6 * whole


@pytest.mark.slow
def test_the_order_that_saves_memory_does_not_change_a_step_s_bits(synthetic: ImageSet) -> None:
    recipe = Recipe(ResNet(num_classes=4, stage_sizes=(1,), widths=(3,)))
    ordered = dataclasses.replace(recipe, in_order=True)
    inputs = StepInputs(synthetic, np.arange(16), KEY, hyperparams())
    one, _ = compiled_programs.compiled(recipe)[0](recipe, search_state(recipe, synthetic), inputs)
    other, _ = compiled_programs.compiled(ordered)[0](ordered, search_state(ordered, synthetic), inputs)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, other)


def test_a_part_too_small_for_batch_norm_is_refused_before_training() -> None:
    """The last of 1,617 examples is in a batch of 1, and is one value per feature where an image is one pixel."""
    config = parser.parse(["digits", "--batch-size", "64", "--accumulate", "64"])
    prepare(config)  # 8x8 pixels: enough in one image
    assert make_recipe(config, 10).part_size == 1
    with pytest.raises(ConfigError, match="^--model vgg16: cannot be trained on images of shape"):
        prepare(dataclasses.replace(config, model="vgg16"))


def test_flags_make_the_recipe() -> None:
    plain, saving = (make_recipe(Config(**fields), 10) for fields in ({}, {"remat": True, "accumulate": 4}))
    assert (plain.part_size, plain.in_order) == (None, False)
    assert (saving.part_size, saving.in_order) == (32, True)
    for fields in ({"remat": True}, {"accumulate": 2}, {"score_dtype": "bfloat16"}):
        assert make_recipe(Config(**fields), 10).in_order
    assert plain.model == MODELS["resnet20"](num_classes=10)
    assert saving.model == MODELS["resnet20"](num_classes=10, remat=True)


def test_snip_ranks_weights_the_same_in_parts() -> None:
    words = "digits --method snip --target-density 0.1 --model lenet300100 --max-train-examples 130".split()
    tickets = []
    for more in ([], ["--accumulate", "4"]):
        config = parser.parse([*words, *more])
        problem, _ = prepare(config)
        tickets.append(search.init_state(config, problem).masks)
    same = jax.tree.map(lambda a, b: float((a == b).mean()), *tickets)
    assert min(jax.tree.leaves(same)) > 0.999


@pytest.mark.slow
def test_a_run_in_parts_ends_with_a_ticket(tmp_path: Path) -> None:
    words = "digits --no-report --controls --epochs 1 --rounds 1 --rewind-epoch 0".split()
    words += [
        "--max-train-examples",
        "100",
        "--accumulate",
        "4",
        "--remat",
        "--score-lr",
        "20",
        "--out",
        str(tmp_path / "run"),
    ]
    summary = run(parser.parse(words))
    assert 0 < summary["ticket"]["density"] < 1
