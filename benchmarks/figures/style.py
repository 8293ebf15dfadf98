"""What the pictures share: colours that everyone can tell apart, grids, and where they are written."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREEN, PINK, SKY, ORANGE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
)
"""Of Okabe and Ito's palette."""


def panels(columns: int, height: float = 4.0, **options: Any) -> tuple[Figure, Any]:
    """A row of panels, wide enough that its letters can be read at the width of a page."""
    return plt.subplots(
        1, columns, figsize=(4.6 * columns, height), layout="constrained", **options
    )


def finish(axes: Axes, title: str, across: str, up: str, **options: Any) -> None:
    """Titles, grid and whatever `Axes.set` takes."""
    axes.set(title=title, xlabel=across, ylabel=up, **options)
    axes.grid(alpha=0.3)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
