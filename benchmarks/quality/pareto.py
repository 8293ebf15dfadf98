"""The Pareto plot: held-out perplexity against the share of AdamW's optimizer state, every point named."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from examples.llama.comparing.plots import perplexity_axis, save, write_footer

LEFT_EDGE = 0.1
"""Per cent of AdamW's state at the left edge; what has less stands on it."""
_CROWDED_FROM = 12.0  # per cent; names of the points from here on stand beside the plot
_OURS, _PEERS = "#0072B2", "#7F7F7F"


@dataclass(frozen=True)
class Point:
    """An optimizer in the plot.

    Attributes:
        label: Its name.
        share: Its state in per cent of AdamW's.
        perplexity: Mean over its seeds.
        low: Lowest perplexity of a seed.
        high: Highest.
        ours: Whether it is one of this repository's.
    """

    label: str
    share: float
    perplexity: float
    low: float
    high: float
    ours: bool


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both state and perplexity, by state.

    >>> a, b, c = (Point(n, x, y, y, y, True) for n, x, y in (("a", 1, 60), ("b", 5, 70), ("c", 50, 40)))
    >>> [point.label for point in front([a, b, c])]
    ['a', 'c']
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.share, point.perplexity)):
        if not kept or point.perplexity < kept[-1].perplexity:
            kept.append(point)
    return kept


def spread_out(places: Sequence[float], distance: float, top: float) -> list[float]:
    """Moves ascending places apart, as little as it takes, so that neighbours keep a distance below `top`.

    >>> spread_out([0.5, 0.5, 0.95], 0.1, 1.0)
    [0.5, 0.6, 0.95]
    >>> [round(place, 2) for place in spread_out([0.9, 0.95, 0.99], 0.1, 1.0)]
    [0.8, 0.9, 1.0]
    """
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + distance) if moved else place)
    limit = top
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - distance
    return moved


def plot_pareto(points: Sequence[Point], path: pathlib.Path, title: str, footer: str) -> None:
    """Draws the points with the range of their seeds, and the front as a stair."""
    figure, axes = plt.subplots(figsize=(11.4, 6.4))
    figure.subplots_adjust(left=0.08, right=0.66, top=0.93, bottom=0.12)
    axes.set_xscale("log")
    axes.set_xlim(LEFT_EDGE, 150)
    best = front(points)
    axes.step(
        [_place(point) for point in best] + [150],
        [point.perplexity for point in best] + [best[-1].perplexity],
        where="post",
        color="0.6",
        linewidth=1,
        zorder=1,
    )
    for point in points:
        axes.errorbar(
            _place(point),
            point.perplexity,
            yerr=[[point.perplexity - point.low], [point.high - point.perplexity]],
            fmt="o" if point.ours else "s",
            color=_OURS if point.ours else _PEERS,
            markeredgecolor="black" if point in best else "none",
            markersize=7,
            linewidth=1,
            capsize=2,
            clip_on=False,
            zorder=2,
        )
    perplexity_axis(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel(
        "optimizer state, of AdamW's (log scale; what has less stands on the left edge)"
    )
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.canvas.draw()
    _name(axes, points, best)
    for label, ours in (("this repository", True), ("others", False)):
        marker, colour = ("o", _OURS) if ours else ("s", _PEERS)
        axes.plot([], [], linestyle="none", label=label, marker=marker, color=colour)
    axes.plot([], [], color="0.6", label="not beaten in both (black rim)")
    axes.legend(loc="lower left", fontsize=8)
    write_footer(figure, footer)
    save(figure, path)


def _place(point: Point) -> float:
    return max(point.share, LEFT_EDGE)


def _name(axes: Axes, points: Sequence[Point], best: Sequence[Point]) -> None:
    """Names the points: beside them on the left, in a column beside the plot where they are crowded."""
    to_axes = axes.transData + axes.transAxes.inverted()
    crowded = sorted(
        (point for point in points if point.share >= _CROWDED_FROM), key=lambda p: p.perplexity
    )
    heights = [to_axes.transform((_place(point), point.perplexity))[1] for point in crowded]
    for point, height in zip(crowded, spread_out(heights, 0.042, 1.0), strict=True):
        axes.annotate(
            f"{point.label}  {point.perplexity:.1f}",
            (_place(point), point.perplexity),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            weight="bold" if point in best else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.75",
                "linewidth": 0.6,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
    ends: list[
        tuple[float, float]
    ] = []  # right end and height of the names above their points so far
    for point in sorted(points, key=lambda p: p.share):
        if point.share >= _CROWDED_FROM:
            continue
        x, y = to_axes.transform((_place(point), point.perplexity))
        text = f"{point.label}  {point.perplexity:.1f}"
        above = all(x > end or abs(y - height) > 0.05 for end, height in ends)
        if above:
            ends.append((x + 0.011 * len(text), y))
        axes.annotate(
            text,
            (_place(point), point.perplexity),
            xytext=(7, 4) if above else (-5, -12),
            textcoords="offset points",
            ha="left" if above else "right",
            fontsize=8,
            weight="bold" if point in best else "normal",
        )
