"""The picture of what a rank buys: perplexity against rank, and against the state that the rank costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from examples.llama.comparing.plots import (
    keep_room,
    label_points,
    perplexity_axis,
    round_ticks,
    row_styles,
    save,
    write_footer,
)
from examples.llama.comparing.rows import Row, family

SMALLEST_SHARE = 1e-3
"""Where optimizers with less state than this share of AdamW's are drawn."""


@dataclass(frozen=True)
class _Group:
    """Rows of one family by rank, and how they are drawn; a row without rank is a group of its own."""

    label: str
    rows: list[Row]
    style: dict[str, Any]

    @property
    def has_rank(self) -> bool:
        return self.rows[0].rank is not None


def has_ranks(rows: Sequence[Row]) -> bool:
    """Whether at least two rows that finished differ in rank alone."""
    return any(len({row.rank for row in group.rows}) > 1 for group in _groups(rows))


def plot_ranks(rows: Sequence[Row], path: Path, title: str, footer: str) -> None:
    """Draws held-out perplexity against rank, and against the state as a share of AdamW's.

    Args:
        rows: What to show; runs that diverged are left out.
        path: The PNG file.
        title: What was trained, and on how much.
        footer: How the picture was made.
    """
    groups = _groups(rows)
    height = max(5.2, 1.8 + 0.17 * len(groups))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, height), layout="constrained", sharey=True
    )
    figure.suptitle(title)
    keep_room(figure, write_footer(figure, footer))
    _perplexity_against_rank(left, groups)
    _perplexity_against_share(right, groups)
    perplexity_axis(left)
    _name_at_the_right(left, groups)
    _rank_labels(right, groups)
    save(figure, path)


def _groups(rows: Sequence[Row]) -> list[_Group]:
    finished = [row for row in rows if row.status == "finished"]
    groups: dict[str, _Group] = {}
    for row, style in zip(finished, row_styles(finished), strict=True):
        found = family(row)
        group = groups.setdefault(found.key, _Group(found.label, [], {**style, "linestyle": "-"}))
        group.rows.append(row)
    for group in groups.values():
        group.rows.sort(key=lambda row: row.rank or 0)
    return list(groups.values())


def _perplexity_against_rank(axes: Axes, groups: Sequence[_Group]) -> None:
    for group in groups:
        perplexities = [row.heldout_perplexity for row in group.rows]
        if group.has_rank:
            ranks = [row.rank or 0 for row in group.rows]
            axes.plot(ranks, perplexities, linewidth=1.6, markersize=6, **group.style)
        else:
            axes.axhline(perplexities[0], color=group.style["color"], linewidth=1.0, linestyle="--")
    ranks = sorted({row.rank for group in groups for row in group.rows if row.rank is not None})
    axes.set_title("Held-out perplexity against rank (dashed: no rank)")
    axes.set_xlabel("rank (log scale)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)


def _perplexity_against_share(axes: Axes, groups: Sequence[_Group]) -> None:
    for group in groups:
        shares = [_share(row) for row in group.rows]
        perplexities = [row.heldout_perplexity for row in group.rows]
        axes.plot(shares, perplexities, linewidth=1.0, markersize=8, **group.style)
    axes.set_title("Held-out perplexity against optimizer state")
    axes.set_xlabel("optimizer state as a share of AdamW's (log scale)")
    axes.set_xscale("log")
    axes.margins(x=0.1)
    round_ticks(axes.xaxis, *axes.get_xlim())
    axes.xaxis.set_major_formatter(FuncFormatter(_share_text))
    axes.grid(alpha=0.3)


def _rank_labels(axes: Axes, groups: Sequence[_Group]) -> None:
    """Writes the lowest and the highest rank of each line; the other panel tells what is between."""
    pairs = [(row, group.style["color"]) for group in groups for row in group.rows]
    texts = _rank_texts([row for row, _ in pairs])
    label_points(
        axes,
        [
            (_share(row), row.heldout_perplexity, text, colour)
            for (row, colour), text in zip(pairs, texts, strict=True)
        ],
    )


def _rank_texts(rows: Sequence[Row]) -> list[str]:
    """The rank of the rows with the lowest and the highest of a family that has several, else nothing."""
    ranks: dict[str, set[int]] = {}
    for row in rows:
        ranks.setdefault(family(row).key, set()).add(row.rank or 0)
    texts = []
    for row in rows:
        own = ranks[family(row).key]
        end = len(own) > 1 and row.rank in (min(own), max(own))
        texts.append(f"r={row.rank}" if end else "")
    return texts


def _share(row: Row) -> float:
    return max(row.state_ratio, SMALLEST_SHARE)


def _share_text(value: float, _: object) -> str:
    return f"\u2264 {100 * value:g} %" if value <= SMALLEST_SHARE else f"{100 * value:g} %"


def _name_at_the_right(axes: Axes, groups: Sequence[_Group]) -> None:
    """Writes each group's name in the right margin, joined to where its line ends."""
    # Heights hold only for the final size of the axes; names in the margin change the width alone.
    axes.figure.canvas.draw()
    per_point = axes.figure.dpi / 72
    ends = [group.rows[-1].heldout_perplexity for group in groups]
    heights = [axes.transData.transform((1, end))[1] / per_point for end in ends]
    low, high = (axes.transAxes.transform((0, y))[1] / per_point for y in (0, 1))
    for group, end, place in zip(groups, ends, spread(heights, 11.0), strict=True):
        colour = group.style["color"]
        height = (place - low) / (high - low)
        x = group.rows[-1].rank if group.has_rank else 1.0
        axes.annotate(
            group.label,
            (x, end),
            xycoords="data" if group.has_rank else axes.get_yaxis_transform(),
            xytext=(1.08, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "linestyle": ":",
                "relpos": (0, 0.5),
                "shrinkA": 8,
                "shrinkB": 0,
            },
        )
        axes.plot(
            1.065, height, transform=axes.transAxes, clip_on=False, markersize=5, **group.style
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least a gap apart, in the same order and near what they were.

    Neighbours that are too near become a block around their mean, and blocks that then meet are one.

    >>> spread([0.0, 2.0, 100.0, 1.0], 10.0)
    [-9.0, 11.0, 100.0, 1.0]
    """
    blocks: list[tuple[float, list[int]]] = []
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        members = [index]
        middle = heights[index]
        while blocks and middle - blocks[-1][0] < gap * (len(members) + len(blocks[-1][1])) / 2:
            members = blocks.pop()[1] + members
            middle = sum(heights[i] for i in members) / len(members)
        blocks.append((middle, members))
    places = [0.0] * len(heights)
    for middle, members in blocks:
        for position, index in enumerate(members):
            places[index] = middle + gap * (position - (len(members) - 1) / 2)
    return places
