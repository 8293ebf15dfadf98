"""Turns instruction records into batches: tokens, marked responses, documents packed into rows.

A batch holds three int32 arrays (B, T + 1): `tokens`; `learned`, 1 for a token to predict (a response's); and
`documents`, the number of the token's document in the row, 0 for padding. Attention stays within a document and
positions restart at each one's first token, so that a packed row computes the same as its documents do
separately.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from examples.llama.data import tokenizer as tokenization
from examples.llama.data.batches import Batch
from examples.llama.data.checks import check_batch, check_seed
from examples.llama.data.documents import BadRecords, DataError
from examples.llama.data.instructions import Part, Template

FIELDS = ("tokens", "learned", "documents")
"""The arrays of a batch."""

_EPOCHS = 1_000_000


@dataclass(frozen=True)
class Example:
    """One tokenized record: its tokens, and which of them to learn."""

    tokens: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class InstructionData:
    """Examples ready for packing, on both sides of the split.

    Attributes:
        source: The source of the records.
        train: The training examples.
        heldout: The held-out examples.
        tokenizer: The tokenizer.
        vocab_size: Largest token id plus one.
        corpus_sha256: Hash of all tokens and marks, so of records, template and tokenizer.
        dropped: Records with no response left after cutting to the maximum length.
        cut: Records that were cut.
        packed: Whether several examples share a row.
        seed: Seed of the split.
        notes: Skipped data, for the run's user.
    """

    source: str
    train: Sequence[Example] = field(repr=False)
    heldout: Sequence[Example] = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    vocab_size: int
    corpus_sha256: str
    dropped: int
    cut: int
    packed: bool
    seed: int
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """The description to store with a result, as JSON."""
        return {
            "data": self.source,
            "corpus_sha256": self.corpus_sha256,
            "tokenizer_sha256": tokenization.tokenizer_sha256(self.tokenizer),
            "vocab_size": self.vocab_size,
            "train_examples": len(self.train),
            "train_tokens": sum(len(example.tokens) for example in self.train),
            "learned_tokens": sum(int(example.learned.sum()) for example in self.train),
            "heldout_examples": len(self.heldout),
            "dropped": self.dropped,
            "cut": self.cut,
            "packed": self.packed,
            "seed": self.seed,
        }


def prepare_instructions(
    records: Iterable[tuple[str, dict[str, Any]]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    end_id: int | None,
    source: str = "",
    heldout_fraction: float = 0.05,
    packed: bool = True,
    seed: int = 0,
    bad: BadRecords | None = None,
) -> InstructionData:
    """Tokenizes records, and holds some of them out.

    Args:
        records: Records, each with its source for messages.
        template: A function from a record to its parts.
        tokenizer: The tokenizer; the special tokens it begins a text with (BOS) begin each example.
        seq_len: The longest example has `seq_len + 1` tokens; a longer one is cut at its end, and dropped if
            nothing of its response is left.
        end_id: Token to append to a learned part that does not end in it; None for none.
        source: Name of the data, for reports.
        heldout_fraction: Share of the examples to hold out.
        packed: Whether several examples may share a row.
        seed: Seed of the split.
        bad: How to treat a record that does not fit the template; by default the first is an error. It also
            holds
            what `records` skips, and the result's notes report it.

    Raises:
        DataError: A record does not fit the template (the message says which), or none is left.
    """
    check_seed(seed)
    if not 0 <= heldout_fraction < 1:
        raise DataError(f"heldout_fraction must be at least 0 and below 1, got {heldout_fraction}.")
    bad = bad or BadRecords()
    examples: list[Example] = []
    dropped = cut = 0
    digest = hashlib.sha256(json.dumps([seq_len, end_id]).encode())
    for where, record in records:
        try:
            parts = template(record)
        except DataError as error:
            bad.met(DataError(f"{where} of {source or 'the data'}: {error}"))
            continue
        example = encode_parts(parts, tokenizer, end_id)
        if len(example.tokens) > seq_len + 1:
            cut += 1
            example = Example(example.tokens[: seq_len + 1], example.learned[: seq_len + 1])
        if not example.learned[1:].any():
            dropped += 1
            continue
        digest.update(example.tokens.tobytes() + example.learned.tobytes())
        examples.append(example)
    heldout = round(heldout_fraction * len(examples))
    if heldout_fraction > 0:
        heldout = max(1, heldout)
    if len(examples) - heldout < 1:
        raise DataError(
            f"{source or 'The data'}: {len(examples)} records can be trained on ({dropped} have no "
            "response, or none within seq_len); give more."
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    return InstructionData(
        source=source,
        train=[examples[i] for i in np.sort(order[heldout:])],
        heldout=[examples[i] for i in np.sort(order[:heldout])],
        tokenizer=tokenizer,
        vocab_size=tokenization.vocabulary_size(tokenizer),
        corpus_sha256=digest.hexdigest(),
        dropped=dropped,
        cut=cut,
        packed=packed,
        seed=seed,
        notes=tuple(bad.notes()),
    )


def encode_parts(parts: Sequence[Part], tokenizer: Tokenizer, end_id: int | None) -> Example:
    """The tokens of a conversation; each part is tokenized separately, as in generation.

    The end token follows a learned part, unless the template contains it.
    """
    tokens: list[int] = []
    learned: list[bool] = []
    for i, part in enumerate(parts):
        ids = encode_text(tokenizer, part.text, first=i == 0)
        if part.learned and end_id is not None and end_id not in ids:
            ids = [*ids, end_id]
        tokens += ids
        learned += [part.learned] * len(ids)
    return Example(np.asarray(tokens, np.int32), np.asarray(learned, bool))


def encode_text(tokenizer: Tokenizer, text: str, *, first: bool) -> list[int]:
    """Tokens of a text; tokens that the tokenizer puts before every text are added only to the first part.

    A template that contains the first special token does not get it twice.
    """
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if first:
        before = special_prefix(tokenizer)
        if ids[: len(before)] != before:
            ids = [*before, *ids]
    return ids


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text, usually BOS or none."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    special = list(encoding.special_tokens_mask)
    return encoding.ids[: special.index(0)] if 0 in special else []


def pack_rows(lengths: Sequence[int], room: int, *, packed: bool = True) -> list[list[int]]:
    """Assigns examples to rows: each goes to the first row with room for it, in order.

    Only the last 64 open rows are considered, so that the time is linear.

    >>> pack_rows([5, 4, 3, 6, 2], room=8)
    [[0, 2], [1, 4], [3]]
    >>> pack_rows([5, 3], room=8, packed=False)
    [[0], [1]]
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = []  # [row, room left]
    for i, length in enumerate(lengths):
        place = next((o for o in open_rows if packed and o[1] >= length), None)
        if place is None:
            place = [len(rows), room]
            rows.append([])
            open_rows = [*open_rows[-63:], place]
        rows[place[0]].append(i)
        place[1] -= length
    return rows


