"""Golden tests against arrays of the authors' code: layers, single steps and whole searches, in float64.

tests/helpers/reference.py explains the tolerances. A tolerance in this file is for a single pass, in which only
rounding differs.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from cs_jax import layers
from cs_jax.core import masks
from cs_jax.experiment import search
from cs_jax.experiment.config import SEARCH, TICKET, Config
from cs_jax.experiment.progress import EpochRecord, Observer, Progress
from cs_jax.training import step
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem, Ticket
from cs_jax.training.step import Hyperparams, TrainState

LAYER_FILES = reference.files("layer_*.npz")
STEP_FILES = reference.files("resnet_step_*.npz")
SEARCH_FILES, FLOAT32_SEARCH_FILES = reference.searches()


def by_name(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@by_name(LAYER_FILES)
@pytest.mark.usefixtures("x64")
def test_golden_layer(path: Path) -> None:
    """Mask, output, loss, gradients and resets of one masked convolution."""
    arrays = reference.load(path)
    dtype = arrays["out"].dtype
    s0, temperature, ticket = float(arrays["s0"]), float(arrays["temp"]), bool(arrays["ticket"])
    x, kernel, scores, cotangent = (jnp.asarray(arrays[k], dtype) for k in ("x", "kernel", "scores", "cotangent"))
    conv = layers.MaskedConv(
        kernel.shape[-1], (3, 3), strides=int(arrays["stride"]), padding=1, use_bias=False, param_dtype=dtype
    )

    def make_mask(scores: jax.Array) -> jax.Array:
        return masks.hard_mask(scores, init_value=s0) if ticket else masks.soft_mask(scores, temperature, init_value=s0)

    def loss_fn(x: jax.Array, kernel: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        mask = make_mask(scores)
        out = conv.apply({"params": {"kernel": kernel}, "masks": {"kernel": mask}}, x)
        return jnp.sum(out * cotangent) + float(arrays["lmbda"]) * masks.mask_penalty(mask), out

    (loss, out), gradients = jax.value_and_grad(loss_fn, argnums=(0, 1, 2), has_aux=True)(x, kernel, scores)
    # In the reference a ticket's mask, and so its penalty, is rounded to float32.
    exact, rounded = (1e-5, 1e-5) if dtype == np.float32 else (1e-12, 1e-7)
    assert reference.distance(make_mask(scores), arrays["mask"]) <= (rounded if ticket else exact)
    assert reference.distance(out, arrays["out"]) <= (rounded if ticket else exact)
    assert reference.distance(loss, arrays["loss"]) <= (rounded if ticket else exact)
    for gradient, name in zip(gradients, ("grad_x", "grad_kernel", "grad_scores"), strict=True):
        assert reference.distance(gradient, arrays[name]) <= (rounded if ticket else exact), name
    for prune_temperature, pruned in zip(arrays["prune_temps"], arrays["pruned"], strict=True):
        reset = masks.prune_scores(scores, float(prune_temperature), init_value=s0)
        assert reference.distance(reset, pruned) <= exact


@pytest.mark.slow
@by_name(STEP_FILES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.usefixtures("x64")
def test_golden_resnet_step(path: Path, dtype: Any) -> None:
    """Logits, loss, running statistics and all gradients of one pass through the whole ResNet-20."""
    arrays, data = reference.load(path), reference.load("data.npz")
    start = reference.load("initial_weights.npz")
    s0, ticket = float(arrays["s0"]), bool(arrays["ticket"])
    given = {name.removeprefix("given/"): array for name, array in arrays.items() if name.startswith("given/")}
    start |= {name: np.full(start[name].shape, s0) for name in start if name.endswith("scores")} | given
    start |= {
        name.removeprefix("given256/"): array / 256.0 for name, array in arrays.items() if name.startswith("given256/")
    }
    params = reference.tree(start, ("kernel", "scale", "bias"), dtype)
    batch_stats = reference.tree(start, ("mean", "var"), dtype)
    recipe = reference.recipe(dtype, num_classes=start["classifier/kernel"].shape[-1])
    scores = reference.tree(start, ("scores",), dtype) or _fill(recipe, s0, dtype)
    fixed = masks.hard_mask(scores, init_value=s0) if ticket else {}
    state = step.init_state(recipe, params, batch_stats, scores={} if ticket else scores, masks=fixed)
    hyper = Hyperparams(*(jnp.asarray(v, dtype) for v in (arrays["temp"], s0, 0.0, 0.0, arrays["lmbda"])))
    indices = jnp.asarray(arrays["image_index"])
    images = reference.images(data, dtype)
    inputs = step.normalize(images.images[indices], images.mean, images.std)
    labels = jnp.asarray(arrays["labels"], jnp.int32)

    step_masks = fixed or masks.soft_mask(scores, hyper.temperature, init_value=s0)
    variables = {"params": params, "batch_stats": batch_stats, "masks": step_masks}
    logits_eval = recipe.model.apply(variables, inputs, train=False)
    logits_train, _ = recipe.model.apply(variables, inputs, train=True, mutable=["batch_stats"])
    differentiate = jax.jit(jax.value_and_grad(step.loss_fn, argnums=(1, 2), has_aux=True), static_argnums=0)
    batch = step.LossInputs(inputs, labels, jax.random.key(0), hyper)  # nothing is drawn from the key
    (loss, (metrics, after)), gradients = differentiate(recipe, params, state.scores, state, batch)
    gradients = reference.names(gradients[0]) | reference.names(gradients[1], "scores")

    single = dtype == np.float32
    forward, backward = (1e-5, 1e-4) if single else (1e-6, 1e-6) if ticket and s0 != 0 else (1e-12, 1e-10)
    prefix = "f32/" if single else ""
    assert reference.distance(logits_eval, arrays[f"{prefix}logits_eval"]) <= forward
    assert reference.distance(logits_train, arrays[f"{prefix}logits_train"]) <= forward
    assert reference.distance(loss, arrays[f"{prefix}loss"]) <= max(forward, 1e-6 if ticket else 0.0)
    assert reference.distance(metrics.cross_entropy, arrays[f"{prefix}cross_entropy"]) <= forward
    assert reference.distance(masks.mask_penalty(step_masks), arrays[f"{prefix}mask_sum"]) <= forward
    index = reference.index(arrays, "grad_tensor")
    assert set(index["names"]) == set(gradients)
    tolerances = np.full(len(index["names"]), backward)
    reference.assert_tensors(gradients, index, arrays[f"{prefix}grad_values"], tolerances)
    if single:
        return
    reference.assert_summaries(gradients, index, arrays["grad_summary"], tolerances)
    statistics = reference.names(after)
    expected = {name.removeprefix("after/"): array for name, array in arrays.items() if name.startswith("after/")}
    assert expected.keys() == statistics.keys()
    for name, array in expected.items():
        assert reference.distance(statistics[name], array) <= forward, name
    for name, array in arrays.items():
        if name.startswith("grad/"):  # stored in float32
            assert reference.distance(gradients[name.removeprefix("grad/")], array) <= 1e-6, name


def _fill(recipe: step.Recipe, s0: float, dtype: Any) -> Any:
    shapes = jax.eval_shape(lambda: step.init_variables(recipe, jax.random.key(0), (32, 32, 3)))
    return masks.init_scores(shapes["masks"], s0, dtype=dtype)


METRICS = ("cross_entropy", "penalty")


class Recorder(Observer):
    """Records a search under the reference's names."""

    def __init__(self, predict: Any) -> None:
        self._predict = predict
        self._phase = -1
        self.states: dict[str, dict[str, np.ndarray]] = {}
        self.momenta: dict[str, dict[str, np.ndarray]] = {}
        self.steps: list[step.StepMetrics] = []
        self.logits: list[np.ndarray] = []
        self.densities: list[float] = []
        self.temperatures: list[float | None] = []
        self.learning_rates: list[float] = []
        self.losses: list[float] = []

    def keep(self, name: str, state: TrainState) -> None:
        self.states[name] = reference.state_arrays(state)
        self.momenta[name] = reference.momentum_arrays(state)

    def on_phase_start(self, progress: Progress) -> None:
        if progress.phase == TICKET:
            self.keep("ticket_start", progress.state)
        elif progress.round:
            self.keep(f"round{progress.round - 1}_pruned", progress.state)

    def on_steps(self, progress: Progress, total: int) -> None:
        self.steps.append(jax.device_get(progress.figures[-1]))
        if len(self.steps) in (1, 2):
            self.keep(f"after_step{len(self.steps)}", progress.state)

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self.logits.append(self._predict(record, progress.state))
        self.densities.append(record.density)
        self.temperatures.append(record.temperature)
        self.learning_rates.append(record.learning_rate)
        self.losses.append(record.loss)

    def on_phase_end(self, progress: Progress) -> None:
        end = "ticket_end" if progress.phase == TICKET else f"round{progress.round}_end"
        self.keep(end, progress.state)


