"""No pruning."""

from cs_jax.methods.method import REWIND, Method


class Dense(Method):
    """The dense network, trained from its initialisation for as many epochs as a ticket is.

    As a control, beside another method, it is trained within the same run.
    """

    afters = (REWIND,)
    why_these = "which has no search to go on from"
    wants_target = False
    searches = False
