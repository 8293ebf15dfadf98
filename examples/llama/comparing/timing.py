"""Compares step times: two programs run in turns, so that both see the same state of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from examples.llama.training.program import Program
from examples.llama.training.step import Batch, TrainState


@dataclass(frozen=True)
class StepTimes:
    """Times of single steps of two programs, in seconds, measured in turns.

    >>> StepTimes([2.0, 2.0, 3.0], [1.0, 1.0, 9.0]).ratio
    2.0
    """

    seconds: list[float]
    reference_seconds: list[float]

    @property
    def median(self) -> float:
        """Median step of the program."""
        return statistics.median(self.seconds)

    @property
    def reference_median(self) -> float:
        """Median step of the reference."""
        return statistics.median(self.reference_seconds)

    @property
    def ratio(self) -> float:
        """Median step of the program over that of the reference."""
        return self.median / self.reference_median


def paired_step_times(
    program: Program, reference: Program, batches: Sequence[Batch], rounds: int
) -> StepTimes:
    """Times the steps of two programs in turns, and waits for each step.

    The program that goes first alternates between rounds. One uncounted step of each runs beforehand, so the
    result omits a step that an optimizer takes rarely (GaLore's new projections, at its first step).

    Args:
        program: The program to time.
        reference: The program to compare with.
        batches: Batches to use in turn; both programs get the same.
        rounds: Timed steps of each.
    """
    states = [program.init(0), reference.init(0)]
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(rounds + 1):
        batch = batches[round_number % len(batches)]
        for which in (0, 1) if round_number % 2 else (1, 0):
            states[which], seconds = _timed_step((program, reference)[which], states[which], batch)
            if round_number:
                times[which].append(seconds)
    return StepTimes(*times)


def _timed_step(program: Program, state: TrainState, batch: Batch) -> tuple[TrainState, float]:
    started = time.perf_counter()
    # A small learning rate: it does not affect the time, and many steps at it cannot diverge.
    state, _, _ = program.step(state, batch, 1e-5)
    jax.block_until_ready(state)
    return state, time.perf_counter() - started
