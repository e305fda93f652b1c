"""Content of summary.json: densities, accuracies, cost; and predictions for the report."""

import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from cs_jax.core import masks
from cs_jax.data.stream import Images
from cs_jax.experiment import metrics
from cs_jax.experiment.config import SEARCH, Config
from cs_jax.experiment.experiment import Experiment
from cs_jax.experiment.progress import EpochRecord
from cs_jax.models.multiply_adds import multiply_adds
from cs_jax.models.wiring import WiringWarning
from cs_jax.tickets.shrink import shrink
from cs_jax.tickets.ticket import LoadedTicket
from cs_jax.training.evaluation import share_right
from cs_jax.training.problem import Problem, Ticket
from cs_jax.training.step import TrainState

MAX_MISTAKES = 24
"""Maximum number of misclassified images that are stored for the report."""


def training_cost(experiment: Experiment, *phases: str) -> dict[str, float | int]:
    """Cost of the given phases: epochs, floating-point operations and seconds.

    A masked network computes the same operations as a dense network. A backward pass counts as two forward passes.
    """
    config, problem = experiment.config, experiment.problem
    epochs = config.epochs * (
        (config.search_rounds if SEARCH in phases else 0) + sum(phase in phases for phase in config.retrainings)
    )
    forward = 2 * multiply_adds(problem.recipe.model, problem.train.image_shape)
    return {
        "epochs": epochs,
        "training_flops": 3 * forward * len(problem.train) * epochs,
        "seconds": experiment.directory.seconds(*phases),
    }


def smaller_multiply_adds(config: Config, problem: Problem, ticket: LoadedTicket) -> dict[str, int]:
    """Multiply-adds of the shrunk ticket and of the dense network; {} for tickets without channel scores."""
    if config.granularity != "channel":
        return {}
    model, image_shape = problem.recipe.model, problem.train.image_shape
    dense = {"dense_multiply_adds": multiply_adds(model, image_shape)}
    try:
        smaller, _ = shrink(model, ticket.variables, image_shape)
    except ValueError as error:  # a warning, so that the run still writes its summary
        message = f"the ticket cannot be shrunk, so its multiply-adds are unknown: {error}"
        warnings.warn(message, WiringWarning, stacklevel=2)
        return dense
    return {"multiply_adds": multiply_adds(smaller, image_shape), **dense}


def predictions(logits: np.ndarray, images: Images) -> dict[str, np.ndarray]:
    """Labels, predicted classes and confidences of all examples, and the images of the most confident mistakes."""
    labels, predicted = np.asarray(images.labels, np.int32), np.argmax(logits, axis=-1).astype(np.int32)
    confidence = np.asarray(jax.nn.softmax(logits).max(axis=-1), np.float32)
    wrong = np.flatnonzero(predicted != labels)
    mistakes = wrong[np.argsort(-confidence[wrong], kind="stable")][:MAX_MISTAKES].astype(np.int32)
    return {
        "labels": labels,
        "predicted": predicted,
        "confidence": confidence,
        "mistakes": mistakes,
        "images": np.asarray(images.take(mistakes).images),
    }


def count_weights(ticket: Ticket) -> dict[str, float | int]:
    """Densities of a network, over the maskable weights and over all weights, and numbers of weights.

    `num_all_weights` counts all weights, `num_masked_weights` counts the maskable weights. `num_weights` counts the
    maskable weights that are kept, and all other weights.
    """
    masked = sum(mask.size for mask in jax.tree.leaves(ticket.masks))
    everything = sum(weight.size for weight in jax.tree.leaves(ticket.start.params))
    density = masks.density(ticket.masks)
    kept = round(density * masked) + everything - masked
    return {
        "density": density,
        "density_all_weights": kept / everything,
        "num_weights": kept,
        "num_all_weights": everything,
        "num_masked_weights": masked,
    }


def summarize_round(record: EpochRecord) -> dict[str, Any]:
    """Accuracies and density at the end of a round."""
    return {
        "round": record.round,
        "soft_accuracy": record.soft_accuracy,
        "hard_accuracy": record.hard_accuracy,
        "density": record.density,
    }


def accuracies(experiment: Experiment, state: TrainState, test_logits: Array) -> dict[str, float | None]:
    """Validation and test accuracy with the fixed masks of a state, in [0, 1]."""
    data = experiment.data
    right = {"val_accuracy": None, "test_accuracy": share_right(test_logits, data.test)}
    if data.validation is not None:
        logits = metrics.logits(experiment, state, state.masks, data.validation)
        right["val_accuracy"] = share_right(logits, data.validation)
    return right
