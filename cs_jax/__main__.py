"""`python -m cs_jax COMMAND`."""

from cs_jax import commands

if __name__ == "__main__":
    commands.leave(commands.main())
