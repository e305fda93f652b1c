"""HTML reports of runs and sweeps, from the files of the runs."""

import json
from pathlib import Path

from cs_jax.core import files
from cs_jax.report import plots, run_page, sweep_page
from cs_jax.report.pages import write
from cs_jax.report.read_run import read
from cs_jax.report.sweep_cells import SweepResults
from cs_jax.sweep import statistics

TABLE_FILE = "pareto.md"
FIGURES_FILE = "pareto.json"

__all__ = ["SweepResults", "write_pareto", "write_report"]


def write_report(run: Path) -> list[Path]:
    """Writes report.html and its plots as PNG files into a run directory.

    If the run is unfinished or a file is missing, the report shows the available results and names the missing files.

    Args:
        run: the run directory.

    Returns:
        Paths of the files, report.html first.

    Raises:
        ConfigError: the directory is not a run directory or cannot be written, or a file is damaged; nothing is
            written.
    """
    with plots.style():
        page = run_page.page(read(run))
    return write(run, page)


def write_pareto(sweep: SweepResults, out: Path) -> list[Path]:
    """Writes the report of a sweep, its plots, and its results table as Markdown and as JSON.

    Args:
        sweep: results and tickets of the sweep.
        out: folder for the files, usually the sweep directory; created if it does not exist.

    Returns:
        Paths of the files, report.html first.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with plots.style():
        page = sweep_page.page(sweep)
    written = write(out, page)
    contents = {
        out / TABLE_FILE: statistics.to_markdown(sweep.cells).encode(),
        out / FIGURES_FILE: (json.dumps(statistics.to_json(sweep.cells), indent=2) + "\n").encode(),
    }
    files.write_all(contents)
    return [*written, *contents]
