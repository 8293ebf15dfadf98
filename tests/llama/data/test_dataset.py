"""Tests of split, packing and iterators: no leak, no loss, exact resume, and each error."""

from __future__ import annotations

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from examples.llama.data.batches import WindowSource, heldout_batches, train_iterator
from examples.llama.data.checks import check_batch
from examples.llama.data.corpus import load_documents
from examples.llama.data.dataset import DataConfig, prepare_data, split_documents
from examples.llama.data.documents import Document
from examples.llama.data.tokenizer import EOS, train_tokenizer
from tests.llama.data.one_sentence import one_sentence


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def config(cache_dir):
    return DataConfig("synthetic:0:60", vocab_size=300, heldout_fraction=0.2, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def dataset(config):
    return prepare_data(config)


def take(iterator, count: int) -> np.ndarray:
    return np.stack([next(iterator)["tokens"] for _ in range(count)])


def tokens_of(batches):
    return [batch["tokens"] for batch in batches]


def change(config: DataConfig, **changes) -> DataConfig:
    return DataConfig(**{**vars(config), **changes})


# Split and packing


def texts(dataset, tokens: np.ndarray) -> list[str]:
    """The documents of a packed array."""
    end = dataset.tokenizer.token_to_id(EOS)
    assert tokens[-1] == end
    parts = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
    return [dataset.tokenizer.decode(part[:-1].tolist()) for part in parts]


def test_every_document_is_on_one_side_whole(dataset):
    train = texts(dataset, dataset.train_tokens)
    heldout = texts(dataset, dataset.heldout_tokens)
    assert (len(train), len(heldout)) == (dataset.train_documents, dataset.heldout_documents)
    everything = [document.text for document in load_documents("synthetic:0:60")]
    assert sorted(train + heldout) == sorted(everything)
    assert not set(train) & set(heldout)
    # Shuffled: neither side is in the order it was read in.
    order = {text: i for i, text in enumerate(everything)}
    for side in (train, heldout):
        places = [order[text] for text in side]
        assert places != sorted(places)
    share = len(dataset.heldout_tokens) / len(dataset.train_tokens)
    assert abs(share - 0.25) < 0.02


def test_seed_changes_split_and_order_but_not_the_tokenizer(config, dataset):
    again = prepare_data(config)
    np.testing.assert_array_equal(again.train_tokens, dataset.train_tokens)
    np.testing.assert_array_equal(again.heldout_tokens, dataset.heldout_tokens)
    other = prepare_data(change(config, seed=1))
    assert other.corpus_sha256 == dataset.corpus_sha256
    assert other.tokenizer_sha256 == dataset.tokenizer_sha256
    first, second = (set(texts(d, d.heldout_tokens)) for d in (dataset, other))
    assert first != second


def test_separator_none_and_no_heldout(config):
    dataset = prepare_data(change(config, separator="none", heldout_fraction=0.0))
    assert dataset.tokenizer.token_to_id(EOS) not in dataset.train_tokens
    assert (dataset.train_documents, dataset.heldout_documents) == (60, 0)
    assert dataset.heldout_tokens.shape == (0,)
    with one_sentence("held-out text is too short"):
        heldout_batches(dataset, 1, 1)


def test_given_tokenizer_is_used_as_it_is(config, tmp_path):
    given = train_tokenizer([Document("a", "quite another text")], 280)
    given.save(str(tmp_path / "tokenizer.json"))
    dataset = prepare_data(change(config, tokenizer=str(tmp_path), vocab_size=5))
    assert dataset.tokenizer.to_str() == given.to_str()
    assert dataset.vocab_size == given.get_vocab_size()
    assert len(texts(dataset, dataset.heldout_tokens)) == dataset.heldout_documents


def test_description_is_json_and_names_the_corpus(dataset):
    description = json.loads(json.dumps(dataset.describe()))
    assert description["corpus_sha256"] == dataset.corpus_sha256
    assert len(description["corpus_sha256"]) == 64
    assert description["train_tokens"] == len(dataset.train_tokens)
    assert description["vocab_size"] == 300
    assert "array" not in repr(dataset)


@hypothesis.given(
    st.lists(st.integers(0, 12), min_size=2, max_size=30),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32 - 1),
)
def test_equal_texts_never_leak(contents, fraction, seed):
    documents = [Document(str(i), f"text {c}") for i, c in enumerate(contents)]
    if len(set(contents)) < 2:
        with one_sentence("needs at least 2 different documents, the data has 1"):
            split_documents(documents, [1] * len(documents), fraction, seed)
        return
    train, heldout = split_documents(documents, [1] * len(documents), fraction, seed)
    assert sorted(train + heldout) == list(range(len(documents)))
    assert train
    assert heldout
    assert not {contents[i] for i in train} & {contents[i] for i in heldout}


