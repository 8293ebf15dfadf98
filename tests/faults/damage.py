"""Ways in which a checkpoint on disk can be harmed after it was written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from examples.llama.checkpoints import FOLDER


def array_file(out: Path, step: int) -> Path:
    """The largest file of a checkpoint's arrays."""
    files = [p for p in (out / FOLDER / str(step) / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(out: Path, step: int) -> None:
    """Cuts the largest file in half."""
    path = array_file(out, step)
    os.truncate(path, path.stat().st_size // 2)


def flip(out: Path, step: int, at: float = 0.66) -> None:
    """Changes one bit of the largest file."""
    path = array_file(out, step)
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
    "record missing": remove_record,
    "record changed": change_record,
}
"""The ways by name, each a function of the run's folder and the step."""
