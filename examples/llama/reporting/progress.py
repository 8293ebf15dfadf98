"""What a run shows while it lasts: a live line on a terminal, plain lines in a log file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress(ABC):
    """Shows how far a run is; a context manager."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    @abstractmethod
    def update(
        self, step: int, *, loss: float, tokens_per_second: float, rate: float, remaining: float
    ) -> None:
        """Shows the state after a step; `remaining` in seconds."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Shows a line that stays."""


def make_progress(console: Console, label: str, total: int) -> Progress:
    """A live line where the console is a terminal, else plain lines."""
    kind = LiveProgress if console.is_terminal else PlainProgress
    return kind(console, label, total)


class LiveProgress(Progress):
    """One line that changes in place."""

    def __init__(self, console: Console, label: str, total: int):
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(escape(label), total=total, numbers="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(
        self, step: int, *, loss: float, tokens_per_second: float, rate: float, remaining: float
    ) -> None:
        """Moves the bar."""
        numbers = (
            f"loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  lr {rate:.2e}  "
            f"{duration(remaining)} left"
        )
        self._bar.update(self._task, completed=step, numbers=numbers)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(escape(text), highlight=False)


class PlainProgress(Progress):
    """One line a log interval, for logs that are read later."""

    def __init__(self, console: Console, label: str, total: int):
        self._console, self._label, self._total = console, label, total

    def update(
        self, step: int, *, loss: float, tokens_per_second: float, rate: float, remaining: float
    ) -> None:
        """Prints a line."""
        self.note(
            f"{self._label} step {step}/{self._total} loss {loss:.3f} "
            f"{tokens_per_second:,.0f} tok/s lr {rate:.2e} {duration(remaining)} left"
        )

    def note(self, text: str) -> None:
        """Prints a line."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time span to read.

    >>> duration(3.2), duration(185), duration(7322)
    ('3s', '3m05s', '2h02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
