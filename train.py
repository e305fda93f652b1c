"""Search a ticket, rewind it, retrain it: flags -> config -> the experiment -> files. `train.py --help` lists flags.

The same as `python -m cs_jax train`, for those who have the source.
"""

import signal
import sys
from collections.abc import Sequence

# Until libraries are loaded, which takes seconds, Ctrl-C ends the process at once: nothing is there to be saved, and an
# exception would be lost in a callback of theirs, or end in a traceback.
is_loading = __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if is_loading:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from cs_jax import commands  # noqa: E402

if is_loading:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one experiment, or what is left of it, and returns the exit code."""
    return commands.run_command("train.py", commands.train.train, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    commands.exit_process(main())
