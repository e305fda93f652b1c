"""The command line: flags of a run, generated from the config classes, and parsers of the other commands."""

import argparse
import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cs_jax.core.errors import ConfigError, closest, in_words, one_of
from cs_jax.core.schema import parse_words
from cs_jax.core.settings import COUNT, NOT_NEGATIVE, Settings, bare_type, field_types, flag
from cs_jax.data.config import DataConfig
from cs_jax.experiment.config import CHOICES, Config
from cs_jax.experiment.presets import DEFAULT_PRESET, PRESETS
from cs_jax.experiment.storage.config_file import from_json, read_stored
from cs_jax.experiment.storage.paths import CONFIG_FILE
from cs_jax.methods.config import MethodConfig
from cs_jax.training.config import TrainingConfig

MODULE = "python -m cs_jax"

_HIDDEN = ("preset",)
"""Fields that are not flags: the first argument sets the preset."""

_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "NAME", Path: "PATH"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invocation(Settings):
    """Flags of the command `train` that are not settings of a run."""

    resume: Path | None = None
    """Run directory to resume, with the settings stored there; other flags override them."""

    tickets: Annotated[int | None, COUNT] = None
    """Number of tickets to search for, with consecutive seeds from --seed on; each has a run directory inside --out."""

    coordinator: str | None = None
    """HOST:PORT of the first process of a run on several hosts, the same value on all hosts. Use auto on a TPU pod,
    and in clusters with SLURM, Open MPI or Kubernetes."""

    processes: Annotated[int | None, COUNT] = None
    """Number of processes of a run on several hosts."""

    process_id: Annotated[int | None, NOT_NEGATIVE] = None
    """Index of this process, from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("processes", "process_id"):
            has_coordinator = getattr(self, name) is None or self.coordinator is not None
            self._check(name, has_coordinator, "requires --coordinator HOST:PORT of the first process")
        alone = "excludes --resume; repeat the command that started the tickets to resume them"
        self._check("tickets", self.tickets is None or self.resume is None, alone)
        alone = "excludes --coordinator; remove one of them"
        self._check("tickets", self.tickets is None or self.coordinator is None, alone)


_GROUPS: dict[type, str] = {
    Invocation: "starting",
    Config: "run",
    MethodConfig: "pruning method",
    TrainingConfig: "training",
    DataConfig: "data",
}
"""Titles of flag groups in the help, by the class that declares the fields."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def command_parser(prog: str, command: Callable[..., None]) -> argparse.ArgumentParser:
    """Parser for the arguments of a command. The docstring of the command is the help text; errors are ConfigErrors."""
    text = command.__doc__ or ""
    return _Parser(prog=prog, description=f"{text[:1].upper()}{text[1:]}.")


