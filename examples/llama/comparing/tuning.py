"""Finds an optimizer's peak learning rate: short runs on a grid that grows until the best is inside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.llama.reporting.files import read_json, same_json, write_json


@dataclass(frozen=True)
class Trial:
    """One short run: its peak learning rate and its final held-out loss (infinite if it diverged)."""

    rate: float
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        best: The trial with the lowest loss.
        trials: All trials, by learning rate.
        at_edge: Whether the best learning rate is the lowest or highest tried because the search ran out of
            trials; a better one may lie outside.
    """

    best: Trial
    trials: list[Trial]
    at_edge: bool


def search_rate(
    run: Callable[[float], float], start: float, *, factor: float = 2.0, max_trials: int = 8
) -> SearchResult:
    """Searches `start * factor**k` for integer k, from k = -1, 0, 1 outwards.

    While the best learning rate is at an edge of the grid, the grid grows there. A loss that is not finite
    counts as infinite.

    Args:
        run: A function from a peak learning rate to the held-out loss.
        start: The centre of the grid.
        factor: Ratio of neighbouring learning rates, above 1.
        max_trials: Largest number of runs, at least 3.

    Raises:
        ValueError: A number is out of range.
        RuntimeError: No learning rate that was tried gives a finite loss.

    >>> result = search_rate(lambda rate: abs(math.log2(rate / 8)), start=1.0)
    >>> result.best.rate, [trial.rate for trial in result.trials], result.at_edge
    (8.0, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0], False)
    """
    if not start > 0 or not factor > 1 or max_trials < 3:
        raise ValueError(
            "the search needs a positive start, a factor above 1 and at least 3 trials, got "
            f"{start}, {factor} and {max_trials}"
        )
    losses: dict[int, float] = {}

    def measure(k: int) -> None:
        loss = run(rounded_rate(start * factor**k))
        losses[k] = loss if math.isfinite(loss) else math.inf

    for k in (0, 1, -1):
        measure(k)
    while len(losses) < max_trials:
        low, high = min(losses), max(losses)
        best = min(losses, key=losses.__getitem__)
        if losses[best] == math.inf:
            measure(low - 1)  # everything diverged, so only lower learning rates can help
        elif best == low:
            measure(low - 1)
        elif best == high:
            measure(high + 1)
        else:
            break
    best = min(losses, key=losses.__getitem__)
    if losses[best] == math.inf:
        raise RuntimeError(
            f"no rate from {rounded_rate(start * factor ** min(losses)):g} to "
            f"{rounded_rate(start * factor ** max(losses)):g} gives a finite loss"
        )
    trials = [Trial(rounded_rate(start * factor**k), losses[k]) for k in sorted(losses)]
    return SearchResult(
        Trial(rounded_rate(start * factor**best), losses[best]),
        trials,
        best in (min(losses), max(losses)),
    )


class TrialStore:
    """Stores trials in a file, so that an interrupted search does not repeat them.

    Args:
        path: A JSON file.
        key: The settings that all trials in the file share, as JSON; trials under another key are dropped.
        keep: Whether trials of an earlier call count.
    """

    def __init__(self, path: Path, key: object, *, keep: bool = True):
        self._path, self._key = path, key
        stored = (read_json(path) if keep else None) or {}
        found = stored.get("trials", []) if same_json(stored.get("key"), key) else []
        self._losses = {float(item["rate"]): float(item["loss"]) for item in found}

    def remember(self, run: Callable[[float], float]) -> Callable[[float], float]:
        """The same function, run only for learning rates that the store lacks."""

        def remembered(rate: float) -> float:
            if rate not in self._losses:
                self._losses[rate] = run(rate)
                trials = [{"rate": r, "loss": loss} for r, loss in sorted(self._losses.items())]
                write_json(self._path, {"key": self._key, "trials": trials})
            return self._losses[rate]

        return remembered


def rounded_rate(rate: float) -> float:
    """Rounds to four significant digits, so that a learning rate is readable and can be found again."""
    return float(f"{rate:.4g}")
