"""Common parts of the scripts in this folder: leaves of a tree as JSON rows, one representative per layer."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

FOLDER = pathlib.Path(__file__).parents[2] / "tests" / "layout" / "trees"

Row: TypeAlias = list[Any]
"""A leaf's path, its shape and, if the framework gives them, its input and output axes."""

_LAYER = re.compile(r"(^|[/.])((?:\w+_)?(?:layers?|blocks?|h)[_/.])\d+")


def representatives(rows: Iterable[Row]) -> list[Row]:
    """The rows without those that differ from an earlier one only in the layer's number."""
    seen, kept = set(), []
    for row in rows:
        # Other numbers distinguish kinds (wi_0, w1).
        key = (_LAYER.sub(r"\1\2N", row[0]), *map(str, row[1:]))
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def write(name: str, source: str, models: Mapping[str, Iterable[Row]]) -> None:
    """Writes tests/layout/trees/NAME.json: the source, and each model's rows, one per line."""
    lines = []
    for model, rows in models.items():
        body = ",\n    ".join(json.dumps(row) for row in representatives(rows))
        lines.append(f"  {json.dumps(model)}: [\n    {body}\n  ]")
    text = f'{{"source": {json.dumps(source)}, "models": {{\n' + ",\n".join(lines) + "\n}}\n"
    json.loads(text)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(text)
