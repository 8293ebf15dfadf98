"""The picture of ranks: perplexity against rank, and against the state that the rank needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from examples.llama.comparing.labels import label_points, name_at_the_right
from examples.llama.comparing.palette import row_styles
from examples.llama.comparing.plots import (
    WIDTH,
    keep_room,
    perplexity_axis,
    save,
    share,
    share_axis,
    write_footer,
)
from examples.llama.comparing.rows import Row, family


@dataclass(frozen=True)
class _Group:
    """Rows of one family by rank, and their style; a row without rank is its own group."""

    label: str
    rows: list[Row]
    style: dict[str, Any]

    @property
    def has_rank(self) -> bool:
        return self.rows[0].rank is not None


def has_ranks(rows: Sequence[Row]) -> bool:
    """Whether at least two finished rows differ in rank alone."""
    return any(len({row.rank for row in group.rows}) > 1 for group in _groups(rows))


def plot_ranks(rows: Sequence[Row], path: Path, title: str, footer: str) -> None:
    """Draws held-out perplexity against rank, and against the state as a share of AdamW's.

    Args:
        rows: The rows; diverged runs are omitted.
        path: The PNG file.
        title: Description of the training and its size.
        footer: Description of how the picture was made.
    """
    groups = _groups(rows)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 10.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    keep_room(figure, write_footer(figure, footer))
    _perplexity_against_rank(upper, groups)
    _perplexity_against_share(lower, groups)
    for axes in (upper, lower):
        axes.margins(y=0.08)
        perplexity_axis(axes)
    name_at_the_right(
        upper,
        [
            (
                group.label,
                group.rows[-1].rank if group.has_rank else None,
                group.rows[-1].heldout_perplexity,
                group.style,
            )
            for group in groups
        ],
    )
    _rank_labels(lower, groups)
    save(figure, path)


def _groups(rows: Sequence[Row]) -> list[_Group]:
    finished = [row for row in rows if row.finished]
    groups: dict[str, _Group] = {}
    for row, style in zip(finished, row_styles(finished), strict=True):
        found = family(row)
        label = found.label.replace(" table r=low", ", tables too")
        group = groups.setdefault(found.key, _Group(label, [], {**style, "linestyle": "-"}))
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
    axes.set_title("Held-out perplexity against rank (dashed: no rank)", fontsize=10)
    axes.set_xlabel("rank (log scale)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)


def _perplexity_against_share(axes: Axes, groups: Sequence[_Group]) -> None:
    for group in groups:
        shares = [share(row) for row in group.rows]
        perplexities = [row.heldout_perplexity for row in group.rows]
        axes.plot(shares, perplexities, linewidth=1.0, markersize=8, **group.style)
    axes.set_title("Held-out perplexity against optimizer state", fontsize=10)
    axes.margins(x=0.1)
    share_axis(axes)


def _rank_labels(axes: Axes, groups: Sequence[_Group]) -> None:
    """Writes the lowest and the highest rank of each line; the other panel shows those between."""
    pairs = [(row, group.style["color"]) for group in groups for row in group.rows]
    texts = _rank_texts([row for row, _ in pairs])
    label_points(
        axes,
        [
            (share(row), row.heldout_perplexity, text, colour)
            for (row, colour), text in zip(pairs, texts, strict=True)
        ],
    )


def _rank_texts(rows: Sequence[Row]) -> list[str]:
    """The rank of a family's rows with the lowest and the highest rank, if there are several."""
    ranks: dict[str, set[int]] = {}
    for row in rows:
        ranks.setdefault(family(row).key, set()).add(row.rank or 0)
    texts = []
    for row in rows:
        own = ranks[family(row).key]
        end = len(own) > 1 and row.rank in (min(own), max(own))
        texts.append(f"r={row.rank}" if end else "")
    return texts
