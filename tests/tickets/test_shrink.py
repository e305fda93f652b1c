"""Smaller networks that compute the same as masked ones."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cs_jax import commands
from cs_jax.core import trees
from cs_jax.core.errors import ConfigError
from cs_jax.data.images import ImageSet
from cs_jax.layers.masked import MaskedConv, MaskedDense
from cs_jax.models import MODELS, VGG, BottleneckResNet, ConvNet, LeNet300100, ResNet, VisionTransformer
from cs_jax.models.multiply_adds import evaluation_mode, multiply_adds
from cs_jax.models.wiring import Signal, Wiring
from cs_jax.tickets import equivalence
from cs_jax.tickets.equivalence import outputs
from cs_jax.tickets.shrink import shrink
from cs_jax.tickets.ticket import load_ticket, save_ticket
from cs_jax.training import step
from cs_jax.training.compiled import compiled_step
from cs_jax.training.step import Hyperparams, Recipe

FAMILIES: dict[str, tuple[nn.Module, tuple[int, int, int]]] = {
    "lenet": (LeNet300100(num_classes=3), (3, 3, 1)),
    "conv": (ConvNet(num_classes=3, widths=(6,)), (4, 4, 2)),
    "resnet": (ResNet(num_classes=3, stage_sizes=(2, 1), widths=(4, 6)), (6, 6, 2)),
    "bottleneck": (BottleneckResNet(num_classes=3, stage_sizes=(2, 1), widths=(2, 3)), (12, 12, 2)),
    "vgg": (VGG(num_classes=3, stage_sizes=(1, 2), widths=(4, 6)), (4, 4, 2)),
    "transformer": (VisionTransformer(num_classes=3, depth=2, width=6, num_heads=3, patch_size=2), (4, 4, 2)),
}

VARIABLES: dict[str, dict[str, Any]] = {}
"""Fresh networks by family, in double precision."""


def fresh(family: str) -> dict[str, Any]:
    """A network in double precision whose biases and BatchNorm state are no longer those of the start."""
    if family not in VARIABLES:
        model, shape = FAMILIES[family]
        rng = np.random.default_rng(0)

        def moved(path: Any, leaf: jax.Array) -> np.ndarray:
            noise = 0.5 * rng.standard_normal(leaf.shape)
            if path[-1].key == "var":
                return np.exp(noise)
            return np.asarray(leaf, np.float64) + (noise if path[-1].key != "kernel" else 0)

        variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, *shape)), train=False))(jax.random.key(0))
        masks = jax.tree.map(lambda mask: np.asarray(mask, np.float64), variables["masks"])
        collections = {name: tree for name, tree in variables.items() if name != "masks"}
        VARIABLES[family] = {**jax.tree_util.tree_map_with_path(moved, collections), "masks": masks}
    return VARIABLES[family]


def masked(family: str, density: float, channels: float, inputs: float, seed: int) -> dict[str, Any]:
    """A network with random masks: of weights, of whole output channels and of whole input channels."""
    rng = np.random.default_rng(seed)

    def draw(mask: np.ndarray) -> np.ndarray:
        kept = rng.random(mask.shape) < density
        kept &= rng.random(mask.shape[-1]) < channels
        kept &= rng.random((mask.shape[-2], 1)) < inputs
        kept.flat[rng.integers(mask.size)] = True  # a layer without weights is refused
        return 2.5 * kept

    variables = fresh(family)
    return {**variables, "masks": jax.tree.map(draw, variables["masks"])}


def narrow(variables: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables)


@functools.cache
def compiled(model: nn.Module) -> Any:
    """An original network, which many cases share."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(functools.partial(model.apply, **evaluation_mode(model)), compiler_options=options)


PRECISIONS = ((lambda tree: tree, 1e-10), (narrow, 1e-5))
"""Casts from double precision, and tolerances relative to the largest output."""


