"""Parts of a report page, and the HTML of the page; all text is escaped."""

import base64
import dataclasses
import math
from collections.abc import Sequence
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
    """Table of text; the first cell of each row is its header."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # number of text columns, from the left; the other columns have numbers
    wide: bool = False  # full width of the page
    folded: bool = False  # hidden until the reader opens it


class Plot(NamedTuple):
    """Plot as SVG and PNG image."""

    name: str  # name of the PNG file, without the suffix
    title: str
    remark: str
    alt: str
    svg: bytes
    png: bytes


class Example(NamedTuple):
    """Test image that the ticket misclassifies."""

    number: int  # index in the test set
    png: bytes
    true: str
    predicted: str
    confidence: str


class Tile(NamedTuple):
    """Key result at the top of the page."""

    name: str
    figure: str  # the number
    remark: str


@dataclass
class Section:
    """Section of the page. `notes` are highlighted: missing files, unfinished phases, empty tickets."""

    title: str
    notes: list[str] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    command: list[str] = dataclasses.field(default_factory=list)
    parts: list[Plot | Table] = dataclasses.field(default_factory=list)
    examples: list[Example] = dataclasses.field(default_factory=list)


class Page(NamedTuple):
    """Contents of a report."""

    title: str
    lead: str
    tiles: list[Tile]
    sections: list[Section]


def write(folder: Path, page: Page) -> list[Path]:
    """Writes report.html and the plots as PNG files: all files, or none.

    Returns:
        Paths of the files, report.html first.

    Raises:
        ConfigError: the folder cannot be written.
    """
    made = [part for section in page.sections for part in section.parts if isinstance(part, Plot)]
    contents = {folder / REPORT_FILE: _html(page), **{folder / f"{plot.name}.png": plot.png for plot in made}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in contents:
            if path.is_dir():
                raise ConfigError(f"{path}: is a folder; remove it, because the report writes a file with this name")
        files.write_all(contents)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the report: {error.strerror}; check the folder") from error
    return list(contents)


def _html(page: Page) -> bytes:
    """HTML of the page in one file. All text is escaped; a lone surrogate becomes a question mark."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(page=page, version=__version__).encode("utf-8", "replace")


def plot(name: str, title: str, remark: str, alt: str, figure: Figure) -> Plot:
    return Plot(name, title, remark, alt, *plots.images(figure))


def shown(value: Any) -> str:
    """A value of a setting as text."""
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "none"
    names = {True: "yes", False: "no", None: "none"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def percent(share: float | None) -> str:
    """A share in [0, 1] as percent: two decimals, but two significant digits below 0.1%; "-" for None."""
    if share is None:
        return "-"
    return f"{share:.2%}" if share == 0 or share >= 0.001 else f"{100 * share:.2g}%"


def points(accuracy: float | None, reference: float | None) -> str:
    """Difference of two accuracies in percentage points, with a sign; "" if one is None."""
    if accuracy is None or reference is None:
        return ""
    return f"{100 * (accuracy - reference):+.2f}".replace("-", "−")


def describe_lines(lines: Sequence[Line], *, percents: bool) -> str:
    """Text with the first and last value of each line, for the alternative text of a plot."""
    show = percent if percents else "{:.4g}".format
    parts = []
    for line in lines:
        known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        (first, start), (last, end) = known[0], known[-1]
        parts.append(f"{line.label}: {show(start)} in epoch {first:g}, {show(end)} in epoch {last:g}")
    return "; ".join(parts) + "."
