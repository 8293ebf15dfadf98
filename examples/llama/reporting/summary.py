"""The summary of a run, for storage and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from examples.llama.reporting.progress import duration

Status = Literal["finished", "interrupted", "preempted", "non_finite", "save_failed"]


@dataclass
class RunSummary:
    """The result of a run, also of one that did not finish.

    Attributes:
        status: Whether it finished.
        message: The reason why it stopped, in a sentence; empty for a finished run.
        preset: Name of the model shape.
        optimizer: Name of the optimizer.
        learning_rate: Peak learning rate.
        rate_source: The source of that learning rate.
        seed: Seed of parameters and data order.
        steps: Steps taken.
        planned_steps: Planned steps.
        skipped: Steps that changed nothing because their loss or gradient was not finite.
        tokens: Tokens trained on.
        train_loss: Mean loss of the last log interval, or None before the first.
        heldout_loss: Mean loss over the held-out tokens at the last evaluation, or None.
        heldout_tokens: Number of these tokens.
        heldout_step: Step of that evaluation.
        parameters: Number of parameters.
        optimizer_state_bytes: Bytes of the optimizer's state, over all devices without copies.
        device_state_bytes: Bytes of it on one device, or None in files from before meshes.
        adamw_state_bytes: Bytes of AdamW's state.
        tokens_per_second: Tokens over the time of training, without compiling and evaluating.
        median_step_seconds: Median over log intervals of the mean time of a step.
        compile_seconds: Time to compile the train steps.
        total_seconds: Wall time of the run without reading the data.
        corpus_sha256: Hash of the corpus.
    """

    status: Status
    preset: str
    optimizer: str
    learning_rate: float
    rate_source: str
    seed: int
    planned_steps: int
    parameters: int
    optimizer_state_bytes: int
    adamw_state_bytes: int
    corpus_sha256: str
    device_state_bytes: int | None = None
    message: str = ""
    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    train_loss: float | None = None
    heldout_loss: float | None = None
    heldout_tokens: int = 0
    heldout_step: int = 0
    tokens_per_second: float | None = None
    median_step_seconds: float | None = None
    compile_seconds: float = 0.0
    total_seconds: float = 0.0

    @property
    def heldout_perplexity(self) -> float | None:
        """The perplexity exp(loss) of the held-out tokens."""
        return None if self.heldout_loss is None else perplexity(self.heldout_loss)

    @property
    def state_ratio(self) -> float:
        """Optimizer-state bytes as a share of AdamW's."""
        return self.optimizer_state_bytes / self.adamw_state_bytes

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RunSummary:
        """A summary from the result of `to_dict`."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in names})

    def to_dict(self) -> dict[str, object]:
        """All fields and the derived numbers, for JSON."""
        return {
            **dataclasses.asdict(self),
            "heldout_perplexity": self.heldout_perplexity,
            "state_ratio": self.state_ratio,
        }


def perplexity(loss: float) -> float:
    """exp(loss), infinite if it overflows.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    return math.exp(loss) if loss < 700 else math.inf


def summary_table(summary: RunSummary) -> Table:
    """The summary as a table for the terminal."""
    title = escape(f"{summary.optimizer} on {summary.preset}: {summary.status}")
    table = Table(title=title, min_width=48)
    table.add_column("result")
    table.add_column("value", justify="right")
    rows = {
        "steps": f"{summary.steps:,} of {summary.planned_steps:,}"
        + (f" ({summary.skipped:,} skipped)" if summary.skipped else ""),
        "tokens": f"{summary.tokens:,}",
        "peak learning rate": f"{summary.learning_rate:g} ({summary.rate_source})",
        "last training loss": _number(summary.train_loss, ".4f"),
        "held-out loss": _number(summary.heldout_loss, ".4f"),
        "held-out perplexity": _number(summary.heldout_perplexity, ".3f"),
        "held-out tokens, at step": f"{summary.heldout_tokens:,}, {summary.heldout_step:,}",
        "parameters": f"{summary.parameters:,}",
        "optimizer state": (
            f"{size(summary.optimizer_state_bytes)} ({summary.state_ratio:.3f} of AdamW's)"
        ),
        "optimizer state of a device": size(
            summary.optimizer_state_bytes
            if summary.device_state_bytes is None
            else summary.device_state_bytes
        ),
        "tokens/s": _number(summary.tokens_per_second, ",.0f"),
        "median step": _number(summary.median_step_seconds, ".4f", " s"),
        "compile": f"{summary.compile_seconds:.1f} s",
        "total": duration(summary.total_seconds),
        "corpus": summary.corpus_sha256[:12],
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def size(number: float) -> str:
    """Bytes as text, in powers of 1024.

    >>> size(512), size(35 * 2**20)
    ('512 B', '35.00 MiB')
    """
    if number < 1024:
        return f"{number:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.2f} {unit}"
    return f"{number / 1024:.2f} TiB"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
