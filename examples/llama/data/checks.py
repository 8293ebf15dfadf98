"""Checks of a batch's size and of a seed, before anything is read."""

from __future__ import annotations

from examples.llama.data.documents import DataError


def check_batch(
    batch_size: int, *, processes: int = 1, devices: int = 1, accumulate: int = 1
) -> None:
    """Checks that a batch divides into equal parts.

    Args:
        batch_size: Sequences per optimizer step, over all processes.
        processes: Number of processes that read data.
        devices: Number of devices, over all processes, that split the sequences.
        accumulate: Number of parts whose gradients are summed for one step.

    Raises:
        DataError: If a number is below 1 or the batch does not divide.

    >>> check_batch(8, devices=4, accumulate=2)
    >>> check_batch(8, devices=3)
    Traceback (most recent call last):
        ...
    examples.llama.data.documents.DataError: 8 sequences do not divide over 3 devices.
    """
    numbers = {"batch_size": batch_size, "processes": processes, "devices": devices}
    for name, number in (numbers | {"accumulate": accumulate}).items():
        if number < 1:
            raise DataError(f"{name} must be at least 1, got {number}.")
    if batch_size % accumulate:
        raise DataError(
            f"A batch of {batch_size} sequences does not divide into {accumulate} accumulation "
            "steps."
        )
    rows = batch_size // accumulate
    after = f" (a batch of {batch_size} in {accumulate} accumulation steps)"
    for name, number in (("processes", processes), ("devices", devices)):
        if rows % number:
            raise DataError(
                f"{rows} sequences{after if accumulate > 1 else ''} do not divide over {number} "
                f"{name}."
            )


def check_seed(seed: int) -> None:
    """Raises DataError for a seed that grain's shuffling refuses."""
    if not 0 <= seed < 2**32:
        raise DataError(f"The seed must be in 0..{2**32 - 1}, got {seed}.")
