"""Turns packed tokens into batches: windows, the training iterator, and held-out batches."""

from __future__ import annotations

import grain
import numpy as np

from examples.llama.data.checks import check_batch, check_seed
from examples.llama.data.dataset import Dataset
from examples.llama.data.documents import DataError

Batch = dict[str, np.ndarray]
"""Arrays by name; here `tokens` alone."""


class WindowSource:
    """Random access to the windows of a token array, for grain.

    Window `i` holds tokens `i * seq_len` to `(i + 1) * seq_len` inclusive. Consecutive windows share one token,
    which is the last target of one and the first input of the next.

    Args:
        tokens: 1-D integer array.
        seq_len: Number of inputs, and of targets, of a window.

    >>> source = WindowSource(np.arange(10), seq_len=4)
    >>> [source[i]["tokens"].tolist() for i in range(len(source))]
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        if seq_len < 1:
            raise DataError(f"seq_len must be at least 1, got {seq_len}.")
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self._seq_len)

    def __getitem__(self, index: int) -> Batch:
        start = index * self._seq_len
        return {"tokens": self._tokens[start : start + self._seq_len + 1].astype(np.int32)}


def train_iterator(
    dataset: Dataset,
    batch_size: int,
    seq_len: int,
    seed: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches in a seeded order that changes with each epoch.

    `get_state()` gives a small JSON-serialisable state. `set_state(state)` on an iterator with the same
    arguments continues with exactly the next batch.

    Args:
        dataset: Prepared data.
        batch_size: Sequences of a batch over all processes.
        seq_len: Number of predicted tokens of a sequence.
        seed: Seed of the windows' order, by default the data's seed.
        process_index: The number of this process.
        process_count: Number of processes; each gets an equal share of every batch, and together they get the
            batch of a single process.
        prefetch: Batches to prepare in a thread; 0 makes them on demand, which takes about 20 microseconds
            per sequence.

    Returns:
        A grain iterator of batches `{"tokens": int32 (batch_size / process_count, seq_len + 1)}`.

    Raises:
        DataError: If the training tokens do not fill one batch, or the batch does not divide.
    """
    seed = dataset.config.seed if seed is None else seed
    check_seed(seed)
    source = _checked_source(
        dataset.train_tokens, "training", batch_size, seq_len, process_index, process_count
    )
    windows = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    batches = windows[process_index::process_count].batch(batch_size // process_count)
    if prefetch < 0:
        raise DataError(f"prefetch must be at least 0, got {prefetch}.")
    options = grain.ReadOptions(
        num_threads=1 if prefetch else 0, prefetch_buffer_size=max(1, prefetch)
    )
    return iter(batches.to_iter_dataset(options))


def heldout_batches(
    dataset: Dataset,
    batch_size: int,
    seq_len: int,
    max_batches: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """The batches for evaluation: always the same, full, and without padding.

    The windows are spread evenly over the held-out tokens, so that fewer batches still see all documents.
    Windows that do not fill a batch are dropped.

    Args:
        dataset: Prepared data.
        batch_size: Sequences of a batch over all processes.
        seq_len: Number of predicted tokens of a sequence.
        max_batches: Largest number of batches; None for all.
        process_index: The number of this process.
        process_count: Number of processes, each of which gets its share of every batch.

    Returns:
        Batches `{"tokens": int32 (batch_size / process_count, seq_len + 1)}`, at least one.

    Raises:
        DataError: If the held-out tokens do not fill one batch, or the batch does not divide.
    """
    source = _checked_source(
        dataset.heldout_tokens, "held-out", batch_size, seq_len, process_index, process_count
    )
    if max_batches is not None and max_batches < 1:
        raise DataError(f"max_batches must be at least 1, got {max_batches}.")
    count = len(source) // batch_size
    count = count if max_batches is None else min(count, max_batches)
    chosen = np.arange(count * batch_size) * len(source) // (count * batch_size)
    return [
        {"tokens": np.stack([source[int(i)]["tokens"] for i in rows[process_index::process_count]])}
        for rows in chosen.reshape(count, batch_size)
    ]


def _checked_source(
    tokens: np.ndarray,
    side: str,
    batch_size: int,
    seq_len: int,
    process_index: int,
    process_count: int,
) -> WindowSource:
    """The windows of one side, if they fill a batch."""
    check_batch(batch_size, processes=process_count)
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index must be in 0..{process_count - 1}, got {process_index}.")
    source = WindowSource(tokens, seq_len)
    if len(source) < batch_size:
        raise DataError(
            f"The {side} text is too short: a batch of {batch_size} sequences of {seq_len} needs "
            f"at least {batch_size * seq_len + 1} tokens, it has {len(tokens)}."
        )
    return source
