"""The commands `ticket`, `verify`, `shrink` and `speed`: what can be done with a ticket's file."""

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
    """Share of a data set's test examples that a saved ticket classifies right, in [0, 1].

    Args:
        config: its data set, folder and batch size count.
        ticket: with its model, and the statistics that its images were normalised by.
        name: of its file, for messages.

    Raises:
        ConfigError: the data set cannot be read, or the ticket is for other images or classes.
    """
    normalization = ticket.metadata.get("normalization")
    if ticket.model is None or normalization is None:
        raise ConfigError(f"{name}: is of a model of its maker's own, wanted a ticket that train.py wrote")
    about = ticket.metadata["model"]
    images, classes = load_test(config, normalization["mean"], normalization["std"])
    for what, got, wanted in (
        ("images of shape", tuple(about["image_shape"]), images.image_shape),
        ("classes", about["num_classes"], len(classes)),
    ):
        if got != wanted:
            raise ConfigError(f"{name}: is for {what} {got}, but {config.dataset} has {what} {wanted}")
    logits = Executor().predict(ticket.model, ticket.variables, images, batch_size=config.batch_size)
    return share_right(logits, images)


ROUNDING = 0.002
"""Difference in accuracy that another device's rounding explains."""


class AccuracyError(ArithmeticError):
    """A ticket does not classify as it did when it was made."""


def ticket(arguments: Sequence[str], *, prog: str) -> None:
    """print what is in a ticket's file"""
    parser = command_parser(prog, ticket)
    parser.add_argument("file", type=Path, metavar="FILE", help="ticket.safetensors of a run")
    path = parser.parse_args(arguments).file
    loaded = load_ticket(path)
    Console().print(describe.describe(loaded, file_size=path.stat().st_size))


def verify(arguments: Sequence[str], *, prog: str) -> None:
    """check a ticket's file, and measure its accuracy on the test set of a data set"""
    parser = command_parser(prog, verify)
    parser.add_argument("file", type=Path, metavar="FILE", help="ticket.safetensors of a run")
    parser.add_argument("dataset", metavar="DATASET", help="of a preset, or a name in TensorFlow Datasets")
    parser.add_argument("--data-dir", type=Path, help="folder of prepared data sets")
    parser.add_argument("--batch-size", type=int, default=128, help="images per call (128)")
    given = parser.parse_args(arguments)
    loaded = load_ticket(given.file)
    made_with = loaded.metadata.get("config") or {}
    dataset = PRESETS[given.dataset].dataset if given.dataset in PRESETS else given.dataset
    can_stream = source_of(dataset).can_stream
    size = _image_size(made_with) if can_stream else None
    asked = Config(
        dataset=dataset,
        data_dir=given.data_dir,
        batch_size=given.batch_size,
        image_size=size,
        stream=can_stream and (size is not None or made_with.get("stream") is True),
    )
    found = measure_test_accuracy(asked, loaded, str(given.file))
    recorded = (loaded.metadata.get("accuracy") or {}).get("test_accuracy")
    line = f"{given.file}: whole; density {loaded.density:.2%}, accuracy on the test set of {dataset} {found:.2%}"
    if loaded.metadata.get("dataset") != dataset or recorded is None:
        return print_line(Console(), line)
    print_line(Console(), f"{line}, recorded {recorded:.2%}")
    if abs(found - recorded) > ROUNDING:
        raise AccuracyError(f"{given.file}: accuracy {found:.2%} is not the recorded one, {recorded:.2%}")


def _image_size(made_with: Mapping[str, Any]) -> int | None:
    """Of the settings that a ticket was made with, the side that its images were cut to."""
    size = made_with.get("image_size")
    return size if type(size) is int and size > 0 else None


