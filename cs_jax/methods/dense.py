"""No pruning."""

from cs_jax.methods.base import AtInitialization


class Dense(AtInitialization):
    """The dense network, trained from its initialisation for as many epochs as a ticket is.

    As a control, beside another method, it is trained within the same run.
    """

    wants_target = False
