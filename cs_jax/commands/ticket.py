"""The commands on ticket files: `ticket`, `verify`, `shrink` and `speed`."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from rich import box
from rich.console import Console
from rich.table import Table

from cs_jax.commands.parser import command_parser
from cs_jax.core import files, trees
from cs_jax.core.errors import ConfigError, error_in_file, out_of_memory
from cs_jax.data.load import load_test
from cs_jax.data.registry import source_of
from cs_jax.experiment.config import Config
from cs_jax.experiment.observers.terminal import print_line
from cs_jax.experiment.presets import PRESETS
from cs_jax.models.features import DEFAULT_FEATURES
from cs_jax.models.multiply_adds import multiply_adds
from cs_jax.tickets import describe
from cs_jax.tickets import shrink as shrinking
from cs_jax.tickets import speed as speeds
from cs_jax.tickets.speed import Measured
from cs_jax.tickets.ticket import LoadedTicket, load_ticket, save_ticket, shapes_of
from cs_jax.training.evaluation import share_right
from cs_jax.training.executor import Executor


def measure_test_accuracy(config: Config, ticket: LoadedTicket, name: str) -> float:
    """Test accuracy of a ticket on a data set, in [0, 1].

    Args:
        config: settings of the data set and the batch size; other settings are ignored.
        ticket: a ticket with a model and normalisation constants.
        name: name of the ticket file, for error messages.

    Raises:
        ConfigError: the ticket has no model or no constants, the data set cannot be read, or the ticket has another
            image shape or number of classes.
    """
    normalization = ticket.metadata.get("normalization")
    if ticket.model is None or normalization is None:
        raise ConfigError(f"{name}: custom model or no normalization; this command supports tickets of train.py only")
    about = ticket.metadata["model"]
    images, classes = load_test(config, normalization["mean"], normalization["std"])
    for what, got, wanted in (
        ("images of shape", tuple(about["image_shape"]), images.image_shape),
        ("classes", about["num_classes"], len(classes)),
    ):
        if got != wanted:
            raise ConfigError(f"{name}: ticket for {what} {got}; {config.dataset} has {what} {wanted}")
    logits = Executor().predict(ticket.model, ticket.variables, images, batch_size=config.batch_size)
    return share_right(logits, images)


ROUNDING = 0.002
"""Largest difference in accuracy that `verify` attributes to rounding on another device."""


class AccuracyError(ArithmeticError):
    """The measured test accuracy of a ticket differs from the recorded test accuracy."""


def ticket(arguments: Sequence[str], *, prog: str) -> None:
    """print the content of a ticket file: model, density, layers, versions"""
    parser = command_parser(prog, ticket)
    parser.add_argument("file", type=Path, metavar="FILE", help="ticket.safetensors of a run")
    path = parser.parse_args(arguments).file
    loaded = load_ticket(path)
    Console().print(describe.describe(loaded, file_size=path.stat().st_size))


def verify(arguments: Sequence[str], *, prog: str) -> None:
    """check a ticket file and measure its test accuracy on a data set"""
    parser = command_parser(prog, verify)
    parser.add_argument("file", type=Path, metavar="FILE", help="ticket.safetensors of a run")
    parser.add_argument("dataset", metavar="DATASET", help="preset or name in TensorFlow Datasets")
    parser.add_argument("--data-dir", type=Path, help="folder of prepared data sets")
    parser.add_argument("--batch-size", type=int, default=128, help="images per call (default: 128)")
    given = parser.parse_args(arguments)
    loaded = load_ticket(given.file)
    made_with = loaded.metadata.get("config") or {}
    dataset = PRESETS[given.dataset].dataset if given.dataset in PRESETS else given.dataset
    can_stream = source_of(dataset).can_stream
    size = _image_size(made_with) if can_stream else None
    config = Config(
        dataset=dataset,
        data_dir=given.data_dir,
        batch_size=given.batch_size,
        image_size=size,
        stream=can_stream and (size is not None or made_with.get("stream") is True),
    )
    found = measure_test_accuracy(config, loaded, str(given.file))
    recorded = (loaded.metadata.get("accuracy") or {}).get("test_accuracy")
    line = f"{given.file}: undamaged; density {loaded.density:.2%}, test accuracy on {dataset} {found:.2%}"
    if loaded.metadata.get("dataset") != dataset or recorded is None:
        return print_line(Console(), line)
    print_line(Console(), f"{line}, recorded {recorded:.2%}")
    if abs(found - recorded) > ROUNDING:
        rule = f"differs from the recorded {recorded:.2%} by more than {ROUNDING:.1%}; check the data set"
        raise AccuracyError(f"{given.file}: test accuracy {found:.2%} {rule}")


def _image_size(made_with: Mapping[str, Any]) -> int | None:
    """Setting `image_size` of the run that wrote a ticket; None if the setting is missing or not positive."""
    size = made_with.get("image_size")
    return size if type(size) is int and size > 0 else None


def shrink(arguments: Sequence[str], *, prog: str) -> None:
    """remove channels, units and heads without effect from a ticket: a smaller network with the same outputs"""
    parser = command_parser(prog, shrink)
    parser.add_argument("file", type=Path, metavar="FILE", help="ticket.safetensors of a run")
    parser.add_argument("--out", type=Path, help="file to write (default: FILE-shrunk.safetensors)")
    given = parser.parse_args(arguments)
    out = given.out or given.file.with_name(f"{given.file.stem}-shrunk.safetensors")
    files.check_out(out, source=given.file)
    loaded = load_ticket(given.file)
    with error_in_file(given.file, TypeError, ValueError):  # the model has no wiring, or a wrong wiring
        smaller = shrinking.shrink_ticket(loaded)
    save_ticket(out, **smaller.variables, metadata=smaller.metadata)
    terminal = Console()
    terminal.print(_what_changed(loaded, smaller))
    sizes = [(file, file.stat().st_size) for file in (given.file, out)]
    print_line(terminal, "; ".join(f"{file}: {size:,} bytes" for file, size in sizes))


def speed(arguments: Sequence[str], *, prog: str) -> None:
    """time a ticket on this device as a dense, masked and shrunk network, and recommend one of them"""
    parser = command_parser(prog, speed)
    parser.add_argument("file", type=Path, metavar="FILE", help="ticket.safetensors of a run")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 128], metavar="N", help="images per call (default: 1 128)"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timings of each network (default: 15)")
    given = parser.parse_args(arguments)
    for name, values in (("--batch-sizes", given.batch_sizes), ("--repeats", [given.repeats])):
        for value in values:
            if value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1")
    loaded = load_ticket(given.file)
    with error_in_file(given.file, TypeError, ValueError):  # the model has no wiring, or a wrong wiring
        forms = speeds.forms(loaded)
    shape, terminal = loaded.metadata["model"]["image_shape"], Console()
    if loaded.metadata["model"].get("features"):
        print_line(
            terminal, "the ticket is already shrunk: dense means the shrunk network, not the network before shrinking"
        )
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    for size in given.batch_sizes:
        try:
            rows = speeds.measure(forms, shape, batch_size=size, repeats=given.repeats)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not out_of_memory(error):
                raise
            raise ConfigError(f"--batch-sizes {size}: does not fit into memory; choose a smaller size") from error
        Console(width=max(terminal.width, 110)).print(_speeds(rows, f"batch {size}, {given.repeats} repeats; {device}"))
        print_line(terminal, speeds.recommend(rows))


def _speeds(rows: Sequence[Measured], title: str) -> Table:
    """Table of the measurements of all forms."""
    table = Table("form", title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("ms", "ratio to dense", "memory, MB", "file, kB", "multiply-adds", "difference"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = f"{row.ratio:.2f} ({row.lowest:.2f} to {row.highest:.2f})"
        sizes = (f"{row.peak_bytes / 1e6:,.1f}", f"{row.num_bytes / 1e3:,.0f}", f"{row.multiply_adds:,}")
        table.add_row(row.form, f"{1e3 * row.seconds:.3f}", ratio, *sizes, f"{row.difference:.0e}")
    return table


def _what_changed(before: LoadedTicket, after: LoadedTicket) -> Table:
    """Table of total sizes and changed layer widths of the dense network, the ticket and the shrunk ticket.

    The dense network is the model with default layer widths.
    """
    table = Table("", "dense", "before", "after", "of dense", box=box.SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    assert before.model is not None and after.model is not None
    whole = before.model.clone(features=DEFAULT_FEATURES)  # pyright: ignore[reportCallIssue]
    image_shape = tuple(before.metadata["model"]["image_shape"])
    dense, old, new = (_sizes(model, image_shape) for model in (whole, before.model, after.model))
    for name, size in new.items():
        if size != dense[name] or name in _TOTALS:
            table.add_row(name, f"{dense[name]:,}", f"{old[name]:,}", f"{size:,}", f"{size / dense[name]:.1%}")
    return table


_TOTALS = ("weights", "multiply-adds")


def _sizes(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, int]:
    """Numbers of weights and multiply-adds of a network, and of output features or heads of each layer, by name."""
    shapes = {name: shape for name, (shape, _) in shapes_of(model, image_shape).items()}
    weights = {tuple(name.split("/")[1:]): shape for name, shape in shapes.items() if name.startswith("params/")}
    counts = (sum(map(math.prod, weights.values())), multiply_adds(model, image_shape))
    features = {}
    for path, shape in weights.items():
        if path[-1] == "kernel":
            name, axis = (path[:-2], -2) if path[-2] == "query" else (path[:-1], -1)
            features.setdefault(trees.name(name), shape[axis])
    return dict(zip(_TOTALS, counts, strict=True)) | features
