"""Tests of the text sources: each source, its order and names, and each error."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import shutil
import sys
import types
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from examples.llama.data import corpus
from examples.llama.data.corpus import load_documents
from examples.llama.data.documents import BadRecords, Document, corpus_sha256, split_document
from examples.llama.data.sources import hub_documents, stdlib_documents, synthetic_documents
from tests.llama.data.one_sentence import one_sentence


def write_jsonl(path: Path, records: list[object]) -> Path:
    text = "\n".join(json.dumps(record) for record in records) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text)
    return path


# The running interpreter's standard library


def test_stdlib_is_the_default_corpus_of_this_interpreter():
    documents = load_documents("stdlib", max_documents=40)
    names = [document.name for document in documents]
    assert len(names) == 40
    assert names == sorted(names)
    assert "argparse.py" in names
    assert documents == load_documents("stdlib", max_documents=40)


def test_stdlib_leaves_out_tests_packages_and_what_is_no_text(tmp_path):
    kept = {"a.py": "a = 1\n", "b/__init__.py": "b = 1\n", "testing.py": "t = 1\n"}
    dropped = [
        "test/a.py",
        "b/tests/a.py",
        "idlelib/a.py",
        "site-packages/a.py",
        "dist-packages/b/a.py",
        "__pycache__/a.py",
        "_sysconfigdata__linux.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "a.txt",
    ]
    for name in [*kept, *dropped]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(kept.get(name, "x = 1\n"))
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\ns = '\xe9'\n")
    (tmp_path / "empty.py").write_text("\n")
    assert {d.name: d.text for d in stdlib_documents(tmp_path)} == kept


def test_stdlib_of_bytecode_only(tmp_path):
    (tmp_path / "a.pyc").write_bytes(b"\0")
    with one_sentence("has no Python source files"):
        list(stdlib_documents(tmp_path))


# Files and folders


def test_text_file_becomes_pieces(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"Paragraph {i} " + "word " * 40 + "\n\n" for i in range(20))
    path.write_text(text)
    documents = load_documents(str(path))
    assert "".join(d.text for d in documents) == text
    assert [d.name for d in documents] == [f"book.txt#{i:05d}" for i in range(len(documents))]
    assert len(documents) == 10
    assert all(d.text.endswith("\n\n") for d in documents)


def test_line_ends_and_byte_order_mark_do_not_matter(tmp_path):
    (tmp_path / "unix").mkdir()
    (tmp_path / "windows").mkdir()
    (tmp_path / "unix" / "a.txt").write_bytes(b"one\ntwo\n")
    (tmp_path / "windows" / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert load_documents(str(tmp_path / "unix")) == load_documents(str(tmp_path / "windows"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path, name):
    path = write_jsonl(tmp_path / name, [{"body": "one"}, {"body": " "}, {"body": "th\r\nree"}])
    documents = load_documents(str(path), text_field="body")
    assert documents == [Document(f"{name}:1", "one"), Document(f"{name}:3", "th\nree")]


def test_jsonl_lone_surrogates_become_question_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    (document,) = load_documents(str(path))
    assert document.text == "a?b 😀"


def test_folder_is_read_in_order_and_hashed_without_its_place(tmp_path):
    folder = tmp_path / "here"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.md").write_text("b\n")
    (folder / "sub" / "a.py").write_text("a\n")
    (folder / "sub" / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".git" / "c.txt").write_text("c\n")
    write_jsonl(folder / "a.jsonl", [{"text": "j"}])
    (folder / "dangling.txt").symlink_to(folder / "nowhere.txt")
    documents = load_documents(str(folder))
    assert documents == [
        Document("a.jsonl:1", "j"),
        Document("b.md", "b\n"),
        Document("sub/a.py", "a\n"),
    ]
    shutil.copytree(folder, tmp_path / "there", symlinks=True)
    assert corpus_sha256(load_documents(str(tmp_path / "there"))) == corpus_sha256(documents)


def test_corpus_sha256_sees_names_texts_order_and_borders():
    base = [Document("a", "bc"), Document("d", "e")]
    others = [
        [Document("a", "b"), Document("cd", "e")],
        [Document("ab", "c"), Document("d", "e")],
        base[::-1],
        base[:1],
    ]
    hashes = {corpus_sha256(documents) for documents in [base, *others]}
    assert len(hashes) == 5
    # Stored with results, so it must not change from one version of this code to the next.
    assert corpus_sha256([Document("a", "b")]) == (
        hashlib.sha256(b"\1\0\0\0\0\0\0\0a\1\0\0\0\0\0\0\0b").hexdigest()
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"caf\xe9", "The file 'a.txt' is not UTF-8 text (byte 3)"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', "Line 2 of 'a.jsonl' is not JSON"),
        ("a.jsonl", b"[1]\n", "Line 1 of 'a.jsonl' is of type list, not an object with fields"),
        ("a.jsonl", b'{"body": 1}\n', "has no field 'text' (its fields: 'body')"),
        ("a.jsonl", b'{"text": 1}\n', "has type int in field 'text', not text"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "The file 'a.jsonl' is not UTF-8 text"),
        ("a.jsonl.gz", b"plain", "The file 'a.jsonl.gz' cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, "cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with one_sentence(message):
        load_documents(str(tmp_path / name))


def test_bad_files_and_records_are_skipped_where_asked_for(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "one"}\n{oops\n{"body": 1}\n{"text": "two"}\n')
    bad = BadRecords(skip=True)
    found = load_documents(str(tmp_path), bad=bad)
    assert [document.text for document in found] == ["good", "one", "two"]
    assert [message.partition(" is ")[0].partition(" has ")[0] for message in bad.messages] == [
        "The file 'a.txt'",
        "Line 2 of 'c.jsonl'",
        "Line 3 of 'c.jsonl'",
    ]
    (note,) = bad.notes()
    assert note.startswith("Note: 3 records or files were skipped: the first: The file 'a.txt'")
    with one_sentence("holds no text"):
        (tmp_path / "b.txt").unlink()
        (tmp_path / "c.jsonl").unlink()
        (tmp_path / "d.jsonl").write_text("[1]\n")
        load_documents(str(tmp_path), bad=BadRecords(skip=True))


def test_missing_and_empty_places(tmp_path):
    with one_sentence("does not exist; give a text file"):
        load_documents(str(tmp_path / "nothing"))
    with one_sentence("has no text files"):
        load_documents(str(tmp_path))
    (tmp_path / "a.txt").write_text("\n")
    with one_sentence("holds no text"):
        load_documents(str(tmp_path))


# Limits


def test_limits(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "é" * 5} for _ in range(9)])
    assert len(load_documents(str(path), max_documents=4)) == 4
    assert len(load_documents(str(path), max_bytes=30)) == 3
    assert len(load_documents(str(path), max_bytes=39)) == 3
    assert len(load_documents(str(path), max_documents=2, max_bytes=1000)) == 2
    with one_sentence("has 10 bytes, more than max_bytes=9"):
        load_documents(str(path), max_bytes=9)
    with one_sentence("max_documents must be at least 1, got 0"):
        load_documents(str(path), max_documents=0)
    with one_sentence("max_bytes must be at least 1, got -1"):
        load_documents(str(path), max_bytes=-1)


# The hub, through a stand-in for `datasets`


@pytest.fixture
def hub(monkeypatch):
    """A module `datasets` whose data sets are the lists in `hub.data`; calls are in `hub.calls`."""
    module = types.ModuleType("datasets")
    data: dict[str, list[object]] = {}
    calls: list[tuple[object, ...]] = []

    def load_dataset(name, config=None, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name not in data:
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.\nTraceback ...")

        def stream():
            for record in data[name]:
                if isinstance(record, Exception):
                    raise record
                yield record

        return stream()

    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return types.SimpleNamespace(data=data, calls=calls)


def test_hub_streams_name_and_config(hub):
    hub.data["who/what"] = [{"text": "one"}, {"text": ""}, {"text": "two"}]
    documents = load_documents("hf:who/what:en", hub_split="validation")
    assert documents == [
        Document("validation/00000000", "one"),
        Document("validation/00000002", "two"),
    ]
    assert hub.calls == [("who/what", "en", "validation", True)]
    load_documents("hf:who/what")
    assert hub.calls[1] == ("who/what", None, "train", True)


def test_hub_reads_no_further_than_its_limit(hub, monkeypatch):
    records = [{"body": f"{number:05d}"} for number in range(21)]
    hub.data["long"] = [*records, ConnectionError("read too far")]
    assert len(load_documents("hf:long", text_field="body", max_documents=7)) == 7
    assert len(load_documents("hf:long", text_field="body", max_bytes=50)) == 10
    monkeypatch.setattr(corpus, "HUB_MAX_BYTES", 100)
    assert len(load_documents("hf:long", text_field="body")) == 20


def test_hub_errors(hub):
    with one_sentence(
        "Could not open 'hf:none/such' on the hub: Dataset 'none/such' doesn't exist"
    ):
        load_documents("hf:none/such")
    hub.data["breaks"] = [{"text": "one"}, ConnectionError("")]
    with one_sentence("Reading 'hf:breaks' from the hub failed at record 1: ConnectionError"):
        load_documents("hf:breaks")
    hub.data["fields"] = [{"code": "one"}]
    with one_sentence("Record 0 of 'hf:fields' has no field 'text' (its fields: 'code')"):
        load_documents("hf:fields")
    hub.data["empty"] = []
    with one_sentence("The data 'hf:empty' holds no text"):
        load_documents("hf:empty")
    with one_sentence("names no data set"):
        load_documents("hf:")


def test_hub_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises ImportError
    with one_sentence("needs the package `datasets`; install it with `pip install"):
        list(hub_documents("hf:who/what"))


# Pieces of one document


@hypothesis.given(st.text(alphabet="ab \n", max_size=300), st.integers(min_value=1, max_value=20))
def test_pieces_are_the_document(text, size):
    pieces = [piece.text for piece in split_document(Document("a", text), size)]
    assert pieces == [text] or max(map(len, pieces)) < 4 * size
    if pieces == [text]:
        return
    rest = text
    for piece in pieces:
        skipped, found, rest = rest.partition(piece)
        assert found == piece
        assert not skipped.strip()
    assert not rest.strip()


def test_pieces_of_text_without_blank_lines_or_line_ends():
    assert [p.text for p in split_document(Document("a", "12\n45\n78\n"), 3)] == [
        "12\n45\n",
        "78\n",
    ]
    assert [len(p.text) for p in split_document(Document("a", "x" * 1000), 100)] == [200] * 5
    assert split_document(Document("a", "x")) == [Document("a", "x")]


# Synthetic text


def test_synthetic_text_is_pinned():
    assert corpus_sha256(synthetic_documents(0, 20)) == (
        "c060d6ed7d912aacf88015f28a65f9948e4a1d5b82944d6d7944a9c49ad55187"
    )
    assert load_documents("synthetic:0:20") == synthetic_documents(0, 20)
    assert len(load_documents("synthetic:3")) == 400


def test_synthetic_text_depends_on_the_seed_and_not_on_the_count():
    assert synthetic_documents(0, 3) != synthetic_documents(1, 3)
    assert synthetic_documents(0, 5)[:3] == synthetic_documents(0, 3)


def test_synthetic_text_has_bigrams_to_learn():
    words = [
        word.lower()
        for document in synthetic_documents(0, 300)
        for word in document.text.replace(".", "").split()
    ]

    def entropy(counts: Counter) -> float:
        total = sum(counts.values())
        return -sum(n / total * math.log2(n / total) for n in counts.values())

    unigram = entropy(Counter(words))
    bigram = entropy(Counter(itertools.pairwise(words))) - unigram
    assert unigram > 6
    assert bigram < unigram - 2


@pytest.mark.parametrize("source", ["synthetic:", "synthetic:x", "synthetic:1:2:3", "synthetic:-1"])
def test_synthetic_source_must_be_numbers(source):
    with one_sentence("is not of the form 'synthetic:SEED'"):
        load_documents(source)


def test_synthetic_sizes_are_checked():
    with one_sentence("count=0, words=200, lexicon=400"):
        load_documents("synthetic:0:0")
