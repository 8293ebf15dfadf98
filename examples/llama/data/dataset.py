"""Turns documents into batches: held-out split, packing, and the iterators that the trainer reads.

A document is held out or trained on as a whole. The documents of each side are put in a seeded order and
joined, each followed by the separator, into one array of tokens. That array is cut into windows of `seq_len +
1` tokens at a stride of `seq_len`, so that every token but the first is predicted once. grain shuffles the
training windows anew in each epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from examples.llama.data import tokenizer as tokenization
from examples.llama.data.checks import check_seed
from examples.llama.data.corpus import load_documents
from examples.llama.data.documents import BadRecords, DataError, Document, corpus_sha256


@dataclass(frozen=True)
class DataConfig:
    """The data to train on.

    Attributes:
        data: `stdlib`, a text or JSONL file, a folder, `hf:NAME[:CONFIG]` or
            `synthetic:SEED[:COUNT]`.
        tokenizer: A tokenizer.json to use instead of training one.
        vocab_size: Vocabulary of the tokenizer trained here; no effect on a given one.
        heldout_fraction: Share of the tokens to hold out, in whole documents.
        seed: Seed of the split and of the documents' order, 0 to 2**32 - 1.
        text_field: Field with the text of a JSONL or hub record.
        max_documents: Read at most this many documents.
        max_bytes: Read at most this many bytes of text.
        hub_split: Split of a hub data set.
        separator: Token after each document: `auto`, `none` or a token of the tokenizer.
        cache_dir: Folder for tokenizers and encoded text; by default the user's cache folder.
        skip_bad_records: Skip files and records that cannot be read, instead of refusing the first.
    """

    data: str = "stdlib"
    tokenizer: str | None = None
    vocab_size: int = 8192
    heldout_fraction: float = 0.05
    seed: int = 0
    text_field: str = "text"
    max_documents: int | None = None
    max_bytes: int | None = None
    hub_split: str = "train"
    separator: str = "auto"
    cache_dir: str | None = None
    skip_bad_records: bool = False


@dataclass(frozen=True)
class Dataset:
    """Tokens ready to be cut into batches.

    Attributes:
        config: The configuration.
        train_tokens: 1-D uint16 or uint32 array.
        heldout_tokens: Likewise; empty for a held-out fraction of 0.
        train_documents: Number of documents in `train_tokens`.
        heldout_documents: Number of documents in `heldout_tokens`.
        tokenizer: The tokenizer.
        vocab_size: Largest token id plus one; may be below the configuration's.
        corpus_sha256: Hash of all the documents' names and texts.
        tokenizer_sha256: Hash of the tokenizer.
        notes: Skipped data, for the run's user.
    """

    config: DataConfig
    train_tokens: np.ndarray = field(repr=False)
    heldout_tokens: np.ndarray = field(repr=False)
    train_documents: int
    heldout_documents: int
    tokenizer: Tokenizer = field(repr=False)
    vocab_size: int
    corpus_sha256: str
    tokenizer_sha256: str
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Sizes and hashes to store with a result, as JSON."""
        return {
            "data": self.config.data,
            "max_documents": self.config.max_documents,
            "max_bytes": self.config.max_bytes,
            "corpus_sha256": self.corpus_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "vocab_size": self.vocab_size,
            "train_documents": self.train_documents,
            "train_tokens": len(self.train_tokens),
            "heldout_documents": self.heldout_documents,
            "heldout_tokens": len(self.heldout_tokens),
            "heldout_fraction": self.config.heldout_fraction,
            "seed": self.config.seed,
        }


