"""What a ticket gains where it runs: its forms timed beside each other, with what they take and how far they agree.

A mask saves nothing by itself, and what is sparse is often slower than what is dense. So nothing is promised: forms of
one network are timed in turns in one process, and the dense one is recommended where no other is clearly faster.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from cs_jax.layers.convolution import for_serving
from cs_jax.models.multiply_adds import evaluation_mode, multiply_adds
from cs_jax.tickets.fold import fold
from cs_jax.tickets.shrink import shrink
from cs_jax.tickets.ticket import LoadedTicket, save_ticket

DENSE = "dense"
"""What others are compared with: the network's layers without masks, whatever their weights are."""

CLEARLY = 0.95
"""Share of the dense network's time below which a form is recommended: less may be noise."""

LEAST_SECONDS = 0.02
"""A measurement takes as many calls as this needs."""


class Form(NamedTuple):
    """One way to serve a ticket."""

    apply: Callable[[Any, jax.Array], Any]  # logits of variables and normalised images
    variables: PyTree
    num_bytes: int  # of its file
    multiply_adds: int


class Measured(NamedTuple):
    """A form at a batch size."""

    form: str
    batch_size: int
    seconds: float  # of a call, the median
    ratio: float  # to the dense form, the median of the ratios within each turn
    lowest: float  # of these ratios
    upper: float  # their third quartile
    highest: float
    peak_bytes: int  # that a call needs at once, its variables among them, by the compiler's own account
    num_bytes: int  # of its file
    multiply_adds: int  # of an image
    difference: float  # of logits from those of the masked network, relative to the largest


def forms(ticket: LoadedTicket) -> dict[str, Form]:
    """The forms that a ticket has, by their names.

    Raises:
        ConfigError: it names no model of `cs_jax.models`, or a mask keeps nothing of its layer.
    """
    model, variables, shape = ticket.known_network()
    networks = {"masked": (model, variables)}
    for size, network in {DENSE: networks["masked"], "shrunk": shrink(model, variables, shape)}.items():
        networks[size] = fold(*network, shape)
        if ticket.variables["batch_stats"]:
            networks[f"{size}, folded"] = fold(*network, shape, batch_norm=True)
    cost = {name: multiply_adds(model, shape) for name, (model, _) in networks.items()}
    found = {name: _form(model, variables, cost[name]) for name, (model, variables) in networks.items()}
    found["masked"] = found["masked"]._replace(num_bytes=_compact_size(ticket))
    return {DENSE: found.pop(DENSE), **found}


def _form(model: nn.Module, variables: PyTree, cost: int) -> Form:
    apply = functools.partial(model.apply, **evaluation_mode(model))
    return Form(apply, variables, sum(leaf.nbytes for leaf in jax.tree.leaves(variables)), cost)


def _compact_size(ticket: LoadedTicket) -> int:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ticket"
        save_ticket(path, **ticket.variables, metadata=ticket.metadata, compact=True)
        return path.stat().st_size


def measure(found: Mapping[str, Form], image_shape: Sequence[int], *, batch_size: int, repeats: int) -> list[Measured]:
    """Every form at a batch size, in turns.

    Args:
        found: `forms` of a ticket.
        image_shape: of one image, as in (32, 32, 3).
        batch_size: images of a call.
        repeats: turns; times are medians over them.
    """
    images = jax.random.normal(jax.random.key(0), (batch_size, *image_shape))
    with for_serving():
        compiled = {name: _compiled(form, images) for name, form in found.items()}
    logits = {name: np.asarray(call(found[name].variables, images)) for name, call in compiled.items()}
    calls = {name: functools.partial(call, found[name].variables, images) for name, call in compiled.items()}
    counts = {name: _calls_in(LEAST_SECONDS, call) for name, call in calls.items()}
    turns = [{name: _seconds(call, counts[name]) for name, call in calls.items()} for _ in range(repeats)]
    on_cpu = jax.default_backend() == "cpu"
    rows, scale = [], max(np.abs(logits["masked"]).max(), 1e-30)
    for name, form in found.items():
        ratios = [turn[name] / turn[DENSE] for turn in turns]
        row = Measured(
            form=name,
            batch_size=batch_size,
            seconds=statistics.median(turn[name] for turn in turns),
            ratio=statistics.median(ratios),
            lowest=min(ratios),
            upper=float(np.quantile(ratios, 0.75)),
            highest=max(ratios),
            peak_bytes=_peak_bytes(_compiled(form, images) if on_cpu else compiled[name]),
            num_bytes=form.num_bytes,
            multiply_adds=form.multiply_adds,
            difference=float(np.abs(logits[name] - logits["masked"]).max() / scale),
        )
        rows.append(row)
    return rows


def _compiled(form: Form, images: jax.Array) -> Any:
    """The program of a form, traced anew."""
    return jax.jit(lambda variables, images: form.apply(variables, images)).lower(form.variables, images).compile()


def _calls_in(seconds: float, call: Callable[[], Any]) -> int:
    return max(1, round(seconds / min(_seconds(call, 1) for _ in range(3))))


def _seconds(call: Callable[[], Any], count: int) -> float:
    """Seconds of a call, the mean of several in a row."""
    started = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / count


def _peak_bytes(compiled: Any) -> int:
    """What a program needs at once: on a CPU that of training, whose convolutions are no secret of a library."""
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes


def recommend(rows: Sequence[Measured]) -> str:
    """The form to serve at one batch size, in words: of those that are about as fast as the fastest, the smallest.

    Faster than the dense one is a form that was so in three turns of four, and clearly by the median.
    """
    faster = [row for row in rows if row.ratio <= CLEARLY and row.upper < 1]
    if not faster:
        return f"batch {rows[0].batch_size}: stay dense, no form is clearly faster"
    limit = min(row.ratio for row in faster) / CLEARLY
    best = min((row for row in faster if row.ratio <= limit), key=lambda row: row.num_bytes)
    return f"batch {best.batch_size}: {best.form}, {1 / best.ratio:.2f} times as fast as dense"
