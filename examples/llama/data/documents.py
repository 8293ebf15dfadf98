"""Documents of a corpus, their hash, their pieces, and the error for bad data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


class DataError(ValueError):
    """The data, the tokenizer or the batch cannot be used; the message is one plain sentence."""


class BadRecords:
    """The treatment of files and records that cannot be read: the first ends the run, or all are skipped.

    Args:
        skip: Whether to skip them.

    Attributes:
        messages: The error of each skipped one, in order.

    >>> bad = BadRecords(skip=True)
    >>> bad.met(DataError("Line 3 of 'a.jsonl' is not JSON."))
    >>> bad.notes()
    ["Note: 1 record or file was skipped: Line 3 of 'a.jsonl' is not JSON."]
    """

    def __init__(self, *, skip: bool = False):
        self.skip = skip
        self.messages: list[str] = []

    def met(self, error: DataError) -> None:
        """Raises the error, or keeps its message."""
        if not self.skip:
            raise error
        self.messages.append(str(error))

    def notes(self) -> list[str]:
        """One line with the count and the first message, or none."""
        if not self.messages:
            return []
        count = len(self.messages)
        what = "1 record or file was" if count == 1 else f"{count} records or files were"
        first = "" if count == 1 else "the first: "
        return [f"Note: {what} skipped: {first}{self.messages[0]}"]


@dataclass(frozen=True)
class Document:
    r"""One text: the unit that is held out or trained on as a whole.

    name: The source of the text, relative to the corpus, with forward slashes.
        name: Where the text is from, relative to its source, with forward slashes.
        text: The text; line ends are `\n`, every character can be written as UTF-8.
    """

    name: str
    text: str


def corpus_sha256(documents: Iterable[Document]) -> str:
    """SHA-256 over the names and texts of the documents, in order, as 64 hexadecimal digits.

    >>> corpus_sha256([Document("a", "b")]) == corpus_sha256([Document("ab", "")])
    False
    """
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.name, document.text):
            encoded = field.encode("utf-8")
            # The length keeps the border between two fields distinct in the hash.
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def split_document(document: Document, size: int | None = None) -> list[Document]:
    r"""Cuts a document into pieces, at blank lines where possible.

    A piece ends at the first blank line after `size` characters. Text without blank lines is cut at a line end
    after twice `size`, and a longer line anywhere. The pieces joined are the document again, apart from pieces
    of only white space.

    Args:
        document: The document.
        size: Characters per piece, by default a fiftieth of the document between 256 and 8192.

    >>> [piece.text for piece in split_document(Document("a", "one\n\ntwo\n\n"), size=3)]
    ['one\n\n', 'two\n\n']
    """
    if size is None:
        size = min(8192, max(256, len(document.text) // 50))
    pieces: list[str] = []
    lines: list[str] = []
    length = 0
    for line in document.text.splitlines(keepends=True):
        for start in range(0, len(line), 2 * size):
            part = line[start : start + 2 * size]
            lines.append(part)
            length += len(part)
            if length >= 2 * size or (length >= size and not line.strip()):
                pieces.append("".join(lines))
                lines, length = [], 0
    if lines:
        pieces.append("".join(lines))
    if len(pieces) <= 1:
        return [document]
    pieces = [piece for piece in pieces if piece.strip()]
    return [Document(f"{document.name}#{i:05d}", piece) for i, piece in enumerate(pieces)]
