"""Decides which folder a command may write into: an empty one or one of its own kind, never its input.

A command checks before it reads or removes anything. Symbolic links are followed first, so that a link to the
input counts as the input. The files of a folder identify it: `config.json` of a run has the run's settings,
that of a Hugging Face model has its `model_type`. Log files from a shell or a scheduler do not count.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from examples.llama.reporting.files import CONFIG, METRICS, SUMMARY

Kind = Literal["nothing", "run", "comparison", "evaluation", "model", "something else"]
"""The kinds of content of a folder."""

LOCK, REPLACED = "run.lock", ".replaced"
"""Names of a folder's lock, and of the folder in which an old run waits while another replaces it."""

CHECKPOINTS, ITEMS = "checkpoints", "items.jsonl"
"""Names of a run's folder of checkpoints, and of an evaluation's file of single problems."""

_PASSED_OVER = (LOCK, REPLACED, ".*.part", "*.log", "*.out", "*.err", "log.txt", "stdout", "stderr")
_OF_RUN = frozenset(
    {
        *(CONFIG, METRICS, f"{METRICS}.old", SUMMARY, "tokenizer.json", CHECKPOINTS),
        *("damaged-checkpoints", "tensorboard", "wandb"),
    }
)
_OF_COMPARISON = frozenset({"comparison.json", "plan.json", "timing.json", "tuned_rates.json"})
_NAMES: dict[Kind, str] = {
    "run": "a training run",
    "comparison": "a comparison",
    "evaluation": "an evaluation",
    "model": "a Hugging Face model",
}


class FolderError(FileExistsError, ValueError):
    """A command may not write to its output; the message gives the reason and the remedy."""


def check_output(
    out: Path,
    kind: Kind,
    inputs: Mapping[str, str | Path | None],
    *,
    flag: str = "--out",
    may_be_inside: bool = False,
) -> None:
    """Refuses a folder that is not valid for a command's output.

    Args:
        out: The folder.
        kind: The kind of the output; the folder must be empty or hold that kind.
        inputs: The command's inputs, by flag. Values that are not existing paths (`hf:NAME`, None) are ignored.
        flag: The flag that names the folder.
        may_be_inside: Whether the output may lie below an input, as an evaluation does below its run.

    Raises:
        FolderError: It is a file, cannot be written, holds something else, or overlaps an input.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     model, out = Path(name, "model"), Path(name, "model", "run")
    ...     model.mkdir()
    ...     check_output(Path(name, "run"), "run", {"--model": model, "--data": "stdlib"})
    ...     try:
    ...         check_output(out, "run", {"--model": model})
    ...     except FolderError as error:
    ...         print(str(error).replace(name, "~"))
    --out ~/model/run lies in --model ~/model; give another folder to write to
    """
    for name, path in inputs.items():
        check_apart(out, name, path, flag=flag, may_be_inside=may_be_inside)
    check_writable(out, flag=flag)
    found = kind_of(out)
    if found not in ("nothing", kind):
        held = _NAMES.get(found) or f"files that are no run's ({_some_names(out)})"
        raise FolderError(f"{flag} {out} holds {held}; give a new folder or an empty one")


def check_apart(
    out: Path,
    name: str,
    path: str | Path | None,
    *,
    flag: str = "--out",
    may_be_inside: bool = False,
) -> None:
    """Refuses an output that is the input, contains it or lies in it.

    Raises:
        FolderError: It does; the message names both.
    """
    if not path or not _exists(Path(path).expanduser()):
        return
    source, target = Path(path).expanduser().resolve(), out.expanduser().resolve()
    if source == target or (target.exists() and source.samefile(target)):
        raise FolderError(f"{flag} {out} is also {name}; give another folder to write to")
    if target in source.parents:
        raise FolderError(f"{flag} {out} holds {name} {path}; give another folder to write to")
    inside = source in target.parents
    if inside and (not may_be_inside or CHECKPOINTS in target.relative_to(source).parts):
        raise FolderError(f"{flag} {out} lies in {name} {path}; give another folder to write to")


def check_writable(out: Path, *, flag: str = "--out") -> None:
    """Refuses a folder that is a file, lies under one or is not writable, without creating anything.

    Raises:
        FolderError: It is; the message names the part of the path that prevents writing.
    """
    place = out.expanduser().absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "is a file" if place.is_file() else "is no folder"
        raise FolderError(f"{flag} {out} cannot be written: {place} {what}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise FolderError(f"{flag} {out} cannot be written: {place} is read-only")


def check_file(
    path: Path, inputs: Mapping[str, str | Path | None], keys: frozenset[str], *, flag: str
) -> None:
    """Refuses a file to write that is an input, a folder, or a file of another kind.

    Args:
        path: The file.
        inputs: The command's inputs, by flag.
        keys: Keys of the file's JSON object, or of its first line's, if this command wrote it.
        flag: The flag that names the file.

    Raises:
        FolderError: It is one of them, or cannot be written.
    """
    for name, source in inputs.items():
        check_apart(path, name, source, flag=flag, may_be_inside=True)
    if path.is_dir():
        raise FolderError(f"{flag} {path} is a folder; name a file")
    check_writable(path.parent, flag=flag)
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            found = _object(file.readline()) or _object(path.read_bytes())
        if not keys <= found.keys():
            raise FolderError(f"{flag} {path} is another file of yours; give a new name")


def make_folder(out: Path, *, flag: str = "--out") -> None:
    """Makes a folder and those above it.

    Raises:
        FolderError: The system refuses; the message says why.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{flag} {out} cannot be written ({error.strerror})") from error


def kind_of(folder: Path) -> Kind:
    """The kind of a folder's content, from its files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     empty = kind_of(Path(name))
    ...     _ = (Path(name) / "config.json").write_text('{"model_type": "llama"}')
    ...     empty, kind_of(Path(name))
    ('nothing', 'model')
    """
    names = _names(folder)
    if not names:
        return "nothing"
    config, summary = _fields(folder / CONFIG), _fields(folder / SUMMARY)
    if "settings" in config and "command" in config:
        return "run"
    if "model_type" in config or any(name.endswith(".safetensors") for name in names):
        return "model"
    if ITEMS in names and "problems" in summary:
        return "evaluation"
    # A run that a crash stopped early, or whose config.json is damaged, has only its own files.
    if names <= _OF_RUN and not config:
        return "run"
    if names & _OF_COMPARISON or all(_is_part_of_comparison(folder / name) for name in names):
        return "comparison" if CONFIG not in names else "something else"
    return "something else"


def _is_part_of_comparison(path: Path) -> bool:
    if not path.is_dir() or path.name not in ("runs", "tuning"):
        return False
    return all(
        kind_of(one) in ("run", "nothing") if one.is_dir() else one.suffix == ".json"
        for one in path.iterdir()
    )


def _names(folder: Path) -> frozenset[str]:
    """The entries of a folder that count."""
    if not folder.is_dir():
        return frozenset()
    names = (path.name for path in folder.iterdir())
    return frozenset(
        name for name in names if not any(fnmatch.fnmatch(name, one) for one in _PASSED_OVER)
    )


def _some_names(folder: Path) -> str:
    names = sorted(_names(folder))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _fields(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty if it cannot be read."""
    try:
        return _object(path.read_bytes())
    except OSError:
        return {}


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _exists(path: Path) -> bool:
    """Whether a path exists; False for text that cannot be a path (`synthetic:0` may be too long a name)."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