def test_split_is_pinned():
    # Results are compared over time: the split of a corpus must not depend on any version.
    documents = [Document(f"name {i}", f"text {i}") for i in range(8)]
    assert split_documents(documents, [1] * 8, 0.25, seed=0) == ([1, 4, 3, 2, 5, 0], [7, 6])


def test_split_takes_the_nearest_share():
    documents = [Document(str(i), str(i)) for i in range(100)]
    sizes = np.arange(100)
    _, heldout = split_documents(documents, sizes, 0.3, seed=5)
    assert abs(sizes[heldout].sum() / sizes.sum() - 0.3) <= 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_fraction": 1.0}, "heldout_fraction must be at least 0 and below 1, got 1.0"),
        ({"heldout_fraction": -0.1}, "heldout_fraction must be at least 0 and below 1, got -0.1"),
        ({"seed": -1}, "The seed must be in 0..4294967295, got -1"),
        ({"data": "no/such/file"}, "The data 'no/such/file' does not exist"),
        ({"tokenizer": "no/such/file"}, "The tokenizer 'no/such/file' does not exist"),
        ({"vocab_size": 100}, "at least 258"),
        ({"separator": "<pad>"}, "no token '<pad>'"),
    ],
)
def test_bad_configurations(config, changes, message):
    with one_sentence(message):
        prepare_data(change(config, **changes))


def test_text_too_short_to_split(tmp_path, cache_dir):
    (tmp_path / "a.txt").write_text("short\n")
    with one_sentence("needs at least 2 different documents, the data has 1"):
        prepare_data(DataConfig(str(tmp_path / "a.txt"), cache_dir=cache_dir))


# Windows


def test_windows_predict_every_token_once():
    tokens = np.arange(23, dtype=np.uint16)
    source = WindowSource(tokens, 5)
    assert len(source) == 4
    windows = np.stack([source[i]["tokens"] for i in range(4)])
    assert windows.dtype == np.int32
    assert windows.shape == (4, 6)
    np.testing.assert_array_equal(windows[:, :-1].ravel(), np.arange(20))
    np.testing.assert_array_equal(windows[:, 1:].ravel(), np.arange(1, 21))
    assert len(WindowSource(tokens[:5], 5)) == 0
    assert len(WindowSource(tokens[:6], 5)) == 1
    assert len(WindowSource(tokens[:0], 5)) == 0
    with one_sentence("seq_len must be at least 1, got 0"):
        WindowSource(tokens, 0)


# Training batches


def test_training_batches_see_every_window_once_an_epoch(dataset):
    seq_len, batch_size = 256, 4
    source = WindowSource(dataset.train_tokens, seq_len)
    epoch = len(source)
    count = -(-2 * epoch // batch_size)
    batches = take(train_iterator(dataset, batch_size, seq_len), count)
    assert batches.dtype == np.int32
    assert batches.shape == (count, batch_size, seq_len + 1)
    rows = [row.tobytes() for row in batches.reshape(-1, seq_len + 1)]
    windows = [source[i]["tokens"].tobytes() for i in range(epoch)]
    first, second = rows[:epoch], rows[epoch : 2 * epoch]
    assert sorted(first) == sorted(windows) == sorted(second)
    assert first != windows
    assert first != second


def test_training_order_depends_on_the_seed_alone(dataset):
    first = take(train_iterator(dataset, 4, 32, seed=3), 5)
    np.testing.assert_array_equal(take(train_iterator(dataset, 4, 32, seed=3), 5), first)
    assert (take(train_iterator(dataset, 4, 32, seed=4), 5) != first).any()
    default = take(train_iterator(dataset, 4, 32), 5)
    np.testing.assert_array_equal(take(train_iterator(dataset, 4, 32, seed=0), 5), default)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_training_resumes_exactly(dataset, prefetch):
    def make():
        return train_iterator(dataset, 4, 128, prefetch=prefetch)

    iterator = make()
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 80)  # over the end of an epoch
    assert len(WindowSource(dataset.train_tokens, 128)) < 4 * 80
    resumed = make()
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 80), expected)
    iterator.set_state(state)
    np.testing.assert_array_equal(take(iterator, 80), expected)
    start = make()
    fresh = take(start, 2)
    resumed.set_state(make().get_state())
    np.testing.assert_array_equal(take(resumed, 2), fresh)


