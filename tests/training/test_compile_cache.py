"""Compiled programs that are kept for the next process."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import jax, jax.numpy as jnp
from cs_jax.training import compile_cache
compile_cache.keep_programs()
print(jax.config.jax_compilation_cache_dir)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))).block_until_ready()
"""


def compiled(cache: Path, **variables: str) -> tuple[str, set[str]]:
    """Program folder of a new process, and the names of the programs in `cache` afterwards."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    ended = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    return ended.stdout.strip(), {path.name for path in cache.rglob("*-cache")}


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    folder, first = compiled(tmp_path)
    assert Path(folder).parent == tmp_path / "cs_jax" / "programs"
    assert first
    assert compiled(tmp_path) == (folder, first)


def test_the_users_own_folder_is_left_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert compiled(tmp_path, JAX_COMPILATION_CACHE_DIR=str(own))[0] == str(own)
    assert not (tmp_path / "cs_jax").exists()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cs_jax").write_text("in the way")
    assert compiled(tmp_path) == ("None", set())
