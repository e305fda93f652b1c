"""Search a ticket, rewind it, retrain it: flags -> config -> the experiment -> files. `train.py --help` lists flags."""

import contextlib
import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from cs_jax import config, console, experiment, interrupts, run_directory
from cs_jax.interrupts import Interrupts
from cs_jax.search import NonFiniteLossError, Observers


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one experiment and returns the exit code: 2 for flags that cannot be used, 1 for a run that went wrong."""
    try:
        with Interrupts() as watch:
            run(config.parse(arguments), Console(), watch)
    except config.ConfigError as error:
        return complain(f"error: {error}", 2)
    except NonFiniteLossError as error:
        return complain(f"stopped: {error}; try a lower --lr, --score-lr or --lmbda", 1)
    except KeyboardInterrupt as stop:
        return complain(f"interrupted{stop}", interrupts.EXIT_CODE)
    except BrokenPipeError:  # nobody reads on, as with `| head`
        return 1
    except OSError as error:
        return complain(f"error: {error}", 1)
    return 0


def run(settings: config.Config, terminal: Console, watch: Interrupts) -> None:
    """Everything between the flags and the result table."""
    started = time.perf_counter()
    run_directory.check_free(settings)
    problem, data = experiment.prepare(settings)
    directory = run_directory.RunDirectory(settings)
    try:
        with console.warnings_as_lines(terminal), console.ProgressDisplay(settings, terminal) as progress:
            summary = experiment.run(settings, problem, data, Observers(watch, directory, progress))
    except KeyboardInterrupt:
        hint = f"; {directory.path} holds the epochs so far: a new run needs another --out, or that folder removed"
        raise KeyboardInterrupt(hint) from None
    directory.write_summary(summary)
    console.print_result(terminal, summary)
    seconds = time.perf_counter() - started
    closing = f"{directory.path}: config.json, metrics.jsonl, summary.json; {seconds:.0f} s"
    terminal.print(closing, markup=False, highlight=False, soft_wrap=True)


def complain(message: str, code: int) -> int:
    """The exit code, after one line on stderr."""
    print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    exit_code = main()
    if exit_code:  # at once: computations still in flight can crash the interpreter while it is taken down
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(exit_code)
