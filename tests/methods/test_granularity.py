"""Scores that stand for channels: what is masked, what it costs, and tickets that are smaller networks."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import linen as nn

import train
from cs_jax import commands, load_ticket, save_ticket
from cs_jax.commands import parser
from cs_jax.core.errors import ConfigError
from cs_jax.data.images import ImageSet
from cs_jax.experiment import search
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import Observer, Observers
from cs_jax.experiment.storage.checkpoints import Checkpoints
from cs_jax.layers.masked import MaskedConv, MaskedDense
from cs_jax.methods import target_multiply_adds
from cs_jax.methods.controls import CONTROLS
from cs_jax.models import MODELS, VGG, ConvNet, LeNet300100, ResNet, VisionTransformer, channels
from cs_jax.models.multiply_adds import multiply_adds
from cs_jax.models.wiring import Signal, Wiring
from cs_jax.report import write_report
from cs_jax.tickets import shrink
from cs_jax.training.problem import Problem
from cs_jax.training.step import Recipe

TinyResNet = functools.partial(ResNet, stage_sizes=(1, 1), widths=(8, 16))
TinyConvNet = functools.partial(ConvNet, widths=(4,))
MADE_BY = {"stage2_conv1": "stage1_conv1", "stage2_conv2": "stage2_conv1"}
QUICK = "digits --epochs 2 --rounds 2 --rewind-epoch 1 --lr-schedule --lr-drops --controls --no-report".split()
QUICK += "--max-train-examples 128 --val-set-size 64".split()  # whole batches: less to compile
COMMAND = [*QUICK, *"--model tiny_resnet --granularity channel --target-multiply-adds 0.5 --channel-multiple 1".split()]
CHANNEL = dataclasses.replace(small.SEARCH, granularity="channel")
SHARE = {"target_multiply_adds": 0.5, "channel_multiple": 1}
A, B = ("stage1_block1", "conv_b", "kernel"), ("stage2_block1", "conv_b", "kernel")

pytestmark = pytest.mark.filterwarnings("ignore::cs_jax.UnfinishedSearchWarning", "ignore::cs_jax.DensityWarning")


@pytest.fixture
def by_channel(synthetic: ImageSet) -> Problem:
    """A search of channels in a network of residual blocks, 8 and 16 channels wide."""
    model = TinyResNet(num_classes=4)
    recipe = Recipe(model, decay=1e-3, channels=channels.of_model(model, (6, 6, 1)))
    images = synthetic.replace(images=synthetic.images[:32], labels=synthetic.labels[:32])  # two batches of 16
    return Problem(recipe, images, validation=images, key=jax.random.key(3))


def found(config: Config, problem: Problem, observer: Observer | None = None) -> Any:
    state = search.init_state(config, problem)
    ticket, ends = search.search_ticket(config, problem, search.begin_search(state), observer or Observer())
    return jax.device_get(ticket), ends


def kept_channels(mask: Any) -> np.ndarray:
    """Which input channels a convolution's mask keeps, all weights of each or none."""
    rows = np.moveaxis(np.asarray(mask), -2, 0).reshape(np.shape(mask)[-2], -1) != 0
    assert (rows.all(axis=1) | ~rows.any(axis=1)).all()
    return rows[:, 0]


def test_channels_are_those_that_no_sum_and_no_output_wants() -> None:
    of_resnet = channels.of_model(TinyResNet(), (6, 6, 1))
    assert [leaf.path for leaf in of_resnet.scored] == [A, B]
    assert [leaf.score_shape for leaf in of_resnet.scored] == [(1, 1, 8, 1), (1, 1, 16, 1)]
    assert [path[-2] for path in of_resnet.unscored] == ["conv0", "conv_a", "conv_a"]
    of_transformer = channels.of_model(VisionTransformer(depth=1, width=6, num_heads=3), (8, 8, 1))
    shapes = {leaf.name: leaf.score_shape for leaf in of_transformer.scored}
    assert shapes == {"block1/out/kernel": (3, 1, 1), "block1/mlp_in/kernel": (1, 24)}
    assert of_resnet.needs_constant == (False, False) and of_transformer.needs_constant == (False, False)


