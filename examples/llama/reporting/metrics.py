"""The lines of numbers of a run: the writer of JSON lines and TensorBoard events, and the reader."""

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
    """Writes the numbers of a run as JSON lines and, if asked, for TensorBoard and Weights & Biases.

    Every line is flushed when it is written, so that a crash loses nothing. The lines of an earlier run
    in the folder are kept beside the new ones under the suffix `.old`; its event files are removed,
    since TensorBoard would mix the two. A run that goes on from a checkpoint keeps what was written up to its
    step, and nothing else: neither what came after nor a line that a crash cut short.

    Args:
        folder: The run's folder; made if it is missing.
        tensorboard: Write event files into `folder/tensorboard` too.
        active: Write at all; of several processes one does.
        wandb: Write to Weights & Biases too, sending the numbers or only keeping them.
        keep_until: Step up to which the lines of the folder are kept and gone on from; None: of none.

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
        """Writes one line: what kind of numbers, after which step, and the numbers by name."""
        if self._file is None:
            return
        line = {"kind": kind, "step": step, **jsonable(numbers)}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                if math.isfinite(value):  # tensorboardX warns of every other, at length
                    self._events.add_scalar(f"{kind}/{name}", value, step)
            self._events.flush()
        if self._wandb is not None:
            self._wandb.write(kind, step, numbers)

    def sync(self) -> None:
        """Waits until the lines so far are on disk: a checkpoint must not outlive them."""
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
    """Leaves the lines up to a step; after a crash there is the old file or the new one."""
    path = folder / METRICS
    lines = read_metrics(folder) if path.exists() else []
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
    write_text(path, "".join(kept))


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics file; a last line that a crash cut short is left out.

    Args:
        folder: The run's folder.
        kind: Only lines of this kind.
    """
    lines = []
    for text in (folder / METRICS).read_bytes().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # no JSON, or bytes that are no text
            break
    return [line for line in lines if kind is None or line["kind"] == kind]
