"""Damages ticket files in many ways; each must be refused in one line or load to its old content.

    python tests/helpers/mutate_ticket.py --files 1000

Every file is loaded in a child process, so that a crash is seen. The tests load fewer of them in their own process.
"""

import argparse
import contextlib
import gc
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax.models import MODELS
from cs_jax.tickets import ticket
from cs_jax.tickets.checks import COMPACT, FULL

MAX_SECONDS, MAX_MEGABYTES = 1.0, 200.0

Rng = np.random.Generator


class Verdict(NamedTuple):
    """Result of loading a damaged file."""

    outcome: str  # "refused", "equal", or an error
    seconds: float
    megabytes: float  # growth of the process's memory at its peak


# Good tickets, to start from.


def write_tickets(folder: Path) -> list[Path]:
    """Tickets in both forms: of a library network, and of a custom network whose masks end inside a byte."""
    paths = []
    for name, content in (("resnet6", resnet6()), ("own", own_network())):
        for form in (FULL, COMPACT):
            paths.append(folder / f"{name}-{form}.safetensors")
            ticket.save_ticket(paths[-1], **content, compact=form == COMPACT)
    return paths


def random_variables(name: str, image_shape: tuple[int, ...], density: float) -> dict[str, Any]:
    """Random weights and state of a library network, and masks of 0 and 2 with about the given density."""
    model, rng = MODELS[name](num_classes=10), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape))))
    noise = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32) + np.float32(0.1), dict(shapes))
    masks = jax.tree.map(lambda leaf: np.float32(2) * (leaf < 0.1 + density), noise["masks"])
    return {"params": noise["params"], "batch_stats": noise.get("batch_stats", {}), "masks": masks}


def resnet6() -> dict[str, Any]:
    """Arguments of `save_ticket` for a ResNet6 of 8x8 images with a density of about 5%."""
    variables = random_variables("resnet6", (8, 8, 1), density=0.05)
    trained = {collection: variables[collection] for collection in ("params", "batch_stats")}
    return variables | {
        "rewound": jax.tree.map(lambda leaf: leaf / 2, trained),
        "metadata": {
            "model": {"name": "resnet6", "num_classes": 10, "image_shape": [8, 8, 1]},
            "config": {"epochs": 15, "lr": 0.1, "target_density": None},
            "dataset": "digits",
            "classes": [str(digit) for digit in range(10)],
            "normalization": {"mean": [0.3], "std": [0.4]},
            "accuracy": {"val": 0.95, "test": None},
            "versions": {"cs_jax": "0.1.0"},
        },
    }


def own_network() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 3)).astype(np.float16)
    mask = np.float16(1.5) * (np.arange(15).reshape(5, 3) % 3 == 0)
    return {
        "params": {"dense": {"kernel": kernel, "bias": rng.normal(size=3)}},
        "batch_stats": {"count": np.array(7, np.int32)},
        "masks": {"dense": {"kernel": mask.astype(np.float16)}},
        "rewound": {
            "params": {"dense": {"kernel": -kernel, "bias": np.zeros(3)}},
            "batch_stats": {"count": np.array(0, np.int32)},
        },
        "metadata": {"config": None},
    }


# A file taken apart and put together, with a right hash.


class Array(NamedTuple):
    dtype: Any
    shape: Any
    data: bytes


@dataclass
class Parts:
    """Arrays and metadata of a file; `build` writes them without checks."""

    arrays: dict[str, Array]
    about: Any

    @classmethod
    def of(cls, content: bytes) -> "Parts":
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        about = json.loads(header.pop("__metadata__")["cs_jax"])
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            arrays[name] = Array(entry["dtype"], entry["shape"], content[start + begin : start + end])
        return cls(arrays, about)

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"cs_jax": compact_json(self.about)}}
        end = 0
        for name, array in self.arrays.items():
            begin, end = end, end + len(array.data)
            header[name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": [begin, end]}
        return header

    def build(self) -> bytes:
        if isinstance(self.about, dict):
            self.about["sha256"] = content_hash(self)
        return self.with_header(json.dumps(self.header()))

    def with_header(self, header: str) -> bytes:
        text = header.encode()
        return len(text).to_bytes(8, "little") + text + b"".join(array.data for array in self.arrays.values())


DTYPE_NAMES = {"F16": "float16", "F32": "float32", "F64": "float64", "U8": "uint8", "I32": "int32", "BOOL": "bool"}


def content_hash(parts: Parts) -> str:
    """The hash as docs/tickets/tickets.md describes it."""
    about = {key: value for key, value in parts.about.items() if key != "sha256"}
    names = sorted(parts.arrays)
    kinds = [[name, DTYPE_NAMES.get(str(parts.arrays[name].dtype), "?"), parts.arrays[name].shape] for name in names]
    digest = sha256(compact_json([about, kinds]).encode())
    for name in names:
        digest.update(parts.arrays[name].data)
    return digest.hexdigest()


def compact_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


# Damage. Blind: to the bytes, as of a bad disk.


def truncated(content: bytes, rng: Rng) -> bytes:
    return content[: rng.integers(len(content))]


def continued(content: bytes, rng: Rng) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 100)))


