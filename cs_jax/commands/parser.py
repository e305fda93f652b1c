"""The command line: flags of a run, generated from the config, parsers of other commands, complaints in one line."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import tyro

from cs_jax.core.errors import ConfigError, one_of
from cs_jax.core.settings import flag
from cs_jax.experiment.config import Config
from cs_jax.experiment.presets import DEFAULT_PRESET, PRESETS
from cs_jax.experiment.storage.config_file import KINDS, from_json, read_stored
from cs_jax.experiment.storage.paths import CONFIG_FILE

MODULE = "python -m cs_jax"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def command_parser(prog: str, command: Callable[..., None]) -> argparse.ArgumentParser:
    """A parser for the words of a command, whose docstring says what it does; it raises ConfigError."""
    return _Parser(prog=prog, description=(command.__doc__ or "").capitalize() + ".")


def parse(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> Config:
    """Config for the command line `[PRESET] [flags]` or `--resume DIRECTORY`; prints the help where that is asked for.

    Args:
        arguments: words after the program's name; by default those of this process.
        prog: the program's name, for its help.

    Raises:
        ConfigError: an unknown preset or flag, a value that cannot be used, or no run in the directory.
        SystemExit: after the help.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [dashed(word) for word in arguments]
    directory = _pop_resume(arguments)
    if directory is not None:
        if arguments and not arguments[0].startswith("-"):
            raise ConfigError(f"--resume: got the preset {arguments[0]!r} too, wanted none: the run has its settings")
        prog, default = f"{prog} --resume {directory}", dataclasses.replace(_stored_config(directory), out=directory)
        description = f"Goes on with {directory}. Shown here are its settings."
    else:
        preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT_PRESET
        if preset not in PRESETS:
            raise ConfigError(f"preset: got {preset!r}, wanted {one_of(preset, PRESETS)}")
        _add_drops(arguments, PRESETS[preset])
        prog, default, description = f"{prog} {preset}", PRESETS[preset], _description(preset, prog)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(Config, prog=prog, description=description, args=arguments, default=default)
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise ConfigError(_complaint(complaint.getvalue(), arguments)) from None
    if directory is not None and parsed.out != directory:
        raise ConfigError(f"--out: got {parsed.out} beside --resume {directory}, wanted one of them")
    return parsed


def _add_drops(arguments: list[str], preset: Config) -> None:
    """Adds a drop for each epoch of a schedule that is given without them: the last of the preset's."""
    names = [word.partition("=")[0] for word in arguments]
    if "--lr-schedule" in names and "--lr-drops" not in names:
        start = names.index("--lr-schedule")
        values = itertools.takewhile(lambda word: not word.startswith("--"), arguments[start + 1 :])
        count = "=" in arguments[start] or len([*values])
        arguments += ["--lr-drops", *[f"{preset.lr_drops[-1]:g}"] * count]


def pop_processes(arguments: list[str]) -> tuple[str | None, int | None, int | None]:
    """What `--coordinator`, `--processes` and `--process-id` say, taken out of the words; None without.

    Raises:
        ConfigError: one of them has no value that fits, or the first is missing beside the others.
    """
    coordinator = _pop("--coordinator", "HOST:PORT of the first process, or auto", arguments)
    numbers = []
    for name in ("--processes", "--process-id"):
        value = _pop(name, "a number", arguments)
        if value is not None and not re.fullmatch("[0-9]{1,6}", value):
            raise ConfigError(f"{name}: got {value}, wanted a number")
        if value is not None and coordinator is None:
            raise ConfigError(f"{name}: got {value} alone, wanted --coordinator HOST:PORT of the first process too")
        numbers.append(None if value is None else int(value))
    return coordinator, *numbers


def pop_tickets(arguments: list[str]) -> int | None:
    """The number that `--tickets` says, taken out of the words; None without.

    It is no setting of a run, but of how many there are.

    Raises:
        ConfigError: it is no number of at least 1, or comes beside `--resume`, which is about one run.
    """
    value = _pop("--tickets", "a number", arguments)
    if value is None:
        return None
    number = read_tickets(value)
    if any(word.partition("=")[0] == "--resume" for word in arguments):
        raise ConfigError(f"--tickets: got {value} beside --resume, wanted the command that began them: it goes on")
    return number