def prepare(arrays: dict[str, np.ndarray], dtype: Any) -> tuple[Config, Problem, TrainState]:
    """The search that a reference file ran: its settings, images, order and start."""
    cfg = {name.removeprefix("cfg/"): array for name, array in arrays.items() if name.startswith("cfg/")}
    config = Config(
        batch_size=int(cfg["batch_size"]),
        epochs=int(cfg["epochs"]),
        rounds=int(cfg["rounds"]),
        lr=float(cfg["lr"]),
        lr_schedule=tuple(int(epoch) for epoch in cfg["lr_schedule"]),
        lr_drops=tuple(float(drop) for drop in cfg["lr_drops"]),
        decay=float(cfg["decay"]),
        rewind_epoch=int(cfg["rewind_epoch"]),
        lmbda=float(cfg["lmbda"]),
        final_temp=float(cfg["final_temp"]),
        mask_initial_value=float(cfg["s0"]),
        reset="released",
    )
    start = reference.load("initial_weights.npz")
    recipe = reference.recipe(dtype, num_classes=start["classifier/kernel"].shape[-1], decay=config.decay)
    problem = Problem(
        recipe,
        reference.images(reference.load("data.npz"), dtype),
        validation=None,
        key=jax.random.key(0),
        order=lambda phase, epoch: arrays["order"][phase, epoch],
    )
    given = {
        name.removeprefix("initial_scores128/"): array / 128.0
        for name, array in arrays.items()
        if name.startswith("initial_scores128/")
    }
    state = step.init_state(
        recipe,
        reference.tree(start, ("kernel", "scale", "bias"), dtype),
        reference.tree(start, ("mean", "var"), dtype),
        scores=reference.tree(given, ("scores",), dtype) or _fill(recipe, config.mask_initial_value, dtype),
        masks={},
    )
    return config, problem, state