def check_same(
    model: nn.Module,
    variables: Any,
    smaller: nn.Module,
    found: Any,
    shape: tuple[int, ...],
    precisions: Any = PRECISIONS,
) -> None:
    """Outputs of two networks agree for 32 images, in both precisions, and so does what they predict."""
    images = np.random.default_rng(1).standard_normal((32, *shape))
    for cast, tolerance in precisions:
        one = np.asarray(compiled(model)(cast(variables), cast(images)), np.float64)
        other = outputs(smaller, cast(found), cast(images))
        assert np.abs(one - other).max() <= tolerance * np.abs(one).max()
        margin = np.diff(np.sort(one, axis=1)[:, -2:]).ravel()
        assert (one.argmax(axis=1) == other.argmax(axis=1))[margin > tolerance * np.abs(one).max()].all()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are not compared before they are returned: the test does that better."""
    monkeypatch.setattr(equivalence, "check_same_outputs", lambda *networks, **messages: None)


@pytest.mark.slow
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    density=st.floats(0, 1),
    channels=st.sampled_from([1.0, 0.6, 0.2]),
    inputs=st.sampled_from([1.0, 0.6, 0.2]),
    seed=st.integers(0, 2**31),
)
def test_smaller_networks_compute_the_same_whatever_the_masks(
    x64: None, unchecked: None, family: str, density: float, channels: float, inputs: float, seed: int
) -> None:
    model, shape = FAMILIES[family]
    variables = masked(family, density, channels, inputs, seed)
    smaller, found = shrink(model, variables, shape)
    precisions = PRECISIONS if seed % 4 == 0 else PRECISIONS[:1]  # each needs a compilation of about a second
    check_same(model, variables, smaller, found, shape, precisions)
    assert multiply_adds(smaller, shape) <= multiply_adds(model, shape)


def edited(variables: Any, **changes: Any) -> Any:
    """Variables with other arrays, by their path with `__` for `/`."""
    flat = {trees.name(path): np.array(leaf) for path, leaf in trees.leaves_by_path(variables).items()}
    for name, change in changes.items():
        change(flat[name.replace("__", "/")])
    return trees.nest({tuple(name.split("/")): leaf for name, leaf in flat.items()})


def zero(*index: Any) -> Any:
    def change(array: np.ndarray) -> None:
        array[index] = 0

    return change


def test_units_that_are_constant_or_not_read_go_and_leave_their_constants_in_the_bias(x64: None) -> None:
    model, shape = FAMILIES["lenet"]
    variables = edited(
        fresh("lenet"),
        masks__hidden0__kernel=zero(slice(None), slice(0, 7)),  # nothing flows into seven units
        masks__hidden1__kernel=zero(slice(7, 10)),  # three more are read by nobody
    )
    smaller, found = shrink(model, variables, shape)
    assert dict(smaller.features) == {"hidden0": 290}
    bias = variables["params"]["hidden0"]["bias"][:7]
    folded = np.maximum(bias, 0) @ variables["params"]["hidden1"]["kernel"][:7]
    np.testing.assert_allclose(
        found["params"]["hidden1"]["bias"], variables["params"]["hidden1"]["bias"] + folded, rtol=0, atol=1e-14
    )
    np.testing.assert_array_equal(
        found["params"]["hidden0"]["kernel"], variables["params"]["hidden0"]["kernel"][:, 10:]
    )
    check_same(model, variables, smaller, found, shape)


def test_constant_channels_before_a_padded_convolution_become_one_of_them(x64: None) -> None:
    model, shape = FAMILIES["vgg"]

    def biases(array: np.ndarray) -> None:
        array[:5] = (2, -1, 3, 1, 0.5)  # of constants behind the ReLU 3 are above 0, one is 0

    variables = edited(
        fresh("vgg"), masks__stage2_conv1__kernel=zero(..., slice(0, 4)), params__stage2_bn1__bias=biases
    )
    for kind in ("mean", "var"):
        variables["batch_stats"]["stage2_bn1"][kind][:4] = 0
    smaller, found = shrink(model, variables, shape)
    assert dict(smaller.features) == {"stage2_conv1": 3}  # two that vary, and the largest constant
    kernel = variables["params"]["stage2_conv2"]["kernel"]
    merged = (2 * kernel[:, :, 0] + 3 * kernel[:, :, 2] + 1 * kernel[:, :, 3]) / 3
    np.testing.assert_allclose(found["params"]["stage2_conv2"]["kernel"][:, :, 0], merged, rtol=0, atol=1e-14)
    check_same(model, variables, smaller, found, shape)


@pytest.mark.slow
def test_channels_of_a_residual_sum_go_only_together(x64: None) -> None:
    model, shape = FAMILIES["resnet"]
    inner = edited(fresh("resnet"), masks__stage1_block2__conv_b__kernel=zero(slice(None), slice(None), slice(0, 3)))
    smaller, found = shrink(model, inner, shape)
    assert dict(smaller.features) == {"stage1_block2/conv_a": 1}
    check_same(model, inner, smaller, found, shape)
    outer = edited(fresh("resnet"), masks__stage1_block2__conv_b__kernel=zero(..., slice(0, 3)))
    assert shrink(model, outer, shape)[0] is model  # the shortcut still has them


@pytest.mark.slow
def test_a_head_whose_values_are_constant_goes_into_the_bias(x64: None) -> None:
    model, shape = FAMILIES["transformer"]
    variables = edited(fresh("transformer"), masks__block1__value__kernel=zero(slice(None), 1))
    smaller, found = shrink(model, variables, shape)
    assert dict(smaller.features) == {"block1": 2}
    assert found["params"]["block1"]["query"]["kernel"].shape == (6, 2, 2)
    check_same(model, variables, smaller, found, shape)


def test_a_network_without_such_channels_is_returned_as_it_is() -> None:
    model, shape = FAMILIES["vgg"]
    variables = narrow(fresh("vgg"))
    same, found = shrink(model, variables, shape)
    assert same is model and found["params"] is variables["params"]


def test_a_smaller_network_is_trained_on(x64: None) -> None:
    model, shape = FAMILIES["vgg"]
    smaller, found = shrink(model, masked("vgg", 1.0, 0.6, 1.0, 0), shape)
    recipe = Recipe(smaller)
    state = step.init_state(recipe, found["params"], found["batch_stats"], scores={}, masks=found["masks"])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, *shape)).astype(np.uint8)
    data = ImageSet(jnp.asarray(images), jnp.arange(6, dtype=jnp.int32) % 3, mean=jnp.zeros(2), std=jnp.full(2, 64.0))
    hyper = Hyperparams(*(jnp.asarray(value, float) for value in (1.0, 0.0, 0.5, 0.0, 0.0)))
    losses = []
    for _ in range(12):
        state, metrics = compiled_step(recipe, state, step.StepInputs(data, np.arange(6), jax.random.key(0), hyper))
        losses.append(float(metrics.loss))
    assert smaller != model and losses[-1] < 0.5 * losses[0], losses


class Mine(nn.Module):
    """A network of a user's own, told rightly or in one of several wrong ways."""

    hidden: int = 5
    told: str = "rightly"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(MaskedConv(self.hidden, (3, 3), name="conv")(x))
        x = MaskedConv(2, (3, 3), name="last_conv")(x)
        return nn.Dense(3, name="classifier")(x.mean(axis=(1, 2)))

    def wire(self, net: Wiring, x: Signal) -> Signal:
        x = net.activation(net.conv(x, "convs" if self.told == "unknown" else "conv", zero_padded=True), nn.relu)
        if self.told == "twice":
            x = net.conv(x, "conv", zero_padded=True)
        x = net.conv(x, "last_conv", zero_padded=self.told != "unpadded")
        return x if self.told == "partly" else net.dense(net.pool(x), "classifier")

    def resize(self, features: dict[str, int]) -> "Mine":
        return self.clone(hidden=7 if self.told == "other sizes" else features["conv"])


