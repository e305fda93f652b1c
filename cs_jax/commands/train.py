"""The command `train`, and a run with all its files."""

import functools
from collections.abc import Sequence

from cs_jax.commands.parser import dashed, parse, pop_processes, pop_tickets
from cs_jax.commands.report import write_report
from cs_jax.core.errors import ConfigError
from cs_jax.experiment import run as experiment_run
from cs_jax.sweep import tickets as sweep_tickets
from cs_jax.training import processes

run = functools.partial(experiment_run.run, write_report=write_report)
"""`experiment.run.run`, with the report at its end."""


def train(arguments: Sequence[str], *, prog: str) -> None:
    """search a ticket, rewind it, retrain it, and report; or go on with a run that stopped"""
    words = [dashed(word) for word in arguments]
    coordinator, count, index = pop_processes(words)
    tickets = pop_tickets(words)
    settings = parse(words, prog=prog)
    if coordinator is not None and tickets is not None:
        raise ConfigError(
            f"--tickets: got {tickets} beside --coordinator, wanted one of them: a run is of all processes"
        )
    if coordinator is not None:
        processes.start(coordinator, count, index, prog=prog)
    if tickets is None:
        run(settings)
        return
    sweep_tickets.train(settings, tickets, write_report)