def test_prefetching_changes_nothing(dataset):
    np.testing.assert_array_equal(
        take(train_iterator(dataset, 4, 32, prefetch=3), 10),
        take(train_iterator(dataset, 4, 32), 10),
    )


def test_processes_share_the_batches_of_one(dataset):
    whole = take(train_iterator(dataset, 6, 64), 20)
    parts = [
        take(train_iterator(dataset, 6, 64, process_index=i, process_count=3), 20) for i in range(3)
    ]
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[:, i::3])


def test_training_text_too_short(dataset):
    tokens = len(dataset.train_tokens)
    windows = (tokens - 1) // 64
    assert next(train_iterator(dataset, windows, 64))["tokens"].shape == (windows, 65)
    needed = (windows + 1) * 64 + 1
    with one_sentence(
        f"The training text is too short: a batch of {windows + 1} sequences of 64 needs at least "
        f"{needed} tokens, it has {tokens}"
    ):
        train_iterator(dataset, windows + 1, 64)


def test_bad_iterator_arguments(dataset):
    with one_sentence("5 sequences do not divide over 2 processes"):
        train_iterator(dataset, 5, 32, process_count=2)
    with one_sentence("process_index must be in 0..1, got 2"):
        train_iterator(dataset, 4, 32, process_index=2, process_count=2)
    with one_sentence("The seed must be in"):
        train_iterator(dataset, 4, 32, seed=2**32)
    with one_sentence("batch_size must be at least 1, got 0"):
        train_iterator(dataset, 0, 32)
    with one_sentence("prefetch must be at least 0, got -1"):
        train_iterator(dataset, 4, 32, prefetch=-1)


# Held-out batches


def test_heldout_batches_are_full_fixed_and_ordered(dataset):
    source = WindowSource(dataset.heldout_tokens, 32)
    batches = tokens_of(heldout_batches(dataset, 8, 32))
    assert len(batches) == len(source) // 8
    assert all(b.shape == (8, 33) and b.dtype == np.int32 for b in batches)
    again = tokens_of(heldout_batches(dataset, 8, 32))
    np.testing.assert_array_equal(np.stack(batches), np.stack(again))
    places = {source[i]["tokens"].tobytes(): i for i in range(len(source))}
    chosen = [places[row.tobytes()] for batch in batches for row in batch]
    assert chosen == sorted(set(chosen))


def test_fewer_heldout_batches_are_spread_evenly(dataset):
    source = WindowSource(dataset.heldout_tokens, 16)
    places = {source[i]["tokens"].tobytes(): i for i in range(len(source))}
    batches = tokens_of(heldout_batches(dataset, 4, 16, max_batches=3))
    assert len(batches) == 3
    chosen = np.asarray([places[row.tobytes()] for batch in batches for row in batch])
    steps = np.diff([*chosen, len(source)])
    assert chosen[0] == 0
    assert steps.max() - steps.min() <= 1
    assert len(heldout_batches(dataset, 4, 16, max_batches=10**6)) == len(source) // 4


def test_heldout_processes_share_the_batches_of_one(dataset):
    whole = tokens_of(heldout_batches(dataset, 6, 32, 4))
    for i in range(2):
        part = tokens_of(heldout_batches(dataset, 6, 32, 4, process_index=i, process_count=2))
        np.testing.assert_array_equal(np.stack(part), np.stack(whole)[:, i::2])


def test_heldout_errors(dataset):
    tokens = len(dataset.heldout_tokens)
    with one_sentence(f"needs at least {10**6 + 1} tokens, it has {tokens}"):
        heldout_batches(dataset, 10**3, 10**3)
    with one_sentence("max_batches must be at least 1, got 0"):
        heldout_batches(dataset, 4, 32, 0)
    with one_sentence("3 sequences do not divide over 2 processes"):
        heldout_batches(dataset, 3, 32, process_count=2)


# Batches that do not divide


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8, "devices": 0}, "devices must be at least 1, got 0"),
        ({"batch_size": 8, "accumulate": 3}, "8 sequences does not divide into 3 accumulation"),
        ({"batch_size": 6, "devices": 4}, "6 sequences do not divide over 4 devices"),
        ({"batch_size": 6, "processes": 4}, "6 sequences do not divide over 4 processes"),
        (
            {"batch_size": 8, "devices": 8, "accumulate": 2},
            "4 sequences (a batch of 8 in 2 accumulation steps) do not divide over 8 devices",
        ),
    ],
)
def test_batches_that_do_not_divide(arguments, message):
    with one_sentence(message):
        check_batch(**arguments)


def test_batches_that_divide():
    check_batch(1)
    check_batch(48, processes=2, devices=8, accumulate=3)
