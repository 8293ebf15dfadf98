"""The picture of a comparison: held-out loss over the run, and perplexity against optimizer state."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from examples.llama.comparing.labels import label_points, name_at_the_right
from examples.llama.comparing.palette import PALE, coloured, row_styles
from examples.llama.comparing.rows import Row

WIDTH = 9.0
"""Inches; small enough that letters of nine points are readable at a width of 700 pixels."""

SMALLEST_SHARE = 1e-3
"""Position of optimizers with less state than this share of AdamW's."""


def plot_comparison(rows: Sequence[Row], path: Path, title: str, footer: str) -> None:
    """Draws held-out loss against tokens, and held-out perplexity against optimizer state.

    Each row is named at its line and its point. With more than ten rows, the best of each optimizer have colour
    and name, and the others are pale.

    Args:
        rows: The rows; a diverged run has a curve, but no point.
        path: The PNG file.
        title: Description of the training and its size.
        footer: Description of how the picture was made.
    """
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 9.2), layout="constrained")
    shown = coloured(rows)
    others = len(rows) - len(shown)
    pale = f"; pale: {others} more rows, see the table" if others else ""
    figure.suptitle(f"{title}{pale}", fontsize=11)
    styles = styled(rows, shown)
    keep_room(figure, write_footer(figure, footer))
    _loss_curves(upper, rows, styles)
    _perplexity_against_state(lower, rows, styles)
    name_at_the_right(
        upper,
        [
            (row.label, *row.heldout_curve[-1], {**style, "linestyle": "none"})
            for row, style in zip(rows, styles, strict=True)
            if row in shown and row.heldout_curve
        ],
    )
    points = [
        (share(row), row.heldout_perplexity, row, style)
        for row, style in zip(rows, styles, strict=True)
        if row.finished
    ]
    texts = {id(row): f"{row.label}  {row.heldout_perplexity:.1f}" for row in shown}
    if others:
        ends = [
            (texts[id(row)], x, y, {**style, "linestyle": "none"})
            for x, y, row, style in points
            if id(row) in texts
        ]
        name_at_the_right(lower, ends)
    else:
        label_points(lower, [(x, y, texts[id(row)], style["color"]) for x, y, row, style in points])
    save(figure, path)


def styled(rows: Sequence[Row], shown: Sequence[Row]) -> list[dict[str, Any]]:
    """The style of each row: its own if it is highlighted, otherwise pale."""
    of_shown = {id(row): style for row, style in zip(shown, row_styles(shown), strict=True)}
    pale = {"color": PALE, "marker": "o", "linestyle": "-", "zorder": 1}
    return [of_shown.get(id(row), pale) for row in rows]


def write_footer(figure: Figure, footer: str) -> float:
    """Writes small print at the bottom of a picture; returns its share of the height."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(footer, int(16 * width))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=6.5, color="0.4", va="bottom")
    return (0.1 + 0.105 * len(lines)) / height


def keep_room(figure: Figure, room: float) -> None:
    """Keeps the panels above a share of the height, since the constrained layout ignores figure texts."""
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))  # type: ignore[union-attr]


def share(row: Row) -> float:
    """The position on the axis of shares, where an optimizer without state has none on a logarithmic scale."""
    return max(row.summary.state_ratio, SMALLEST_SHARE)


def save(figure: Figure, path: Path) -> None:
    """Writes a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _loss_curves(axes: Axes, rows: Sequence[Row], styles: Sequence[dict[str, Any]]) -> None:
    trained = False
    for row, style in zip(rows, styles, strict=True):
        if row.train_curve and style["color"] != PALE:
            trained = True
            tokens, losses = zip(*row.train_curve, strict=True)
            axes.plot(tokens, losses, color=style["color"], linewidth=0.8, alpha=0.35)
        points = row.heldout_curve or [(float("nan"), float("nan"))]
        tokens, losses = zip(*points, strict=True)
        axes.plot(tokens, losses, linewidth=1.6, markersize=4, **style)
    axes.set_title("Held-out loss" + (" (training loss thin)" if trained else ""), fontsize=10)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss, nats a token")
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.grid(alpha=0.3)


def _perplexity_against_state(
    axes: Axes, rows: Sequence[Row], styles: Sequence[dict[str, Any]]
) -> None:
    axes.set_title("Held-out perplexity at the end against optimizer state", fontsize=10)
    axes.margins(x=0.12, y=0.15)
    for row, style in zip(rows, styles, strict=True):
        if row.finished:
            point = {**style, "linestyle": "none"}
            axes.plot(share(row), row.heldout_perplexity, markersize=8, **point)
    if not any(row.finished for row in rows):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no row has finished", transform=axes.transAxes, ha="center")
        return
    share_axis(axes)
    perplexity_axis(axes)


def share_axis(axes: Axes) -> None:
    """A logarithmic horizontal axis of state as a share of AdamW's."""
    axes.set_xlabel("optimizer state, per cent of AdamW's (log scale)")
    axes.set_xscale("log")
    round_ticks(axes.xaxis, *axes.get_xlim())
    axes.xaxis.set_major_formatter(FuncFormatter(_share_text))
    axes.grid(alpha=0.3)


def perplexity_axis(axes: Axes) -> None:
    """A logarithmic vertical axis for the drawn data, with round numbers also over a short range."""
    axes.set_ylabel("held-out perplexity (log scale)")
    axes.set_yscale("log")
    round_ticks(axes.yaxis, *axes.get_ylim())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def round_ticks(axis: Axis, low: float, high: float) -> None:
    """Round numbers as ticks of a logarithmic axis, whether it spans decades or a part of one."""
    if high < 8 * low:
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 200 * low else (1.0, 2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())


def _share_text(value: float, _: object) -> str:
    return f"\u2264 {100 * value:g} %" if value <= SMALLEST_SHARE else f"{100 * value:g} %"


def _thousands(value: float, _: object) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value else "0"
