"""Tests of the tokenizer: round trips, determinism, given files, and a cache that cannot break."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from examples.llama.data import tokenizer as tokenization
from examples.llama.data.documents import Document, corpus_sha256
from examples.llama.data.sources import synthetic_documents
from examples.llama.data.tokenizer import (
    BOS,
    EOS,
    cached_encoding,
    cached_tokenizer,
    default_cache_dir,
    encode_documents,
    load_tokenizer,
    separator_id,
    tokenizer_sha256,
    train_tokenizer,
    vocabulary_size,
    write_atomically,
)
from tests.llama.data.one_sentence import one_sentence

DOCUMENTS = synthetic_documents(0, 12)
SHA256 = corpus_sha256(DOCUMENTS)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(DOCUMENTS, 400)


def test_training_is_deterministic_and_fills_the_vocabulary(trained):
    again = train_tokenizer(DOCUMENTS, 400)
    assert again.to_str() == trained.to_str()
    assert vocabulary_size(trained) == 400
    assert (trained.token_to_id(BOS), trained.token_to_id(EOS)) == (0, 1)
    assert train_tokenizer(DOCUMENTS, 300).to_str() != trained.to_str()


def test_training_needs_room_for_the_bytes():
    with one_sentence("at least 258 (256 bytes and 2 special tokens), got 257"):
        train_tokenizer(DOCUMENTS, 257)
    assert vocabulary_size(train_tokenizer(DOCUMENTS, 258)) == 258


def test_tiny_corpus_gives_a_smaller_vocabulary():
    assert vocabulary_size(train_tokenizer([Document("a", "ab")], 8192)) == 259


def test_large_corpus_is_thinned(monkeypatch):
    characters = sum(len(document.text) for document in DOCUMENTS)
    monkeypatch.setattr(tokenization, "MAX_TRAINING_CHARACTERS", characters // 3 + 1)
    assert train_tokenizer(DOCUMENTS, 400).to_str() == train_tokenizer(DOCUMENTS[::3], 400).to_str()


@hypothesis.given(st.text(max_size=60))
def test_any_text_comes_back(trained, text):
    tokens, lengths = encode_documents([Document("a", text)], trained)
    assert trained.decode(tokens.tolist(), skip_special_tokens=False) == text
    assert lengths.tolist() == [len(tokens)]


def test_text_cannot_spell_a_separator(trained):
    tokens, _ = encode_documents([Document("a", f"one {EOS} two {BOS}")], trained)
    assert not set(tokens.tolist()) & {0, 1}
    # The caller's setting is left as it was.
    assert trained.encode_special_tokens is False


def test_encoding_in_parts_is_encoding_one_by_one(trained, monkeypatch):
    monkeypatch.setattr(tokenization, "_ENCODE_DOCUMENTS", 5)
    tokens, lengths = encode_documents(DOCUMENTS, trained)
    assert tokens.dtype == np.uint16
    singles = [trained.encode(document.text).ids for document in DOCUMENTS]
    assert lengths.tolist() == [len(ids) for ids in singles]
    assert tokens.tolist() == [token for ids in singles for token in ids]


def test_large_vocabularies_take_uint32(trained):
    wide = tokenization.Tokenizer.from_str(trained.to_str())
    wide.add_tokens([f"<extra{i}>" for i in range(2**16 - 400)])
    assert vocabulary_size(wide) == 2**16
    assert encode_documents(DOCUMENTS[:1], wide)[0].dtype == np.uint16
    wide.add_tokens(["<one more>"])
    tokens, _ = encode_documents([Document("a", "<one more>")], wide)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [2**16]


# A tokenizer.json that is given


def test_given_tokenizer_from_file_or_folder(tmp_path, trained):
    trained.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == trained.to_str()
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == trained.to_str()


def test_given_tokenizer_does_not_cut_or_pad(tmp_path, trained):
    cutting = tokenization.Tokenizer.from_str(trained.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=300)
    cutting.save(str(tmp_path / "tokenizer.json"))
    tokens, lengths = encode_documents(DOCUMENTS, load_tokenizer(tmp_path))
    expected_tokens, expected_lengths = encode_documents(DOCUMENTS, trained)
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_array_equal(lengths, expected_lengths)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b'{"version": "1.0", "model": {}}', b"\xff\xfe", b"[1, 2]"]
)
def test_broken_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with one_sentence("is broken or not a tokenizer.json: "):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_missing_and_empty_tokenizer(tmp_path):
    with one_sentence("does not exist"):
        load_tokenizer(tmp_path)
    empty = tokenization.Tokenizer(tokenization.models.BPE())
    (tmp_path / "tokenizer.json").write_text(empty.to_str())
    with one_sentence("has an empty vocabulary"):
        load_tokenizer(tmp_path)


def test_separator(trained):
    assert separator_id(trained) == 1
    assert separator_id(trained, "none") is None
    assert separator_id(trained, BOS) == 0
    with one_sentence("has no token '</s>' to put between documents"):
        separator_id(trained, "</s>")
    foreign = tokenization.Tokenizer(tokenization.models.BPE())
    with one_sentence("has none of the usual end-of-document tokens"):
        separator_id(foreign)
    foreign.add_special_tokens(["<s>", "</s>"])
    assert separator_id(foreign) == 1


# The cache


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "sage-lorapre-optax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "sage-lorapre-optax"


def refuse(*args, **kwargs):
    raise AssertionError("made again, though it is in the cache")


def test_tokenizer_is_trained_once(tmp_path, monkeypatch, trained):
    first = cached_tokenizer(DOCUMENTS, SHA256, 400, tmp_path)
    assert first.to_str() == trained.to_str()
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "train_tokenizer", refuse)
        assert cached_tokenizer(DOCUMENTS, SHA256, 400, tmp_path).to_str() == first.to_str()
        for key in [("0" * 64, 400), (SHA256, 300)]:
            with pytest.raises(AssertionError, match="made again"):
                cached_tokenizer(DOCUMENTS, *key, tmp_path)
        patch.setattr(tokenization.tokenizers, "__version__", "0.0")
        with pytest.raises(AssertionError, match="made again"):
            cached_tokenizer(DOCUMENTS, SHA256, 400, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_corpus_is_encoded_once(tmp_path, monkeypatch, trained):
    tokens, lengths = cached_encoding(DOCUMENTS, SHA256, trained, tmp_path)
    other = train_tokenizer(DOCUMENTS, 300)
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "encode_documents", refuse)
        again, again_lengths = cached_encoding(DOCUMENTS, SHA256, trained, tmp_path)
        with pytest.raises(AssertionError, match="made again"):
            cached_encoding(DOCUMENTS, SHA256, other, tmp_path)
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_array_equal(again_lengths, lengths)
    assert again.dtype == np.uint16
    assert tokenizer_sha256(other) != tokenizer_sha256(trained)


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "folder-less json"])
def test_damaged_cache_is_made_again(tmp_path, trained, damage):
    expected = encode_documents(DOCUMENTS, trained)
    for _ in range(2):
        tokenizer = cached_tokenizer(DOCUMENTS, SHA256, 400, tmp_path)
        encoded = cached_encoding(DOCUMENTS, SHA256, tokenizer, tmp_path)
        assert tokenizer.to_str() == trained.to_str()
        np.testing.assert_array_equal(encoded[0], expected[0])
        np.testing.assert_array_equal(encoded[1], expected[1])
        files = sorted(tmp_path.iterdir())
        assert len(files) == 2
        for path in files:
            content = path.read_bytes()
            path.write_bytes(
                {
                    "empty": b"",
                    "half": content[: len(content) // 2],
                    "noise": bytes(255 - byte for byte in content),
                    "folder-less json": json.dumps({"tokens": 1}).encode(),
                }[damage]
            )


def test_encoding_of_another_length_is_made_again(tmp_path, trained):
    tokens, lengths = cached_encoding(DOCUMENTS, SHA256, trained, tmp_path)
    (path,) = tmp_path.iterdir()
    with open(path, "wb") as file:
        np.savez(file, tokens=tokens[:-1], lengths=lengths)
    np.testing.assert_array_equal(cached_encoding(DOCUMENTS, SHA256, trained, tmp_path)[0], tokens)


def test_a_crash_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"new, but only ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, crash)
    monkeypatch.setattr(os, "replace", crash_in_replace)
    with one_sentence("cannot be written (disk full)"):
        write_atomically(path, lambda file: file.write(b"new"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def crash_in_replace(source, target):
    assert Path(source).parent == Path(target).parent
    raise OSError(28, "disk full")


def test_concurrent_writers_leave_one_whole_file(tmp_path):
    contents = [bytes([i]) * 100_000 for i in range(8)]
    path = tmp_path / "folder" / "file"
    threads = [
        threading.Thread(target=write_atomically, args=(path, lambda file, c=c: file.write(c)))
        for c in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


def test_cache_folder_that_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("")
    with one_sentence("cannot be written"):
        cached_tokenizer(DOCUMENTS, SHA256, 400, tmp_path / "cache")
