"""Several simulated devices: placement of arrays, and results equal to those on one device."""

import dataclasses
from pathlib import Path
from typing import Any

import device_counts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import linen as nn
from jax.sharding import PartitionSpec

from cs_jax.commands import parser
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import ConfigError
from cs_jax.core.masks import init_scores
from cs_jax.data.images import ImageSet
from cs_jax.experiment import search
from cs_jax.experiment.prepare import prepare
from cs_jax.experiment.progress import Observer, Observers, Progress
from cs_jax.experiment.storage.checkpoints import Checkpoints
from cs_jax.models.vit import VisionTransformer
from cs_jax.training import mesh, step
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import Executor
from cs_jax.training.mesh import MeshLayout
from cs_jax.training.problem import Problem, Snapshot
from cs_jax.training.step import Recipe, StepInputs


def layout(data: int, model: int) -> MeshLayout:
    found = mesh.make_layout(data, model)
    assert found is not None
    return found


def spec(sharded: Any) -> PartitionSpec:
    return sharded.spec


# Placement of arrays.


def test_one_device_has_no_layout() -> None:
    assert mesh.make_layout(None, 1) is None
    assert mesh.make_layout(1, 1) is None


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((128, 64), PartitionSpec("model")),
        ((64, 128), PartitionSpec(None, "model")),
        ((64, 64), PartitionSpec(None, "model")),  # the last of equal ones
        ((3, 3, 64, 130), PartitionSpec(None, None, "model")),  # 130 does not divide by 4
        ((4095,), PartitionSpec()),  # small
        ((5, 1001), PartitionSpec()),  # nothing divides
        ((), PartitionSpec()),
    ],
)
def test_large_arrays_are_split_along_their_longest_axis(shape: tuple[int, ...], wanted: PartitionSpec) -> None:
    assert spec(layout(2, 4).state(jax.ShapeDtypeStruct(shape, jnp.float32))) == wanted


def test_names_of_a_weight_decide_where_it_is_split_and_where_its_scores_are() -> None:
    dense = nn.with_partitioning(nn.initializers.ones, ("model", "layers"))
    boxed = nn.Dense(128, kernel_init=dense, use_bias=False).init(jax.random.key(0), jnp.ones((1, 64)))["params"]
    here = layout(2, 4)
    placed = here.place(boxed, here.state(boxed))
    assert spec(placed["kernel"].value.sharding) == PartitionSpec("model", None)
    assert placed["kernel"].names == ("model", "layers")
    assert init_scores(placed, 0.1)["kernel"].value.sharding == placed["kernel"].value.sharding


def test_a_batch_that_does_not_divide_is_whole() -> None:
    assert spec(layout(4, 2).batch(8)) == PartitionSpec("data")
    assert spec(layout(4, 2).batch(6)) == PartitionSpec()
    assert spec(layout(4, 2).batches(8)) == PartitionSpec(None, "data")


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (None, 9, "--model-parallel 9: must be at most 8, the number of devices"),
        (9, 1, "--data-parallel 9 with --model-parallel 1: requires 9 devices, but there are 8"),
        (3, 3, "--data-parallel 3 with --model-parallel 3: requires 9 devices, but there are 8"),
    ],
)
def test_more_devices_than_there_are_is_refused(data: int | None, model: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mesh.make_layout(data, model)


def test_a_batch_size_that_does_not_divide_is_refused_before_data_are_read() -> None:
    config = parser.parse(["digits", "--data-parallel", "3", "--data-dir", "/nowhere"])
    with pytest.raises(
        ConfigError, match="--batch-size 64: must be a multiple of 3, the number of devices that share a batch"
    ):
        prepare(config)


def test_devices_that_would_share_no_weights_are_refused() -> None:
    config = parser.parse(["digits", "--model-parallel", "3"])
    with pytest.raises(
        ConfigError, match="--model-parallel 3: splits no weight array of --model resnet6; choose a number"
    ):
        prepare(config)


# Equal results.


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        problem, _ = prepare(device_counts.CONFIG)
        return device_counts.train(problem)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (8, 1), (2, 4)], ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.usefixtures("x64")
