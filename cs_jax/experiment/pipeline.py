"""The whole experiment: data and network from a config, search, retraining, comparison, and the summary of it all."""

from typing import Any

import numpy as np

from cs_jax import methods
from cs_jax.core import trees
from cs_jax.data.load import Data
from cs_jax.experiment import metrics, search
from cs_jax.experiment.config import SEARCH, TICKET, Config
from cs_jax.experiment.progress import Observer, Progress
from cs_jax.experiment.storage import config_file, paths
from cs_jax.experiment.storage.config_file import NOT_IN_RESULT
from cs_jax.experiment.storage.run_directory import RunDirectory
from cs_jax.experiment.storage.versions import versions
from cs_jax.experiment.summary import (
    accuracies,
    count_weights,
    predictions,
    smaller_multiply_adds,
    summarize_round,
    training_cost,
)
from cs_jax.methods.controls import CONTROLS, DENSE
from cs_jax.tickets.ticket import load_ticket
from cs_jax.training import processes
from cs_jax.training.problem import Problem, Snapshot, Ticket
from cs_jax.training.step import TrainState


def run(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    observer: Observer,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Searches a ticket, retrains it, trains its controls, and tests them all.

    Args:
        config: what was asked.
        problem: of `prepare`.
        data: of `prepare`.
        directory: takes the ticket and its predictions.
        observer: told of every phase, step and epoch.
        progress: where an earlier process stood; None is the beginning.

    Returns:
        What summary.json holds. Accuracies and densities are shares, in [0, 1].

    Raises:
        NonFiniteLossError: in which round, epoch and step.
    """
    progress = progress or search.begin_search(search.init_state(config, problem))
    round_ends = progress.round_ends
    if progress.phase == SEARCH:
        ticket, round_ends = search.search_ticket(config, problem, progress, observer)
        if config.retraining == methods.NONE:
            _write_ticket(config, problem, data, directory, None, search.fixed_state(problem, ticket), observer)
        else:
            progress = search.begin_retraining(problem, ticket, round_ends=round_ends)
    if progress.phase == TICKET:
        start = progress.snapshot
        state = search.retrain(config, problem, progress, observer)
        _write_ticket(config, problem, data, directory, start, state, observer)
    processes.wait()  # the leader has written it
    saved = load_ticket(directory.path / paths.TICKET_FILE)  # here too where this process has made it
    start = saved.rewound or saved.variables
    ticket = Ticket(Snapshot(start["params"], start["batch_stats"]), saved.found_masks)
    progress = progress._replace(round_ends=round_ends)
    controls = _train_controls(config, problem, data, directory, ticket, observer, progress)
    return {
        "dataset": config.dataset,
        "classes": list(data.classes),
        "model": config.model,
        "method": config.method,
        "after": config.retraining,
        "seed": config.seed,
        "search": [summarize_round(record) for record in round_ends],
        "ticket": {
            **count_weights(ticket),
            **saved.metadata["accuracy"],
            **training_cost(config, problem, directory, SEARCH, TICKET),
            **smaller_multiply_adds(config, problem, saved),
        },
        "dense": controls.pop(DENSE, None),
        "controls": controls,
        "seconds": directory.seconds(),
    }


def _train_controls(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    ticket: Ticket,
    observer: Observer,
    progress: Progress,
) -> dict[str, Any]:
    """What came of each control: those that an earlier process has trained are read."""
    names = config.trained_controls
    done = names[: names.index(progress.phase)] if progress.phase in names else ()
    results = {name: result for name, result in directory.read_controls().items() if name in done}
    for name in names[len(done) :]:
        begun = CONTROLS[name](config, problem, ticket)
        if progress.phase != name:
            progress = search.begin_retraining(problem, begun, phase=name, round_ends=progress.round_ends)
        state = search.retrain(config, problem, progress, observer)
        logits = metrics.logits(config, problem, state, state.masks, data.test, observer)
        results[name] = {
            **count_weights(begun),
            **accuracies(config, problem, data, state, logits, observer),
            **training_cost(config, problem, directory, name),
        }
        directory.write_controls(results)
    return results


def _write_ticket(
    config: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    start: Snapshot | None,
    state: TrainState,
    observer: Observer,
) -> None:
    """Writes the trained ticket, what its retraining began with, and what it makes of the test set."""
    logits = metrics.logits(config, problem, state, state.masks, data.test, observer)
    fields = config_file.to_json(config)
    metadata = {
        "dataset": config.dataset,
        "classes": list(data.classes),
        "model": {
            "name": config.model,
            "num_classes": len(data.classes),
            "image_shape": list(data.train.image_shape),
            "dtype": config.dtype,
        },
        "normalization": {"mean": data.train.mean.tolist(), "std": data.train.std.tolist()},
        "mask_scale": methods.of(config).mask_scale(config),
        "accuracy": accuracies(config, problem, data, state, logits, observer),
        "config": {
            name: value for name, value in fields.items() if name not in (*NOT_IN_RESULT, "controls")
        },  # what made it
        "versions": versions(),
    }
    if state.channels is not None:
        metadata["unmasked"] = [trees.name(path) for path in state.channels.unscored]
    directory.write_predictions(predictions(np.asarray(logits), data.test))
    directory.write_ticket(
        params=state.params,
        batch_stats=state.batch_stats,
        masks=state.masks,
        rewound=start and start._asdict(),
        metadata=metadata,
    )
