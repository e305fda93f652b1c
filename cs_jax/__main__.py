"""`python -m cs_jax COMMAND`."""

import signal

from cs_jax import commands  # noqa: E402

# As in train.py: Ctrl-C ends the process at once until libraries are loaded.
is_loading = __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if is_loading:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if is_loading:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    commands.exit_process(commands.main())
