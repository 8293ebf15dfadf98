"""Reads the example's text: from a source string to a list of named documents.

| source | documents |
|---|---|
| `stdlib` | the running interpreter's standard library, one per file |
| a text file | its pieces, cut at blank lines (see `split_document`) |
| a `.jsonl` or `.jsonl.gz` file | one per line |
| a folder | every text, Markdown, Python and JSONL file below it |
| `hf:NAME` or `hf:NAME:CONFIG` | one per record, streamed from the hub through `datasets` |
| `synthetic:SEED` or `synthetic:SEED:COUNT` | generated text, the same on every machine |

Document names are relative to their source, so that `corpus_sha256` differs between corpora but not between
machines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from examples.llama.data.documents import (
    BadRecords,
    DataError,
    Document,
    corpus_sha256,
    split_document,
)
from examples.llama.data.sources import (
    hub_documents,
    path_documents,
    stdlib_documents,
    synthetic_documents,
)

__all__ = [
    "HUB_MAX_BYTES",
    "DataError",
    "Document",
    "corpus_sha256",
    "load_documents",
    "split_document",
    "synthetic_documents",
]

HUB_MAX_BYTES = 64 * 2**20
"""UTF-8 bytes read from the hub when neither `max_documents` nor `max_bytes` says otherwise."""


def load_documents(
    source: str,
    *,
    text_field: str = "text",
    max_documents: int | None = None,
    max_bytes: int | None = None,
    hub_split: str = "train",
    bad: BadRecords | None = None,
) -> list[Document]:
    """Reads a corpus.

    Documents with only white space are dropped. `split_document` cuts a source with a single document (a text
    file, or a folder with one) into pieces, because a held-out split by document needs at least two.

    Args:
        source: `stdlib`, a path, `hf:NAME[:CONFIG]` or `synthetic:SEED[:COUNT]`.
        text_field: The field with the text of a JSONL or hub record.
        max_documents: Read at most this many documents.
        max_bytes: Stop before the document that would exceed this many bytes of UTF-8. A stream from the hub
            stops
            at `HUB_MAX_BYTES` if neither limit is given.
        hub_split: The split of a hub data set to stream.
        bad: How to treat files and records that cannot be read; by default the first is an error.

    Returns:
        At least one document, in a fixed order.

    Raises:
        DataError: If the source is missing, empty or not readable as text, or a limit leaves nothing.

    >>> documents = load_documents("synthetic:0:3")
    >>> [document.name for document in documents]
    ['synthetic/0/00000', 'synthetic/0/00001', 'synthetic/0/00002']
    """
    for name, limit in (("max_documents", max_documents), ("max_bytes", max_bytes)):
        if limit is not None and limit < 1:
            raise DataError(f"{name} must be at least 1, got {limit}.")
    if source.startswith("hf:"):
        if max_documents is None and max_bytes is None:
            max_bytes = HUB_MAX_BYTES
        documents = hub_documents(source, text_field=text_field, split=hub_split, bad=bad)
    elif source == "stdlib":
        documents = stdlib_documents()
    elif source.startswith("synthetic:"):
        documents = _synthetic_source(source)
    else:
        documents = path_documents(source, text_field=text_field, bad=bad)
    result = list(_limited(documents, source, max_documents, max_bytes))
    if not result:
        raise DataError(f"The data {source!r} holds no text.")
    return split_document(result[0]) if len(result) == 1 else result


def _synthetic_source(source: str) -> list[Document]:
    """The documents of `synthetic:SEED` or `synthetic:SEED:COUNT`."""
    numbers = source.split(":")[1:]
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise DataError(
            f"The data {source!r} is not of the form 'synthetic:SEED' or 'synthetic:SEED:COUNT'."
        )
    return synthetic_documents(*map(int, numbers))


def _limited(
    documents: Iterable[Document], source: str, max_documents: int | None, max_bytes: int | None
) -> Iterator[Document]:
    """Yields documents until a limit is reached."""
    total = 0
    for document in itertools.islice(documents, max_documents):
        if max_bytes is not None:
            size = len(document.text.encode("utf-8"))
            if total == 0 and size > max_bytes:
                raise DataError(
                    f"The first document of {source!r} has {size} bytes, more than "
                    f"max_bytes={max_bytes}."
                )
            total += size
            if total > max_bytes:
                return
        yield document
