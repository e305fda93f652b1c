"""Checks of stored values, and the one line in which a value is refused."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from cs_jax.core.errors import ConfigError
from cs_jax.core.schema import convert, decode

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Layer(msgspec.Struct):
    density: Share
    shape: list[int]


class Network(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    layers: dict[str, Layer]
    reset: Literal["paper", "released"] | None = None
    folder: Path | None = None


LAYER = {"density": 0.5, "shape": [3, 2]}


def network(**layers: Any) -> dict[str, Any]:
    return {"name": "a", "layers": layers}


def test_values_become_instances_of_their_types() -> None:
    network = convert({"name": "a", "layers": {"x": {"density": 1, "shape": [2]}}, "folder": "runs"}, Network, "file")
    assert network == Network("a", {"x": Layer(1.0, [2])}, None, Path("runs"))


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "file: []: must be an object"),
        ({"layers": {}}, "file: name: missing"),
        ({"name": 3, "layers": {}}, "file: name 3: must be text"),
        ({"name": "a", "layers": {}, "more": 1}, "file: more: unknown"),
        (network(x={**LAYER, "density": 2}), "file: layers.x.density 2: must be a number <= 1.0"),
        (
            {"name": "a", "layers": {"x": {**LAYER, "shape": [True]}}},
            "file: layers.x.shape[0] True: must be a whole number",
        ),
        ({"name": "a", "layers": {}, "reset": "never"}, "file: reset 'never': must be one of paper, released"),
        ({"name": "a", "layers": {}, "folder": 3}, "file: folder 3: must be text"),
        (
            {"name": "a", "layers": {"x": {**LAYER, "density": math.nan}}},
            "file: layers.x.density nan: must be a number >= 0.0",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_value_and_the_rule(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(value, Network, "file")
    assert str(error.value) == message


def test_an_entry_that_does_not_fit_is_found_among_others() -> None:
    with pytest.raises(ConfigError, match=r"^file: b 'x': must be a whole number$"):
        convert({"a": 1, "b": "x"}, dict[str, int], "file")


@pytest.mark.parametrize(
    "value, message",
    [
        ({"x\n\x1b[31m": "y"}, r"file: x\n\x1b[31m 'y': must be a whole number"),
        ({"x" * 9000: "y"}, f"file: {'x' * 117}... 'y': must be a whole number"),
        ({"x - at `$.y": "y"}, "file: x - at `$.y 'y': must be a whole number"),
    ],
)
def test_a_strange_name_leaves_the_message_one_short_line(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(value, dict[str, int], "file")
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["a\nb", "a\x1b", "a\udc80", "a - at `$.name", "x" * 9000])
def test_an_unknown_field_of_a_strange_name_is_one_short_line(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert({**network(), name: 1}, Network, "file")
    assert str(error.value).isprintable() and len(str(error.value)) < 200


@pytest.mark.parametrize("content", [b"{", b"[NaN]", b"\xff", b"[" * 100_000])
def test_bytes_that_are_not_json_are_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match="^file: not valid JSON: "):
        decode(content, list, "file")
