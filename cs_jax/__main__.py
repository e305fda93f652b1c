"""`python -m cs_jax COMMAND`."""

import signal

# As in train.py: Ctrl-C ends the process at once until libraries are loaded.
answer_to_interrupt = signal.getsignal(signal.SIGINT)
if answer_to_interrupt is signal.default_int_handler and __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from cs_jax import commands  # noqa: E402

signal.signal(signal.SIGINT, answer_to_interrupt)

if __name__ == "__main__":
    commands.leave(commands.main())
