"""SIGTERM and Ctrl-C as a flag that the training loop checks between steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

STDERR = 2
"""The file that answers to signals go to, whatever Python writes to at that moment."""


class StopSignals:
    """Turns the first signal into a flag; the second one ends the process at once, as usual.

    A context manager. Outside the main thread, where Python allows no handlers, it does nothing. With several
    processes, JAX's preemption service handles SIGTERM and makes all of them stop after the same step.

    Args:
        terminate: Whether to catch SIGTERM too; without checkpoints that has no benefit.

    Attributes:
        received: The signal, or None.
    """

    def __init__(self, *, terminate: bool):
        self.received: signal.Signals | None = None
        self._signals = [signal.SIGINT]
        if terminate and jax.process_count() == 1:
            self._signals.append(signal.SIGTERM)
        self._sync = terminate and jax.process_count() > 1
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {sig: signal.signal(sig, self._receive) for sig in self._signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for sig, handler in self._previous.items():
            signal.signal(sig, handler)  # pyright: ignore[reportArgumentType]

    def should_stop(self, step: int) -> bool:
        """Whether to stop after a step; all of several processes get the same answer."""
        if self._sync and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        saving = " and saving" if signal.SIGTERM in self._signals or self._sync else ""
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        # Not print: the signal may have interrupted one.
        os.write(STDERR, f"\nStopping after this step{saving}{again}.\n".encode())
        # Restore the handler now, not at the second signal, which may come while C++ runs and Python does not.
        for sig in self._previous:
            signal.signal(sig, signal.SIG_DFL)
