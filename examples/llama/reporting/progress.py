"""The display of a run: a live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress


class Progress(ABC):
    """Shows the progress of a run; a context manager."""

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
        """Shows a permanent line."""


def make_progress(console: Console, label: str, total: int) -> Progress:
    """A live line if the console is a terminal, otherwise plain lines."""
    kind = LiveProgress if console.is_terminal else PlainProgress
    return kind(console, label, total)


@contextlib.contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Shows a wait and its duration while it lasts; nothing if the console is not a terminal."""
    if not console.is_terminal:
        yield
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with RichProgress(*columns, console=console, transient=True) as bar:
        bar.add_task(escape(text), total=None)
        yield


@contextlib.contextmanager
def counting(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of some items are done; gives the function to call with their number so far.

    On a terminal a line changes in place, from the start, so that a compilation shows its time. Elsewhere there
    is a line at each tenth.

    >>> with counting(Console(width=80), "problems", 4) as done:
    ...     done(2)
    ...     done(4)
    problems 2/4, 0s left
    problems 4/4, 0s left
    """
    started = time.perf_counter()
    if console.is_terminal:
        columns = (
            *(SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=24)),
            *(MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}")),
        )
        with RichProgress(*columns, console=console, refresh_per_second=4) as bar:
            task = bar.add_task(escape(label), total=total, left="compiling")

            def show(done: int) -> None:
                bar.update(task, completed=done, left=f"{_left(started, done, total)} left")

            yield show
        return
    said = 0

    def tell(done: int) -> None:
        nonlocal said
        if done == total or 10 * (done - said) >= total:
            said = done
            text = f"{label} {done}/{total}, {_left(started, done, total)} left"
            console.print(escape(text), highlight=False, soft_wrap=True)

    yield tell


def _left(started: float, done: int, total: int) -> str:
    spent = time.perf_counter() - started
    return duration(spent / max(1, done) * (total - done))


class LiveProgress(Progress):
    """One line that changes in place, with a spinner and the elapsed time, since compilation takes minutes."""

    def __init__(self, console: Console, label: str, total: int):
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
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
    """One line per log interval, for later reading."""

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


def say(console: Console, text: str) -> None:
    """Prints a line as it is: no markup, no colours, no line breaks at the edge."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time span as text.

    >>> duration(3.2), duration(185), duration(7322)
    ('3s', '3m05s', '2h02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
