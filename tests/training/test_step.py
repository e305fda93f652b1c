"""One optimizer step, an epoch in its two forms, and evaluation."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cs_jax.core import masks
from cs_jax.data.images import ImageSet
from cs_jax.layers.masked import MaskedDense
from cs_jax.models import ResNet
from cs_jax.training import compiled, executor
from cs_jax.training import step as training_step
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import Executor
from cs_jax.training.step import Hyperparams, Recipe, StepInputs, TrainState

KEY = jax.random.key(7)


def hyperparams(**values: float) -> Hyperparams:
    defaults = dict(temperature=2.0, init_value=0.1, learning_rate=0.1, score_learning_rate=0.5, penalty_weight=1e-3)
    return Hyperparams(**{name: jnp.float32(value) for name, value in (defaults | values).items()})


def search_state(recipe: Recipe, data: ImageSet, init_value: float = 0.1) -> TrainState:
    variables = training_step.init_variables(recipe, jax.random.key(0), data.images.shape[1:])
    scores = masks.init_scores(variables["masks"], init_value)
    return training_step.init_state(recipe, variables["params"], variables["batch_stats"], scores=scores, masks={})


def ticket_state(recipe: Recipe, data: ImageSet) -> TrainState:
    variables = training_step.init_variables(recipe, jax.random.key(0), data.images.shape[1:])
    fixed = jax.tree.map(lambda m: 2.0 * jax.random.bernoulli(KEY, 0.3, m.shape), variables["masks"])
    return training_step.init_state(recipe, variables["params"], variables["batch_stats"], scores={}, masks=fixed)


def equal(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


@pytest.mark.slow
def test_a_step_is_nesterov_with_decay_on_weights_and_without_on_scores(lenet: Recipe, synthetic: ImageSet) -> None:
    """Two steps by the formula `v = 0.9 v + g; p -= lr (g + 0.9 v)`, with g of the loss through the masks."""
    recipe = dataclasses.replace(lenet, augment="none")
    state, hyper = search_state(recipe, synthetic), hyperparams()
    inputs = training_step.normalize(synthetic.images, synthetic.mean, synthetic.std)

    def loss(params: Any, scores: Any) -> jax.Array:
        step_masks = masks.soft_mask(scores, 2.0, init_value=0.1)
        logits = recipe.model.apply({"params": params, "masks": step_masks}, inputs[:16])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), synthetic.labels[:16, None], axis=1)
        return -picked.mean() + 1e-3 * masks.mask_penalty(step_masks)

    params, scores = copy(state.params), copy(state.scores)
    weight_v = jax.tree.map(np.zeros_like, params)
    score_v = jax.tree.map(np.zeros_like, scores)
    for _ in range(2):
        weight_g, score_g = jax.grad(loss, argnums=(0, 1))(params, scores)
        weight_g = jax.tree.map(lambda g, p: g + 1e-3 * p, weight_g, params)
        weight_v = jax.tree.map(lambda v, g: 0.9 * v + g, weight_v, weight_g)
        score_v = jax.tree.map(lambda v, g: 0.9 * v + g, score_v, score_g)
        params = jax.tree.map(lambda p, g, v: p - 0.1 * (g + 0.9 * v), params, weight_g, weight_v)
        scores = jax.tree.map(lambda s, g, v: s - 0.5 * (g + 0.9 * v), scores, score_g, score_v)
        state, _ = compiled.compiled_step(recipe, state, StepInputs(synthetic, np.arange(16), KEY, hyper))
    assert int(state.step) == 2
    for ours, expected in ((state.params, params), (state.scores, scores)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), ours, expected)


def test_the_loss_is_cross_entropy_plus_penalty(lenet: Recipe, synthetic: ImageSet) -> None:
    state = search_state(lenet, synthetic)
    entries = sum(leaf.size for leaf in jax.tree.leaves(state.scores))
    hyper = hyperparams(temperature=1.0)
    _, metrics = compiled.compiled_step(lenet, state, StepInputs(synthetic, np.arange(16), KEY, hyper))
    assert float(metrics.penalty) == pytest.approx(1e-3 * entries, rel=1e-5)
    assert float(metrics.loss) == pytest.approx(float(metrics.cross_entropy) + float(metrics.penalty), rel=1e-6)


def test_fixed_masks_stay_and_masked_weights_only_decay(lenet: Recipe, synthetic: ImageSet) -> None:
    state = ticket_state(lenet, synthetic)
    before = copy((state.params, state.masks))
    state, _ = compiled.compiled_step(lenet, state, StepInputs(synthetic, np.arange(16), KEY, hyperparams()))
    assert equal(state.masks, before[1])
    assert state.scores == {}
    for layer, mask in state.masks.items():
        old, new = before[0][layer]["kernel"], np.asarray(state.params[layer]["kernel"])
        off = np.asarray(mask["kernel"]) == 0
        np.testing.assert_allclose(new[off], old[off] * (1 - 0.1 * 1.9 * 1e-3), rtol=1e-6)
        assert (new[~off] != old[~off]).mean() > 0.5


def test_new_hyperparameters_do_not_retrace(lenet: Recipe, synthetic: ImageSet) -> None:
    state = search_state(lenet, synthetic)
    traces = []
    step = jax.jit(lambda *arguments: traces.append(1) or training_step.step(lenet, *arguments))
    for temperature, rate in ((1.0, 0.1), (14.0, 0.1), (200.0, 0.001)):
        hyper = hyperparams(temperature=temperature, learning_rate=rate, penalty_weight=rate)
        state, _ = step(state, StepInputs(synthetic, np.arange(16), KEY, hyper))
    assert len(traces) == 1


def epoch(
    recipe: Recipe, state: Any, data: ImageSet, order: Any, **options: Any
) -> tuple[list[int], Any, training_step.StepMetrics | None]:
    """Steps done after each call, the last state, and the figures of all steps."""
    calls, figures = [], []
    last = state
    one_pass = Epoch(data, order, KEY, hyperparams(), **options)
    for done, last, metrics in Executor().train_epoch(recipe, state, one_pass):  # noqa: B007
        calls.append(done)
        figures.append(jax.tree.map(np.atleast_1d, metrics))
    return calls, last, jax.tree.map(lambda *calls: np.concatenate(calls), *figures) if figures else None


@pytest.mark.slow
def test_equal_recipes_share_compiled_code(synthetic: ImageSet) -> None:
    before = compiled.compiled_step._cache_size()
    for _ in range(2):
        recipe = Recipe(ResNet(num_classes=4, stage_sizes=(1,), widths=(2,)), augment="none")
        state = search_state(recipe, synthetic)
        epoch(recipe, state, synthetic, np.arange(20), batch_size=16)
    assert compiled.compiled_step._cache_size() == before + 2  # a full batch and a smaller one


class Traced(nn.Module):
    """Counts the traces of its forward pass."""

    traces: ClassVar[list[int]] = []

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        self.traces.append(1)
        return MaskedDense(4)(x.reshape(len(x), -1))


def test_networks_of_other_keys_share_compiled_code() -> None:
    recipes = Recipe(Traced(), decay=0.1), Recipe(Traced())
    one, other = (training_step.init_variables(recipes[seed], jax.random.key(seed), (6, 6, 1)) for seed in (0, 1))
    assert len(Traced.traces) == 1
    assert not equal(one["params"], other["params"])


def test_an_epoch_takes_every_example_once_and_the_last_batch_is_smaller(lenet: Recipe, synthetic: ImageSet) -> None:
    calls, state, metrics = epoch(lenet, search_state(lenet, synthetic), synthetic, np.arange(37), batch_size=16)
    assert calls == [1, 2, 3]
    again, losses = search_state(lenet, synthetic), []
    for indices in (np.arange(16), np.arange(16, 32), np.arange(32, 37)):
        again, one = compiled.compiled_step(lenet, again, StepInputs(synthetic, indices, KEY, hyperparams()))
        losses.append(float(one.loss))
    assert metrics.loss.tolist() == losses
    assert equal(state, again)


SMALL_RESNET = Recipe(ResNet(num_classes=4, stage_sizes=(1,), widths=(2,)), augment="flip-crop")


@pytest.mark.parametrize(
    "param_dtype, wide",
    [(jnp.float32, False), (jnp.bfloat16, False), (jnp.float32, True), (jnp.bfloat16, True), (jnp.float64, True)],
)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_step_keeps_every_dtype_and_has_its_loss_in_float32_at_least(
    synthetic: ImageSet, param_dtype: Any, dtype: Any, wide: bool
) -> None:
    with jax.enable_x64(wide):
        model = ResNet(num_classes=4, stage_sizes=(1,), widths=(2,), dtype=dtype, param_dtype=param_dtype)
        recipe = Recipe(model)
        state = jax.eval_shape(lambda: search_state(recipe, synthetic))
        inputs = StepInputs(synthetic, jnp.arange(5), KEY, hyperparams())
        after, metrics = jax.eval_shape(lambda state: training_step.step(recipe, state, inputs), state)
        assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
        assert {metrics.cross_entropy.dtype, metrics.penalty.dtype} <= {np.dtype(np.float32), np.dtype(np.float64)}


@pytest.mark.parametrize("make_state", [search_state, ticket_state])
@pytest.mark.parametrize("batch_size", [16, 37, 5])
def test_an_epoch_in_one_call_equals_its_steps(
    lenet: Recipe, synthetic: ImageSet, make_state: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the accelerators' form on the CPU: equal metrics, weights, scores and momentum."""
    lenet = SMALL_RESNET if batch_size == 16 else lenet
    monkeypatch.setattr(executor, "STEPS_PER_CALL", 2)
    order = jax.random.permutation(KEY, 37)
    _, stepped, step_metrics = epoch(lenet, make_state(lenet, synthetic), synthetic, order, batch_size=batch_size)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    calls, looped, metrics = epoch(lenet, make_state(lenet, synthetic), synthetic, order, batch_size=batch_size)
    assert calls == {16: [2, 3], 37: [1], 5: [2, 4, 6, 7, 8]}[batch_size]
    assert metrics.loss.shape == step_metrics.loss.shape == (calls[-1],)
    np.testing.assert_allclose(metrics.loss, step_metrics.loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), looped, stepped)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("first", [1, 2, 5, 7, 8])
def test_an_epoch_goes_on_from_any_step_to_the_same_bits(
    lenet: Recipe, synthetic: ImageSet, backend: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "STEPS_PER_CALL", 3)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    if backend == "gpu" and first % 3 and first < 7:
        first += 3 - first % 3  # calls of an accelerator end there
    whole = Epoch(synthetic, np.arange(37), KEY, hyperparams(), batch_size=5)
    start = last = search_state(lenet, synthetic)
    for done, last, _ in Executor().train_epoch(lenet, last, whole):  # noqa: B020
        start = jax.tree.map(np.array, last) if done == first else start
    calls, resumed, _ = epoch(lenet, start, synthetic, np.arange(37), batch_size=5, first_step=first)
    assert calls == {"cpu": [*range(first + 1, 9)], "gpu": [end for end in (3, 6, 7, 8) if end > first]}[backend]
    assert equal(resumed, last)