def with_bits_flipped(content: bytes, rng: Rng) -> bytes:
    return _flipped(content, rng.integers(0, len(content), rng.integers(1, 9)), rng)


def with_bits_of_the_header_flipped(content: bytes, rng: Rng) -> bytes:
    return _flipped(content, rng.integers(0, _start(content), rng.integers(1, 4)), rng)


def overwritten(content: bytes, rng: Rng) -> bytes:
    begin = rng.integers(len(content))
    return content[:begin] + rng.bytes(len(content[begin : begin + 64])) + content[begin + 64 :]


def with_a_piece_lost(content: bytes, rng: Rng) -> bytes:
    begin = rng.integers(len(content))
    return content[:begin] + content[begin + rng.integers(1, 100) :]


def with_header_overwritten(content: bytes, rng: Rng) -> bytes:
    begin = rng.integers(8, _start(content) - 1)
    letters = rng.choice(list('0123456789[]{}",:-.eE\\ '), rng.integers(1, 5))
    return content[:begin] + "".join(letters).encode() + content[begin + len(letters) :]


def with_another_header_length(content: bytes, rng: Rng) -> bytes:
    near = int(rng.integers(-9, 9)) + _start(content) - 8
    length = _any([0, 1, near, len(content) - 8, len(content), 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1], rng)
    return length.to_bytes(8, "little") + content[8:]


def random_bytes(content: bytes, rng: Rng) -> bytes:
    return rng.bytes(int(rng.integers(200)))


def laid_out_anew(content: bytes, rng: Rng) -> bytes:
    """The same ticket as written by other software: arrays in another order, a header with spaces."""
    parts = Parts.of(content)
    parts.arrays = {name: parts.arrays[name] for name in rng.permutation(list(parts.arrays))}
    return parts.build()


def _flipped(content: bytes, positions: np.ndarray, rng: Rng) -> bytes:
    changed = bytearray(content)
    for position in positions:
        changed[position] ^= 1 << rng.integers(8)
    return bytes(changed)