class RowSource:
    """Random access to packed rows, whose arrays are int32 (seq_len + 1,), for grain."""

    def __init__(self, examples: Sequence[Example], seq_len: int, *, packed: bool):
        self._examples = examples
        self._length = seq_len + 1
        lengths = [len(example.tokens) for example in examples]
        self._rows = pack_rows(lengths, self._length, packed=packed)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        row = empty_row(self._length)
        start = 0
        for number, i in enumerate(self._rows[index], start=1):
            example = self._examples[i]
            place = slice(start, start + len(example.tokens))
            row["tokens"][place] = example.tokens
            row["learned"][place] = example.learned
            # No token before a document's first one predicts it.
            row["learned"][start] = 0
            row["documents"][place] = number
            start = place.stop
        return row


def instruction_iterator(
    data: InstructionData,
    batch_size: int,
    seq_len: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Training batches of a million epochs, each in another order; otherwise as `train_iterator`.

    Raises:
        DataError: The rows do not fill one batch, or the batch does not divide.
    """
    source = _checked_rows(data.train, data, "training", batch_size, seq_len, process_count)
    # Not endless: grain counts, and batches of 1 from an endless set exceed an index.
    rows = grain.MapDataset.source(source).shuffle(seed=seed).repeat(_EPOCHS)
    batches = rows[process_index::process_count].batch(batch_size // process_count)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)))


def heldout_rows(
    data: InstructionData,
    batch_size: int,
    seq_len: int,
    max_batches: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """Batches of the held-out examples, the last one filled with empty rows, which have no effect."""
    check_batch(batch_size, processes=process_count)
    source = RowSource(data.heldout, seq_len, packed=data.packed)
    rows = [source[i] for i in range(min(len(source), max_batches * batch_size))]
    rows += [empty_row(seq_len + 1)] * (-len(rows) % batch_size)
    return [
        {
            name: np.stack(
                [row[name] for row in rows[i : i + batch_size][process_index::process_count]]
            )
            for name in FIELDS
        }
        for i in range(0, len(rows), batch_size)
    ]


def empty_row(length: int) -> Batch:
    """A row of padding, without tokens to learn."""
    return {name: np.zeros(length, np.int32) for name in FIELDS}


def rows_per_epoch(data: InstructionData, seq_len: int) -> int:
    """Rows that hold every training example once."""
    lengths = [len(example.tokens) for example in data.train]
    return len(pack_rows(lengths, seq_len + 1, packed=data.packed))


def _checked_rows(
    examples: Sequence[Example],
    data: InstructionData,
    side: str,
    batch_size: int,
    seq_len: int,
    process_count: int,
) -> RowSource:
    check_batch(batch_size, processes=process_count)
    source = RowSource(examples, seq_len, packed=data.packed)
    if len(source) < batch_size:
        raise DataError(
            f"The {side} records fill {len(source)} rows of {seq_len} tokens, a batch has {batch_size}; "
            "give more records or a smaller batch_size."
        )
    return source