def test_fifty_steps_are_the_same_on_any_number_of_devices(
    on_one_device: dict[str, np.ndarray], shape: tuple[int, int]
) -> None:
    problem, _ = prepare(device_counts.CONFIG)
    executor = Executor(layout(*shape))
    problem = dataclasses.replace(problem, executor=executor, train=executor.place_everywhere(problem.train))
    found = device_counts.train(problem)
    assert found.keys() == on_one_device.keys()
    for name, wanted in on_one_device.items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-9, err_msg=name)
        if name.startswith("masks/"):
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    kept = np.concatenate([hard.ravel() > 0 for name, hard in found.items() if name.startswith("masks/")])
    assert 0.1 < kept.mean() < 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_scores_are_rounded_at_random_alike_on_several_devices(problem: Problem) -> None:
    config = dataclasses.replace(CONFIG, score_dtype="bfloat16")
    found = []
    for here in (problem, on(problem, 4, 1)):
        hyper = search.hyperparams(config, "search", 0)
        state, epoch = search.init_state(config, here), Epoch(here.train, np.arange(36), here.key, hyper, batch_size=12)
        for _, state, _ in here.executor.train_epoch(here.recipe, state, epoch):  # noqa: B007, B020
            pass
        found.append(on_host(state.scores))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found[0]))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_each_device_computes_its_share_of_a_batch(problem: Problem) -> None:
    """In the compiled program, products of the first layer have an eighth of the rows."""
    executor = Executor(layout(8, 1))
    here = dataclasses.replace(problem, executor=executor, train=executor.place_everywhere(problem.train))
    state = search.init_state(small.SEARCH, here)
    hyper = search.hyperparams(small.SEARCH, "search", 0)
    indices = executor.place_batch(np.arange(16))
    program = jax.jit(step.step, static_argnums=0).lower(
        here.recipe, state, StepInputs(here.train, indices, here.key, hyper)
    )
    text = program.compile().as_text()
    assert text is not None
    assert "f32[2,300]" in text
    assert "f32[16,300]" not in text


# Checkpoints.


class Stop(Exception):
    pass


class StopAfter(Observer):
    def __init__(self, steps: int) -> None:
        self._left = steps

    def on_steps(self, progress: Progress, total: int) -> None:
        self._left -= 1
        if not self._left:
            raise Stop


def on(problem: Problem, data: int, model: int) -> Problem:
    executor = Executor(mesh.make_layout(data, model))
    train, validation = executor.place_everywhere((problem.train, problem.validation))
    return dataclasses.replace(problem, executor=executor, train=train, validation=validation)


def finish(problem: Problem, progress: Progress | None, observer: Observer) -> tuple[Any, Snapshot]:
    progress = progress or search.begin_search(search.init_state(CONFIG, problem))
    ticket, _ = search.search_ticket(CONFIG, problem, progress, observer)
    begun = search.begin_retraining(problem, ticket)
    assert begun.snapshot is not None
    return on_host(search.retrain(CONFIG, problem, begun, Observer())), begun.snapshot


CONFIG = dataclasses.replace(
    small.SEARCH, target_density=0.3, lr=0.01, checkpoint_steps=1, checkpoint_seconds=0.0, decay=1e-3
)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((4, 1), (1, 1)), ((4, 1), (8, 1)), ((1, 1), (2, 2))])
@pytest.mark.usefixtures("x64")
def test_a_run_goes_on_on_another_number_of_devices(
    tmp_path: Path, problem: Problem, first: tuple[int, int], then: tuple[int, int]
) -> None:
    wanted, wanted_snapshot = finish(problem, None, Observer())
    before = on(problem, *first)
    with Checkpoints(CONFIG, before, tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(Stop):
            finish(before, None, Observers(checkpoints, StopAfter(8)))
        assert checkpoints.save_latest()
    after = on(problem, *then)
    with Checkpoints(CONFIG, after, tmp_path / "checkpoints") as checkpoints:
        progress = checkpoints.restore()
        assert progress is not None
        assert progress.epochs_done(CONFIG) * 3 + progress.step == 8
        wide = jax.tree.leaves(progress.state.params)[0]
        assert len(wide.sharding.device_set) == then[0] * then[1]
        found, snapshot = finish(after, progress, checkpoints)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), (found, snapshot), (wanted, wanted_snapshot)
    )
    jax.tree.map(np.testing.assert_array_equal, found.masks, wanted.masks)


# Networks too large for a device.


@pytest.mark.slow
def test_no_device_holds_much_of_a_large_transformer(synthetic: ImageSet) -> None:
    """65 million weights over 4 of 8 devices: a step runs, and no device holds 0.3 or more of any array."""
    model = VisionTransformer(num_classes=4, depth=9, width=768, num_heads=12, patch_size=3)
    problem = on(Problem(Recipe(model), synthetic, None, jax.random.key(0)), 2, 4)
    state = search.init_state(small.SEARCH, problem)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > 50e6
    hyper = search.hyperparams(small.SEARCH, "search", 0)
    epoch = Epoch(problem.train, np.arange(4), problem.key, hyper, batch_size=4)
    [(_, state, metrics)] = list(problem.executor.train_epoch(problem.recipe, state, epoch))
    assert np.isfinite(metrics.loss)
    for part in (state.params, state.scores, state.weight_momentum, state.score_momentum):
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(part):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.size
        whole = sum(leaf.size for leaf in jax.tree.leaves(part))
        assert max(held.values()) < 0.3 * whole