def _start(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


# Made to harm: the hash is right, the content is not. Every one of these must be refused.


def with_a_bad_name(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    bad = ["../kernel", "params/../kernel", "/etc/passwd", "params//kernel", "params/a\\b", "params/a\0b", "", "params"]
    bad += ["params/", "masks/new", "other/x", "params/line\nbreak", "rewound/x", "params/.", "params/\u202ekernel"]
    bad += ["params/" + "x" * 5000, f"{_any(parts.arrays, rng)}/more"]
    parts.arrays = _renamed(parts.arrays, _any(parts.arrays, rng), _any(bad, rng))
    return parts.build()


def with_an_array_inside_an_array(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    parent = _any([name for name in parts.arrays if name.startswith("batch_stats/")], rng)
    parts.arrays[parent + "/more"] = Array("F32", [], bytes(4))
    return parts.build()


def with_a_name_twice(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    name = _any(parts.arrays, rng)
    entry = json.dumps({name: parts.header()[name]})[1:-1]
    return parts.with_header(json.dumps(parts.header())[:-1] + ", " + entry + "}")


def with_another_dtype(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    name = _any(parts.arrays, rng)
    array = parts.arrays[name]
    others = ["BOOL", "C64", "F8_E4M3", "F4", "F64", "U8", "I32", "float32", 5, None, [], "Q" * 1000]
    others = [dtype for dtype in others if DTYPE_NAMES.get(str(dtype), "?") != DTYPE_NAMES[array.dtype]]
    parts.arrays[name] = array._replace(dtype=_any(others, rng))
    return parts.build()


def with_another_shape(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    name = _any(parts.arrays, rng)
    array = parts.arrays[name]
    shape = list(array.shape)
    others: list[Any] = [[-1], [2**62], [2**62, 0], [0, 2**63, 2**63], [*shape, 2], [*[1] * 70, *shape], [1.0], [True]]
    others += [["3"], None, 7, [[*shape]], [2**64], [1, 10**30], [*shape, -1, -1], [0], {}, [10**9, 10**9]]
    parts.arrays[name] = array._replace(shape=_any([other for other in others if other != shape], rng))
    return parts.build()


def with_an_axis_more(content: bytes, rng: Rng) -> bytes:
    """The same entries in another shape: detectable only from other arrays, the metadata or the model."""
    parts = Parts.of(content)
    name = _any([name for name in parts.arrays if not _is_free(name, parts)], rng)
    array = parts.arrays[name]
    parts.arrays[name] = array._replace(shape=[1, *array.shape])
    return parts.build()


def _is_free(name: str, parts: Parts) -> bool:
    """True if nothing determines an array's shape: in a compact file of an unnamed network."""
    masked = any(name.endswith("/" + layer) for layer in parts.about["layers"])
    return "model" not in parts.about and parts.about["form"] == COMPACT and not masked


def with_other_offsets(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    header = parts.header()
    name = _any(parts.arrays, rng)
    begin, end = header[name]["data_offsets"]
    others = [[0, 2**64 - 1], [begin + 1, end + 1], [end, begin], [begin], [begin, end, end], [-1, end - begin - 1]]
    others += [None, "0,4", [float(begin), end], [begin, end + 10**12], [2**70, 2**70 + end - begin]]
    header[name]["data_offsets"] = _any([other for other in others if other != [begin, end]], rng)
    return parts.with_header(json.dumps(header))


def with_an_array_lost(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    del parts.arrays[_any([name for name in parts.arrays if not _is_free(name, parts)], rng)]
    return parts.build()


def with_an_array_too_many(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    name = _any([f"{group}/x" for group in ("masks", "rewound/params", "rewound/batch_stats", "scores")], rng)
    parts.arrays[name] = Array("F32", [1], bytes(4))
    return parts.build()


def with_another_mask(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    name = _any([name for name in parts.arrays if name.startswith("masks/")], rng)
    data = bytearray(parts.arrays[name].data)
    if rng.random() < 0.5:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    else:
        data = data + b"\0" if rng.random() < 0.5 else data[:-1]
    parts.arrays[name] = Array("U8", [len(data)], bytes(data))
    return parts.build()


def with_a_padding_bit_set(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    for name, layer in parts.about["layers"].items():
        data = bytearray(parts.arrays["masks/" + name].data)
        extra = -math.prod(layer["shape"]) % 8
        if extra:
            data[-1] |= 1 << rng.integers(extra)
        else:
            data += b"\1"
        parts.arrays["masks/" + name] = Array("U8", [len(data)], bytes(data))
    return parts.build()


def with_other_kept_weights(content: bytes, rng: Rng) -> bytes:
    """Adds a removed weight in the full form; adds or drops a value in the compact form."""
    parts = Parts.of(content)
    layer = _any(parts.about["layers"], rng)
    name = "params/" + layer
    array = parts.arrays[name]
    size = len(array.data) // math.prod(array.shape)
    if parts.about["form"] == COMPACT:
        data = array.data + array.data[:size] if rng.random() < 0.5 else array.data[size:]
        parts.arrays[name] = array._replace(shape=[len(data) // size], data=data)
    else:
        bits = np.unpackbits(np.frombuffer(parts.arrays["masks/" + layer].data, np.uint8))
        removed = _any(np.flatnonzero(bits[: math.prod(array.shape)] == 0), rng)
        data = bytearray(array.data)
        data[removed * size + rng.integers(size)] ^= 1 << rng.integers(8)
        parts.arrays[name] = array._replace(data=bytes(data))
    return parts.build()


def with_other_metadata(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    layer = _any(parts.about["layers"], rng)
    old = parts.about["layers"][layer]
    edits: list[tuple[str, Any]] = [
        *(("mask_scale", value) for value in (0, -1.5, "2", None, True, 1e300, 1e-300, [], float("nan"), float("inf"))),
        *(("density", value) for value in (0.9, -0.1, 2, "1", None, float("nan"), 10**400)),
        *(("layers", value) for value in ({}, [], None, {layer: old, "other": old}, {layer: {}}, {layer: 3})),
        *(("layers", {**parts.about["layers"], layer: {**old, "shape": s}}) for s in ([2**62], [0, 2**62], "x", [1])),
        ("layers", {**parts.about["layers"], layer: {**old, "density": 0.123}}),
        *(("layers", {name: {**old, "density": 2}}) for name in ("line\nbreak", "\x1b[31m", "x" * 9000, " - at `$.b")),
        *(("model", {name: 1}) for name in ("line\nbreak", "\x1b[31m", "x" * 9000)),
        *(("format", value) for value in (0, 2, "1", None, [])),
        *(("form", value) for value in ("compact" if parts.about["form"] == "full" else "full", "", 3, None, {})),
        *(("model", value) for value in ("resnet6", [], 3, {"name": 3}, {"name": "resnet6"}, {"path": "/"})),
        *(("classes", value) for value in ("ten", [1, 2], {"a": 1}, 5)),
        *(("accuracy", value) for value in ({"test": 2}, [], {"test": "high"}, {"test": float("nan")})),
        *(("normalization", value) for value in ({"mean": 3}, [1], {"mean": ["x"]})),
        *(("versions", value) for value in ({"jax": 3}, "1", [])),
        ("dataset", 3),
        ("config", [1]),
        ("config", nested(100)),
    ]
    key, value = _any(edits, rng)
    parts.about[key] = value
    return parts.build()


def for_another_model(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    model = {"name": "resnet6", "num_classes": 10, "image_shape": [8, 8, 1]}
    sizes: list[Any] = [10**9, 2**20, 0, -1, "10", True, 11, 10.0, 10**30]
    shapes: list[Any] = [[8, 8, 3], [0, 8, 1], [10**9] * 3, [8, 8], "8x8", [8, 8, 1, 1], [-8, -8, 1], [2**14] * 3]
    names: list[Any] = ["resnet20", "lenet300100", "resnet8", "resnet7", "", "__class__", ["resnet6"]]
    values = {"num_classes": sizes, "image_shape": shapes, "name": names}
    key = _any(values, rng)
    parts.about["model"] = model | {key: _any(values[key], rng)}
    parts.about.pop("classes", None)
    return parts.build()


def with_strange_json(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    text = compact_json(parts.about)
    texts = ["", "{}", "[]", "null", "[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "[" + "{}," * 500_000 + "{}]"]
    texts += [text[:-1] + ',"form":"full"}', " " + text, text * 2, json.dumps(parts.about)]
    others = [{"cs_jax": other} for other in texts] + [None, {}, {"cs_jax": 3}, {"cs_jax": text, "more": ""}, [], "x"]
    return parts.with_header(json.dumps(parts.header() | {"__metadata__": _any(others, rng)}))


def with_a_strange_header(content: bytes, rng: Rng) -> bytes:
    parts = Parts.of(content)
    header = parts.header()
    text = json.dumps(header)
    name = _any(parts.arrays, rng)
    count = _any([8_000, 25_000], rng)
    many = {f"params/{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(count)}
    headers = ["", "[]", "null", "3", "[" * 100_000, '{"a":' * 100_000, text[:-1], text + text, "é"]
    headers += ["[" + "{}," * 600_000 + "{}]", text + " " * 3_000_000, text.replace("{", '{"\\ud800": 1, ', 1)]
    headers += [json.dumps(header | many), json.dumps({name: header[name]}), json.dumps(header | {name: [1]})]
    headers += [json.dumps(header | {name: header[name] | {"more": 1}}), json.dumps(header | {name: nested(200)})]
    return parts.with_header(_any(headers, rng))


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


def _any(choices: Any, rng: Rng) -> Any:
    return list(choices)[rng.integers(len(choices))]


def _renamed(arrays: dict[str, Array], old: str, new: str) -> dict[str, Array]:
    return {new if name == old else name: array for name, array in arrays.items()}


BLIND: tuple[Callable[[bytes, Rng], bytes], ...] = (
    truncated,
    continued,
    with_bits_flipped,
    with_bits_of_the_header_flipped,
    overwritten,
    with_a_piece_lost,
    with_header_overwritten,
    with_another_header_length,
    random_bytes,
    laid_out_anew,
)
CRAFTED: tuple[Callable[[bytes, Rng], bytes], ...] = (
    with_a_bad_name,
    with_an_array_inside_an_array,
    with_a_name_twice,
    with_another_dtype,
    with_another_shape,
    with_an_axis_more,
    with_other_offsets,
    with_an_array_lost,
    with_an_array_too_many,
    with_another_mask,
    with_a_padding_bit_set,
    with_other_kept_weights,
    with_other_metadata,
    for_another_model,
    with_strange_json,
    with_a_strange_header,
)


def mutation(contents: list[bytes], index: int, seed: int) -> tuple[str, int, bytes]:
    """Damaged file by number: kind of damage, index of the damaged content, and the bytes."""
    rng = np.random.default_rng([seed, index])
    damage = (*BLIND, *CRAFTED)[index % len(BLIND + CRAFTED)]
    original = int(rng.integers(len(contents)))
    return damage.__name__, original, damage(contents[original], rng)


# The judge.


def judge(path: Path, original: ticket.LoadedTicket) -> Verdict:
    """Loads a damaged file and judges the result."""
    before = _start_of_peak()
    # What other processes and threads do meanwhile is not the loader's, nor is a collection of all that is here.
    gc.disable()
    started = time.thread_time()
    try:
        outcome = _outcome(path, original)
    finally:
        seconds = time.thread_time() - started
        gc.enable()
    megabytes = (_peak_memory() - before) / 2**20
    if outcome in ("refused", "equal") and (seconds > MAX_SECONDS or megabytes > MAX_MEGABYTES):
        outcome += f", but took {seconds:.2f} s and {megabytes:.0f} MB"
    return Verdict(outcome, seconds, megabytes)


def _outcome(path: Path, original: ticket.LoadedTicket) -> str:
    try:
        found = ticket.load_ticket(path)
    except ticket.TicketError as error:
        lines = str(error).splitlines()
        return "refused" if len(lines) == 1 and lines[0].startswith(f"{path}: ") else f"a poor message: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "equal" if fingerprint(found) == fingerprint(original) else "loaded to other values"


def fingerprint(found: ticket.LoadedTicket) -> Any:
    """Content of a ticket in a form that can be compared bit for bit."""
    leaves, structure = jax.tree.flatten((found.variables, found.rewound))
    arrays = [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]
    return str(structure), arrays, json.dumps(found.metadata)


def _start_of_peak() -> int:
    """Memory in use, in bytes; sets the peak back to it where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def judge_range(folder: Path, begin: int, end: int, seed: int) -> None:
    """Body of a child process: judges files and prints one line of JSON for each."""
    paths = sorted(folder.glob("*.safetensors"))
    contents, originals = [path.read_bytes() for path in paths], [ticket.load_ticket(path) for path in paths]
    damaged = folder / f"damaged-{begin}"
    for index in range(begin, end):
        kind, number, content = mutation(contents, index, seed)
        damaged.write_bytes(content)
        print(json.dumps([index, kind, *judge(damaged, originals[number])]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=1000, help="how many to damage")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS, metavar=("FOLDER", "BEGIN", "END"))
    flags = parser.parse_args()
    if flags.child:
        judge_range(Path(flags.child[0]), int(flags.child[1]), int(flags.child[2]), flags.seed)
        return 0
    wrong, verdicts = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_tickets(Path(folder))
        for begin in range(0, flags.files, 250):
            end = min(begin + 250, flags.files)
            own = [sys.executable, __file__, "--seed", str(flags.seed), "--child", folder, str(begin), str(end)]
            child = subprocess.run(own, stdout=subprocess.PIPE, text=True)
            found = [json.loads(line) for line in child.stdout.splitlines()]
            verdicts += found
            wrong += [f"file {row[0]}, {row[1]}: {row[2]}" for row in found if row[2] not in ("refused", "equal")]
            if child.returncode or len(found) < end - begin:
                wrong.append(f"a process ended with code {child.returncode} at file {begin + len(found)}")
    for line in wrong:
        print(line, file=sys.stderr)
    outcomes = [row[2] for row in verdicts]
    print(
        f"{len(verdicts)} files: {outcomes.count('refused')} refused, {outcomes.count('equal')} loaded equal, "
        f"{len(wrong)} wrong; worst {max(row[3] for row in verdicts):.2f} s, {max(row[4] for row in verdicts):.0f} MB"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
