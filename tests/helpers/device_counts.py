"""Takes search steps on the digits in double precision, on several devices, and writes the results.

    python tests/helpers/device_counts.py FOLDER LAYOUT... [--coordinator HOST:PORT --processes N --process-id I]

A LAYOUT is DATAxMODEL, for example 4x2; its arrays are written to FOLDER/LAYOUT.npz. With a coordinator, all devices of
all processes form one layout, and the first process writes. XLA_FLAGS sets the number of devices of a process.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax.commands import parser
from cs_jax.core import masks, trees
from cs_jax.core.arrays import on_host
from cs_jax.experiment import search
from cs_jax.experiment.config import SEARCH
from cs_jax.experiment.prepare import prepare
from cs_jax.training import mesh, processes
from cs_jax.training.epoch import Epoch
from cs_jax.training.executor import Executor
from cs_jax.training.problem import Problem

STEPS = 50
CONFIG = parser.parse(["digits", "--lr", "0.01", "--score-lr", "0.01", "--mask-initial-value", "0"])


def main(folder: Path, layouts: list[str]) -> None:
    jax.config.update("jax_enable_x64", True)
    problem, _ = prepare(CONFIG)
    for name in layouts:
        data, model = map(int, name.split("x"))
        executor = Executor(mesh.make_layout(data, model))
        arrays = train(dataclasses.replace(problem, executor=executor, train=executor.place_everywhere(problem.train)))
        if processes.is_leader():
            np.savez(folder / f"{name}.npz", **arrays)


def train(problem: Problem) -> dict[str, np.ndarray]:
    """Weights, statistics, scores, momenta and hard masks after `STEPS` search steps, by name."""
    state = problem.executor.place(jax.tree.map(to_double, search.init_state(CONFIG, problem)))
    hyper, size = search.hyperparams(CONFIG, SEARCH, 3), CONFIG.batch_size
    order = np.concatenate([np.random.default_rng(epoch).permutation(len(problem.train)) for epoch in range(3)])
    epoch = Epoch(problem.train, order[: STEPS * size], problem.key, hyper, batch_size=size)
    for _, state, _ in problem.executor.train_epoch(problem.recipe, state, epoch):  # noqa: B007, B020
        pass
    assert int(state.step) == STEPS
    hard = masks.hard_mask(state.scores, init_value=CONFIG.mask_initial_value)
    leaves = trees.leaves_by_path({"state": vars(state), "masks": hard})
    return {trees.name(path): on_host(leaf) for path, leaf in leaves.items()}


def to_double(leaf: jax.Array) -> jax.Array:
    return leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


if __name__ == "__main__":
    words = argparse.ArgumentParser()
    words.add_argument("folder", type=Path)
    words.add_argument("layouts", nargs="+")
    words.add_argument("--coordinator")
    words.add_argument("--processes", type=int)
    words.add_argument("--process-id", type=int)
    given = words.parse_args()
    if given.coordinator is not None:
        processes.start(given.coordinator, given.processes, given.process_id, prog="device_counts.py")
    main(given.folder, given.layouts)
