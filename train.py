"""Search a ticket, rewind it, retrain it: flags -> config -> the experiment -> files. `train.py --help` lists flags.

The same as `python -m cs_jax train`, for those who have the source.
"""

import sys
from collections.abc import Sequence

try:
    from cs_jax import commands
except KeyboardInterrupt:  # it takes seconds
    raise SystemExit(130) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one experiment, or what is left of it, and returns the exit code."""
    return commands.answer("train.py", commands.train, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    commands.leave(main())
