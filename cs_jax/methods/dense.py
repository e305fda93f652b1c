"""No pruning."""

from cs_jax.methods.base import AtInitialization


class Dense(AtInitialization):
    """No pruning: trains the dense network from the initial weights, with the same number of epochs as a ticket.

    With the control `dense`, a run of another method trains the dense network, too.
    """

    wants_target = False
