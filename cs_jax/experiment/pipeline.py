"""Stages of an experiment: search, retraining, controls, tests, summary."""

from typing import Any

import numpy as np

from cs_jax import methods
from cs_jax.core import trees
from cs_jax.experiment import metrics, search
from cs_jax.experiment.config import SEARCH, TICKET
from cs_jax.experiment.experiment import Experiment
from cs_jax.experiment.progress import Progress
from cs_jax.experiment.storage import config_file, paths
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
from cs_jax.training.problem import Snapshot, Ticket
from cs_jax.training.step import TrainState


def run(experiment: Experiment, progress: Progress | None = None) -> dict[str, Any]:
    """Searches for a ticket, retrains it, trains the controls, and tests all trained networks.

    Args:
        experiment: config, problem, data, directory and observer.
        progress: progress restored from a checkpoint; None starts from scratch.

    Returns:
        The content of summary.json. Accuracies and densities are shares, in [0, 1].

    Raises:
        NonFiniteLossError: loss, weights or scores are not finite.
    """
    config, problem, observer = experiment.config, experiment.problem, experiment.observer
    directory, data = experiment.directory, experiment.data
    progress = progress or search.begin_search(search.init_state(config, problem))
    round_ends = progress.round_ends
    if progress.phase == SEARCH:
        ticket, round_ends = search.search_ticket(config, problem, progress, observer)
        if config.retraining == methods.NONE:
            _write_ticket(experiment, None, search.fixed_state(problem, ticket))
        else:
            progress = search.begin_retraining(problem, ticket, round_ends=round_ends)
    if progress.phase == TICKET:
        start = progress.snapshot
        _write_ticket(experiment, start, search.retrain(config, problem, progress, observer))
    processes.wait()  # until the leader has written the ticket
    saved = load_ticket(directory.path / paths.TICKET_FILE)  # also in the process that has just trained it
    start = saved.rewound or saved.variables
    ticket = Ticket(Snapshot(start["params"], start["batch_stats"]), saved.found_masks)
    controls = _train_controls(experiment, ticket, progress._replace(round_ends=round_ends))
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
            **training_cost(experiment, SEARCH, TICKET),
            **smaller_multiply_adds(config, problem, saved),
        },
        "dense": controls.pop(DENSE, None),
        "controls": controls,
        "seconds": directory.seconds(),
    }


def _train_controls(experiment: Experiment, ticket: Ticket, progress: Progress) -> dict[str, Any]:
    """Results of each control; controls that an earlier process has trained are read from the directory."""
    config, problem = experiment.config, experiment.problem
    names = config.trained_controls
    done = names[: names.index(progress.phase)] if progress.phase in names else ()
    results = {name: result for name, result in experiment.directory.read_controls().items() if name in done}
    for name in names[len(done) :]:
        begun = CONTROLS[name](problem, ticket)
        if progress.phase != name:
            progress = search.begin_retraining(problem, begun, phase=name, round_ends=progress.round_ends)
        state = search.retrain(config, problem, progress, experiment.observer)
        logits = metrics.logits(experiment, state, state.masks, experiment.data.test)
        results[name] = {
            **count_weights(begun),
            **accuracies(experiment, state, logits),
            **training_cost(experiment, name),
        }
        experiment.directory.write_controls(results)
    return results


def _write_ticket(experiment: Experiment, start: Snapshot | None, state: TrainState) -> None:
    """Writes the trained ticket with the initial weights of its retraining, and its predictions for the test set."""
    config, data, directory = experiment.config, experiment.data, experiment.directory
    logits = metrics.logits(experiment, state, state.masks, data.test)
    made_with = {
        name: value
        for name, value in config_file.to_json(config).items()
        if config_file.decides_result(name) and name != "controls"
    }
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
        "mask_scale": config.pruning_method.mask_scale(),
        "accuracy": accuracies(experiment, state, logits),
        "config": made_with,
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