@by_name(SEARCH_FILES)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cs_jax.CollapsedLayerWarning")  # some of these searches empty a layer
@pytest.mark.usefixtures("x64")
def test_golden_search(path: Path) -> None:
    """A miniature search, step by step, from initial weights over the rounds to the retrained ticket."""
    arrays = reference.load(path)
    config, problem, state = prepare(arrays, np.float64)
    evaluation = reference.images(reference.load("data.npz"), np.float64, prefix="eval_")

    def predict(record: EpochRecord, state: TrainState) -> np.ndarray:
        epoch_masks = state.masks or masks.soft_mask(
            state.scores, record.temperature, init_value=config.mask_initial_value
        )
        variables = {"params": state.params, "batch_stats": state.batch_stats, "masks": epoch_masks}
        return np.asarray(Executor().predict(problem.recipe.model, variables, evaluation, batch_size=16))

    recorder = Recorder(predict)
    ticket, _ = search.search_ticket(config, problem, search.begin_search(state), recorder)
    search.retrain(config, problem, search.begin_retraining(problem, ticket), recorder)
    recorder.states["checkpoint"] = reference.names(ticket.start.params) | reference.names(ticket.start.batch_stats)

    _check_schedules(arrays, recorder, config)
    _check_steps(arrays, recorder, config)
    _check_states(arrays, recorder)
    _check_ticket(arrays, ticket, recorder)


def _check_schedules(arrays: dict[str, np.ndarray], recorder: Recorder, config: Config) -> None:
    phases, epochs = arrays["epoch/lr"].shape
    assert (phases, epochs) == (config.rounds + 1, config.epochs)
    np.testing.assert_allclose(recorder.learning_rates, arrays["epoch/lr"].ravel(), rtol=1e-12)
    searched = config.rounds * epochs
    np.testing.assert_allclose(recorder.temperatures[:searched], arrays["epoch/temp"].ravel()[:searched], rtol=1e-12)
    assert recorder.temperatures[searched:] == [None] * epochs
    positive = arrays["epoch/fraction_scores_positive"].ravel()
    # One entry of 267,696 may sit on the edge while scores still move.
    np.testing.assert_allclose(recorder.densities, positive, rtol=0, atol=5e-6)


def _check_steps(arrays: dict[str, np.ndarray], recorder: Recorder, config: Config) -> None:
    """Losses of every step, their means over an epoch's examples, and logits after every epoch, phase by phase."""
    source = {name: arrays[f"step/{name}"].copy() for name in ("loss", "cross_entropy", "mask_sum")}
    logits = arrays["epoch/eval_logits"].copy()
    if "double_ticket/step/loss" in arrays:  # the ticket with masks that were not rounded to float32, as ours
        for name in source:
            source[name][-1] = arrays[f"double_ticket/step/{name}"]
        logits[-1] = arrays["double_ticket/epoch/eval_logits"]
    phases, epochs, num_steps = source["loss"].shape
    ours = {name: np.reshape([getattr(m, name) for m in recorder.steps], source["loss"].shape) for name in METRICS}
    ours["mask_sum"] = ours.pop("penalty") / config.lmbda if config.lmbda else source["mask_sum"]
    ours["loss"] = ours["cross_entropy"] + config.lmbda * ours["mask_sum"]
    means = np.average(ours["loss"], axis=-1, weights=arrays["step/batch_size"][0, 0])
    np.testing.assert_allclose(recorder.losses, means.ravel(), rtol=1e-12)
    for phase in range(phases):
        for epoch in range(epochs):
            least = _least(phase, epoch, config)
            for name, figures in ours.items():
                allowed = _cell(reference.tolerance(arrays, name, least), phase, epoch)
                error = np.abs(figures[phase, epoch] - source[name][phase, epoch])
                scale = np.maximum(1.0, np.abs(source[name][phase, epoch]))
                assert (error <= allowed * scale).all(), f"{name} of phase {phase}, epoch {epoch}: {error}, {allowed}"
            allowed = _cell(reference.tolerance(arrays, "eval_logits", least), phase, epoch)
            error = reference.distance(recorder.logits[phase * epochs + epoch], logits[phase, epoch])
            assert error <= allowed, f"logits after phase {phase}, epoch {epoch}: {error}, {allowed}"


