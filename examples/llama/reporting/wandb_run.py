"""Logs a run to Weights & Biases, besides the JSON lines: `--wandb online` or `--wandb offline`.

The package is an extra and is imported only on request. Its own environment variables give project, entity and
key (WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from examples.llama.reporting.files import CONFIG, read_json, write_text

WandbMode = Literal["online", "offline"]

PROJECT = "llama-optimizers"
"""The project if WANDB_PROJECT is not set."""


def check_wandb(mode: WandbMode | None) -> None:
    """Raises ValueError if the package is requested but not installed."""
    if mode is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb needs the package of that name; pip install -e '.[wandb]'")


class WandbRun:
    """A run in Weights & Biases; a resumed run keeps its identity from its folder.

    Args:
        folder: The run's folder; the package's own files go into its `wandb`.
        mode: Whether to send the numbers, or only keep them there (`wandb sync` sends them later).
        resumed: Whether the run resumes from a checkpoint.

    Raises:
        ValueError: The package is not installed.
    """

    def __init__(self, folder: Path, mode: WandbMode, *, resumed: bool = False):
        check_wandb(mode)
        wandb: Any = importlib.import_module("wandb")
        kept = folder / "wandb" / "identity.txt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not (resumed and kept.exists()):
            write_text(kept, uuid.uuid4().hex[:12])
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=read_json(folder / CONFIG) or {},
        )
        # The steps come from here: after a resumption some repeat, which the package's own counter would
        # refuse.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Logs the numbers of a line under TensorBoard's names."""
        self._run.log(
            {"step": step, **{f"{kind}/{name}": value for name, value in numbers.items()}}
        )

    def close(self) -> None:
        """Ends the run, and waits until its data is sent or on disk."""
        self._run.finish()