def mine() -> dict[str, Any]:
    variables = nn.unbox(Mine().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2))))

    def biases(array: np.ndarray) -> None:
        array[:] = (1, 2, 0, 0, -1)

    return edited(variables, masks__conv__kernel=zero(..., slice(0, 2)), params__conv__bias=biases)


def test_a_network_of_ones_own_tells_how_it_is_wired() -> None:
    smaller, found = shrink(Mine(), mine(), (4, 4, 2))
    assert smaller == Mine(hidden=4) and found["params"]["conv"]["kernel"].shape == (3, 3, 2, 4)


@pytest.mark.parametrize(
    "told, message",
    [
        ("unpadded", "wiring of Mine is wrong: .*: outputs differ by"),
        ("partly", "wiring: misses 'classifier/bias'; name every layer in `wire`"),
        ("unknown", "wiring of layer 'convs': no such layer in the params"),
        ("twice", "wiring of layer 'conv': named twice; name each layer once in `wire`"),
        ("other sizes", "`resize` of Mine does not fit its wiring: "),
    ],
)
def test_a_wrong_wiring_is_refused(told: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shrink(Mine(told=told), mine(), (4, 4, 2))


def test_a_network_that_does_not_tell_is_refused() -> None:
    model = nn.Sequential([MaskedDense(3), nn.Dense(2)])
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    complaint = "model Sequential: does not declare its wiring; add methods `wire` and `resize`"
    with pytest.raises(TypeError, match=complaint):
        shrink(model, variables, (4,))


def test_a_layer_without_weights_is_refused_by_name() -> None:
    model, shape = FAMILIES["conv"]
    variables = edited(narrow(fresh("conv")), masks__hidden0__kernel=zero(...))
    with pytest.raises(ConfigError, match="^layer 'hidden0': its mask keeps no weight; must keep at least one$"):
        shrink(model, variables, shape)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model, shape = FAMILIES["conv"]

    def broken(array: np.ndarray) -> None:
        array[0, 0] = np.nan

    variables = edited(narrow(fresh("conv")), params__hidden0__kernel=broken)
    with pytest.raises(ConfigError, match="^params/hidden0/kernel: entries must be finite$"):
        shrink(model, variables, shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_in_few_bits_are_folded_to_these(dtype: Any) -> None:
    model, shape = FAMILIES["lenet"]
    variables = edited(fresh("lenet"), masks__hidden0__kernel=zero(slice(None), slice(0, 7)))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
    smaller, found = shrink(model, variables, shape)
    assert dict(smaller.features) == {"hidden0": 293} and found["params"]["hidden1"]["bias"].dtype == dtype


# The command.


def ticket_of(path: Path, **model: Any) -> Path:
    """A ticket of random weights, half of whose first hidden units nothing flows into."""
    network = LeNet300100(num_classes=10)
    variables = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    variables = edited(variables, masks__hidden0__kernel=zero(..., slice(0, 150)))
    about = {"name": "lenet300100", "num_classes": 10, "image_shape": [4, 4, 1], **model}
    save_ticket(path, **variables, batch_stats={}, metadata={"model": about, "accuracy": {"test": 0.5}})
    return path


def test_the_command_writes_a_smaller_ticket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ticket_of(tmp_path / "ticket.safetensors")
    assert commands.main(["shrink", str(path)]) == 0
    shown = capsys.readouterr().out.split()
    assert {"hidden0", "300", "150", "50.0%"} <= set(shown)
    one, other = load_ticket(path), load_ticket(tmp_path / "ticket-shrunk.safetensors")
    assert other.metadata["model"]["features"] == {"hidden0": 150} and other.metadata["accuracy"] == {"test": 0.5}
    images = jax.random.normal(jax.random.key(1), (8, 4, 4, 1))
    assert one.model is not None and other.model is not None
    wanted, got = (outputs(ticket.model, ticket.variables, images) for ticket in (one, other))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert commands.main(["shrink", str(tmp_path / "ticket-shrunk.safetensors"), "--out", str(tmp_path / "b")]) == 0
    again = load_ticket(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, again.variables, other.variables)  # there is nothing left to take out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.write_bytes(b"no ticket"), "ticket.safetensors: not a ticket file: 9 bytes, "),
        (lambda path: path.unlink(), "ticket.safetensors: cannot be read: No such file"),
        (
            lambda path: ticket_of(path, name=None),
            "ticket has a custom model; this command supports cs_jax.models only",
        ),
    ],
)
def test_the_command_refuses_what_it_cannot_shrink(
    change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ticket_of(tmp_path / "ticket.safetensors")
    change(path)
    before = sorted(tmp_path.iterdir())
    assert commands.main(["shrink", str(path)]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_the_command_does_not_replace_the_ticket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ticket_of(tmp_path / "ticket.safetensors")
    before = path.read_bytes()
    assert commands.main(["shrink", str(path), "--out", str(path)]) == 2
    assert "must not overwrite the ticket" in capsys.readouterr().err and path.read_bytes() == before


@pytest.mark.parametrize(
    "features, message",
    [
        ({"hidden0": 299}, r"array 'masks/hidden0/kernel' \(16, 300\) floats: must be \(16, 299\) floats"),
        ({"hidden7": 3}, "metadata: model.features 'hidden7': must be a layer of the ticket"),
        ({"hidden0": 0}, "metadata: model.features.hidden0 0: must be a whole number >= 1"),
    ],
)
def test_a_ticket_with_other_features_than_it_says_is_refused(
    features: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        ticket_of(tmp_path / "ticket.safetensors", features=features)


class Unwired(nn.Module):
    """A network that does not say how it is wired."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes)(MaskedDense(3)(x.reshape(x.shape[0], -1)))


@pytest.mark.parametrize("command", ["shrink", "speed"])
def test_a_ticket_of_a_network_that_does_not_tell_is_refused_in_a_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "unwired", Unwired)
    variables = Unwired(2).init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    about = {"name": "unwired", "num_classes": 2, "image_shape": [4, 4, 1]}
    save_ticket(tmp_path / "ticket", **variables, batch_stats={}, metadata={"model": about})
    assert commands.main([command, str(tmp_path / "ticket")]) == 2
    shown = capsys.readouterr().err
    assert "ticket: model Unwired: does not declare its wiring; add methods `wire` and `resize`" in shown
    assert shown.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["ticket"]


def test_a_ticket_that_was_shrunk_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, smaller = ticket_of(tmp_path / "ticket.safetensors"), tmp_path / "smaller.safetensors"
    assert commands.main(["shrink", str(path), "--out", str(smaller)]) == 0
    for file, says in ((path, False), (smaller, True)):
        capsys.readouterr()
        assert commands.main(["ticket", str(file)]) == 0
        assert ("hidden0 150" in capsys.readouterr().out) is says
        assert commands.main(["speed", str(file), "--batch-sizes", "1", "--repeats", "1"]) == 0
        assert ("the ticket is already shrunk: dense means the shrunk network" in capsys.readouterr().out) is says


@pytest.mark.parametrize("words", [["ticket"], ["export", "--to", "sparse"]])
def test_a_ticket_that_was_shrunk_is_compared_with_the_network_that_nothing_was_taken_out_of(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, smaller = ticket_of(tmp_path / "ticket.safetensors"), tmp_path / "smaller.safetensors"
    assert commands.main(["shrink", str(path), "--out", str(smaller)]) == 0
    capsys.readouterr()
    assert commands.main([words[0], str(smaller), *words[1:]]) == 0
    file = smaller if words == ["ticket"] else smaller.with_suffix(".npz")
    size, dense = file.stat().st_size, 4 * (16 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{size:,} bytes, {size / dense:.1%} of the dense weights ({dense:,} bytes)" in shown


def test_the_command_says_what_a_ticket_that_was_shrunk_before_is_compared_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ticket_of(tmp_path / "ticket.safetensors")
    for file, out, before, share in (("ticket", "b", "300", "50.0%"), ("b", "c", "150", "50.0%")):
        source = path if file == "ticket" else tmp_path / file
        assert commands.main(["shrink", str(source), "--out", str(tmp_path / out)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["dense", "before", "after", "of", "dense"] in lines
        assert ["hidden0", "300", before, "150", share] in lines
