"""Description of a ticket for the terminal: facts, and a table of masked layers."""

import math

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cs_jax.core import trees
from cs_jax.core.schema import printable
from cs_jax.tickets.ticket import LoadedTicket, dense_sizes


def describe(ticket: LoadedTicket, *, file_size: int | None = None) -> RenderableType:
    """Facts of a ticket and a table of its masked layers, for printing with rich.

    Args:
        ticket: a loaded ticket.
        file_size: size of the ticket file in bytes; None omits this line.
    """
    facts = Table.grid("", "", padding=(0, 2))
    for label, value in _facts(ticket, file_size).items():
        facts.add_row(label, Text(printable(value), overflow="fold"))
    layers = Table("layer", title="Masked layers", box=box.SIMPLE_HEAD, title_justify="left")
    layers.columns[0].overflow = "fold"
    for header in ("shape", "kept", "density"):
        layers.add_column(header, justify="right")
    for name, layer in ticket.metadata["layers"].items():
        size = math.prod(layer["shape"])
        shape = "×".join(map(str, layer["shape"])) or "scalar"
        kept = f"{round(layer['density'] * size):,} of {size:,}"
        layers.add_row(Text(printable(name)), shape, kept, f"{layer['density']:.2%}")
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
        "model": str(model.get("name") or "custom") + (f", shrunk to {features}" if features else ""),
        "classes": f"{model['num_classes']:,}" if model.get("num_classes") else "-",
        "images": "×".join(map(str, model.get("image_shape") or ())) or "-",
        "data set": about.get("dataset") or "-",
        "accuracy": ", ".join(f"{name} {share:.2%}" for name, share in accuracy.items()) or "-",
        "density": f"{about['density']:.2%} ({kept:,} of {masked:,} maskable weights)",
        "mask scale": f"{about['mask_scale']:g}",
        "weights": f"{kept + total - masked:,} of {total:,}, including {total - masked:,} without a mask",
        "form": about["form"] + (", with the rewound network" if ticket.rewound else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items()) or "-",
        "sha256": about["sha256"],
    }
    if file_size is not None:
        share = file_size / dense_bytes
        facts["size"] = f"{file_size:,} bytes, {share:.1%} of the dense weights ({dense_bytes:,} bytes)"
    return facts
