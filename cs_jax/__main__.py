"""`python -m cs_jax COMMAND`."""

import signal

from cs_jax import commands

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # cs_jax/__init__.py set it while libraries were loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    commands.exit_process(commands.main())
