"""Readers of text: the standard library, files and folders, and the Hugging Face hub."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import os
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from examples.llama.data.documents import BadRecords, DataError, Document

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".py"})
"""Suffixes of the files that a folder contributes, besides `.jsonl` and `.jsonl.gz`."""

# Folders of the standard library to omit, anywhere in the tree.
_STDLIB_EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
# Written when the interpreter was built, full of that machine's paths: no text to learn from.
_STDLIB_GENERATED = ("_sysconfigdata", "config-")


def stdlib_documents(root: str | Path | None = None) -> Iterator[Document]:
    """Yields the Python files of the running interpreter's standard library, sorted by path.

    It omits `test`, `tests`, `idlelib` and installed packages, files generated when the
    interpreter was built, and the few files that are not UTF-8.

    Args:
        root: The library's folder, by default `sysconfig.get_path("stdlib")`.

    Raises:
        DataError: If the folder has no Python files (some interpreters ship only bytecode).
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    found = False
    for name, path in _files_below(folder, _STDLIB_EXCLUDED):
        generated = any(part.startswith(_STDLIB_GENERATED) for part in name.split("/"))
        if path.suffix != ".py" or generated:
            continue
        try:
            text = _read_text(path, name)
        except DataError:
            continue
        found = True
        if text.strip():
            yield Document(name, text)
    if not found:
        raise DataError(
            f"The standard library at '{folder}' has no Python source files, so --data must name "
            "other text."
        )


def path_documents(
    path: str | Path, *, text_field: str = "text", bad: BadRecords | None = None
) -> Iterator[Document]:
    """Yields the documents of a text file, a JSONL file or a folder.

    A folder is read recursively in the order of the relative paths. Hidden files and folders and files of other
    kinds are skipped.

    Args:
        path: The file or folder.
        text_field: The field with the text of a JSONL record.
        bad: How to treat a file that is not UTF-8 and a JSONL record without text; by default the first is an
            error. Records before a fault in the encoding of a JSONL file are kept.

    Raises:
        DataError: If there is no data, or for errors that `bad` does not skip.
    """
    bad = bad or BadRecords()
    path = Path(path).expanduser()
    if path.is_dir():
        files = [
            (name, file)
            for name, file in _files_below(path)
            if file.suffix.lower() in TEXT_SUFFIXES or _is_jsonl(file)
        ]
        if not files:
            kinds = ", ".join([*sorted(TEXT_SUFFIXES), ".jsonl", ".jsonl.gz"])
            raise DataError(f"The folder '{path}' has no text files (looked for {kinds}).")
    elif path.is_file():
        files = [(path.name, path)]
    elif path.exists():
        raise DataError(
            f"The data '{path}' is neither a file nor a folder; write what it gives to a file first."
        )
    else:
        raise DataError(
            f"The data '{path}' does not exist; give a text file, a .jsonl file, a folder, "
            "'stdlib', 'hf:NAME' or 'synthetic:SEED'."
        )
    for name, file in files:
        try:
            if _is_jsonl(file):
                yield from _jsonl_documents(file, name, text_field, bad)
                continue
            text = _read_text(file, name)
        except DataError as error:
            bad.met(error)
            continue
        if text.strip():
            yield Document(name, text)


def hub_documents(
    source: str, *, text_field: str = "text", split: str = "train", bad: BadRecords | None = None
) -> Iterator[Document]:
    """Streams a data set of the Hugging Face hub, record by record, without storing it.

    Args:
        source: `hf:NAME` or `hf:NAME:CONFIG`.
        text_field: The field with a record's text.
        split: The split to stream.
        bad: How to treat a record without text; by default the first is an error.

    Raises:
        DataError: If `datasets` is not installed, the hub does not answer, the data set does not exist, or a
            record has no such text.
    """
    bad = bad or BadRecords()
    _, name, config = [*source.split(":", 2), ""][:3]
    if not name:
        raise DataError(
            f"The data {source!r} names no data set; write 'hf:NAME' or 'hf:NAME:CONFIG'."
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"The data {source!r} needs the package `datasets`; install it with "
            "`pip install datasets`."
        ) from error
    # `datasets` passes on the errors of its HTTP, file-system and parsing layers, so no list of exception types
    # would be complete.
    try:
        records = iter(datasets.load_dataset(name, config or None, split=split, streaming=True))
    except Exception as error:
        raise DataError(f"Could not open {source!r} on the hub: {_one_line(error)}.") from error
    for index in itertools.count():
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"Reading {source!r} from the hub failed at record {index}: {_one_line(error)}."
            ) from error
        try:
            text = _field(record, text_field, f"Record {index} of {source!r}")
        except DataError as error:
            bad.met(error)
            continue
        if text.strip():
            yield Document(f"{split}/{index:08d}", text)


