"""Controls: networks trained like the ticket, with one property of the ticket changed.

Controls in `FRESH` start from initial weights, so they use the whole learning rate schedule even if the ticket is
fine-tuned.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cs_jax.core import trees
from cs_jax.methods.random import random_ranks
from cs_jax.training.problem import Problem, Ticket
from cs_jax.training.step import expand


def dense(problem: Problem, ticket: Ticket) -> Ticket:
    """The initial dense network, as a ticket that keeps every weight with mask 1."""
    del ticket
    return problem.init_ticket()


def reinit(problem: Problem, ticket: Ticket) -> Ticket:
    """The ticket's masks with new initial weights: tests whether the masks alone explain the accuracy.

    References:
        Frankle and Carbin, ICLR 2019, arXiv:1803.03635, section 2.
    """
    return problem.init_ticket("reinit")._replace(masks=ticket.masks)


def shuffled(problem: Problem, ticket: Ticket) -> Ticket:
    """The ticket's weights with masks shuffled within each layer: tests whether layer densities explain the accuracy.

    The masks are random, with the ticket's density in each layer.

    References:
        Frankle, Dziugaite, Roy and Carbin, "Pruning Neural Networks at Initialization: Why are We Missing the Mark?",
        ICLR 2021, arXiv:2009.08576, section 5.
    """
    channels = problem.recipe.channels

    def shuffle(key: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.random.permutation(key, mask.ravel()).reshape(mask.shape)

    masks = ticket.masks if channels is None else channels.first_entries(ticket.masks)
    drawn = trees.map_with_keys(shuffle, problem.key_for("shuffled"), masks)
    return ticket._replace(masks=expand(channels, drawn))


def random(problem: Problem, ticket: Ticket) -> Ticket:
    """The ticket's weights with random masks of the same overall density: tests whether density explains accuracy."""
    leaves = trees.leaves_by_path(ticket.masks)
    values = jnp.concatenate([mask.ravel() for mask in leaves.values()])
    ranks = trees.leaves_by_path(random_ranks(problem.key_for("random"), ticket.masks))
    order = jnp.argsort(jnp.concatenate([ranks[path].ravel() for path in leaves]), descending=True)
    drawn = jnp.zeros_like(values).at[order].set(jnp.sort(values, descending=True))
    parts = jnp.split(drawn, np.cumsum([mask.size for mask in leaves.values()])[:-1])
    masks = {path: part.reshape(leaves[path].shape) for path, part in zip(leaves, parts, strict=True)}
    return ticket._replace(masks=trees.nest(masks))


DENSE, REINIT = "dense", "reinit"

FRESH = (DENSE, REINIT)
"""Controls that start from initial weights."""

CONTROLS: dict[str, Callable[[Problem, Ticket], Ticket]] = {
    DENSE: dense,
    REINIT: reinit,
    "shuffled": shuffled,
    "random": random,
}
"""Controls by their name after `--controls`: functions from problem and ticket to the network to train."""
