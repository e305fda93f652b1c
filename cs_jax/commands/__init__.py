"""The commands `python -m cs_jax COMMAND`: dispatch, error messages and exit codes."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from cs_jax.commands import export, report, sweep, ticket, train
from cs_jax.commands.parser import MODULE
from cs_jax.commands.train import run
from cs_jax.core.errors import ConfigError, one_of
from cs_jax.experiment.observers.interrupts import Stopped
from cs_jax.experiment.search import NonFiniteLossError
from cs_jax.training import compile_cache, processes

__all__ = ["COMMANDS", "run_command", "exit_process", "main", "run"]

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "ticket": ticket.ticket,
    "verify": ticket.verify,
    "shrink": ticket.shrink,
    "speed": ticket.speed,
    "report": report.report,
    "connect": report.connect,
    "export": export.export,
    "import": export.import_state_dict,
    "sweep": sweep.sweep,
    "pareto": sweep.pareto,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `COMMAND ARGUMENTS` and returns the exit code.

    Args:
        arguments: command-line arguments after the module name; None means the arguments of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {MODULE} COMMAND ...\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<8} {command.__doc__}")
        print(f"\n{MODULE} COMMAND --help describes a command.")
        return 0
    if words[0] not in COMMANDS:
        return _complain(MODULE, f"error: command {words[0]!r}: must be {one_of(words[0], COMMANDS)}", 2)
    return run_command(f"{MODULE} {words[0]}", COMMANDS[words[0]], words[1:])


def run_command(prog: str, command: Callable[..., None], arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code; prints one line on stderr for most failures.

    The code is 2 for invalid arguments, 128 plus the signal's number after a signal, and 1 for other failures.

    Args:
        prog: program and command, printed at the start of the line.
        command: one of `COMMANDS`.
        arguments: arguments of the command.
    """
    compile_cache.keep_programs()
    try:
        with processes.explain_lost_process():
            command(arguments, prog=prog)
    except ConfigError as error:
        return _complain(prog, f"error: {error}", 2)
    except processes.LostProcessError as error:
        return _complain(prog, f"error: {error}", 1)
    except NonFiniteLossError as error:
        advice = "the last checkpoint is from an earlier step; start a new run with a lower --lr, --score-lr or --lmbda"
        return _complain(prog, f"stopped: {error}; {advice}", 1)
    except ticket.AccuracyError as error:
        return _complain(prog, f"error: {error}", 1)
    except Stopped as stop:
        return _complain(prog, f"interrupted by {stop.number.name}{stop.hint}", stop.exit_code)
    except KeyboardInterrupt:
        return _complain(prog, "interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has ended, as with `| head`
        return 1
    except OSError as error:
        return _complain(prog, f"error: {error}", 1)
    except BaseException as error:
        if not processes.are_several() or (isinstance(error, SystemExit) and not error.code):
            raise
        traceback.print_exc()  # then `exit_process` skips the exit handlers of JAX, which wait for other processes
        return 1
    return 0


def _complain(prog: str, message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"{prog}: {message}", file=sys.stderr)
    return code


def exit_process(exit_code: int) -> None:
    """Ends the process if the exit code is not 0, without the interpreter's exit handlers."""
    if exit_code:  # running computations can crash the interpreter during shutdown
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(exit_code)
