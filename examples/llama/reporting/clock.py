"""Times steps that run ahead of the host: a time is known only between two waits for the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any


class StepClock:
    """Times stretches of steps, each from one wait for the device to the next.

    Attributes:
        seconds: Time of all stretches so far, without the time between them (evaluation).
        steps: Steps in all stretches.

    >>> clock = StepClock()
    >>> clock.start(); clock.count(); clock.count(); clock.stop()
    >>> seconds, steps = clock.interval()
    >>> steps, seconds == clock.seconds, clock.median() == seconds / 2
    (2, True, True)
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._started = 0.0
        self._running_steps = 0
        self._interval_start = (0.0, 0)
        self._ordinary: list[float] = []
        self._others: list[float] = []

    def start(self) -> None:
        """Begins a stretch."""
        self._running_steps = 0
        self._started = time.perf_counter()

    def count(self) -> None:
        """Counts a step of the running stretch."""
        self._running_steps += 1

    def stop(self, *, ordinary: bool = True) -> None:
        """Ends a stretch, after a wait for the device.

        Args:
            ordinary: Whether all its steps were plain, without statistics.
        """
        elapsed = time.perf_counter() - self._started
        self.seconds += elapsed
        self.steps += self._running_steps
        if self._running_steps:
            means = self._ordinary if ordinary else self._others
            means.append(elapsed / self._running_steps)

    def interval(self) -> tuple[float, int]:
        """Seconds and steps since the last call, or since the beginning."""
        seconds, steps = self._interval_start
        self._interval_start = (self.seconds, self.steps)
        return self.seconds - seconds, self.steps - steps

    def to_dict(self) -> dict[str, Any]:
        """The completed measurements, as JSON."""
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "interval_start": list(self._interval_start),
            "ordinary": self._ordinary,
            "others": self._others,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> StepClock:
        """A clock that continues from the result of `to_dict`.

        >>> StepClock.from_dict(StepClock().to_dict()).steps
        0
        """
        clock = cls()
        clock.seconds, clock.steps = stored["seconds"], stored["steps"]
        seconds, steps = stored["interval_start"]
        clock._interval_start = (seconds, steps)
        clock._ordinary, clock._others = list(stored["ordinary"]), list(stored["others"])
        return clock

    def median(self) -> float | None:
        """Median over stretches of the mean time of an ordinary step; of any step if none was plain."""
        means = self._ordinary or self._others
        return statistics.median(means) if means else None
