"""Ticket files: round trips, equal bytes, sizes, and refused files."""

import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mutate_ticket
import numpy as np
import pytest
import safetensors.numpy
import small
from flax import linen as nn
from rich.console import Console

from cs_jax.core import masks as masks_module
from cs_jax.core import trees
from cs_jax.core.errors import ConfigError
from cs_jax.layers.masked import MaskedDense
from cs_jax.models import MODELS
from cs_jax.tickets import describe
from cs_jax.tickets.ticket import TicketError, load_ticket, save_ticket

DOCS = Path(__file__).parents[2] / "docs" / "tickets" / "tickets.md"

FLOATS = (np.float16, jnp.bfloat16, np.float32, np.float64)


def network(dtype: Any = np.float32) -> Any:
    """Arguments of `save_ticket` for 15 masked weights of which 5 are kept, with odd values among all weights."""
    odd = np.array([-0.0, np.nan, np.inf, -np.inf, float(jnp.finfo(dtype).smallest_subnormal)]).astype(dtype)
    kernel = np.resize(odd, (5, 3))
    mask = (np.arange(15).reshape(5, 3) % 3 == 1).astype(dtype) * np.asarray(2, dtype)
    return {
        "params": {"dense": {"kernel": kernel, "bias": odd[:3]}},
        "batch_stats": {"norm": {"mean": odd}},
        "masks": {"dense": {"kernel": mask}},
        "rewound": {"params": {"dense": {"kernel": -kernel, "bias": odd[2:]}}, "batch_stats": {"norm": {"mean": -odd}}},
        "metadata": {"dataset": "digits"},
    }


def without_rewound(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"rewound": None}


def bits_of(tree: Any) -> Any:
    """Leaves by path as dtype, shape and bytes, to compare NaNs and signs of zero too."""
    leaves = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), str(a.dtype), a.shape, np.asarray(a).tobytes()) for path, a in leaves]


