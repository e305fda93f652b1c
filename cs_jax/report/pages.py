"""What a report's page is made of, and its writing; every text in it is escaped."""

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from cs_jax.core import files
from cs_jax.core.errors import ConfigError
from cs_jax.core.version import __version__
from cs_jax.experiment.storage.paths import REPORT_FILE
from cs_jax.report import plots
from cs_jax.report.plots import Line


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of each heads it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # so many columns hold words, from the first; the others figures
    wide: bool = False  # as wide as the page
    folded: bool = False  # shown on demand


class Plot(NamedTuple):
    """A figure, drawn as both kinds of image."""

    name: str  # of the PNG file, without its ending
    title: str
    remark: str
    alt: str
    svg: bytes
    png: bytes


class Example(NamedTuple):
    """An image that the ticket gets wrong."""

    number: int  # in the test set
    png: bytes
    true: str
    predicted: str
    confidence: str


class Tile(NamedTuple):
    """A figure that the eye should meet first."""

    name: str
    figure: str
    remark: str


@dataclass
class Section:
    """A part of the page. Notes say what is missing."""

    title: str
    notes: list[str] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    command: list[str] = dataclasses.field(default_factory=list)
    parts: list[Plot | Table] = dataclasses.field(default_factory=list)
    examples: list[Example] = dataclasses.field(default_factory=list)


class Page(NamedTuple):
    """What a report shows."""

    title: str
    lead: str
    tiles: list[Tile]
    sections: list[Section]


def write(folder: Path, page: Page) -> list[Path]:
    """Writes the page and its plots: all of them, or none."""
    made = [part for section in page.sections for part in section.parts if isinstance(part, Plot)]
    contents = {folder / REPORT_FILE: _html(page), **{folder / f"{plot.name}.png": plot.png for plot in made}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in contents:
            if path.is_dir():
                raise ConfigError(f"{path}: is a folder, wanted none, or a file that can be replaced")
        files.write_all(contents)
    except OSError as error:
        raise ConfigError(f"{folder}: the report cannot be written there: {error.strerror}") from error
    return list(contents)


def _html(page: Page) -> bytes:
    """The page as one file. Every text is escaped; half of a surrogate pair becomes a question mark."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(page=page, version=__version__).encode("utf-8", "replace")


def plot(name: str, title: str, remark: str, alt: str, figure: Figure) -> Plot:
    return Plot(name, title, remark, alt, *plots.images(figure))


def shown(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "none"
    names = {True: "yes", False: "no", None: "none"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def percent(share: float | None) -> str:
    """A share in [0, 1] in percent; two digits after the point, more where they would all be zero."""
    if share is None:
        return "-"
    return f"{share:.2%}" if share == 0 or share >= 0.001 else f"{100 * share:.2g}%"


def points(accuracy: float | None, reference: float | None) -> str:
    """A difference of accuracies in percentage points, with its sign; empty where one is not known."""
    if accuracy is None or reference is None:
        return ""
    return f"{100 * (accuracy - reference):+.2f}".replace("-", "−")


def numbers(epochs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [math.nan if epoch[key] is None else float(epoch[key]) for epoch in epochs]


def describe_lines(lines: Sequence[Line], *, percents: bool) -> str:
    """Lines in words: where each starts and ends."""
    show = percent if percents else "{:.4g}".format
    parts = []
    for line in lines:
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        (first, start), (last, end) = known[0], known[-1]
        parts.append(f"{line.label}: {show(start)} in epoch {first:g}, {show(end)} in epoch {last:g}")
    return "; ".join(parts) + "."
