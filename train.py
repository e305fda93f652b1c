"""Search a ticket, rewind it, retrain it: flags -> config -> the experiment -> files. `train.py --help` lists flags."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console

from cs_jax import config, console, experiment, run_directory
from cs_jax.search import NonFiniteLossError, Observers


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one experiment and returns the exit code: 2 for flags that cannot be used, 1 for a run that went wrong."""
    terminal = Console()
    try:
        run(config.parse(arguments), terminal)
    except config.ConfigError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"train.py: stopped: {error}; try a lower --lr or --score-lr", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted; a new run needs another --out, or this run's folder removed", file=sys.stderr)
        return 130
    return 0


def run(settings: config.Config, terminal: Console) -> None:
    """Everything between the flags and the result table."""
    started = time.perf_counter()
    run_directory.check_free(settings)
    problem, data = experiment.prepare(settings)
    directory = run_directory.RunDirectory(settings)
    with console.ProgressDisplay(settings, terminal) as progress:
        summary = experiment.run(settings, problem, data, Observers(directory, progress))
    directory.write_summary(summary)
    terminal.print(console.result_table(summary))
    terminal.print(f"{directory.path}: config.json, metrics.jsonl, summary.json; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
