"""Byte-level BPE for the example: trained once, cached, and used to turn documents into tokens.

A cache folder holds the tokenizer and the encoded corpus under names with a hash of everything they depend on.
Both are written to a temporary file that is then renamed, so a crash or two simultaneous runs leave a whole
file or none. A cached file that cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.llama.data.documents import DataError, Document

BOS, EOS = "<bos>", "<eos>"
"""Special tokens of a tokenizer trained here, with ids 0 and 1; the corpus uses `<eos>`."""

MIN_VOCAB_SIZE = 256 + 2
"""The bytes and the two special tokens."""

MAX_TRAINING_CHARACTERS = 64 * 2**20
"""A larger corpus is thinned to about this many characters for training a tokenizer."""

# End-of-document tokens in order of preference, for tokenizers trained elsewhere.
_SEPARATORS = (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<eod>", "[SEP]")

# Part of each cache key; raise it when training or encoding changes.
_RECIPE = 1

_ENCODE_DOCUMENTS = 64


def default_cache_dir() -> Path:
    """The cache folder: `$XDG_CACHE_HOME` or `~/.cache`, then `sage-lorapre-optax`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sage-lorapre-optax"


def train_tokenizer(documents: Sequence[Document], vocab_size: int = 8192) -> Tokenizer:
    """Trains a byte-level BPE tokenizer.

    The same documents give the same tokenizer. Every byte has a token, so there is no unknown token. A small
    corpus may give fewer tokens than requested. A corpus of more than `MAX_TRAINING_CHARACTERS` is thinned to
    every n-th document.

    Args:
        documents: The corpus.
        vocab_size: Largest number of tokens, special tokens included.

    Raises:
        DataError: If `vocab_size` is below `MIN_VOCAB_SIZE`.

    >>> tokenizer = train_tokenizer([Document("a", "banana banana")], 260)
    >>> tokenizer.decode(tokenizer.encode("banana ☃").ids)
    'banana ☃'
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"A byte-level tokenizer needs a vocabulary of at least {MIN_VOCAB_SIZE} (256 bytes "
            f"and 2 special tokens), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stride = -(-sum(len(document.text) for document in documents) // MAX_TRAINING_CHARACTERS)
    sample = documents[:: max(1, stride)]
    tokenizer.train_from_iterator((document.text for document in sample), trainer)
    return tokenizer


def cached_tokenizer(
    documents: Sequence[Document],
    corpus_sha256: str,
    vocab_size: int = 8192,
    cache_dir: str | Path | None = None,
) -> Tokenizer:
    """`train_tokenizer`, once for each corpus, vocabulary size and version of `tokenizers`.

    Args:
        documents: The corpus.
        corpus_sha256: The corpus's hash.
        vocab_size: Largest number of tokens.
        cache_dir: The cache folder, by default `default_cache_dir()`.

    Raises:
        DataError: If the vocabulary is too small or the cache folder cannot be written.
    """
    path = _cache_path(cache_dir, "tokenizer", ".json", corpus_sha256, str(vocab_size))
    try:
        return load_tokenizer(path)
    except DataError:  # missing or incomplete
        tokenizer = train_tokenizer(documents, vocab_size)
        write_atomically(path, lambda file: file.write(tokenizer.to_str().encode("utf-8")))
        return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a `tokenizer.json`, without its truncation and padding settings.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        DataError: If it is missing, broken or empty.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"The tokenizer '{path}' does not exist.")
    try:
        # `tokenizers` raises bare Exception; UnicodeDecodeError and OSError come from reading.
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(
            f"The tokenizer '{path}' is broken or not a tokenizer.json: {reason}."
        ) from error
    if tokenizer.get_vocab_size() == 0:
        raise DataError(f"The tokenizer '{path}' has an empty vocabulary.")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's serialised form, as 64 hexadecimal digits."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest token id plus one: the number of rows of an embedding."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def separator_id(tokenizer: Tokenizer, separator: str = "auto") -> int | None:
    """The token after each document.

    Args:
        tokenizer: The tokenizer.
        separator: A token of it, `auto` for its end-of-document token under one of the usual names, or `none`.

    Returns:
        The token's id, or None for `none`.

    Raises:
        DataError: If the tokenizer has no such token.
    """
    if separator == "none":
        return None
    names = _SEPARATORS if separator == "auto" else (separator,)
    for name in names:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    if separator == "auto":
        raise DataError(
            "The tokenizer has none of the usual end-of-document tokens "
            f"({', '.join(_SEPARATORS)}); name one as separator, or 'none'."
        )
    raise DataError(f"The tokenizer has no token {separator!r} to put between documents.")


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes documents, without special tokens, even where a text spells one.

    Args:
        documents: The corpus.
        tokenizer: The tokenizer.

    Returns:
        All tokens in one array, uint16 or, if ids do not fit, uint32; and the number of tokens of each
        document, int64 `(len(documents),)`.
    """
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
    lengths: list[int] = []
    parts = [np.zeros((0,), dtype)]
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        for batch in _batches(documents):
            # In parts, and without offsets, because an encoding takes far more memory than its ids.
            texts = [document.text for document in batch]
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                parts.append(np.asarray(encoding.ids, dtype))
                lengths.append(len(encoding.ids))
    finally:
        tokenizer.encode_special_tokens = before
    return np.concatenate(parts), np.asarray(lengths, np.int64)


def cached_encoding(
    documents: Sequence[Document],
    corpus_sha256: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`encode_documents`, once for each corpus and tokenizer.

    Args:
        documents: The corpus.
        corpus_sha256: The corpus's hash.
        tokenizer: The tokenizer.
        cache_dir: The folder for the arrays, by default `default_cache_dir()`.

    Raises:
        DataError: If the cache folder cannot be written.
    """
    path = _cache_path(cache_dir, "tokens", ".npz", corpus_sha256, tokenizer_sha256(tokenizer))
    try:
        # Opened here, because `np.load` leaves an unreadable file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            tokens, lengths = arrays["tokens"], arrays["lengths"]
        if len(lengths) == len(documents) and lengths.sum() == len(tokens):
            return tokens, lengths
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # missing or incomplete
    tokens, lengths = encode_documents(documents, tokenizer)
    write_atomically(path, lambda file: np.savez(file, tokens=tokens, lengths=lengths))
    return tokens, lengths


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that readers see all of it or nothing.

    Args:
        path: The file; its folder is made if necessary.
        write: Called with a binary file to fill.

    Raises:
        DataError: If the file cannot be written.
    """
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"The cache folder '{path.parent}' cannot be written ({error.strerror or error}); "
            "choose another."
        ) from error


def _cache_path(cache_dir: str | Path | None, kind: str, suffix: str, *key: str) -> Path:
    """A file name with a hash of the file's dependencies."""
    parts = (kind, str(_RECIPE), tokenizers.__version__, sys.byteorder, *key)
    digest = hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return folder / f"{kind}-{digest[:32]}{suffix}"


def _batches(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    for start in range(0, len(documents), _ENCODE_DOCUMENTS):
        yield documents[start : start + _ENCODE_DOCUMENTS]