def read_tickets(value: str, *, auto: bool = False) -> int | None:
    """What a word after `--tickets` says; None for "auto", where that can be.

    Raises:
        ConfigError: it is no number of at least 1.
    """
    if auto and value == "auto":
        return None
    if not re.fullmatch("[0-9]{1,6}", value) or int(value) < 1:
        raise ConfigError(f"--tickets: got {value}, wanted a number of at least 1{' or auto' * auto}")
    return int(value)


def _pop_resume(arguments: list[str]) -> Path | None:
    """The folder that `--resume` names, taken out of the words; None without."""
    value = _pop("--resume", "a run directory", arguments)
    return None if value is None else Path(value).expanduser()


def _pop(name: str, wanted: str, arguments: list[str]) -> str | None:
    """The value of a flag that is none of a config's, taken out of the words; None without."""
    places = [index for index, word in enumerate(arguments) if word.partition("=")[0] == name]
    if not places:
        return None
    if len(places) > 1:
        raise ConfigError(f"{name}: got {len(places)} of them, wanted one")
    index = places[0]
    _, equals, value = arguments.pop(index).partition("=")
    if not equals and index < len(arguments) and not arguments[index].startswith("--"):
        value = arguments.pop(index)
    if not value:
        raise ConfigError(f"{name}: got nothing, wanted {wanted}")
    return value


def dashed(word: str) -> str:
    """`--batch-size` for `--batch_size`: tyro takes both."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _description(preset: str, prog: str) -> str:
    return (
        f"{(Config.__doc__ or '').splitlines()[0]}\n\n"
        f"Usage: {prog} [PRESET] [flags], PRESET one of {', '.join(PRESETS)} ({DEFAULT_PRESET} if none is named); or "
        f"{prog} --resume DIRECTORY, to go on with the run there. Shown here are the defaults of {preset}.\n\n"
        "--tickets N searches N tickets, with the seeds from --seed on, in folders of their own inside --out.\n\n"
        "On several hosts, start it on each of them with --coordinator HOST:PORT --processes N --process-id I beside "
        "the other flags; or with --coordinator auto on a TPU pod or in a cluster of SLURM, Open MPI or Kubernetes."
    )


def _complaint(panel: str, arguments: Sequence[str]) -> str:
    """tyro's boxed panel as one line: the flag, what came, what was wanted."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", panel).strip()
    rows = [row.strip("│ ") for row in text.splitlines()[1:]]  # the first holds the title
    words = " ".join(row for row in rows if row.strip("─-╭╮╰╯ "))
    words = words.split(" For full helptext")[0].removeprefix("Error parsing Config: ")
    unparsed = re.match(r"Error parsing --([\w-]+): ", words)
    if unparsed:
        name = unparsed[1].replace("-", "_")
        kind = next(field.type for field in dataclasses.fields(Config) if field.name == name)
        return f"{flag(name)}: got {_given(flag(name), arguments)}, wanted {KINDS.get(kind, kind)}"
    lacking = re.search(r"(--[\w-]+)'?[^-]*Expected \d+ values?\.", words)
    if words.startswith("Missing value") and lacking:
        return f"{lacking[1]}: got nothing, wanted a value"
    if words.startswith("Unrecognized") and "Perhaps" not in words:
        words += f", wanted flags of --help; a preset ({', '.join(PRESETS)}) comes first"
    return words


def _given(name: str, arguments: Sequence[str]) -> str:
    """What the command line gave for a flag."""
    words = " ".join(arguments).replace(f"{name}=", f"{name} ").split()
    values = words[len(words) - words[::-1].index(name) :]  # the last is what counts
    return " ".join(itertools.takewhile(lambda word: not word.startswith("--"), values)) or "nothing"


def _stored_config(path: Path) -> Config:
    stored = read_stored(path, "--resume")
    try:
        return from_json(stored)
    except ConfigError as error:
        raise ConfigError(f"--resume: got {path}, whose {CONFIG_FILE} cannot be used: {error}") from error
