"""The rows of a comparison, as a terminal table and as Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from examples.llama.optimizers.registry import optimizer_entry
from examples.llama.optimizers.variants import Variant
from examples.llama.reporting.summary import RunSummary, perplexity, size

_OF_SUMMARY = (
    *("optimizer", "status", "learning_rate", "rate_source", "train_loss", "steps", "tokens"),
    *("parameters", "optimizer_state_bytes", "state_ratio", "tokens_per_second"),
    "median_step_seconds",
)
"""Fields of the summary in a row's JSON, beside the held-out loss and perplexity."""


@dataclass(frozen=True)
class Row:
    """One optimizer's result.

    Attributes:
        summary: The summary of its run; its `rate_source` is the comparison's.
        label: Its name for readers.
        step_time_ratio: Step time over AdamW's, measured in turns after the runs; None without measurement.
        paired_step_seconds: Median step of that measurement.
        heldout_curve: Pairs of tokens and held-out loss.
        train_curve: Pairs of tokens and training loss.
        variant: The key of the optimizer and its options; the optimizer's name if it has none.
        rank: Rank of its factors or projections, or None.
        options: The options of the key.
    """

    summary: RunSummary
    label: str
    step_time_ratio: float | None = None
    paired_step_seconds: float | None = None
    heldout_curve: list[tuple[float, float]] = field(default_factory=list)
    train_curve: list[tuple[float, float]] = field(default_factory=list)
    variant: str = ""
    rank: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def optimizer(self) -> str:
        """The optimizer's name."""
        return self.summary.optimizer

    @property
    def finished(self) -> bool:
        """Whether the run reached its end; otherwise it diverged."""
        return self.summary.status == "finished"

    @property
    def heldout_loss(self) -> float:
        """Mean loss over the held-out tokens at the end; infinite if the run diverged."""
        loss = self.summary.heldout_loss
        return loss if self.finished and loss is not None else math.inf

    @property
    def heldout_perplexity(self) -> float:
        """The perplexity exp(loss) of these tokens."""
        return perplexity(self.heldout_loss)

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON, with the fields of the summary that `_OF_SUMMARY` names."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        del own["summary"]
        heldout = {name: getattr(self, name) for name in ("heldout_loss", "heldout_perplexity")}
        return {**{name: getattr(self.summary, name) for name in _OF_SUMMARY}, **heldout, **own}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Row:
        """A row from `to_dict`, or from its JSON. Other fields of the summary are empty."""
        own = {one.name for one in dataclasses.fields(cls)} & set(stored)
        ratio, state = stored["state_ratio"], stored["optimizer_state_bytes"]
        lost = {"preset": "", "seed": 0, "corpus_sha256": "", "planned_steps": stored["steps"]}
        lost["adamw_state_bytes"] = round(state / ratio) if ratio else 1
        loss = {"heldout_loss": float(stored["heldout_loss"])}
        summary = RunSummary.from_dict({**lost, **stored, **loss})
        return cls(summary, **{name: stored[name] for name in own})


def make_row(summary: RunSummary, rate_source: str, lines: Sequence[dict[str, Any]]) -> Row:
    """A row from a run's summary, the source of its learning rate, and its metrics lines."""
    return Row(
        dataclasses.replace(summary, rate_source=rate_source),
        optimizer_entry(summary.optimizer).label,
        heldout_curve=_curve(lines, "heldout"),
        train_curve=_curve(lines, "train"),
    )


def with_times(row: Row, ratio: float, seconds: float) -> Row:
    """Adds the step times measured in turns."""
    return dataclasses.replace(row, step_time_ratio=ratio, paired_step_seconds=seconds)


def family(row: Row) -> Variant:
    """The row's optimizer and options without its rank; the rows of a family differ only in rank.

    The rank of embedding and head goes with the rank of matrices; families differ in whether they have one.
    """
    options = {name: value for name, value in row.options.items() if name != "rank"}
    if "table_rank" in options:
        options["table_rank"] = "low"
    return Variant(row.optimizer, options)


HEADER = ("optimizer", "perplexity", "loss", "rate", "state", "state/AdamW", "step/AdamW")
"""Held-out perplexity and loss, peak learning rate, optimizer state, and state bytes and step time over
AdamW's; fits a terminal of 80 columns."""


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, under `HEADER`."""
    run = row.summary
    ratio = "-" if row.step_time_ratio is None else f"{row.step_time_ratio:.2f}"
    return (
        row.label,
        f"{row.heldout_perplexity:.2f}" if row.finished else f"diverged ({run.steps})",
        f"{row.heldout_loss:.4f}" if row.finished else "-",
        f"{run.learning_rate:g}",
        size(run.optimizer_state_bytes),
        f"{run.state_ratio:.3f}",
        ratio,
    )


def rich_table(rows: Sequence[Row], title: str) -> Table:
    """The rows for the terminal; the best perplexity is bold."""
    table = Table(title=title, padding=(0, 0), collapse_padding=True)
    for name in HEADER:
        # A variant's long label is wrapped; a number never is.
        first = name == "optimizer"
        table.add_column(name, justify="left" if first else "right", no_wrap=not first)
    best = min((row.heldout_loss for row in rows), default=math.inf)
    for row in rows:
        is_best = row.heldout_loss == best < math.inf
        table.add_row(*cells(row), style="bold" if is_best else None)
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with the state of each optimizer and the source of each learning rate."""
    entries = [optimizer_entry(name) for name in dict.fromkeys(row.optimizer for row in rows)]
    lines = [
        "| " + " | ".join(HEADER) + " |",
        "|" + "|".join("---" if name == "optimizer" else "---:" for name in HEADER) + "|",
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
        "What each stores:",
        "",
        *(f"- {entry.label}: {entry.state}" for entry in entries),
        "",
        "Rates: " + "; ".join(f"{row.label} {row.summary.rate_source}" for row in rows) + ".",
    ]
    return "\n".join(lines) + "\n"


def _curve(lines: Sequence[dict[str, Any]], kind: str) -> list[tuple[float, float]]:
    return [(line["tokens"], float(line["loss"])) for line in lines if line["kind"] == kind]
