"""Networks trained beside a ticket, each with one thing about it changed: what the ticket owes to that.

Beside a ticket that is fine-tuned, those of `FRESH` weights have the whole schedule all the same.
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
    """The dense network as a ticket that keeps every weight, unscaled, from its initialisation."""
    del ticket
    return problem.init_ticket()


def reinit(problem: Problem, ticket: Ticket) -> Ticket:
    """The ticket's masks over other initial weights: whether the masks alone make it.

    References:
        Frankle and Carbin, ICLR 2019, arXiv:1803.03635, section 2.
    """
    return problem.init_ticket("reinit")._replace(masks=ticket.masks)


def shuffled(problem: Problem, ticket: Ticket) -> Ticket:
    """The ticket's weights under its masks shuffled within each layer: whether the layers' densities alone make it.

    These are random masks with the ticket's own density in each layer.

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
    """The ticket's weights under random masks of its density over all layers: whether its density alone makes it."""
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
"""Controls whose weights are new."""

CONTROLS: dict[str, Callable[[Problem, Ticket], Ticket]] = {
    DENSE: dense,
    REINIT: reinit,
    "shuffled": shuffled,
    "random": random,
}
"""What `--controls` can name: the network to train from config, problem and ticket."""
