"""Results that several workers write: one JSON file under a lock, and claims on what each is doing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from benchmarks.steps.updates import Store
from examples.llama.reporting.folders import FolderError
from examples.llama.reporting.locks import FolderLock

KEYS = (
    "shape",
    "dtype",
    "variant",
    "learning_rate",
    "table_rate",
    "budget",
    "batch_size",
    "seq_len",
    "accumulate",
    "final_rate_fraction",
    "seed",
    "tokens_sha256",
    "device",
)
"""What says which cell it is."""


class SharedStore(Store):
    """Cells in a JSON file that other processes write too: each reads again before it writes, under a lock.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     one, other = (SharedStore(pathlib.Path(folder) / "a.json") for _ in range(2))
    ...     for store, rate in ((one, 1.0), (other, 2.0)):
    ...         store.put(dict.fromkeys(KEYS) | {"learning_rate": rate}, {})
    ...     one.refresh()
    ...     [cell["learning_rate"] for cell in one.cells]
    [1.0, 2.0]
    """

    def __init__(self, path: pathlib.Path):
        super().__init__(path, KEYS)

    def refresh(self) -> None:
        """Reads what the other workers have written."""
        if self.path.exists():
            self.content = json.loads(self.path.read_text())

    def put(self, cell: dict[str, Any], facts: dict[str, Any]) -> None:
        """Adds a cell to those of the file, or replaces it there."""
        with self._alone():
            super().put(cell, facts)

    def mark(self, done: dict[str, Any], facts: dict[str, Any]) -> None:
        """Notes that a search is finished."""
        with self._alone():
            found = self.content.setdefault("searches", [])
            if done not in found:
                found.append(done)
                self.write(facts)

    def trace(self, found: dict[str, Any], facts: dict[str, Any]) -> None:
        """Adds a trace, in the place of the one of the same optimizer, rate and protocol."""
        with self._alone():
            names = [name for name in found if name not in ("points", "group_share")]
            kept = [
                other
                for other in self.content.get("traces", [])
                if any(other.get(name) != found[name] for name in names)
            ]
            self.content["traces"] = [*kept, found]
            self.write(facts)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else writes meanwhile, and the content is what the file holds."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
            self.refresh()
            yield


def claim(folder: pathlib.Path, name: str, *, force: bool = False) -> FolderLock | None:
    """Takes what is named for this process until it ends or releases it; None if another one has it.

    A claim of a process that has ended, however it did, counts for nothing (`FolderLock`).

    Args:
        folder: Where claims are.
        name: What is claimed.
        force: Take the claims of processes of other hosts too.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = claim(pathlib.Path(folder), "adamw")
    ...     second = claim(pathlib.Path(folder), "adamw")
    ...     first.__exit__(None, None, None)
    ...     third = claim(pathlib.Path(folder), "adamw")
    ...     third.__exit__(None, None, None)
    >>> second is None, third is None
    (True, False)
    """
    lock = FolderLock(folder / name, force=force)
    try:
        return lock.__enter__()
    except FolderError:
        return None
