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

from examples.llama.comparing.labels import FONT
from examples.llama.comparing.palette import GREY
from examples.llama.comparing.plots import WIDTH, perplexity_axis, save, write_footer

LEFT_EDGE = 0.1
"""Per cent of AdamW's state at the left edge; what has less stands on it."""
_LINE = 0.029  # of the plot's height; the distance of two names beside it


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
        colour: That of its optimizer.
    """

    label: str
    share: float
    perplexity: float
    low: float
    high: float
    ours: bool
    colour: str = GREY


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
    figure, axes = plt.subplots(figsize=(WIDTH, 7.6))
    figure.subplots_adjust(left=0.08, right=0.6, top=0.94, bottom=0.11)
    axes.set_xscale("log")
    axes.set_xlim(LEFT_EDGE, 150)
    best = front(points)
    axes.step(
        [_place(point) for point in best],
        [point.perplexity for point in best],
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
            color=point.colour,
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
        "optimizer state, per cent of AdamW's (log scale; less stands on the left edge)"
    )
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    for label, marker in (("this repository", "o"), ("others", "s")):
        axes.plot([], [], linestyle="none", label=label, marker=marker, color=GREY)
    axes.errorbar([], [], yerr=[], label="lowest to highest of three seeds", color=GREY, capsize=2)
    axes.plot([], [], color="0.6", label="not beaten in both (black rim, bold)")
    axes.legend(loc="best", fontsize=FONT)
    figure.canvas.draw()
    _name(axes, points, best)
    write_footer(figure, footer)
    save(figure, path)


def _place(point: Point) -> float:
    return max(point.share, LEFT_EDGE)


def _name(axes: Axes, points: Sequence[Point], best: Sequence[Point]) -> None:
    """Names the points in a column beside the plot."""
    to_axes = axes.transData + axes.transAxes.inverted()
    points = sorted(points, key=lambda point: point.perplexity)
    heights = [to_axes.transform((_place(point), point.perplexity))[1] for point in points]
    distance = min(_LINE, 1 / max(len(points), 1))
    for point, height in zip(points, spread_out(heights, distance, 1.0), strict=True):
        axes.annotate(
            f"{point.label}  {point.perplexity:.1f}",
            (_place(point), point.perplexity),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=FONT,
            va="center",
            color=point.colour,
            weight="bold" if point in best else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.75",
                "linewidth": 0.6,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
