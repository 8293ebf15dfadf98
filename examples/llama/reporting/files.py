"""Files of a run that are written atomically, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
"""Names of a run's files."""

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "grain", "numpy", "tokenizers")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically: after a crash there is the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in an existing folder."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if it is absent or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def jsonable(value: Any) -> Any:
    """Converts a value to strict JSON; numbers that JSON lacks become their names.

    >>> jsonable({"rate": np.float32(0.5), "loss": float("nan"), "out": Path("runs")})
    {'rate': 0.5, 'loss': 'NaN', 'out': 'runs'}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {written(field): getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (np.generic, jax.Array)) or (
        isinstance(value, np.ndarray) and value.ndim == 0
    ):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, Path) else value


def written(field: dataclasses.Field[Any]) -> str:
    """The name of a dataclass's field in files and, with dashes, on the command line.

    It is the field's own, unless its metadata have another `name`.
    """
    return field.metadata.get("name", field.name)


def same_json(stored: Any, value: Any) -> bool:
    """Whether a value equals a stored one, where None equals an absent value.

    A setting that is newer than the file is None if it changes nothing.

    >>> same_json({"b1": None, "b2": 0.9}, {"b2": 0.9, "rank": None})
    True
    """

    def given(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: given(item) for key, item in value.items() if item is not None}
        if isinstance(value, (list, tuple)):
            return [given(item) for item in value]
        return value

    return given(stored) == given(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the numbers, and the device."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": f"{jax.device_count()} x {device.device_kind}",
    }


def command_line(module: str) -> str:
    """The command that started this process, without paths of this machine's interpreter."""
    return " ".join(["python", "-m", module, *sys.argv[1:]])