def prepare_data(config: DataConfig) -> Dataset:
    """Reads, tokenizes, splits and packs a corpus.

    The tokenizer is trained on all documents, so that one corpus has one tokenizer for every split. The
    documents that come first in a seeded order of their texts are held out, up to the count nearest to the
    fraction. A text that occurs twice never falls on both sides.

    Args:
        config: The data and its split.

    Returns:
        The packed tokens of both sides.

    Raises:
        DataError: If the data or the tokenizer cannot be used, or there are too few documents to split.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as cache:
    ...     dataset = prepare_data(DataConfig("synthetic:0:40", vocab_size=300, cache_dir=cache))
    >>> dataset.train_documents, dataset.heldout_documents, dataset.vocab_size
    (38, 2, 300)
    """
    check_seed(config.seed)
    if not 0 <= config.heldout_fraction < 1:
        raise DataError(
            f"heldout_fraction must be at least 0 and below 1, got {config.heldout_fraction}."
        )
    # First, so that a broken tokenizer is found before a download.
    given = tokenization.load_tokenizer(config.tokenizer) if config.tokenizer else None
    bad = BadRecords(skip=config.skip_bad_records)
    documents = load_documents(
        config.data,
        text_field=config.text_field,
        max_documents=config.max_documents,
        max_bytes=config.max_bytes,
        hub_split=config.hub_split,
        bad=bad,
    )
    sha256 = corpus_sha256(documents)
    tokenizer = given or tokenization.cached_tokenizer(
        documents, sha256, config.vocab_size, config.cache_dir
    )
    separator = tokenization.separator_id(tokenizer, config.separator)
    tokens, lengths = tokenization.cached_encoding(documents, sha256, tokenizer, config.cache_dir)
    train, heldout = split_documents(documents, lengths, config.heldout_fraction, config.seed)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return Dataset(
        config=config,
        train_tokens=_pack([parts[i] for i in train], separator, tokens.dtype),
        heldout_tokens=_pack([parts[i] for i in heldout], separator, tokens.dtype),
        train_documents=len(train),
        heldout_documents=len(heldout),
        tokenizer=tokenizer,
        vocab_size=tokenization.vocabulary_size(tokenizer),
        corpus_sha256=sha256,
        tokenizer_sha256=tokenization.tokenizer_sha256(tokenizer),
        notes=tuple(bad.notes()),
    )


def split_documents(
    documents: Sequence[Document], sizes: Sequence[int] | np.ndarray, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Chooses which documents are held out, and orders both sides.

    Both choices come from SHA-256 over seed and text or name, so they are the same on every machine and with
    every version of Python and NumPy.

    Args:
        documents: The corpus.
        sizes: Number of tokens of each document.
        fraction: Share of the tokens to hold out, at least 0 and below 1.
        seed: Seed of choice and order.

    Returns:
        Indices of the training documents and of the held-out ones.

    Raises:
        DataError: If `fraction` is above 0 and there are fewer than two different texts.
    """

    def digest(purpose: str, text: str) -> bytes:
        return hashlib.sha256(f"{purpose}:{seed}:{text}".encode()).digest()

    train = set(range(len(documents)))
    if fraction > 0:
        # By text, not by name: equal texts get equal digests and go to the same side.
        groups: dict[bytes, list[int]] = {}
        for i, document in enumerate(documents):
            groups.setdefault(digest("split", document.text), []).append(i)
        if len(groups) < 2:
            raise DataError(
                "Holding out documents needs at least 2 different documents, the data has "
                f"{len(groups)}; give more text or set heldout_fraction to 0."
            )
        order = [groups[key] for key in sorted(groups)]
        reached = np.cumsum([sum(int(sizes[i]) for i in group) for group in order])
        # At least one group on either side; otherwise the cut nearest to the fraction.
        cut = 1 + int(np.argmin(np.abs(reached[:-1] - fraction * reached[-1])))
        train -= {i for group in order[:cut] for i in group}
    pack_order = sorted(range(len(documents)), key=lambda i: (digest("pack", documents[i].name), i))
    return [i for i in pack_order if i in train], [i for i in pack_order if i not in train]


def _pack(parts: Sequence[np.ndarray], separator: int | None, dtype: np.dtype) -> np.ndarray:
    """Joins documents, each followed by the separator."""
    end = np.asarray([] if separator is None else [separator], dtype)
    pieces = [np.zeros((0,), dtype)]
    for part in parts:
        pieces += [part, end]
    return np.concatenate(pieces)
