"""The commands `python -m cs_jax COMMAND`: what each does between its words and its exit code."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cs_jax import compilation, connectivity, console, experiment, flags, processes, run_directory, stored_config
from cs_jax.checkpoints import Checkpoints
from cs_jax.config import Config, flag
from cs_jax.console import Terminal, say
from cs_jax.data import Data, fingerprint
from cs_jax.errors import ConfigError, one_of
from cs_jax.executor import Executor
from cs_jax.export_commands import export, import_state_dict
from cs_jax.flags import MODULE, command_parser
from cs_jax.health import Health
from cs_jax.interrupts import Interrupts, Stopped
from cs_jax.progress import Observer, Observers
from cs_jax.run_directory import RunDirectory
from cs_jax.search import NonFiniteLossError, Problem
from cs_jax.sweep.commands import pareto, sweep
from cs_jax.ticket_commands import AccuracyError, shrink, speed, ticket, verify
from cs_jax.tracking import TensorBoard, Tracker, Tracking


def run(
    settings: Config,
    *,
    trackers: Sequence[Tracker] = (),
    terminal: Console | None = None,
    executor: Executor | None = None,
    watch: Interrupts | None = None,
) -> dict[str, Any]:
    """The whole experiment that a config asks for, from where an earlier process left it, with all its files.

    Args:
        settings: what is asked.
        trackers: told of every epoch's figures, beside TensorBoard.
        terminal: where it is shown; standard output by default.
        executor: takes the steps; by default those of this run alone.
        watch: hears signals; by default one that listens to them from here on.

    Returns:
        What summary.json holds.

    Raises:
        ConfigError: it cannot be done as asked.
        NonFiniteLossError: in which round, epoch and step.
        Stopped: on SIGINT or SIGTERM, after the run was saved.
        OSError: a file cannot be written.
    """
    started, path = time.perf_counter(), settings.run_directory
    terminal = terminal or Terminal(quiet=not processes.is_leader())
    processes.check_same(_what_runs(settings))
    with watch or Interrupts() as watch, console.warnings_as_lines(terminal), contextlib.ExitStack() as stack:
        figures = TensorBoard(path / run_directory.TENSORBOARD_FOLDER)
        tracking = stack.enter_context(Tracking(settings, [figures, *trackers]))
        unused = settings.without_effect()
        if unused:
            say(terminal, f"without effect: {', '.join(unused)}, which --method {settings.method} makes no use of")
        new = processes.from_leader(lambda: not run_directory.holds_run(path))
        if new:
            processes.from_leader(lambda: run_directory.check_free(settings))
            problem, data = experiment.prepare(settings, executor)  # before anything is written
            hashed = _fingerprint(data)
            directory = stack.enter_context(run_directory.opened(settings, new=True))
            processes.from_leader(lambda: directory.begin(hashed))
        else:
            processes.from_leader(lambda: run_directory.check_same(settings))
            summary = processes.from_leader(lambda: run_directory.read_summary(path))
            if summary is not None:
                console.print_result(terminal, summary)
                reported = (path / run_directory.REPORT_FILE).exists() or not processes.is_leader()
                if settings.report and not reported:
                    write_report(path)
                say(terminal, f"{path}: finished before, nothing was trained")
                return summary
            directory = stack.enter_context(run_directory.opened(settings, new=False))
            problem, data = experiment.prepare(settings, executor)
            hashed = _fingerprint(data)
            for name, (began, now) in processes.from_leader(lambda: directory.check_same(hashed)).items():
                say(terminal, f"goes on with {name} {now}, began with {began}: figures may differ in the last digits")
        summary = go_on(settings, problem, data, directory, tracking, watch, terminal, new=new)
        directory.write_summary(summary)
        console.print_result(terminal, summary)
        if settings.report and processes.is_leader():
            write_report(path)
        say(terminal, f"{path}: {', '.join(directory.files())}; {time.perf_counter() - started:.0f} s")
    return summary


def _what_runs(settings: Config) -> dict[str, Any]:
    """What has to be the same in all processes of a run."""
    fields = stored_config.to_json(settings)
    versions = {name: version for name, version in run_directory.versions().items() if name != "cs_jax"}
    asked = {flag(name): value for name, value in fields.items() if name != "data_dir"}
    return {"cs_jax": processes.code_version(), **versions, **asked}


def _fingerprint(data: Data) -> str:
    """That of the data, which all processes have to have."""
    found = fingerprint(data)
    processes.check_same({"data": found})
    return found


def go_on(
    settings: Config,
    problem: Problem,
    data: Data,
    directory: RunDirectory,
    tracking: Observer,
    watch: Interrupts,
    terminal: Console,
    *,
    new: bool,
) -> dict[str, Any]:
    """What is left of the experiment; saved where a signal ends it."""
    folder = directory.path / run_directory.CHECKPOINTS_FOLDER
    health = Health(settings, 0 if data.validation is None else len(data.validation))
    with (
        Checkpoints(settings, problem, folder, directory.path / run_directory.METRICS_FILE) as checkpoints,
        watch.held(),
    ):
        progress = checkpoints.restore()
        processes.from_leader(lambda: directory.go_on_from(progress))
        if progress is not None:
            at_end = progress.epoch == settings.epochs
            where = "its end" if at_end else f"epoch {progress.epoch}, step {progress.step}"
            say(terminal, f"goes on from {progress.phase_name()}, {where}")
        elif not new:
            say(terminal, "there is no checkpoint yet: begins from the start")
        try:
            with console.ProgressDisplay(settings, terminal) as display:
                told = (directory, tracking, display, health) if processes.is_leader() else ()
                observers = Observers(*told, checkpoints, watch)
                return experiment.run(settings, problem, data, directory, observers, progress)
        except Stopped as stop:
            saved = checkpoints.save_latest()
            stop.hint = f"; saved: go on with --resume {directory.path}" if saved else "; nothing to save yet"
            raise
        except BrokenPipeError:  # nobody reads what is printed
            if not processes.are_several():  # a save is everybody's, and the others are elsewhere
                checkpoints.save_latest()
            raise
        except OSError as error:
            raise OSError(f"{error}; the same command goes on from the last checkpoint") from error


def write_report(path: Path) -> list[Path]:
    from cs_jax import report  # matplotlib loads for a while, and only a run's end wants it

    return report.write_report(path)


def train(arguments: Sequence[str], *, prog: str) -> None:
    """search a ticket, rewind it, retrain it, and report; or go on with a run that stopped"""
    words = [flags.dashed(word) for word in arguments]
    coordinator, count, index = flags.pop_processes(words)
    tickets = flags.pop_tickets(words)
    settings = flags.parse(words, prog=prog)
    if coordinator is not None and tickets is not None:
        raise ConfigError(
            f"--tickets: got {tickets} beside --coordinator, wanted one of them: a run is of all processes"
        )
    if coordinator is not None:
        processes.start(coordinator, count, index, prog=prog)
    if tickets is None:
        run(settings)
        return
    from cs_jax import several  # which runs what is above

    several.train(settings, tickets)


def report(arguments: Sequence[str], *, prog: str) -> None:
    """write report.html and its plots for one run, or compare several"""
    parser = command_parser(prog, report)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", type=Path, help="folder for the comparison of several runs (comparison)")
    given = parser.parse_args(arguments)
    if len(given.runs) == 1 and given.out is None:
        written = write_report(given.runs[0])
    else:
        from cs_jax import report as reports

        written = reports.write_comparison(given.runs, given.out or Path("comparison"))
    for path in written:
        say(Console(), str(path))


def connect(arguments: Sequence[str], *, prog: str) -> None:
    """train a finished run's ticket twice, on other batches, and measure the line between the two"""
    parser = command_parser(prog, connect)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--points", type=int, default=11, help="networks on the line, with its two ends (11)")
    parser.add_argument("--seed", type=int, default=0, help="of the batches of the two trainings (0)")
    given = parser.parse_args(arguments)
    connectivity.check(points=given.points, seed=given.seed)
    settings, begun = connectivity.read_run(given.run)
    terminal, path = Console(), given.run / run_directory.CONNECTIVITY_FILE
    with (
        Interrupts() as watch,
        console.warnings_as_lines(terminal),
        run_directory.opened(settings, new=False) as directory,
    ):
        problem, data = experiment.prepare(settings)
        directory.check_same(fingerprint(data))
        try:
            with console.ProgressDisplay(connectivity.for_display(settings), terminal) as display:
                observers = Observers(display, watch)
                found = connectivity.measure(
                    settings, problem, data.test, begun, observers, points=given.points, seed=given.seed
                )
        except Stopped as stop:
            stop.hint = "; nothing was written"
            raise
        with watch.held():  # a signal that comes now is too late
            connectivity.write(path, found)
            reported = (given.run / run_directory.REPORT_FILE).exists()
            written = write_report(given.run)[:1] if reported else []
    terminal.print(connectivity.describe(found))
    for file in (path, *written):
        say(terminal, str(file))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "ticket": ticket,
    "verify": verify,
    "shrink": shrink,
    "speed": speed,
    "report": report,
    "connect": connect,
    "export": export,
    "import": import_state_dict,
    "sweep": sweep,
    "pareto": pareto,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `COMMAND words...` and returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {MODULE} COMMAND ...\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<8} {command.__doc__}")
        print(f"\n{MODULE} COMMAND --help tells more.")
        return 0
    if words[0] not in COMMANDS:
        return _complain(MODULE, f"error: got {words[0]!r}, wanted {one_of(words[0], COMMANDS)}", 2)
    return answer(f"{MODULE} {words[0]}", COMMANDS[words[0]], words[1:])


