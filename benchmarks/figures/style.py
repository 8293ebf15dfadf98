"""Common parts of the pictures: sizes, grids, and their output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from examples.llama.comparing.plots import WIDTH


def panels(columns: int, height: float = 4.2, **options: Any) -> tuple[Figure, Any]:
    """Two panels in a row or three in a column; letters are readable at a width of 700 pixels."""
    if columns > 2:
        size = (WIDTH, 3.4 * columns)
        return plt.subplots(columns, 1, figsize=size, layout="constrained", **options)
    return plt.subplots(1, columns, figsize=(WIDTH, height), layout="constrained", **options)


def finish(axes: Axes, title: str, across: str, up: str, **options: Any) -> None:
    """Titles, grid and whatever `Axes.set` takes."""
    axes.set(xlabel=across, ylabel=up, **options)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)


def whole_numbers(axis: Axis) -> None:
    """Ranks as whole numbers on a logarithmic axis."""
    axis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def short(values: Iterable[float]) -> list[float]:
    """Numbers with four significant digits, for JSON."""
    return [float(f"{value:.4g}") for value in values]
