"""Pictures of a comparison, for screens and for readers who do not see all colours."""

from __future__ import annotations

import math
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

from examples.llama.comparing.rows import Row, family
from examples.llama.reporting.summary import size

# Okabe and Ito's palette without its yellow, which is too pale for lines; then as many colours as
# there are optimizers, told apart by their markers too.
COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    *("#7F7F7F", "#5B3A8C", "#8C5A2B", "#7A8B1F"),
)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "h")


LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
CROWDED = 10
"""More rows than these have no room for their names beside their points."""
LEGEND_COLUMNS = 4


def plot_comparison(rows: Sequence[Row], path: Path, title: str, footer: str) -> None:
    """Draws held-out loss against tokens, and held-out perplexity against optimizer state.

    Rows that differ in rank alone have one colour. Many rows are named in a legend below both panels.

    Args:
        rows: What to show; a run that diverged has its curve, but no point.
        path: The PNG file.
        title: What was trained, and on how much.
        footer: How the picture was made.
    """
    crowded = len(rows) > CROWDED
    height = 5.2 + (0.19 * math.ceil(len(rows) / LEGEND_COLUMNS) if crowded else 0.0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), layout="constrained")
    figure.suptitle(title)
    styles = row_styles(rows)
    _loss_curves(left, rows, styles)
    room = write_footer(figure, footer)
    if crowded:
        legend = figure.legend(
            *left.get_legend_handles_labels(),
            loc="lower center",
            bbox_to_anchor=(0.5, room),
            ncols=LEGEND_COLUMNS,
            fontsize=8,
            handlelength=4,
        )
        figure.canvas.draw()
        room = legend.get_window_extent().y1 / figure.bbox.height + 0.01
        legend.set_in_layout(False)
    else:
        left.legend(loc="upper right", fontsize=9)
    keep_room(figure, room)
    _perplexity_against_state(right, rows, styles)
    save(figure, path)


def row_styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Colour and marker of each row by its family, and its line by its place among the family's ranks."""
    members: dict[str, list[int]] = {}
    for row in rows:
        members.setdefault(family(row).key, []).append(row.rank or 0)
    families = list(members)
    styles = []
    for row in rows:
        key = family(row).key
        index, place = families.index(key), sorted(members[key]).index(row.rank or 0)
        styles.append(
            {
                "color": COLOURS[index % len(COLOURS)],
                # Shifted from one round of the colours to the next, so that no two are alike.
                "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
                "linestyle": LINES[place % len(LINES)],
            }
        )
    return styles


def write_footer(figure: Figure, footer: str) -> float:
    """Writes small print at the bottom of a picture; returns the share of the height that it takes."""
    lines = textwrap.wrap(footer, 190)
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=6.5, color="0.4", va="bottom")
    return (0.1 + 0.105 * len(lines)) / figure.get_size_inches()[1]


def keep_room(figure: Figure, room: float) -> None:
    """Keeps the panels above a share of the height: figure texts are no part of the constrained layout."""
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))  # type: ignore[union-attr]


def save(figure: Figure, path: Path) -> None:
    """Writes a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _loss_curves(axes: Axes, rows: Sequence[Row], styles: Sequence[dict[str, Any]]) -> None:
    for row, style in zip(rows, styles, strict=True):
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


def _perplexity_against_state(
    axes: Axes, rows: Sequence[Row], styles: Sequence[dict[str, Any]]
) -> None:
    axes.set_title("Held-out perplexity against optimizer state")
    axes.set_xlabel("optimizer state (log scale)")
    axes.set_xscale("log", base=2)
    axes.margins(x=0.3, y=0.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.grid(alpha=0.3)
    # An optimizer without state has no place on a logarithmic axis; a byte stands for none.
    points = [
        (max(row.optimizer_state_bytes, 1), row.heldout_perplexity, row, style)
        for row, style in zip(rows, styles, strict=True)
        if row.status == "finished"
    ]
    for x, y, _, style in points:
        axes.plot(x, y, markersize=9, **{**style, "linestyle": "none"})
    perplexity_axis(axes)
    if len(rows) <= CROWDED:
        label_points(
            axes, [(x, y, f"{row.label}  {y:.1f}", style["color"]) for x, y, row, style in points]
        )
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    for x, y, row, _ in sorted(points, key=lambda point: point[2].rank or 0):
        lines.setdefault(family(row).key, []).append((x, y))
    colours = {family(row).key: style["color"] for *_, row, style in points}
    for key, line in lines.items():
        axes.plot(*zip(*line, strict=True), color=colours[key], linewidth=0.8)


def perplexity_axis(axes: Axes) -> None:
    """A logarithmic vertical axis for what is drawn, with round numbers also over a short range."""
    axes.set_ylabel("perplexity (log scale)")
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


def label_points(axes: Axes, points: Sequence[tuple[float, float, str, Any]]) -> None:
    """Writes each label beside its point in a colour, moved up or down from other labels and points.

    A label that had to be moved is joined to its point. Empty labels are left out.
    """
    # Offsets hold only for the final size of the axes, which the layout decides when drawing.
    axes.figure.canvas.draw()
    per_point = axes.figure.dpi / 72  # offsets are in points, positions in pixels
    edge = axes.transAxes.transform((1, 0))[0] / per_point
    places = [axes.transData.transform((x, y)) / per_point for x, y, *_ in points]
    # Left, right and height of what must not be covered: markers, then labels too.
    taken = [(x - 6.0, x + 6.0, y) for x, y in places]
    for (x, y, text, colour), (at_x, at_y) in sorted(
        zip(points, places, strict=True), key=lambda pair: pair[0][1]
    ):
        if not text:
            continue
        width = 4.7 * len(text)
        right = at_x + 9 + width < edge
        start = at_x + 9 if right else at_x - 9 - width

        def free(height: float, start: float = start, width: float = width) -> bool:
            return not any(
                start < high and low < start + width and abs(height - y2) < 11.0
                for low, high, y2 in taken
            )

        moves = (sign * move for move in range(400) for sign in (1.0, -1.0))
        move = next((move for move in moves if free(at_y + move)), 0.0)
        taken.append((start, start + width, at_y + move))
        line = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.6,
            "relpos": (0 if right else 1, 0.5),
        }
        axes.annotate(
            text,
            (x, y),
            textcoords="offset points",
            xytext=(9 if right else -9, move),
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={**line, "shrinkA": 0, "shrinkB": 0} if abs(move) > 6 else None,
        )


def _bytes(value: float) -> str:
    return size(value).replace(".00", "") if value >= 1 else ""


def _thousands(value: float, _: object) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value else "0"
