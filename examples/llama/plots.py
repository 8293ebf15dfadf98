"""Pictures of a comparison, for screens and for readers who do not see all colours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from examples.llama.comparison import Row
from examples.llama.report import size

# Okabe and Ito's palette without its yellow, which is too pale for lines; then as many colours as
# there are optimizers, told apart by their markers too.
COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    *("#7F7F7F", "#5B3A8C", "#8C5A2B", "#7A8B1F"),
)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "h")


def plot_comparison(rows: Sequence[Row], path: Path, title: str, footer: str) -> None:
    """Draws held-out loss against tokens, and held-out perplexity against optimizer state.

    Args:
        rows: What to show; a run that diverged has its curve, but no point.
        path: The PNG file.
        title: What was trained, and on how much.
        footer: How the picture was made.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    figure.suptitle(title)
    _loss_curves(left, rows)
    _perplexity_against_state(right, rows)
    # A figure text is no part of the constrained layout: room for it is kept below.
    lines = textwrap.wrap(footer, 190)
    room = 0.02 + 0.02 * len(lines)
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))  # type: ignore[union-attr]
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=6.5, color="0.4", va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _loss_curves(axes: Axes, rows: Sequence[Row]) -> None:
    for index, row in enumerate(rows):
        style = _style(index)
        if row.train_curve:
            tokens, losses = zip(*row.train_curve, strict=True)
            axes.plot(tokens, losses, color=style["color"], linewidth=0.8, alpha=0.35)
        points = row.heldout_curve or [(float("nan"), float("nan"))]
        tokens, losses = zip(*points, strict=True)
        axes.plot(tokens, losses, label=row.label, linewidth=1.6, markersize=4, **style)
    axes.set_title("Held-out loss (training loss pale)")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=9)


def _perplexity_against_state(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Held-out perplexity against optimizer state")
    axes.set_xlabel("optimizer state (log scale)")
    axes.set_ylabel("perplexity (log scale)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(x=0.3, y=0.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    # An optimizer without state has no place on a logarithmic axis; a byte stands for none.
    points = [
        (max(row.optimizer_state_bytes, 1), row.heldout_perplexity, row.label, _style(index))
        for index, row in enumerate(rows)
        if row.status == "finished"
    ]
    for x, y, _, style in points:
        axes.plot(x, y, linestyle="none", markersize=9, **style)
    _label_points(axes, [(x, y, f"{label}  {y:.1f}") for x, y, label, _ in points])


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes each label beside its point, moved up where it would cover another."""
    # Offsets hold only for the final size of the axes, which the layout decides when drawing.
    axes.figure.canvas.draw()
    gap, taken = 12.0, []
    per_point = axes.figure.dpi / 72  # offsets are in points, positions in pixels
    middle = axes.transAxes.transform((0.7, 0))[0] / per_point
    for x, y, text in sorted(points, key=lambda point: point[1]):
        at_x, at_y = axes.transData.transform((x, y)) / per_point
        place = at_y
        while any(abs(at_x - x2) < 120 and abs(place - y2) < gap for x2, y2 in taken):
            place += 1.0
        taken.append((at_x, place))
        right = at_x < middle
        axes.annotate(
            text,
            (x, y),
            textcoords="offset points",
            xytext=(9 if right else -9, place - at_y),
            ha="left" if right else "right",
            va="center",
            fontsize=8,
        )


def _bytes(value: float) -> str:
    return size(value).replace(".00", "")


def _thousands(value: float, _: object) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value else "0"
