"""The command `train`, and the function `run`, which also writes the report."""

import functools
from collections.abc import Sequence

from cs_jax.commands.parser import parse_train
from cs_jax.commands.report import write_report
from cs_jax.experiment import run as experiment_run
from cs_jax.sweep import tickets as sweep_tickets
from cs_jax.training import processes

run = functools.partial(experiment_run.run, write_report=write_report)
"""`experiment.run.run`, followed by the report of the run."""


def train(arguments: Sequence[str], *, prog: str) -> None:
    """search for a ticket, rewind it, retrain it and write a report; or resume a stopped run"""
    config, invocation = parse_train(arguments, prog=prog)
    if invocation.coordinator is not None:
        processes.start(invocation.coordinator, invocation.processes, invocation.process_id, prog=prog)
    if invocation.tickets is None:
        run(config)
    else:
        sweep_tickets.train(config, invocation.tickets, write_report)
