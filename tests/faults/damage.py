"""Ways in which a checkpoint on disk can be harmed after it was written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from examples.llama.training.checkpoints import FOLDER


def array_file(out: Path, step: int) -> Path:
    """The largest file with the numbers of a checkpoint's arrays."""
    files = [p for p in (out / FOLDER / str(step) / "state").rglob("d/*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def every_file(out: Path, step: int) -> list[Path]:
    """All files of a checkpoint."""
    return [p for p in sorted((out / FOLDER / str(step)).rglob("*")) if p.is_file()]


def truncate(out: Path, step: int) -> None:
    """Cuts the largest file in half."""
    path = array_file(out, step)
    os.truncate(path, path.stat().st_size // 2)


def flip(out: Path, step: int, at: float = 0.66) -> None:
    """Changes one bit of the largest file."""
    flip_file(array_file(out, step), at)


def flip_file(path: Path, at: float) -> None:
    """Changes one bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0x10
    path.write_bytes(bytes(data))


def remove(out: Path, step: int) -> None:
    """Removes the largest file."""
    array_file(out, step).unlink()


def empty(out: Path, step: int) -> None:
    """Removes all arrays."""
    folder = out / FOLDER / str(step) / "state"
    shutil.rmtree(folder)
    folder.mkdir()


def cut_metadata(out: Path, step: int) -> None:
    """Cuts the description of the arrays in half."""
    path = out / FOLDER / str(step) / "state" / "_METADATA"
    os.truncate(path, path.stat().st_size // 2)


def remove_record(out: Path, step: int) -> None:
    """Removes the record beside the arrays."""
    shutil.rmtree(out / FOLDER / str(step) / "run")


def change_record(out: Path, step: int) -> None:
    """Changes a number of the record."""
    path = out / FOLDER / str(step) / "run" / "metadata"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "data_iterator": {"next_index": 1}}))


DAMAGES = {
    "file cut in half": truncate,
    "one flipped bit": flip,
    "one flipped bit near the front": lambda out, step: flip(out, step, 0.02),
    "file missing": remove,
    "all arrays missing": empty,
    "description of the arrays cut in half": cut_metadata,
    "record missing": remove_record,
    "record changed": change_record,
}
"""The ways by name, each a function of the run's folder and the step."""
