"""Metrics of a run: the writer of JSON lines and TensorBoard events, and the reader."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from examples.llama.reporting.files import METRICS, jsonable, write_text
from examples.llama.reporting.wandb_run import WandbMode, WandbRun


class MetricsWriter:
    """Writes the metrics of a run as JSON lines and, on request, for TensorBoard and Weights & Biases.

    Every line is flushed when it is written, so a crash loses nothing. The lines of an earlier run in the
    folder stay beside the new ones under the suffix `.old`. Its event files are removed, since TensorBoard
    would mix the two. A run that resumes from a checkpoint keeps the lines up to its step, and drops later
    lines and a line that a crash cut short.

    Args:
        folder: The run's folder; made if it is missing.
        tensorboard: Whether to write event files into `folder/tensorboard` too.
        active: Whether to write at all; among several processes one does.
        wandb: Whether to write to Weights & Biases too, online or offline.
        keep_until: Step up to which the folder's lines are kept; None keeps none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricsWriter(Path(folder), tensorboard=False) as writer:
    ...         writer.write("train", 1, {"loss": 2.5, "grad_norm": float("inf")})
    ...     read_metrics(Path(folder))
    [{'kind': 'train', 'step': 1, 'loss': 2.5, 'grad_norm': 'Infinity'}]
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = True,
        active: bool = True,
        wandb: WandbMode | None = None,
        keep_until: int | None = None,
    ):
        self._file: TextIO | None = None
        self._events = None
        self._wandb: WandbRun | None = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        if keep_until is not None:
            _truncate(folder, keep_until)
        elif path.exists():
            path.replace(path.with_suffix(path.suffix + ".old"))
        self._file = path.open("w" if keep_until is None else "a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter  # protobuf is slow to import

            events = folder / "tensorboard"
            if keep_until is None:
                for old in events.glob("events.out.tfevents.*"):
                    old.unlink()
                self._events = SummaryWriter(str(events))
            else:
                self._events = SummaryWriter(str(events), purge_step=keep_until + 1)
        if wandb is not None:
            self._wandb = WandbRun(folder, wandb, resumed=keep_until is not None)

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Writes one line: the kind of numbers, the step, and the numbers by name."""
        if self._file is None:
            return
        line = {"kind": kind, "step": step, **jsonable(numbers)}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                if math.isfinite(value):  # tensorboardX prints a long warning for others
                    self._events.add_scalar(f"{kind}/{name}", value, step)
            self._events.flush()
        if self._wandb is not None:
            self._wandb.write(kind, step, numbers)

    def sync(self) -> None:
        """Waits until the lines so far are on disk, since a checkpoint must not be newer than they are."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _truncate(folder: Path, step: int) -> None:
    """Keeps the lines up to a step; after a crash there is the old file or the new one."""
    path = folder / METRICS
    lines = read_metrics(folder) if path.exists() else []
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
    write_text(path, "".join(kept))


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics file, without a last line that a crash cut short.

    Args:
        folder: The run's folder.
        kind: Only lines of this kind.
    """
    lines = []
    for text in (folder / METRICS).read_bytes().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # not JSON, or bytes that are not text
            break
    return [line for line in lines if kind is None or line["kind"] == kind]
