"""A table of what a ticket file holds."""

import math

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cs_jax.core import trees
from cs_jax.tickets.ticket import LoadedTicket, dense_sizes


def describe(ticket: LoadedTicket, *, file_size: int | None = None) -> RenderableType:
    """What a person wants to know of a ticket, for rich to print: facts, then a table of its masked layers.

    Args:
        ticket: as loaded.
        file_size: of its file, in bytes; left out if not given.
    """
    facts = Table.grid("", "", padding=(0, 2))
    for label, value in _facts(ticket, file_size).items():
        facts.add_row(label, Text(_printable(value), overflow="fold"))
    layers = Table("layer", title="Masked layers", box=box.SIMPLE_HEAD, title_justify="left")
    layers.columns[0].overflow = "fold"
    for header in ("shape", "kept", "density"):
        layers.add_column(header, justify="right")
    for name, layer in ticket.metadata["layers"].items():
        size = math.prod(layer["shape"])
        shape = "×".join(map(str, layer["shape"])) or "scalar"
        kept = f"{round(layer['density'] * size):,} of {size:,}"
        layers.add_row(Text(_printable(name)), shape, kept, f"{layer['density']:.2%}")
    return Group(facts, "", layers)


def _facts(ticket: LoadedTicket, file_size: int | None) -> dict[str, str]:
    about = ticket.metadata
    model = about.get("model") or {}
    accuracy = {name: share for name, share in (about.get("accuracy") or {}).items() if share is not None}
    weights = {trees.name(path): leaf for path, leaf in trees.leaves_by_path(ticket.variables["params"]).items()}
    total, sizes = sum(weight.size for weight in weights.values()), dense_sizes(ticket)
    dense_bytes = sum(sizes[f"params/{name}"] * weight.dtype.itemsize for name, weight in weights.items())
    masked = sum(math.prod(layer["shape"]) for layer in about["layers"].values())
    features = ", ".join(f"{name} {size}" for name, size in (model.get("features") or {}).items())
    kept = round(about["density"] * masked)
    facts = {
        "model": str(model.get("name") or "not named") + (f", made smaller: {features}" if features else ""),
        "classes": f"{model['num_classes']:,}" if model.get("num_classes") else "-",
        "images": "×".join(map(str, model.get("image_shape") or ())) or "-",
        "data set": about.get("dataset") or "-",
        "accuracy": ", ".join(f"{name} {share:.2%}" for name, share in accuracy.items()) or "-",
        "density": f"{about['density']:.2%} ({kept:,} of {masked:,} masked weights)",
        "mask scale": f"{about['mask_scale']:g}",
        "weights": f"{kept + total - masked:,} of {total:,}, {total - masked:,} of them never masked",
        "form": about["form"] + (", with the rewound network" if ticket.rewound else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items()) or "-",
        "sha256": about["sha256"],
    }
    if file_size is not None:
        facts["size"] = f"{file_size:,} bytes, {file_size / dense_bytes:.1%} of the dense weights' {dense_bytes:,}"
    return facts


def _printable(text: str) -> str:
    """Text of a file as one line without control sequences."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
