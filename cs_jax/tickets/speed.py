"""Inference speed of a ticket's forms on this device: dense, masked, shrunk, with and without folded BatchNorm.

Multiplying by masks saves no time. The timings of the forms are interleaved in one process. The dense form is
recommended unless another form is clearly faster.
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
"""Reference form: plain layers, masks multiplied into the weights. As fast as the network before pruning."""

CLEARLY = 0.95
"""Largest ratio of a form's time to the dense form's time at which the form is recommended, in (0, 1)."""

LEAST_SECONDS = 0.02
"""Approximate minimum duration of a measurement, in seconds: calls are repeated to reach it."""


class Form(NamedTuple):
    """A way to serve a ticket."""

    apply: Callable[[Any, jax.Array], Any]  # from variables and normalised images to logits
    variables: PyTree
    num_bytes: int  # size of the variables; for the masked form, size of the compact ticket file
    multiply_adds: int  # per image


class Measured(NamedTuple):
    """Measurements of a form at one batch size."""

    form: str
    batch_size: int
    seconds: float  # per call, median over repeats
    ratio: float  # time divided by the time of the dense form in the same repeat, median over repeats
    lowest: float  # minimum of these ratios
    upper: float  # third quartile of these ratios
    highest: float  # maximum of these ratios
    peak_bytes: int  # memory of a call including the variables, from the compiler's memory analysis
    num_bytes: int  # see `Form`
    multiply_adds: int  # per image
    difference: float  # largest difference of logits from the masked form, relative to the largest logit


def forms(ticket: LoadedTicket) -> dict[str, Form]:
    """Forms of a ticket by name. Forms with folded BatchNorm are included if the network has BatchNorm.

    Raises:
        ConfigError: the ticket has a custom model, a mask keeps no weight of its layer, or an entry is not finite.
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
    """Measurements of every form at one batch size; the timings of the forms are interleaved.

    Args:
        found: `forms` of a ticket.
        image_shape: shape of one image, for example (32, 32, 3).
        batch_size: images per call, >= 1.
        repeats: number of timings of each form, >= 1; times are medians over repeats.
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
            # On a CPU, serving convolutions call a library whose memory the compiler does not report. The memory is
            # therefore from a compilation with training convolutions.
            peak_bytes=_peak_bytes(_compiled(form, images) if on_cpu else compiled[name]),
            num_bytes=form.num_bytes,
            multiply_adds=form.multiply_adds,
            difference=float(np.abs(logits[name] - logits["masked"]).max() / scale),
        )
        rows.append(row)
    return rows


def _compiled(form: Form, images: jax.Array) -> Any:
    """Compiled function of a form; always traced again, because `for_serving` changes the trace."""
    return jax.jit(lambda variables, images: form.apply(variables, images)).lower(form.variables, images).compile()


def _calls_in(seconds: float, call: Callable[[], Any]) -> int:
    return max(1, round(seconds / min(_seconds(call, 1) for _ in range(3))))


def _seconds(call: Callable[[], Any], count: int) -> float:
    """Mean seconds of `count` calls in a row."""
    started = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / count


def _peak_bytes(compiled: Any) -> int:
    """Bytes of arguments, outputs and temporary arrays of a compiled function."""
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes


def recommend(rows: Sequence[Measured]) -> str:
    """Recommendation for one batch size: the form with the fewest bytes among the fastest, or the dense form.

    A form counts as faster than the dense form if its median ratio is at most `CLEARLY` and the third quartile of its
    ratios is below 1. Forms within a factor of `CLEARLY` of the lowest median ratio count as the fastest.
    """
    faster = [row for row in rows if row.ratio <= CLEARLY and row.upper < 1]
    if not faster:
        return f"batch {rows[0].batch_size}: stay dense; no other form is clearly faster"
    limit = min(row.ratio for row in faster) / CLEARLY
    best = min((row for row in faster if row.ratio <= limit), key=lambda row: row.num_bytes)
    return f"batch {best.batch_size}: {best.form}, {1 / best.ratio:.2f} times as fast as dense"
