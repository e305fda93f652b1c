"""`report.html` and its plots, of one run or of a sweep, from the files that runs leave behind."""

import json
from collections.abc import Sequence
from pathlib import Path

from cs_jax.core import files
from cs_jax.report import plots, run_page, sweep_page
from cs_jax.report.pages import write
from cs_jax.report.read_run import read
from cs_jax.sweep import statistics
from cs_jax.sweep.results import SweptTicket
from cs_jax.sweep.statistics import Cell, Result

TABLE_FILE = "pareto.md"
FIGURES_FILE = "pareto.json"

__all__ = ["write_pareto", "write_report"]


def write_report(run: Path) -> list[Path]:
    """Paths of report.html and of its plots as PNG files, written into the run directory.

    A run that has not ended, or lacks files, gets a report of what there is, which says what is missing.

    Args:
        run: the run directory.

    Returns:
        report.html first.

    Raises:
        ConfigError: no run, a damaged file, or a folder that cannot be written; nothing is written then.
    """
    with plots.style():
        page = run_page.page(read(run))
    return write(run, page)


def write_pareto(
    name: str,
    results: Sequence[Result],
    missing: Sequence[str],
    out: Path,
    *,
    reference: str,
    tickets: Sequence[SweptTicket] = (),
) -> tuple[list[Path], list[Cell]]:
    """Paths of the report, plots, table and figures of a sweep, written into `out`; and the table's rows.

    Args:
        name: of the sweep.
        results: of its networks.
        missing: a line for each run that has not ended.
        out: folder.
        reference: method that the others are compared with.
        tickets: of its runs, whose masks are compared.

    Raises:
        ConfigError: the folder cannot be written.
    """
    cells = statistics.summarize(results, reference=reference)
    with plots.style():
        page = sweep_page.page(f"Sweep {name}", cells, results, missing, f"{len(results)} networks", tickets, reference)
    written = write(out, page)
    contents = {
        out / TABLE_FILE: statistics.to_markdown(cells).encode(),
        out / FIGURES_FILE: (json.dumps(statistics.to_json(cells), indent=2) + "\n").encode(),
    }
    files.write_all(contents)
    return [*written, *contents], cells