def answer(prog: str, command: Callable[..., None], arguments: Sequence[str]) -> int:
    """Exit code of a command: 2 for words that cannot be used, 1 for what went wrong; both with one line on stderr."""
    compilation.keep_programs()
    try:
        with processes.told():
            command(arguments, prog=prog)
    except ConfigError as error:
        return _complain(prog, f"error: {error}", 2)
    except processes.LostProcessError as error:
        return _complain(prog, f"error: {error}", 1)
    except NonFiniteLossError as error:
        advice = "the last checkpoint is from before; try a lower --lr, --score-lr or --lmbda in a new run"
        return _complain(prog, f"stopped: {error}; {advice}", 1)
    except AccuracyError as error:
        return _complain(prog, f"error: {error}", 1)
    except Stopped as stop:
        return _complain(prog, f"interrupted by {stop.number.name}{stop.hint}", stop.exit_code)
    except KeyboardInterrupt:
        return _complain(prog, "interrupted", 130)
    except BrokenPipeError:  # nobody reads on, as with `| head`
        return 1
    except OSError as error:
        return _complain(prog, f"error: {error}", 1)
    except BaseException as error:
        if not processes.are_several() or (isinstance(error, SystemExit) and not error.code):
            raise
        traceback.print_exc()  # and out at once, by `leave`: at JAX's own end this process would wait for the others
        return 1
    return 0


def _complain(prog: str, message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"{prog}: {message}", file=sys.stderr)
    return code


def leave(exit_code: int) -> None:
    """Ends the process."""
    if exit_code:  # at once: computations still in flight can crash the interpreter while it is taken down
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(exit_code)
