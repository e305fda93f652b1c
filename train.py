"""Searches for a ticket, rewinds it, retrains it and writes the files of the run. `train.py --help` lists the flags.

Equivalent to `python -m cs_jax train`, for a checkout of the source.
"""

import signal
import sys
from collections.abc import Sequence

# Importing libraries takes seconds. During the imports, Ctrl-C ends the process at once: there is nothing to save, and
# a KeyboardInterrupt could be lost in a library's callback or print a traceback.
is_loading = __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if is_loading:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from cs_jax import commands  # noqa: E402

if is_loading:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or resumes one experiment and returns the exit code."""
    return commands.run_command("train.py", commands.train.train, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    commands.exit_process(main())