def parse(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> Config:
    """The config for the command line `[PRESET] [flags]` or `--resume DIRECTORY [flags]`; see `parse_train`."""
    return parse_train(arguments, prog=prog)[0]


def parse_train(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> tuple[Config, Invocation]:
    """The config for a command line, and the flags that are not settings of a run; prints the help for `--help`.

    Args:
        arguments: command-line arguments after the program's name; None means the arguments of this process.
        prog: name of the program, for the help.

    Raises:
        ConfigError: a preset or flag is unknown, a value is not allowed, or the directory to resume has no run.
        SystemExit: after the help is printed.
    """
    words = [_normalized(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    named = words.pop(0) if words and not words[0].startswith("-") else None
    preset = DEFAULT_PRESET if named is None else named
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset}: must be {one_of(preset, PRESETS)}")
    given = _read_words(words)
    wants_help = given.pop("help", False)
    invocation = Invocation(**_values(Invocation, given))
    base = PRESETS[preset]
    if invocation.resume is not None:
        directory = invocation.resume.expanduser()
        if named is not None:
            raise ConfigError(f"--resume {directory}: excludes the preset {named}; remove the preset")
        prog, base = f"{prog} --resume {directory}", dataclasses.replace(_stored_config(directory), out=directory)
    if wants_help:
        _print_help(base, prog=f"{prog} [PRESET]", description=_description(base, prog))
        raise SystemExit(0)
    values = _values(Config, given)
    if "lr_schedule" in values and "lr_drops" not in values:
        values["lr_drops"] = base.lr_drops[-1:] * len(values["lr_schedule"])
    if invocation.resume is not None and values.get("out", base.out) != base.out:
        raise ConfigError(f"--out {values['out']}: excludes --resume {invocation.resume}; give one of them")
    return dataclasses.replace(base, **values), invocation


def read_tickets(word: str) -> int | None:
    """Value of `--tickets` as a number; None for "auto"."""
    if word == "auto":
        return None
    number = parse_words(word, int, "--tickets") if word.isdecimal() else 0
    if number < 1:
        raise ConfigError(f"--tickets {word}: must be auto or a whole number of at least 1")
    return number


def _make_parser(**about: Any) -> argparse.ArgumentParser:
    """Parser with the flag --help only; raises errors."""
    about = {"usage": "%(prog)s [flags]", "argument_default": argparse.SUPPRESS, **about}
    parser = _Parser(add_help=False, allow_abbrev=False, exit_on_error=False, **about)
    parser.add_argument("-h", "--help", action="store_true", help="Show the flags and their defaults.")
    return parser


def _fields() -> Iterator[tuple[type, str, Any]]:
    """All fields that are flags: class, name and type of each."""
    for kind in (Invocation, Config):
        yield from ((kind, name, hint) for name, hint in field_types(kind).items() if name not in _HIDDEN)


def _print_help(defaults: Config, **about: Any) -> None:
    """Prints every flag with its help text and, for settings of a run, the default."""
    parser = _make_parser(**about)
    groups = {kind: parser.add_argument_group(title) for kind, title in _GROUPS.items()}
    for kind, name, hint in _fields():
        declared_in, text = _help_texts(kind)[name]
        if kind is Config:
            value = getattr(defaults, name)
            text += f" One of: {', '.join(CHOICES[name])}." if name in CHOICES else ""
            text += f" (default: {'none' if value is None else in_words(value)})"
        groups[declared_in].add_argument(flag(name), dest=name, help=text.replace("%", "%%"), **_argument(hint))
    parser.print_help()


def _argument(hint: Any) -> dict[str, Any]:
    """Options of `add_argument` for a type; a tuple accepts any number of values, other types accept one."""
    kind = _plain_type(hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is Literal:
        return {"metavar": "{" + ",".join(typing.get_args(kind)) + "}"}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "*", "metavar": _METAVARS[typing.get_args(kind)[0]]}
    return {"metavar": _METAVARS[kind]}


def _plain_type(hint: Any) -> Any:
    """A field's type without annotations and without None."""
    hint = bare_type(hint)
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if type(None) in typing.get_args(hint) else hint


def _read_words(words: Sequence[str]) -> dict[str, Any]:
    """Texts of the values of each given flag, by field name."""
    parser, flags = _make_parser(), []
    for _, name, hint in _fields():
        flags.append(flag(name))
        parser.add_argument(flag(name), dest=name, **_argument(hint))
    try:
        given, unknown = parser.parse_known_args(_joined(words))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from error
    for word in unknown:
        if word.startswith("-"):
            name = word.partition("=")[0]
            raise ConfigError(f"{name}: unknown flag{closest(name, flags)}; --help lists all flags")
        raise ConfigError(f"{word}: not a flag; a preset ({', '.join(PRESETS)}) must be the first argument")
    return vars(given)


def _values(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the fields of a class whose flags were given."""
    values = {}
    for name, hint in field_types(kind).items():
        if name in given:
            words = given[name]
            values[name] = words if isinstance(words, bool) else parse_words(words, hint, flag(name))
    return values


def _normalized(word: str) -> str:
    """An argument with dashes in the name of the flag: "--batch-size" for "--batch_size"."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _joined(words: Sequence[str]) -> list[str]:
    """The arguments, with "--decay=-1e-4" for "--decay" "-1e-4", because argparse parses -1e-4 as a flag."""
    joined: list[str] = []
    for word in words:
        after_flag = joined and joined[-1].startswith("--") and "=" not in joined[-1]
        if after_flag and _is_negative(word) and ("e" in word or "inf" in word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_negative(word: str) -> bool:
    try:
        return word.startswith("-") and float(word) <= 0
    except ValueError:
        return False


@functools.cache
def _help_texts(kind: type) -> dict[str, tuple[type, str]]:
    """For each field, the class that declares the field, and the string below the field in the source."""
    texts = {}
    for owner in reversed(kind.__mro__):
        if owner in _GROUPS:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
            assert isinstance(tree, ast.ClassDef)
            for field, text in zip(tree.body, tree.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)
                    texts[field.target.id] = (owner, " ".join(ast.literal_eval(text.value).split()))
    return texts


def _description(base: Config, prog: str) -> str:
    purpose = (Config.__doc__ or "").splitlines()[0]
    presets = f"The first argument is a preset: {', '.join(PRESETS)} ({DEFAULT_PRESET} without one)."
    defaults = f"The defaults below are {'from the run' if '--resume' in prog else f'of {base.preset}'}."
    return f"{purpose} {presets} {defaults}"


def _stored_config(path: Path) -> Config:
    stored = read_stored(path, "--resume")
    try:
        return from_json(stored)
    except ConfigError as error:
        raise ConfigError(f"--resume {path}: its {CONFIG_FILE} is not valid: {error}") from error
