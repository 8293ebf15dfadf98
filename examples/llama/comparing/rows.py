"""The rows of a comparison, as a terminal table and as Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from examples.llama.optimizers.registry import optimizer_entry
from examples.llama.optimizers.variants import Variant
from examples.llama.reporting.summary import RunSummary, size


@dataclass(frozen=True)
class Row:
    """One optimizer's result.

    Attributes:
        optimizer: Its name.
        label: Its name for readers.
        status: `finished` or `non_finite`.
        learning_rate: Peak learning rate.
        rate_source: The source of that learning rate.
        heldout_loss: Mean loss over the held-out tokens at the end; infinite if the run diverged.
        heldout_perplexity: exp of the held-out loss.
        train_loss: Mean training loss of the last log interval, or None.
        steps: Steps taken.
        tokens: Tokens trained on.
        parameters: Number of parameters.
        optimizer_state_bytes: Bytes of the optimizer's state.
        state_ratio: These bytes as a share of AdamW's.
        tokens_per_second: Over the run.
        median_step_seconds: Over the run.
        step_time_ratio: Step time over AdamW's, measured in turns after the runs; None without measurement.
        paired_step_seconds: Median step of that measurement.
        heldout_curve: Pairs of tokens and held-out loss.
        train_curve: Pairs of tokens and training loss.
        variant: The key of the optimizer and its options; the optimizer's name if it has none.
        rank: Rank of its factors or projections, or None.
        options: The options of the key.
    """

    optimizer: str
    label: str
    status: str
    learning_rate: float
    rate_source: str
    heldout_loss: float
    heldout_perplexity: float
    train_loss: float | None
    steps: int
    tokens: int
    parameters: int
    optimizer_state_bytes: int
    state_ratio: float
    tokens_per_second: float | None
    median_step_seconds: float | None
    step_time_ratio: float | None = None
    paired_step_seconds: float | None = None
    heldout_curve: list[tuple[float, float]] = field(default_factory=list)
    train_curve: list[tuple[float, float]] = field(default_factory=list)
    variant: str = ""
    rank: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def make_row(summary: RunSummary, rate_source: str, lines: Sequence[dict[str, Any]]) -> Row:
    """A row from a run's summary, the source of its learning rate, and its metrics lines."""
    finished = summary.status == "finished"
    loss, perplexity = summary.heldout_loss, summary.heldout_perplexity
    return Row(
        optimizer=summary.optimizer,
        label=optimizer_entry(summary.optimizer).label,
        status=summary.status,
        learning_rate=summary.learning_rate,
        rate_source=rate_source,
        heldout_loss=loss if finished and loss is not None else math.inf,
        heldout_perplexity=perplexity if finished and perplexity is not None else math.inf,
        train_loss=summary.train_loss,
        steps=summary.steps,
        tokens=summary.tokens,
        parameters=summary.parameters,
        optimizer_state_bytes=summary.optimizer_state_bytes,
        state_ratio=summary.state_ratio,
        tokens_per_second=summary.tokens_per_second,
        median_step_seconds=summary.median_step_seconds,
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
    diverged = row.status != "finished"
    ratio = "-" if row.step_time_ratio is None else f"{row.step_time_ratio:.2f}"
    return (
        row.label,
        f"diverged ({row.steps})" if diverged else f"{row.heldout_perplexity:.2f}",
        "-" if diverged else f"{row.heldout_loss:.4f}",
        f"{row.learning_rate:g}",
        size(row.optimizer_state_bytes),
        f"{row.state_ratio:.3f}",
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
        "Rates: " + "; ".join(f"{row.label} {row.rate_source}" for row in rows) + ".",
    ]
    return "\n".join(lines) + "\n"


def _curve(lines: Sequence[dict[str, Any]], kind: str) -> list[tuple[float, float]]:
    return [(line["tokens"], float(line["loss"])) for line in lines if line["kind"] == kind]
