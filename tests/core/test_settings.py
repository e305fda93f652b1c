"""Base class of config dataclasses."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from cs_jax.core.errors import ConfigError
from cs_jax.core.settings import RUNTIME, Settings


@dataclass(frozen=True, kw_only=True)
class Rise(Settings):
    plain: Literal["linear", "square"] = "linear"
    annotated: Annotated[Literal["linear", "square"], RUNTIME] = "linear"


@pytest.mark.parametrize("name", ["plain", "annotated"])
def test_a_literal_is_checked_with_and_without_an_annotation(name: str) -> None:
    Rise(**{name: "square"})
    with pytest.raises(ConfigError, match=f"^--{name} cubic: must be one of linear, square$"):
        Rise(**{name: "cubic"})
