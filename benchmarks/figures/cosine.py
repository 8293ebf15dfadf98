"""Cosine and norm of low-rank momentum by rank, from the numbers of `benchmarks.faithfulness`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.faithfulness import MOMENTS
from benchmarks.figures.style import finish, panels
from examples.llama.comparing.palette import BLUE, GREEN, RED
from examples.llama.comparing.plots import save


def middles(results: Mapping[str, Any], ranks: Sequence[int], moment: str, what: str) -> np.ndarray:
    """For each rank the quantiles over matrices, each the median over the run's second half."""
    half = len(results["steps"]) // 2
    found = [
        np.median(np.array(results["ranks"][str(rank)][f"{moment}/stored/{what}"])[half:], axis=0)
        for rank in ranks
    ]
    return np.array(found).T


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Two panels: cosine and ratio of norms against rank, one line per moment."""
    figure, axes = panels(2)
    ranks = sorted(map(int, results["ranks"]))
    for panel, what in zip(axes, ("cosine", "ratio"), strict=True):
        for moment, colour, marker in zip(MOMENTS, (BLUE, RED, GREEN), "os^", strict=True):
            low, middle, high = middles(results, ranks, moment, what)
            panel.fill_between(ranks, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(ranks, middle, marker + "-", color=colour, label=MOMENTS[moment])
        panel.axhline(1, color="0.6", linewidth=0.8)
        word = "Cosine to" if what == "cosine" else "Norm, of that of"
        finish(
            panel,
            f"{word} the exact momentum",
            "rank (of 192)",
            what if what == "cosine" else "ratio",
            xscale="log",
            ylim=(0, 1.05 if what == "cosine" else 1.3),
        )
        panel.set_xticks(ranks, [str(rank) for rank in ranks])
        panel.minorticks_off()
    axes[0].legend(fontsize=9, loc="lower right")
    save(figure, path)
