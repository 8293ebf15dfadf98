"""Starts and ends a command: reads its arguments, reports a user's mistake in one line, returns a status.

A line begins with `error:`, names the flag or the file, and gives the remedy. A mistyped name gets the nearest
one as a suggestion. Errors that are not the user's keep their traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import tyro
from rich.console import Console

from examples.llama.reporting.files import written
from examples.llama.reporting.help import help_class

T = TypeVar("T")

USAGE_EXIT = 2
"""The exit status for a mistake of the user."""

_OTHER_NAMES = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "output": "out",
    "output_dir": "out",
    "model_name_or_path": "model",
    "dataset": "data",
    "bf16": "compute_dtype",
    "max_steps": "steps",
    "num_steps": "steps",
    "gradient_checkpointing": "remat",
    "gradient_accumulation_steps": "accumulate",
    "max_grad_norm": "clip_norm",
    "wd": "weight_decay",
    "optim": "optimizer",
}
"""Names of our options in other trainers."""


def command(
    kind: type[T],
    act: Callable[[T], int],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    usage_errors: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Reads the arguments, runs the command, reports a user's mistake in one line; returns the exit status.

    Args:
        kind: The dataclass of the options.
        act: Runs the command with the options; returns its exit status.
        arguments: The arguments, by default those of the process.
        prog: The command's name in its help.
        usage_errors: Exceptions that the user's arguments or files cause; others are raised.
    """
    config = parse(kind, arguments, prog=prog)
    try:
        return act(config)
    except usage_errors as error:
        return fail(error, kind)


def parse(kind: type[T], arguments: Sequence[str] | None, *, prog: str) -> T:
    """The options of a command line.

    Raises:
        SystemExit: With 2 for arguments that cannot be read, after one line of explanation; 0 after help.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if {"-h", "--help"}.intersection(given):
                tyro.cli(help_class(kind), args=["--help"], prog=prog)
            return tyro.cli(kind, args=given, prog=prog)
    except SystemExit as exit_:
        if exit_.code:
            problem = explain(kind, given)
            print(f"error: {problem}" if problem else said.getvalue().rstrip(), file=sys.stderr)
            raise SystemExit(USAGE_EXIT) from None
        raise


def fail(error: BaseException, kind: Any = None) -> int:
    """Prints the line of an error; returns the exit status of a user's mistake.

    Args:
        error: The error.
        kind: The dataclass of the options, whose names in the message become flags.
    """
    Console(stderr=True).print(
        f"error: {message(error, kind)}", markup=False, highlight=False, soft_wrap=True
    )
    return USAGE_EXIT


def message(error: BaseException, kind: Any = None) -> str:
    """The line of an error: the file of a system error, flags by their names, the nearest name.

    >>> message(FileNotFoundError(2, "No such file or directory", "a.json"))
    'a.json: No such file or directory'
    >>> message(ValueError("unknown optimizer 'sage_hybird'; the optimizers are adamw, sage_hybrid"))
    "unknown optimizer 'sage_hybird'; did you mean 'sage_hybrid'? The optimizers are adamw, sage_hybrid"
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}"
    text = " ".join(text.split("\n"))
    return nearest_said(flags_named(text, kind) if dataclasses.is_dataclass(kind) else text)


def flags_named(text: str, kind: Any) -> str:
    """Replaces Python names of options in a message by flags; one-word names only at the beginning.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     steps: int = 1
    ...     batch_size: int = 1
    >>> flags_named("batch_size 3 is odd", Config), flags_named("steps must be 1", Config)
    ('--batch-size 3 is odd', '--steps must be 1')
    """
    for option in dataclasses.fields(kind):
        flag = f"--{written(option).replace('_', '-')}"
        if "_" in option.name:
            text = re.sub(rf"(?<![\w./'\"-]){option.name}(?![\w/'\"=.])", flag, text)
        else:
            text = re.sub(rf"^{option.name}(?= (must|is|of|needs|wants)\b)", flag, text)
    return text


def nearest_said(text: str) -> str:
    """Adds the nearest of the listed names to a message about an unknown name."""
    found = re.match(
        r"(.*[Uu]nknown [^']*'([^']*)'[^;]*);\s*((?:.*?\b(?:are|of|use))\s+(.*))$", text
    )
    if found is None:
        return text
    name, names = found[2], re.split(r",\s*(?:or )?", found[4].rstrip("."))
    near = closest(name, names)
    if near is None:
        return text
    return f"{found[1]}; did you mean {near!r}? {found[3][0].upper()}{found[3][1:]}"


def closest(name: str, names: Sequence[str]) -> str | None:
    """The nearest of some names, or None if none is near.

    >>> closest("alpacca", ["alpaca", "plain"]), closest("x", ["alpaca"])
    ('alpaca', None)
    """
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)


def explain(kind: Any, arguments: Sequence[str]) -> str | None:
    """The reason in one line why a command line cannot be read; None for uncommon reasons."""
    hints = typing.get_type_hints(kind)
    options = {written(option): option for option in dataclasses.fields(kind)}
    seen = set()
    for position, argument in enumerate(arguments):
        if not argument.startswith("--") or argument == "--":
            continue
        flag, equals, value = argument[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in options and name.removeprefix("no_") in options:
            name = name.removeprefix("no_")
            seen.add(name)
            continue
        if name not in options:
            return _unknown(name, list(options))
        seen.add(name)
        following = arguments[position + 1 :]
        if not equals:
            value = following[0] if following and not following[0].startswith("--") else None
        problem = _wrong_value(hints[options[name].name], value)
        if problem:
            return f"--{name.replace('_', '-')} wants {problem}"
    for name, option in options.items():
        required = (
            option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
        )
        if required and name not in seen:
            return f"--{name.replace('_', '-')} is required"
    return None


def _unknown(name: str, names: Sequence[str]) -> str:
    near = _OTHER_NAMES.get(name)
    if near not in names:
        near = closest(name, names)
    also = f"; did you mean --{near.replace('_', '-')}?" if near else ""
    return f"there is no option --{name.replace('_', '-')}{also} (--help lists them)"


def _wrong_value(hint: Any, value: str | None) -> str:
    """What an option expects instead of a value; empty if the value is valid."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)][:1]
    if hint is bool:
        return ""
    got = "no value" if value is None else f"{value!r}"
    if typing.get_origin(hint) is Literal:
        choices = [str(choice) for choice in typing.get_args(hint)]
        near = None if value is None else closest(value, choices)
        also = f"; did you mean {near!r}?" if near else ""
        return "" if value in choices else f"one of {', '.join(choices)}, got {got}{also}"
    if hint is int:
        return "" if _is_number(value, int) else f"an integer, got {got}"
    if hint is float:
        return "" if _is_number(value, float) else f"a number, got {got}"
    return f"a value, got {got}" if value is None else ""


def _is_number(value: str | None, kind: Callable[[str], float]) -> bool:
    try:
        return value is not None and kind(value) is not None
    except ValueError:
        return False
