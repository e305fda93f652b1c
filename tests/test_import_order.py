"""The order of the packages: each module imports only from its own package and from those above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cs_jax"
ORDER = (
    "core",
    "layers",
    "nnx",
    "optim",
    "data",
    "models",
    "training",
    "tickets",
    "methods",
    "experiment",
    "sweep",
    "report",
    "commands",
)
"""The same list as in the README."""


def imports(source: str) -> set[str]:
    """Modules of this package that a module's source imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "cs_jax"}


def upward(module: str, source: str) -> list[str]:
    """Imports of a module, named as "training/step.py", from a package below its own or from the whole package."""
    own = ORDER.index(module.removesuffix(".py").split("/")[0])
    above = {"cs_jax." + name for name in ORDER[: own + 1]}
    return sorted(name for name in imports(source) if ".".join(name.split(".")[:2]) not in above)


def modules() -> dict[str, str]:
    """Sources of all modules in packages, by their path."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: path.read_text() for name, path in paths.items() if name not in ("__init__.py", "__main__.py")}


def test_no_import_runs_up() -> None:
    assert {name: found for name, source in modules().items() if (found := upward(name, source))} == {}


@pytest.mark.parametrize(
    "module, line, found",
    [
        ("core/masks.py", "from cs_jax.training.step import step", ["cs_jax.training.step.step"]),
        ("core/masks.py", "def f():\n    from cs_jax import models", ["cs_jax.models"]),
        ("nnx.py", "import cs_jax.optim.state", ["cs_jax.optim.state"]),
        ("data/load.py", "import cs_jax", ["cs_jax"]),
        ("training/step.py", "from cs_jax.core import masks", []),
        ("experiment/storage/paths.py", "from cs_jax.experiment.config import Config", []),
    ],
)
def test_an_import_that_is_turned_round_is_found(module: str, line: str, found: list[str]) -> None:
    assert upward(module, line) == found


def test_modules_import_each_other_in_no_circle() -> None:
    known = {
        "cs_jax." + name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in modules()
    }
    edges = {}
    for module, name in known.items():
        targets = {found if found in known else found.rpartition(".")[0] for found in imports(modules()[name])}
        edges[module] = targets & known.keys() - {module}
    while leaves := {module for module, targets in edges.items() if not targets}:
        edges = {module: targets - leaves for module, targets in edges.items() if module not in leaves}
    assert edges == {}


def test_every_module_lies_in_a_package() -> None:
    assert {name.removesuffix(".py").split("/")[0] for name in modules()} == set(ORDER)