def one_line(caught: pytest.ExceptionInfo[BaseException], path: Path) -> str:
    """Message of a TicketError without the file's name."""
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def refusal(path: Path, **flags: Any) -> str:
    with pytest.raises(TicketError) as caught:
        load_ticket(path, **flags)
    return one_line(caught, path)


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of two networks in both forms."""
    return mutate_ticket.write_tickets(tmp_path_factory.mktemp("tickets"))


# Round trips.


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_comes_back(tmp_path: Path, dtype: Any, compact: bool) -> None:
    content = network(dtype)
    save_ticket(tmp_path / "t", **content, compact=compact)
    loaded = load_ticket(tmp_path / "t")
    mask = content["masks"]["dense"]["kernel"]
    trained = jax.tree.map(np.copy, content["params"])
    trained["dense"]["kernel"][mask == 0] = 0
    expected = {"params": trained, "batch_stats": content["batch_stats"], "masks": content["masks"]}
    assert bits_of(loaded.variables) == bits_of(expected)
    assert (loaded.rewound is None) if compact else (bits_of(loaded.rewound) == bits_of(content["rewound"]))
    assert loaded.density == 1 / 3 and loaded.model is None


def test_arrays_of_64_bits_stay_numpys_where_jax_would_narrow_them(tmp_path: Path) -> None:
    content = network(np.float64) | {"batch_stats": {"count": np.array(2**40)}}
    content["rewound"]["batch_stats"] = {"count": np.array(0)}
    save_ticket(tmp_path / "t", **content)
    variables = load_ticket(tmp_path / "t").variables
    assert isinstance(variables["masks"]["dense"]["kernel"], np.ndarray)
    assert variables["batch_stats"]["count"] == 2**40
    with jax.enable_x64(True):
        assert isinstance(load_ticket(tmp_path / "t").variables["masks"]["dense"]["kernel"], jax.Array)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name, shape", [("lenet300100", (8, 8, 1)), ("resnet6", (8, 6, 3))])
def test_a_loaded_model_gives_the_logits_of_the_saved_one(tmp_path: Path, name: str, shape: Any, compact: bool) -> None:
    model, variables = MODELS[name](num_classes=10), mutate_ticket.random_variables(name, shape, density=0.1)
    save_model(tmp_path / "t", name, shape, variables, compact=compact)
    loaded = load_ticket(tmp_path / "t")
    images = jax.random.normal(jax.random.key(2), (3, *shape))
    assert loaded.model == model and set(loaded.variables) == {"params", "batch_stats", "masks"}
    apply = jax.jit(functools.partial(model.apply, train=False))
    np.testing.assert_array_equal(apply(loaded.variables, images), apply(variables, images))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.variables))


def save_model(path: Path, name: str, shape: tuple[int, ...], variables: dict[str, Any], **flags: Any) -> None:
    about = {
        "model": {"name": name, "num_classes": 10, "image_shape": shape},
        "config": {
            "dataset": "cifar10",
            "lr": 0.1,
            "lr_schedule": (56, 71),
            "val_set_size": 5000,
            "allow_empty_layers": False,
        },
        "dataset": "cifar10",
        "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        "normalization": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]},
        "accuracy": {"val": 0.9, "test": 0.9},
        "versions": {"cs_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.7"},
    }
    save_ticket(path, **variables, metadata=about, **flags)


def test_a_compact_resnet20_at_density_5_percent_takes_at_most_12_percent(tmp_path: Path) -> None:
    variables = mutate_ticket.random_variables("resnet20", (32, 32, 3), density=0.0505)
    save_model(tmp_path / "t", "resnet20", (32, 32, 3), variables, compact=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 272_282
    assert (tmp_path / "t").stat().st_size <= 0.12 * 4 * 272_282
    save_model(tmp_path / "full", "resnet20", (32, 32, 3), variables)
    assert load_ticket(tmp_path / "t").density > 0.05
    assert bits_of(load_ticket(tmp_path / "t").variables) == bits_of(load_ticket(tmp_path / "full").variables)


def test_masks_without_axes_and_without_entries_come_back(tmp_path: Path) -> None:
    shapes = {"on": (), "off": (), "none": (0, 3), "full": (2, 4)}
    weights = {name: np.full(shape, 3, np.float32) for name, shape in shapes.items()}
    hard = {"on": 1.5, "off": 0.0, "none": 1.5, "full": 1.5}
    masks = {name: np.full(weights[name].shape, value, np.float32) for name, value in hard.items()}
    for compact in (False, True):
        save_ticket(tmp_path / "t", params=weights, batch_stats={}, masks=masks, metadata={}, compact=compact)
        loaded = load_ticket(tmp_path / "t").variables
        assert bits_of(loaded["masks"]) == bits_of(masks)
        assert loaded["params"]["on"] == 3 and loaded["params"]["off"] == 0 and loaded["params"]["none"].shape == (0, 3)


@pytest.mark.parametrize("init_value", [0.0, -0.03, 0.3, -4.0])
def test_a_scale_of_hard_masks_comes_back_in_every_dtype_beside_the_others(tmp_path: Path, init_value: float) -> None:
    dtypes = dict(zip("abc", (jnp.bfloat16, np.float16, np.float32), strict=True))
    scores = {name: np.array([-1, 1], dtype) for name, dtype in dtypes.items()}
    masks = masks_module.hard_mask(scores, init_value=jnp.float32(init_value))
    save_ticket(tmp_path / "t", params=scores, batch_stats={}, masks=masks, metadata={})
    loaded = load_ticket(tmp_path / "t")
    assert bits_of(loaded.variables["masks"]) == bits_of(masks)
    assert loaded.metadata["mask_scale"] == float(masks["c"][1])


def test_empty_masks_take_their_scale_from_the_metadata(tmp_path: Path) -> None:
    save_ticket(tmp_path / "t", **(with_mask(np.zeros((5, 3), np.float32)) | {"metadata": {"mask_scale": 2}}))
    loaded = load_ticket(tmp_path / "t")
    assert loaded.density == 0 and loaded.metadata["mask_scale"] == 2.0
    assert not loaded.variables["params"]["dense"]["kernel"].any()


def test_what_is_given_as_metadata_comes_back_beside_what_is_written(tmp_path: Path) -> None:
    given = {"config": {"lr": 0.1, "lr_schedule": (1, 2)}, "classes": ["ä", "猫"], "note": [None, True, {"deep": []}]}
    save_ticket(tmp_path / "t", **(network() | {"metadata": given}))
    found = load_ticket(tmp_path / "t").metadata
    written = {"format": 1, "form": "full", "mask_scale": 2.0, "density": 1 / 3, "sha256": found["sha256"]}
    layers = {"dense/kernel": {"density": 1 / 3, "shape": [5, 3]}}
    assert found == json.loads(json.dumps(given)) | written | {"layers": layers}


def test_a_loaded_ticket_is_saved_again_to_the_same_bytes_and_in_the_other_form(tickets: list[Path]) -> None:
    full, compact = tickets[:2]
    loaded = load_ticket(full)
    again = full.with_name("again")
    save_ticket(again, **loaded.variables, rewound=loaded.rewound, metadata=loaded.metadata)
    assert again.read_bytes() == full.read_bytes()
    save_ticket(again, **loaded.variables, metadata=loaded.metadata, compact=True)
    assert again.read_bytes() == compact.read_bytes()


# The file.


def test_the_metadata_are_one_sorted_and_compact_json_text(tmp_path: Path) -> None:
    save_ticket(tmp_path / "t", **network())
    with safetensors.safe_open(tmp_path / "t", framework="np") as file:
        metadata = file.metadata()
        names = sorted(file.keys())
    about = json.loads(metadata["cs_jax"])
    assert set(metadata) == {"cs_jax"} and mutate_ticket.compact_json(about) == metadata["cs_jax"]
    trained = ["batch_stats/norm/mean", "masks/dense/kernel", "params/dense/bias", "params/dense/kernel"]
    rewound = ["rewound/batch_stats/norm/mean", "rewound/params/dense/bias", "rewound/params/dense/kernel"]
    assert names == trained + rewound


def test_the_hash_is_the_documented_one(tickets: list[Path]) -> None:
    for path in tickets:
        parts = mutate_ticket.Parts.of(path.read_bytes())
        assert parts.about["sha256"] == mutate_ticket.content_hash(parts)


def test_equal_content_gives_equal_bytes_whatever_its_order_and_place(tmp_path: Path) -> None:
    content = network()
    save_ticket(tmp_path / "a", **content)
    backwards = {name: reversed_keys(value) for name, value in reversed(content.items())}
    backwards["params"] = jax.tree.map(jnp.asarray, backwards["params"])
    (tmp_path / "folder").mkdir()
    save_ticket(tmp_path / "folder" / "b", **backwards)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "folder" / "b").read_bytes()


def reversed_keys(tree: Any) -> Any:
    return {key: reversed_keys(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree


@pytest.mark.slow
def test_equal_content_gives_equal_bytes_in_every_process(tmp_path: Path) -> None:
    program = "import mutate_ticket, pathlib, sys; mutate_ticket.write_tickets(pathlib.Path(sys.argv[1]))"
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", program, str(tmp_path / seed)]
        subprocess.run(command, env=environment, cwd=Path(__file__).parents[1] / "helpers", check=True)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_a_file_that_cannot_be_written_leaves_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_ticket(path, **network())
    before = path.read_bytes()
    with pytest.raises(OSError), small.largest_file(100):
        save_ticket(path, **network(np.float64))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_the_file_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(OSError):
        save_ticket(tmp_path / "t", **network())
    assert list(tmp_path.iterdir()) == [tmp_path / "t"]


# Errors of saving.

KERNEL = np.ones((5, 3), np.float32)


def with_params(params: Any) -> Any:
    return without_rewound(network()) | {"params": params}


def with_mask(mask: Any) -> Any:
    return without_rewound(network()) | {"masks": {"dense": {"kernel": mask}}}


def with_metadata(**metadata: Any) -> dict[str, Any]:
    return network() | {"metadata": metadata}


def with_model(**model: Any) -> dict[str, Any]:
    return with_metadata(model={"name": "lenet300100", "num_classes": 10, "image_shape": [8, 8, 1]} | model)


@pytest.mark.parametrize(
    "content, message",
    [
        (with_params([KERNEL]), "^params of type list: must be nested dictionaries of arrays$"),
        (with_params({"dense": {"kernel": 1.0}}), "^params/dense/kernel of type float: must be nested dictionaries"),
        (
            with_params({"dense": {"kernel": KERNEL.astype(complex)}}),
            "^params/dense/kernel of dtype complex128: must be one of float16, ",
        ),
        (with_params({"dense": {"kernel": KERNEL.astype(">f4")}}), "^params/dense/kernel of dtype >f4: must be one of"),
        (
            with_params({"dense": {"kernel": jax.random.key(0)}}),
            "^params/dense/kernel of dtype key<fry>: must be one of",
        ),
        (with_params({"dense": {0: KERNEL}}), "^params/dense: key 0: must be text without '/'$"),
        (with_params({"a/b": KERNEL}), "^params: key 'a/b': must be text without '/'$"),
        (
            with_params({"dense": {"kernel": KERNEL}, "..": KERNEL}),
            r"^array 'params/\.\.': name must be a path of dictionary keys below params, ",
        ),
        (with_params({"dense": {"kernel": KERNEL}, "": KERNEL}), "^array 'params/': name must be a path"),
        (with_params({"dense": {"kernel": KERNEL}, "a\0": KERNEL}), r"^array 'params/a\\x00': name must be a path"),
        (
            with_params({"dense": {"bias": KERNEL}}),
            "^masks/dense/kernel: has no weights; params must have an array of the same path$",
        ),
        (
            with_params({"dense": {"kernel": KERNEL.T}}),
            r"^masks/dense/kernel of shape \(5, 3\) and dtype float32: must have shape \(3, 5\)",
        ),
        (
            with_mask(KERNEL.astype(np.float16)),
            "^masks/dense/kernel of shape .* and dtype float16: must have .* dtype float32, like its weights$",
        ),
        (
            with_mask(KERNEL.cumsum(0)),
            "^masks/dense/kernel: entry 2.0: must be 0 or one finite scale above 0, here 1.0$",
        ),
        (with_mask(-KERNEL), "^masks/dense/kernel: entry -1.0: must be 0 or one finite scale above 0"),
        (with_mask(KERNEL * np.nan), "^masks/dense/kernel: entry nan: must be"),
        (with_mask(0 * KERNEL), "^metadata: mask_scale: missing; required because no mask keeps a weight$"),
        (without_rewound(network()) | {"masks": {}}, "^metadata: mask_scale: missing"),
        (with_metadata(mask_scale=2) | {"masks": {}, "rewound": None}, "^masks: empty; must have at least one entry$"),
        (with_metadata(mask_scale=3), "^metadata: mask_scale 3: must be 2.0, as in the masks$"),
        (with_metadata(mask_scale=float("inf")), "^metadata: mask_scale inf: must be a finite number$"),
        (with_metadata(mask_scale="2"), "^metadata: mask_scale '2': must be a number"),
        (
            with_metadata(note=np.float32(1)),
            "^metadata: note .*1.0.*: must be JSON: text, finite number, true, false, null, list or dictionary$",
        ),
        (with_metadata(note={"path": Path("/")}), "^metadata: note.path PosixPath.*: must be JSON"),
        (with_metadata(note={1: 2}), "^metadata: note: key 1: must be text$"),
        (with_metadata(note=mutate_ticket.nested(100)), "^metadata: note.a: nested deeper than 16 levels$"),
        (
            with_metadata(note="x" * 3_000_000),
            "^7 arrays and 3,000,[0-9]+ bytes .*: must be fewer than 8,192 arrays and at most 2,097,152 bytes$",
        ),
        (with_metadata(accuracy={"test": 97.0}), "^metadata: accuracy.test 97.0: must be a number <= 1.0$"),
        (with_metadata(classes="0123"), "^metadata: classes '0123': must be a list"),
        (with_metadata(normalization={"mean": None}), "^metadata: normalization.mean None: must be a list$"),
        (with_model(name="lenet"), r"^metadata: model.name 'lenet': must be one of .*did you mean resnet8\?"),
        (
            with_model(image_shape=None),
            "^metadata: model .*: a model with a name must have num_classes and image_shape",
        ),
        (with_model(num_classes=10**9), "^metadata: model.num_classes 1000000000: must be a whole number <= 1048576$"),
        (with_model(depth=3), "^metadata: model.depth: unknown$"),
        (with_model(dtype="float16"), "^metadata: model.dtype 'float16': must be one of float32, bfloat16$"),
        (with_model(), r"^array 'batch_stats/norm/mean' \(5,\) floats: unknown; model lenet300100 has no such array$"),
        (network() | {"metadata": None}, "^metadata of type NoneType: must be a dictionary$"),
        (network() | {"rewound": {"params": {}}}, "^rewound .*: must have the keys params and batch_stats only$"),
        (
            network() | {"rewound": {"params": network()["params"], "batch_stats": {}}},
            r"^rewound array 'batch_stats/norm/mean': missing; the trained network has \(5,\) float32$",
        ),
        (
            network() | {"rewound": network(np.float64)["rewound"]},
            r"^rewound array 'batch_stats/norm/mean' \(5,\) float64: must be \(5,\) float32, as in the trained",
        ),
    ],
)
def test_what_cannot_be_a_ticket_is_not_written(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        save_ticket(tmp_path / "t", **content)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


# Errors of loading.


def a_folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.touch()


def some_text(path: Path) -> None:
    path.write_text("no ticket, but some other file that is lying about")


def exported(path: Path) -> None:
    safetensors.numpy.save_file({"conv0.weight": np.ones(3)}, path, {"format": "pt", "cs_jax": "{}"})


def weights_of_another_library(path: Path) -> None:
    safetensors.numpy.save_file({"weight": np.ones(3)}, path, {"format": "pt"})


def a_ticket_of_a_later_format(path: Path) -> None:
    change(path, lambda parts: parts.about.update(format=2))


def one_bit_lost(path: Path) -> None:
    save_ticket(path, **network())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    save_ticket(path, **network())
    path.write_bytes(path.read_bytes()[:-1])


def a_bit_moved_behind_the_last(path: Path) -> None:
    def move(parts: mutate_ticket.Parts) -> None:
        mask = np.frombuffer(parts.arrays["masks/dense/kernel"].data, np.uint8)
        parts.arrays["masks/dense/kernel"] = mutate_ticket.Array(
            "U8", [2], (mask ^ np.array([64, 1], np.uint8)).tobytes()
        )

    change(path, move)


def an_array_of_many_axes(path: Path) -> None:
    def stretch(parts: mutate_ticket.Parts) -> None:
        parts.arrays["params/dense/bias"] = parts.arrays["params/dense/bias"]._replace(shape=[1] * 70 + [3])

    change(path, stretch)


def metadata_with_spaces(path: Path) -> None:
    save_ticket(path, **network())
    parts = mutate_ticket.Parts.of(path.read_bytes())
    header = parts.header() | {"__metadata__": {"cs_jax": json.dumps(parts.about)}}
    path.write_bytes(parts.with_header(json.dumps(header)))


def a_header_of_3_megabytes(path: Path) -> None:
    save_ticket(path, **network())
    parts = mutate_ticket.Parts.of(path.read_bytes())
    path.write_bytes(parts.with_header(json.dumps(parts.header()) + " " * 3_000_000))


def change(path: Path, edit: Callable[[mutate_ticket.Parts], Any]) -> None:
    """Ticket with a change and the matching hash."""
    save_ticket(path, **network())
    parts = mutate_ticket.Parts.of(path.read_bytes())
    edit(parts)
    path.write_bytes(parts.build())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "cannot be read: No such file or directory"),
        (a_folder, "is a folder or a device: must be a file"),
        (os.mkfifo, "is a folder or a device: must be a file"),
        (empty, "not a ticket file: 0 bytes, with a header of 0 bytes"),
        (some_text, r"not a ticket file: 50 bytes, with a header of [\d,]+ bytes"),
        (exported, "is an exported state dict, not a ticket; convert it with `python -m cs_jax import`"),
        (weights_of_another_library, "not a ticket file: the metadata key cs_jax is missing"),
        (a_ticket_of_a_later_format, "metadata: format 2: must be 1; later formats need a later cs_jax"),
        (a_bit_moved_behind_the_last, "mask 'dense/kernel': bits after the last entry must be 0"),
        (an_array_of_many_axes, "header: params/dense/bias.shape .*: must be a list of length <= 16"),
        (metadata_with_spaces, "metadata: JSON must be sorted and compact, as save_ticket writes it"),
        (a_header_of_3_megabytes, "not a ticket file: 3,[0-9,]+ bytes, with a header of 3,[0-9,]+ bytes"),
        (one_bit_lost, "content does not match its hash: the file is damaged"),
        (cut_off, "[0-9,]+ bytes: must be [0-9,]+; truncated or with extra bytes"),
    ],
)
def test_what_is_no_ticket_is_refused_in_one_line(tmp_path: Path, make: Callable, message: str) -> None:
    make(tmp_path / "t")
    assert re.match(message, refusal(tmp_path / "t"))


def test_a_file_that_must_not_be_read_is_refused(tmp_path: Path) -> None:
    save_ticket(tmp_path / "t", **network())
    (tmp_path / "t").chmod(0)
    if os.access(tmp_path / "t", os.R_OK):
        pytest.skip("this user may read every file")
    assert refusal(tmp_path / "t") == "cannot be read: Permission denied"


@pytest.mark.parametrize(
    "model, message",
    [
        (
            {"num_classes": 11},
            r"array 'params/classifier/bias' \(10,\) floats: must be \(11,\) floats, as in model lenet300100",
        ),
        ({"image_shape": [8, 8, 3]}, r"array 'masks/hidden0/kernel' \(64, 300\) floats: must be \(192, 300\) floats"),
        ({"name": "resnet6"}, r"array 'batch_stats/bn0/mean': missing; model resnet6 has \(32,\) floats"),
        (
            {"name": "gone"},
            "metadata: model.name 'gone': must be one of resnet20, resnet32, resnet56, resnet50, resnet8, resnet6, "
            "vgg16, conv2, conv4, conv6, vit_tiny, lenet300100",
        ),
        ({"image_shape": [10**5, 10**5, 1]}, "metadata: model .*: image_shape must have 1 to 268,435,456 entries"),
    ],
)
def test_a_ticket_for_another_model_is_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    variables = mutate_ticket.random_variables("lenet300100", (8, 8, 1), density=0.1)
    save_model(tmp_path / "t", "lenet300100", (8, 8, 1), variables)
    parts = mutate_ticket.Parts.of((tmp_path / "t").read_bytes())
    parts.about["model"].update(model)
    del parts.about["classes"]
    (tmp_path / "t").write_bytes(parts.build())
    assert re.match(message, refusal(tmp_path / "t"))


class Own(nn.Module):
    """Two layers, one masked, and a normalisation."""

    width: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = MaskedDense(self.width)(x)
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))


@pytest.mark.parametrize("metadata", [{}, {"model": None}, {"model": {"image_shape": [3]}}])
def test_a_model_of_ones_own_is_given_when_loading(tmp_path: Path, metadata: dict[str, Any]) -> None:
    x = jnp.arange(6.0).reshape(2, 3)
    variables = Own().init(jax.random.key(0), x, train=False)
    save_ticket(tmp_path / "t", **variables, metadata=metadata)
    loaded = load_ticket(tmp_path / "t", model=Own())
    assert loaded.model is not None and loaded.model == Own() and load_ticket(tmp_path / "t").model is None
    np.testing.assert_array_equal(
        loaded.model.apply(loaded.variables, x, train=False), Own().apply(variables, x, train=False)
    )


@pytest.mark.parametrize(
    "model, message",
    [
        (
            Own(width=5),
            r"array 'masks/MaskedDense_0/kernel' \(3, 4\) floats: must be \(3, 5\) floats, as in model Own",
        ),
        (
            nn.Sequential([nn.Dense(2)]),
            r"array 'batch_stats/BatchNorm_0/mean' \(2,\) floats: unknown; model Sequential has no such array",
        ),
        (nn.Conv(1, (3, 3, 3), (1, 1, 1)), "model Conv: does not accept images of shape"),
        (MODELS["resnet6"](), "model ResNet: does not accept images of shape"),
    ],
)
def test_another_model_than_the_tickets_is_refused(tmp_path: Path, model: nn.Module, message: str) -> None:
    variables = Own().init(jax.random.key(0), jnp.ones((1, 3)), train=False)
    save_ticket(tmp_path / "t", **variables, metadata={"model": {"image_shape": [3]}})
    assert re.match(message, refusal(tmp_path / "t", model=model))


@pytest.mark.parametrize("damage", [*mutate_ticket.BLIND, *mutate_ticket.CRAFTED], ids=lambda damage: damage.__name__)
def test_damaged_files_are_refused_in_one_line_or_load_to_what_they_were(
    tmp_path: Path, tickets: list[Path], damage: Callable
) -> None:
    for seed in range(8):
        original = tickets[seed % len(tickets)]
        (tmp_path / "damaged").write_bytes(damage(original.read_bytes(), np.random.default_rng(seed)))
        verdict = mutate_ticket.judge(tmp_path / "damaged", load_ticket(original))
        assert verdict.outcome == ("equal" if damage is mutate_ticket.laid_out_anew else "refused"), verdict


# Printed output, and the guide.


def printed(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # pyright: ignore


def test_a_ticket_is_described_with_its_layers(tickets: list[Path]) -> None:
    path = tickets[1]
    loaded = load_ticket(path)
    text = printed(describe.describe(loaded, file_size=path.stat().st_size))
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines()[:12])
    assert rows == {
        "model": "resnet6",
        "classes": "10",
        "images": "8×8×1",
        "data set": "digits",
        "accuracy": "val 95.00%",
        "density": f"{loaded.density:.2%} (3,773 of 74,016 maskable weights)",
        "mask scale": "2",
        "weights": "6,919 of 77,162, including 3,146 without a mask",
        "form": "compact",
        "versions": "cs_jax 0.1.0",
        "sha256": loaded.metadata["sha256"],
        "size": f"{path.stat().st_size:,} bytes, 13.8% of the dense weights (308,648 bytes)",
    }
    assert re.search(r"^  conv0/kernel\s+3×3×1×32\s+15 of 288\s+5\.21%$", text, re.MULTILINE)


def test_text_of_a_file_does_not_reach_the_terminal_as_control_sequences(tmp_path: Path) -> None:
    metadata = {"dataset": "\x1b[31m[bold]red\nline", "versions": {"\x07": "\ud800"}}
    save_ticket(tmp_path / "t", **(network() | {"metadata": metadata}))
    text = printed(describe.describe(load_ticket(tmp_path / "t")))
    assert r"\x1b[31m[bold]red\nline" in text and r"\x07 \ud800" in text
    assert "\x1b" not in text and "\x07" not in text


@pytest.mark.slow
def test_the_guide_runs_and_its_ten_lines_load_what_load_ticket_loads(
    tmp_path: Path, tickets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(block, namespace)
    loader = next(block for block in blocks if "safe_open" in block)
    for path in ("ticket.safetensors", "compact.safetensors", *map(str, tickets)):
        found: dict[str, Any] = {}
        exec(loader.replace("ticket.safetensors", path), found)
        loaded = load_ticket(path)
        expected = bits_of(loaded.variables) + bits_of({"rewound": loaded.rewound})
        nested = trees.nest({tuple(name.split("/")): array for name, array in found["arrays"].items()})
        rewound = nested.pop("rewound", None)
        assert bits_of(nested) + bits_of({"rewound": rewound}) == expected and found["about"] == loaded.metadata