class Normalized(nn.Module):
    """Two convolutions with BatchNorm and a dense layer, all masked."""

    num_classes: int = 3
    flattens: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for name in "ab":
            x = MaskedConv(4, (3, 3), name=f"conv_{name}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"bn_{name}")(x))
        x = x.reshape(x.shape[0], -1) if self.flattens else x.mean(axis=(1, 2))
        return MaskedDense(self.num_classes, name="last")(x)

    def wire(self, net: Wiring, x: Signal) -> Signal:
        for name in "ab":
            x = net.conv(x, f"conv_{name}", zero_padded=True)
            x = net.activation(net.batch_norm(x, f"bn_{name}"), nn.relu)
        return net.dense(x if self.flattens else net.pool(x), "last")

    def resize(self, features: dict[str, int]) -> Any:
        raise AssertionError("nothing here is made smaller")


@pytest.mark.parametrize(
    "model, expected",
    [
        (Normalized(), {"conv_b": (1, 1, 4, 1), "last": (4, 1)}),
        # `last` reads 36 numbers of each channel, and conv_b is where the channels of conv_a are masked.
        (Normalized(flattens=True), {"conv_b": (1, 1, 4, 1)}),
        # The classifier is not masked, and so on.
        (VGG(stage_sizes=(1, 2), widths=(4, 6)), {"stage2_conv1": (1, 1, 4, 1), "stage2_conv2": (1, 1, 6, 1)}),
    ],
)
def test_where_batch_norm_follows_it_is_the_reading_layer_whose_channels_are_masked(
    model: nn.Module, expected: dict[str, tuple[int, ...]]
) -> None:
    known = channels.of_model(model, (8, 8, 1))
    assert {leaf.path[0]: leaf.score_shape for leaf in known.scored} == expected
    assert not any(known.needs_constant)


def test_without_batch_norm_it_is_the_layer_that_makes_them() -> None:
    known = channels.of_model(TinyConvNet(), (6, 6, 1))
    shapes = {leaf.path[0]: leaf.score_shape for leaf in known.scored}
    assert shapes["stage1_conv1"] == shapes["stage1_conv2"] == (1, 1, 1, 4)
    # Constants of the first convolution stay before the second, which pads with zeros.
    padded = [leaf.path[0] for leaf, constant in zip(known.scored, known.needs_constant, strict=True) if constant]
    assert padded == ["stage1_conv1"]


@pytest.mark.parametrize(
    "model, image_shape, kept",
    [
        (LeNet300100(), (6, 6, 1), [7, 3]),
        (TinyResNet(), (6, 6, 1), [2, 5]),
        (TinyConvNet(), (6, 6, 1), [9, 11, 1, 3]),
        (VGG(stage_sizes=(1, 2), widths=(4, 6)), (8, 8, 1), [3, 1]),
        (VisionTransformer(depth=2, width=6, num_heads=3), (8, 8, 1), [5, 2, 7, 1]),
    ],
)
def test_multiply_adds_of_fewer_channels_are_those_of_the_network_that_has_them(
    model: Any, image_shape: tuple[int, ...], kept: list[int]
) -> None:
    known = channels.of_model(model, image_shape)
    assert known.multiply_adds(known.sizes) == multiply_adds(model, image_shape)
    sizes = [count + constant for count, constant in zip(kept, known.needs_constant, strict=True)]
    layers = [leaf.name.removesuffix("/kernel").removesuffix("/out") for leaf in known.scored]
    made = [MADE_BY.get(layer, layer.replace("conv_b", "conv_a")) for layer in layers]
    smaller = model.resize(dict(zip(made, sizes, strict=True)))
    assert known.multiply_adds(kept) == multiply_adds(smaller, image_shape)


def test_held_scores_above_0_have_no_more_than_the_share_and_one_more_would() -> None:
    known = channels.of_model(LeNet300100(), (6, 6, 1))
    keys = jax.random.split(jax.random.key(0), 2)
    scores = known.selection.nest(map(jax.random.normal, keys, [leaf.score_shape for leaf in known.scored]))
    held = target_multiply_adds.track_target(known, scores, 0.3)
    leaves, before = map(known.selection.score_leaves, (held, scores))
    counts = [int((leaf > 0).sum()) for leaf in leaves]
    limit = 0.3 * multiply_adds(LeNet300100(), (6, 6, 1))
    assert known.multiply_adds(counts) <= limit
    below = [float(jnp.where(leaf > 0, -jnp.inf, leaf).max()) for leaf in leaves]
    counts[int(np.argmax(below))] += 1
    assert known.multiply_adds(counts) > limit
    shifts = [np.unique(np.round(old - new, 5)) for old, new in zip(before, leaves, strict=True)]
    assert len(shifts[0]) == len(shifts[1]) == 1 and shifts[0] == shifts[1]


def test_a_ticket_keeps_the_highest_of_each_layer_then_what_fits() -> None:
    known = channels.of_model(TinyResNet(), (6, 6, 1))
    scores = known.selection.nest([jnp.arange(8.0).reshape(1, 1, 8, 1) - 10, jnp.arange(16.0).reshape(1, 1, 16, 1)])
    dense = known.multiply_adds(known.sizes)
    collapsed = "stage1_block1/conv_b/kernel' has collapsed: it keeps only its highest score, which is reserved"
    with pytest.warns(match=collapsed):
        kept = target_multiply_adds.keep_highest(known, scores, known.multiply_adds([1, 12]) / dense)
    first, second = (np.ravel(leaf) for leaf in known.selection.score_leaves(kept))
    assert first.tolist() == [-1] * 7 + [1]
    assert second.tolist() == [-1] * 4 + [1] * 12
    lower = jax.tree.map(lambda score: score - 12, scores)
    with pytest.warns(match="stage1_block1/conv_b/kernel' has collapsed"):
        above = target_multiply_adds.keep_highest(known, lower, None)
    assert [int((leaf > 0).sum()) for leaf in known.selection.score_leaves(above)] == [1, 3]


def test_layers_that_are_a_multiple_keep_one() -> None:
    known = channels.of_model(ConvNet(widths=(8,), num_classes=3), (8, 8, 1))
    sizes = dict(zip([leaf.path[0] for leaf in known.scored], known.sizes, strict=True))
    assert sizes == {"hidden0": 256, "hidden1": 256, "stage1_conv1": 8, "stage1_conv2": 8}
    keys = jax.random.split(jax.random.key(1), 4)
    scores = known.selection.nest(map(jax.random.normal, keys, [leaf.score_shape for leaf in known.scored]))
    dense = known.multiply_adds(known.sizes)
    for multiple in (4, 3):
        kept = target_multiply_adds.keep_highest(known, scores, 0.5, multiple)
        counts = [int((leaf > 0).sum()) for leaf in known.selection.score_leaves(kept)]
        assert known.multiply_adds(counts) <= 0.5 * dense
        # What the first convolution's masked channels leave is one channel more; 3 divides none of the layers.
        computed = [
            min(count + constant, size)
            for count, constant, size in zip(counts, known.needs_constant, known.sizes, strict=True)
        ]
        assert (np.remainder(computed, 4) == 0).all() == (multiple == 4)
        for before, after in zip(*map(known.selection.score_leaves, (scores, kept)), strict=True):
            below = np.asarray(before)[np.asarray(after) < 0]
            assert np.asarray(before)[np.asarray(after) > 0].min() > below.max(initial=-np.inf)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cs", "imp", "gmp", "magnitude", "random"])
def test_every_method_keeps_whole_channels_that_conv_b_reads(method: str, by_channel: Problem) -> None:
    config = dataclasses.replace(CHANNEL, method=method, target_density=0.5)
    ticket, _ = found(config, by_channel)
    kept = [kept_channels(ticket.masks[path[0]]["conv_b"]["kernel"]) for path in (A, B)]
    assert set(ticket.masks["stage1_block1"]) == {"conv_b"} and "conv0" not in ticket.masks
    # conv_b of the first block reads 8 channels with 72 weights each, that of the second 16 with 144.
    weights = np.dot([part.sum() for part in kept], [72, 144])
    assert weights in (1440, 1368) and all(part.any() for part in kept)


@pytest.mark.parametrize("method", ["cs", "imp-c", "gmp", "magnitude", "random"])
def test_the_shrunk_ticket_has_no_more_than_the_target(method: str, by_channel: Problem) -> None:
    config = dataclasses.replace(CHANNEL, method=method, **SHARE)
    ticket, _ = found(config, by_channel)
    model, known = by_channel.recipe.model, by_channel.recipe.channels
    assert known is not None
    masks = known.complete(ticket.masks, ticket.start.params)
    np.testing.assert_array_equal(masks["conv0"]["kernel"], 1)
    variables = {"params": ticket.start.params, "batch_stats": ticket.start.batch_stats, "masks": masks}
    smaller, _ = shrink.shrink(model, variables, (6, 6, 1))
    assert multiply_adds(smaller, (6, 6, 1)) <= 0.5 * multiply_adds(model, (6, 6, 1))
    counts = [int(kept_channels(ticket.masks[path[0]]["conv_b"]["kernel"]).sum()) for path in (A, B)]
    for place in range(2):
        more = [count + (number == place) for number, count in enumerate(counts)]
        assert known.multiply_adds(more) > 0.5 * multiply_adds(model, (6, 6, 1))


@pytest.mark.parametrize("multiple", [1, 4])
def test_what_is_pruned_is_left_out_of_later_rounds(multiple: int) -> None:
    known = channels.of_model(ConvNet(widths=(8,), num_classes=3), (8, 8, 1))
    keys = jax.random.split(jax.random.key(3), 4)
    ranks = known.selection.nest(map(jax.random.uniform, keys, [leaf.score_shape for leaf in known.scored]))
    before = ranks
    for round in range(1, 7):
        kept = target_multiply_adds.keep_highest(known, ranks, 0.35 ** (round / 6), multiple, least=0.0)
        back = jax.tree.map(lambda now, then: ((now > 0) & (then < 0)).sum(), kept, before)
        assert sum(map(int, jax.tree.leaves(back))) == 0
        before = ranks = jax.tree.map(lambda now, rank: jnp.where(now > 0, rank, -1), kept, ranks)


@pytest.mark.filterwarnings("ignore::cs_jax.CollapsedLayerWarning")
def test_heads_are_counted_by_their_features() -> None:
    known = channels.of_model(VisionTransformer(depth=1, width=16, num_heads=4), (8, 8, 1))
    ranks = known.selection.nest(jnp.zeros(leaf.score_shape) for leaf in known.scored)
    leaves = jax.tree.leaves(target_multiply_adds.keep_highest(known, ranks, 0.6, 8))
    counts = {leaf.path[1]: int((mask > 0).sum()) for leaf, mask in zip(known.scored, leaves, strict=True)}
    assert counts["out"] == 2 and counts["mlp_in"] % 8 == 0  # heads of 4 features


def test_penalty_and_density_count_weights(by_channel: Problem) -> None:
    history: list[Any] = []

    class Records(Observer):
        def on_epoch_end(self, record: Any, progress: Any) -> None:
            history.append((record, jax.device_get(progress.state.scores)))

    config = dataclasses.replace(CHANNEL, rounds=1, lmbda=1e-3, score_lr=1e-20)
    found(config, by_channel, Records())
    record, scores = history[0]
    assert record.penalty == pytest.approx(1e-3 * (8 * 72 + 16 * 144), rel=1e-3)  # masks are 1 at first
    assert [leaf.shape for leaf in jax.tree.leaves(scores)] == [(1, 1, 8, 1), (1, 1, 16, 1)]
    assert record.density == 1.0 and set(record.layer_density) == {"/".join(A), "/".join(B)}


def test_the_dense_network_is_the_same_at_both_granularities(by_channel: Problem) -> None:
    alone = dataclasses.replace(by_channel, recipe=dataclasses.replace(by_channel.recipe, channels=None))
    whole, scored = alone.init_variables(), by_channel.init_variables()
    jax.tree.map(np.testing.assert_array_equal, whole["params"], scored["params"])
    assert len(jax.tree.leaves(whole["masks"])) == 5 and len(jax.tree.leaves(scored["masks"])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("target", [{"target_density": 0.5}, SHARE])
def test_a_search_that_goes_on_ends_with_the_same_bits(
    target: dict[str, Any], by_channel: Problem, tmp_path: Path
) -> None:
    config = dataclasses.replace(CHANNEL, **target, score_dtype="bfloat16")
    whole = found(config, by_channel)

    class Stop(Exception):
        pass

    class StopAt(Observer):
        def on_steps(self, progress: Any, total: int) -> None:
            if (progress.round, progress.epoch, progress.step) == (1, 1, 1):
                raise Stop

    with Checkpoints(config, by_channel, tmp_path) as saved:
        with pytest.raises(Stop):
            found(config, by_channel, Observers(saved, StopAt()))
        saved.save_latest()
    with Checkpoints(config, by_channel, tmp_path) as saved:
        progress = saved.restore()
        assert progress is not None and (progress.round, progress.epoch, progress.step) == (1, 1, 1)
        ticket, ends = search.search_ticket(config, by_channel, progress, saved)
    jax.tree.map(np.testing.assert_array_equal, tuple(ticket), tuple(whole[0]))
    assert [end.density for end in ends] == [end.density for end in whole[1]]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the digits, of a network of residual blocks."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_resnet", TinyResNet)
        assert train.main([*COMMAND, "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_the_summary_has_the_multiply_adds_of_the_shrunk_and_the_dense_network(run_folder: Path) -> None:
    ticket = json.loads((run_folder / "summary.json").read_text())["ticket"]
    assert ticket["dense_multiply_adds"] == multiply_adds(TinyResNet(), (8, 8, 1))
    assert 0.35 * ticket["dense_multiply_adds"] < ticket["multiply_adds"] <= 0.5 * ticket["dense_multiply_adds"]
    assert ticket["num_masked_weights"] == 8 * 72 + 16 * 144


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny_resnet", TinyResNet)
    assert train.main([*COMMAND, "--out", str(tmp_path / "again")]) == 0
    for name in ("ticket.safetensors", "masks.safetensors", "scores.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run_folder / name).read_bytes()


@pytest.mark.slow
def test_the_ticket_has_masks_of_ones_where_nothing_could_be_masked(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "tiny_resnet", TinyResNet)
    ticket = load_ticket(run_folder / "ticket.safetensors")
    assert set(ticket.metadata["layers"]) == {"/".join(A), "/".join(B)}
    assert len(jax.tree.leaves(ticket.variables["masks"])) == 5 and len(jax.tree.leaves(ticket.found_masks)) == 2
    np.testing.assert_array_equal(ticket.variables["masks"]["stage1_block1"]["conv_a"]["kernel"], 1)
    assert ticket.model is not None
    ticket.model.apply(ticket.variables, jnp.zeros((1, 8, 8, 1)))
    again = tmp_path / "again.safetensors"
    save_ticket(again, **ticket.variables, rewound=ticket.rewound, metadata=ticket.metadata)
    assert again.read_bytes() == (run_folder / "ticket.safetensors").read_bytes()
    ticket.variables["masks"]["conv0"]["kernel"] = jnp.zeros_like(ticket.variables["masks"]["conv0"]["kernel"])
    with pytest.raises(ConfigError, match="masks/conv0/kernel: entries must be 1"):
        save_ticket(again, **ticket.variables, metadata=ticket.metadata)


def test_score_histograms_count_the_weights_that_share_a_score(run_folder: Path) -> None:
    rounds = json.loads((run_folder / "scores.json").read_text())["rounds"]
    counts = rounds[-1]["end"]
    assert {name: sum(bins) for name, bins in counts.items()} == {"/".join(A): 8 * 72, "/".join(B): 16 * 144}


def test_the_report_shows_a_run_by_channel(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny_resnet", TinyResNet)
    write_report(run_folder)
    assert (run_folder / "report.html").exists()


@pytest.mark.slow
def test_two_children_of_a_ticket_are_connected(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny_resnet", TinyResNet)
    assert commands.main(["connect", str(run_folder), "--points", "2"]) == 0


TAKERS = "requires --method cs or imp or imp-c or gmp or magnitude or random"


@pytest.mark.parametrize(
    "words, complaint",
    [
        (
            "--granularity channel --method snip",
            f"--granularity channel: {TAKERS}",
        ),
        (
            "--granularity channel --method supermask",
            f"--granularity channel: {TAKERS}",
        ),
        (
            "--granularity channel --method dense",
            f"--granularity channel: {TAKERS}",
        ),
        ("--target-multiply-adds 0.5", "--target-multiply-adds 0.5: requires --granularity channel"),
        (
            "--granularity channel --target-multiply-adds 0",
            "--target-multiply-adds 0.0: must be a share above 0",
        ),
        (
            "--granularity channel --target-multiply-adds 0.5 --target-density 0.5",
            "--target-multiply-adds 0.5: excludes --target-density 0.5; give one of them",
        ),
        (
            "--granularity channel --target-multiply-adds 0.5 --scope layer",
            "--scope layer: not possible with --target-",
        ),
        ("--granularity channel --allow-empty-layers", "--allow-empty-layers: not possible with --granularity channel"),
        (
            "--granularity channel --target-density 0.3 --channel-multiple 4",
            "--channel-multiple 4: requires --target-multiply-adds",
        ),
        ("--granularity channel --channel-multiple 0", "--channel-multiple 0: must be at least 1"),
        (
            "--granularity channel --controls random",
            "--controls random: not possible with --granularity",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(words: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parser.parse(["digits", *words.split()])
    assert str(caught.value).startswith(complaint) and "\n" not in str(caught.value)


class Unwired(nn.Module):
    """A network that does not declare its wiring."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(self.num_classes)(MaskedDense(3)(x.reshape(x.shape[0], -1)))


TAKERS = "requires --method cs or imp or imp-c or gmp or magnitude or random"


@pytest.mark.parametrize(
    "words, complaint",
    [
        (
            "--model unwired",
            "--granularity channel: not possible with --model unwired: model Unwired: does not declare",
        ),
        (
            "--target-multiply-adds 0.01 --channel-multiple 1",
            "--target-multiply-adds 0.01: must be at least 0.144, the share of the network with one channel",
        ),
        (
            "--target-multiply-adds 0.5 --channel-multiple 8",
            "--target-multiply-adds 0.5: must be at least 0.797, the share of the network with the fewest channels",
        ),
        ("--target-density 0.001", "--target-density 0.001: keeps 3 of 2880 weights, but one score in each layer"),
    ],
)
def test_what_the_network_cannot_do_is_refused_before_anything_is_written(
    words: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny_resnet", TinyResNet)
    monkeypatch.setitem(MODELS, "unwired", Unwired)
    config = ["digits", "--model", "tiny_resnet", "--granularity", "channel", *words.split()]
    assert train.main([*config, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].removeprefix("train.py: error: ").startswith(complaint)
    assert "allow-empty-layers" not in said and not (tmp_path / "run").exists()


class Miswired(ConvNet):
    """A network that says that a hidden unit without weights gives one, where it gives none."""

    def wire(self, net: Wiring, x: Signal) -> Signal:
        activation = net.activation
        net.activation = lambda source, function: activation(source, lambda value: function(value) + 1)  # pyright: ignore[reportAttributeAccessIssue]
        return super().wire(net, x)


@pytest.mark.slow
def test_a_run_whose_wiring_is_wrong_keeps_its_ticket_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "miswired", functools.partial(Miswired, widths=(8,)))
    command = [word.replace("tiny_resnet", "miswired") for word in COMMAND]
    assert train.main([*command, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "warning: the ticket cannot be shrunk, so its multiply-adds are unknown: " in said
    ticket = json.loads((tmp_path / "run" / "summary.json").read_text())["ticket"]
    assert "multiply_adds" not in ticket and ticket["dense_multiply_adds"] > 0
    assert load_ticket(tmp_path / "run" / "ticket.safetensors").model is not None


def test_shuffled_masks_keep_as_many_channels_of_each_layer(by_channel: Problem) -> None:
    config = dataclasses.replace(CHANNEL, target_density=0.5)
    state = search.init_state(config, by_channel)
    ticket, _ = search.search_ticket(config, by_channel, search.begin_search(state), Observer())
    shuffled = CONTROLS["shuffled"](by_channel, ticket)
    for block, layer, kind in (A, B):
        before, after = (kept_channels(network.masks[block][layer][kind]) for network in (ticket, shuffled))
        assert before.sum() == after.sum()