def shrink(arguments: Sequence[str], *, prog: str) -> None:
    """take out of a ticket the channels, units and heads that no longer matter: a smaller network that does the same"""
    parser = command_parser(prog, shrink)
    parser.add_argument("file", type=Path, metavar="FILE", help="ticket.safetensors of a run")
    parser.add_argument("--out", type=Path, help="file of the smaller ticket (FILE-shrunk.safetensors)")
    given = parser.parse_args(arguments)
    out = given.out or given.file.with_name(f"{given.file.stem}-shrunk.safetensors")
    files.check_out(out, source=given.file)
    loaded = load_ticket(given.file)
    with error_in_file(given.file, TypeError, ValueError):  # of a model whose wiring is missing or wrong
        smaller = shrinking.shrink_ticket(loaded)
    save_ticket(out, **smaller.variables, metadata=smaller.metadata)
    terminal = Console()
    terminal.print(_what_changed(loaded, smaller))
    sizes = [(file, file.stat().st_size) for file in (given.file, out)]
    print_line(terminal, "; ".join(f"{file}: {size:,} bytes" for file, size in sizes))


def speed(arguments: Sequence[str], *, prog: str) -> None:
    """measure a ticket's forms on this device, dense, masked and shrunk, and say which one to serve"""
    parser = command_parser(prog, speed)
    parser.add_argument("file", type=Path, metavar="FILE", help="ticket.safetensors of a run")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 128], metavar="N", help="images of a call (1 128)"
    )
    parser.add_argument("--repeats", type=int, default=15, help="turns, over which figures are medians (15)")
    given = parser.parse_args(arguments)
    for name, values in (("--batch-sizes", given.batch_sizes), ("--repeats", [given.repeats])):
        for value in values:
            if value < 1:
                raise ConfigError(f"{name}: got {value}, wanted at least 1")
    loaded = load_ticket(given.file)
    with error_in_file(given.file, TypeError, ValueError):  # of a model whose wiring is missing or wrong
        forms = speeds.forms(loaded)
    shape, terminal = loaded.metadata["model"]["image_shape"], Console()
    if loaded.metadata["model"].get("features"):
        print_line(
            terminal, "the ticket was made smaller before: dense is here the smaller network, and not its family's"
        )
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    for size in given.batch_sizes:
        try:
            rows = speeds.measure(forms, shape, batch_size=size, repeats=given.repeats)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not out_of_memory(error):
                raise
            raise ConfigError(f"--batch-sizes: got {size}, wanted fewer images: there is no memory for them") from error
        Console(width=max(terminal.width, 110)).print(_speeds(rows, f"batch {size}, {given.repeats} turns; {device}"))
        print_line(terminal, speeds.recommend(rows))


def _speeds(rows: Sequence[Measured], title: str) -> Table:
    """Figures of every form."""
    table = Table("form", title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("ms", "of dense's time", "memory, MB", "file, kB", "multiply-adds", "differs by"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = f"{row.ratio:.2f} ({row.lowest:.2f} to {row.highest:.2f})"
        sizes = (f"{row.peak_bytes / 1e6:,.1f}", f"{row.num_bytes / 1e3:,.0f}", f"{row.multiply_adds:,}")
        table.add_row(row.form, f"{1e3 * row.seconds:.3f}", ratio, *sizes, f"{row.difference:.0e}")
    return table


def _what_changed(before: LoadedTicket, after: LoadedTicket) -> Table:
    """Sizes of a ticket's dense network, of the ticket and of the smaller one: in all, and of every layer that differs.

    The dense network is that of the family: a ticket that was shrunk before has less than it.
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
    """A network's weights, multiply-adds, and the output features (or heads) of its layers."""
    shapes = {name: shape for name, (shape, _) in shapes_of(model, image_shape).items()}
    weights = {tuple(name.split("/")[1:]): shape for name, shape in shapes.items() if name.startswith("params/")}
    counts = (sum(map(math.prod, weights.values())), multiply_adds(model, image_shape))
    features = {}
    for path, shape in weights.items():
        if path[-1] == "kernel":
            name, axis = (path[:-2], -2) if path[-2] == "query" else (path[:-1], -1)
            features.setdefault(trees.name(name), shape[axis])
    return dict(zip(_TOTALS, counts, strict=True)) | features