def _files_below(folder: Path, excluded: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    """Files below a folder with their relative names, in the same order on every system.

    Excluded and hidden folders are not entered, because the standard library's folder may have a large
    `site-packages`.
    """
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in excluded and name[0] != "."]
        paths = [Path(parent, name) for name in names if name[0] != "."]
        files += [(path.relative_to(folder).as_posix(), path) for path in paths if path.is_file()]
    return sorted(files)


def _is_jsonl(path: Path) -> bool:
    return path.name.lower().endswith((".jsonl", ".jsonl.gz"))


def _read_text(path: Path, name: str) -> str:
    r"""A file's text; a byte-order mark is dropped and line ends become `\n`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The file {name!r} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"The file {name!r} cannot be read: {error.strerror}.") from error


def _jsonl_documents(path: Path, name: str, text_field: str, bad: BadRecords) -> Iterator[Document]:
    """Yields a document for each non-empty line, named by file and line."""
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(
            path, "rt", encoding="utf-8-sig"
        ) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = _text_of(line, text_field, f"Line {number} of {name!r}")
                except DataError as error:
                    bad.met(error)
                    continue
                if text.strip():
                    yield Document(f"{name}:{number}", text)
    except UnicodeDecodeError as error:
        raise DataError(f"The file {name!r} is not UTF-8 text (byte {error.start}).") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"The file {name!r} cannot be read: {_one_line(error)}.") from error


def _text_of(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {_one_line(error)}.") from error
    return _field(record, field, where)


def _field(record: object, field: str, where: str) -> str:
    """The text of a record, encodable as UTF-8."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is of type {type(record).__name__}, not an object with fields.")
    if field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{where} has no field {field!r} (its fields: {fields}); name its text's with --text-field."
        )
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where} has type {type(text).__name__} in field {field!r}, not text.")
    # JSON can contain lone surrogates, which are not characters; '?' replaces them.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\r\n", "\n")


def _one_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def synthetic_documents(
    seed: int, count: int = 400, *, words: int = 200, lexicon: int = 400
) -> list[Document]:
    """Generates word-like text with structure for a model to learn.

    It draws a lexicon of syllable words, and for each word four likely successors (probabilities .4, .2, .1,
    .1). One time in five the next word comes instead from the document's topic, a tenth of the lexicon, and
    sometimes it is the document's own name. The text thus has structure at every range: spelling, bigrams,
    topic, and copying from far back. It uses only `random.Random.random`, whose sequence Python guarantees for
    a seed, so the text is the same with every version of Python and NumPy.

    Args:
        seed: Seed of lexicon, successors and documents.
        count: Number of documents.
        words: Mean number of words per document; lengths are uniform between half and one and a half of it.
        lexicon: Number of words of the language.

    Returns:
        `count` documents of about `6 * words` bytes.

    >>> synthetic_documents(0, 2) == synthetic_documents(0, 2)
    True
    >>> synthetic_documents(0, 1)[0].text[:34]
    'Ka bekas mir dovihur. Tadeves mabo'
    """
    if count < 1 or words < 2 or lexicon < 10:
        raise DataError(
            "Synthetic text needs count >= 1, words >= 2 and lexicon >= 10, got "
            f"count={count}, words={words}, lexicon={lexicon}."
        )
    draw = random.Random(seed).random

    def below(n: int) -> int:
        return int(draw() * n)

    def word() -> str:
        syllables = 1 + below(3)
        return (
            "".join("bcdfghklmnprstvz"[below(16)] + "aeiou"[below(5)] for _ in range(syllables))
            + ("", "n", "r", "s")[below(4)]
        )

    vocabulary = [word() for _ in range(lexicon)]
    successors = [[below(lexicon) for _ in range(4)] for _ in range(lexicon)]
    documents = []
    for index in range(count):
        topic = below(10) * (lexicon // 10)
        name = word().capitalize() + word()
        parts: list[str] = []
        current = topic
        start = True
        for _ in range(words // 2 + below(words + 1)):
            u = draw()
            if u < 0.8:
                current = successors[current][(u >= 0.4) + (u >= 0.6) + (u >= 0.7)]
            else:
                current = topic + below(lexicon // 10)
            text = name if u >= 0.97 else vocabulary[current]
            parts.append(text.capitalize() if start and u < 0.97 else text)
            start = draw() < 0.12
            parts.append((".\n\n" if draw() < 0.2 else ". ") if start else " ")
        documents.append(Document(f"synthetic/{seed}/{index:05d}", "".join(parts).rstrip() + "\n"))
    return documents
