"""No pruning."""

from cs_jax.methods.base import AtInitialization


class Dense(AtInitialization):
    """No pruning: trains the dense network from its initialisation, with the epochs of a ticket.

    As a control of another method, the dense network is trained in the same run.
    """

    wants_target = False