def _least(phase: int, epoch: int, config: Config) -> float:
    if phase == 0:
        return reference.TOLERANCES["checkpoint" if epoch == 0 else "round0"]
    return reference.TOLERANCES["later"]


def _cell(allowed: np.ndarray, phase: int, epoch: int) -> np.ndarray:
    return allowed[phase, epoch] if allowed.ndim else allowed


def _check_states(arrays: dict[str, np.ndarray], recorder: Recorder) -> None:
    """Weights, scores, BatchNorm and momentum at every stage that the reference kept."""
    index = reference.index(arrays, "tensor")
    scores = {name for name in index["names"] if name.endswith("scores")}
    stages = {name.removesuffix("/summary") for name in arrays if name.endswith("/summary") and name.count("/") == 1}
    assert stages == recorder.states.keys()
    for stage, ours in recorder.states.items():
        fixed = stage == "checkpoint" or stage.startswith("ticket")
        assert set(index["names"]) - ours.keys() == (scores if fixed else set())
        source = f"double_ticket/{stage}" if f"double_ticket/{stage}/summary" in arrays else stage
        group = stage if stage in reference.TOLERANCES else "round0" if stage.startswith("round0") else "later"
        allowed = reference.tolerance(arrays, stage, reference.TOLERANCES[group])
        allowed = np.broadcast_to(allowed, len(index["names"]))
        reference.assert_summaries(ours, index, arrays[f"{source}/summary"], allowed)
        if f"{source}/values" in arrays:
            reference.assert_tensors(ours, index, arrays[f"{source}/values"], allowed)
        if f"{stage}/momentum_summary" in arrays:
            momenta = recorder.momenta[stage]
            assert len(momenta) > len(scores)
            reference.assert_summaries(momenta, index, arrays[f"{stage}/momentum_summary"], allowed)


def _check_ticket(arrays: dict[str, np.ndarray], ticket: Ticket, recorder: Recorder) -> None:
    """Hard masks agree entry for entry, and the ticket starts from the snapshot, bit for bit."""
    kept = {name.removesuffix("/kernel"): mask > 0 for name, mask in reference.names(ticket.masks).items()}
    expected = {
        name.removeprefix("ticket_hard_mask/"): array
        for name, array in arrays.items()
        if name.startswith("ticket_hard_mask/")
    }
    assert kept.keys() == expected.keys()
    final = "double_ticket/final_logits" if "double_ticket/final_logits" in arrays else "final_logits"
    allowed = np.ravel(reference.tolerance(arrays, "eval_logits", reference.TOLERANCES["later"]))[-1]
    assert reference.distance(recorder.logits[-1], arrays[final]) <= allowed
    flips = sum(int(np.sum(kept[name] != expected[name])) for name in expected)
    assert flips <= 10 * int(np.max(arrays.get("sens_perturb1e-14/hard_mask_flips", 0)))
    for name, array in recorder.states["checkpoint"].items():
        np.testing.assert_array_equal(recorder.states["ticket_start"][name], array)


@pytest.mark.slow
@by_name(FLOAT32_SEARCH_FILES)
def test_golden_search_starts_alike_in_float32(path: Path) -> None:
    """Cross-entropy of the first two steps in float32; later steps differ by the chaos of rounding errors."""
    arrays = reference.load(path)
    config, problem, state = prepare(arrays, np.float32)
    order, hyper = arrays["order"][0, 0][: 2 * config.batch_size], search.hyperparams(config, SEARCH, 0)
    epoch = Epoch(problem.train, order, problem.key, hyper, batch_size=config.batch_size)
    calls = Executor().train_epoch(problem.recipe, state, epoch)
    entropies = [float(metrics.cross_entropy) for _, _, metrics in calls]
    np.testing.assert_allclose(entropies, arrays["step/cross_entropy"][0, 0, :2], rtol=1e-4)
