"""Places names at the points of a picture and the ends of its lines without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

FONT = 9.0
"""Font size of names: nine points of a picture nine inches wide are ten pixels at a width of 700."""

_LETTER, _LINE = 0.56 * FONT, 1.3 * FONT


def label_points(axes: Axes, points: Sequence[tuple[float, float, str, Any]]) -> None:
    """Writes each label beside its point in a colour, moved up or down away from other labels and points.

    A line joins a moved label to its point. Empty labels are omitted.
    """
    # Offsets are valid only for the final size of the axes, which the layout determines when drawing.
    axes.figure.canvas.draw()
    per_point = axes.figure.dpi / 72  # offsets are in points, positions in pixels
    (left_edge, floor), (edge, ceiling) = (
        axes.transAxes.transform(corner) / per_point for corner in ((0, 0), (1, 1))
    )
    places = [axes.transData.transform((x, y)) / per_point for x, y, *_ in points]
    # Left, right and height of the areas to keep free: markers, then labels too.
    taken = [(x - 6.0, x + 6.0, y) for x, y in places]
    for (x, y, text, colour), (at_x, at_y) in sorted(
        zip(points, places, strict=True), key=lambda pair: pair[0][1]
    ):
        if not text:
            continue
        width = _LETTER * len(text)
        right = at_x + 9 + width < edge or at_x - 9 - width < left_edge
        start = at_x + 9 if right else at_x - 9 - width

        def free(height: float, start: float = start, width: float = width) -> bool:
            inside = floor + 0.5 * _LINE < height < ceiling - 0.5 * _LINE
            return inside and not any(
                start < high and low < start + width and abs(height - y2) < _LINE
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
            fontsize=FONT,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
            arrowprops={**line, "shrinkA": 0, "shrinkB": 0} if abs(move) > 6 else None,
        )


def name_at_the_right(
    axes: Axes, ends: Sequence[tuple[str, float | None, float, dict[str, Any]]]
) -> None:
    """Writes names in the right margin, each joined to the end of its line.

    Args:
        axes: The axes of the lines.
        ends: For each line its name, its end (None: at the edge of the axes), and its style.
    """
    if not ends:
        return
    # Heights are valid only for the final size of the axes; names in the margin change only the width.
    axes.figure.canvas.draw()
    per_point = axes.figure.dpi / 72
    heights = [axes.transData.transform((1, y))[1] / per_point for _, _, y, _ in ends]
    low, high = (axes.transAxes.transform((0, y))[1] / per_point for y in (0, 1))
    for (name, x, y, style), place in zip(ends, spread(heights, _LINE), strict=True):
        colour = style["color"]
        height = (place - low) / (high - low)
        axes.annotate(
            name,
            (1.0 if x is None else x, y),
            xycoords=axes.get_yaxis_transform() if x is None else "data",
            xytext=(1.07, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=FONT,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "linestyle": ":",
                "relpos": (0, 0.5),
                "shrinkA": 12,
                "shrinkB": 0,
            },
        )
        axes.plot(1.05, height, transform=axes.transAxes, clip_on=False, markersize=5, **style)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least a gap apart, in the same order and near the originals.

    Neighbours that are too close become a block around their mean, and blocks that then touch merge.

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
