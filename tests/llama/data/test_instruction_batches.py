"""Instruction data: records, templates, tokens and marks, packing, batches."""

import gzip
import json
import sys

import chex
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from examples.llama.data.documents import BadRecords, DataError
from examples.llama.data.instruction_batches import (
    FIELDS,
    RowSource,
    encode_parts,
    heldout_rows,
    instruction_iterator,
    pack_rows,
    prepare_instructions,
    rows_per_epoch,
)
from examples.llama.data.instructions import (
    RESPONSE_FIELDS,
    Part,
    chat_template,
    field,
    prompt_template,
    read_records,
)

WORDS = ["<s>", "</s>", *"abcdefgh", "[INST]", "[/INST]", *"12345"]
END = WORDS.index("</s>")


def word_tokenizer(*, begin=True):
    """One token a word; begins a text with <s>, as Llama's do."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return tokenizer


def words(tokens):
    return [WORDS[i] for i in tokens]


def records(*pairs):
    return [(f"line {i}", {"query": q, "response": r}) for i, (q, r) in enumerate(pairs, start=1)]


def prepared(found, seq_len=8, **arguments):
    return prepare_instructions(
        found,
        prompt_template("plain"),
        word_tokenizer(),
        seq_len=seq_len,
        end_id=END,
        **{"heldout_fraction": 0.2, **arguments},
    )


def test_only_the_response_is_learned():
    example = encode_parts([Part("a b", False), Part("c", True)], word_tokenizer(), END)
    assert words(example.tokens) == ["<s>", "a", "b", "c", "</s>"]
    assert example.learned.tolist() == [False, False, False, True, True]


def test_special_tokens_of_a_template_are_not_doubled():
    parts = [Part("<s> [INST] a [/INST]", False), Part("b </s>", True)]
    example = encode_parts(parts, word_tokenizer(), END)
    assert words(example.tokens) == ["<s>", "[INST]", "a", "[/INST]", "b", "</s>"]
    plain = encode_parts([Part("a", False), Part("b", True)], word_tokenizer(begin=False), None)
    assert words(plain.tokens) == ["a", "b"]


def test_rows_hold_whole_documents():
    data = prepared(records(("a", "b"), ("c d", "e"), ("f", "g"), ("h", "a"), ("b", "c")))
    source = RowSource(data.train, 8, packed=True)
    seen = []
    for i in range(len(source)):
        row = source[i]
        assert {name: array.shape for name, array in row.items()} == dict.fromkeys(FIELDS, (9,))
        for number in range(1, row["documents"].max() + 1):
            place = row["documents"] == number
            seen.append(tuple(row["tokens"][place]))
            assert row["learned"][place].sum() == 2
            assert row["learned"][place][0] == 0
        padding = row["documents"] == 0
        assert not row["learned"][padding].any()
    assert sorted(seen) == sorted(tuple(example.tokens) for example in data.train)
    assert max(RowSource(data.train, 8, packed=False)[i]["documents"].max() for i in range(4)) == 1


def test_nothing_predicts_a_documents_first_token():
    """Even where a record has no prompt and no BOS."""
    data = prepare_instructions(
        records(("a", "b"), ("a", "b")),
        lambda record: [Part(record["response"] + " c", True)],
        word_tokenizer(begin=False),
        seq_len=8,
        end_id=None,
        heldout_fraction=0.5,
    )
    assert RowSource(data.train, 8, packed=True)[0]["learned"].tolist()[:3] == [0, 1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_nothing_and_fits(seed):
    lengths = np.random.default_rng(seed).integers(1, 30, 300).tolist()
    rows = pack_rows(lengths, 30)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 30 for row in rows)
    # Not far above the least there could be.
    assert len(rows) <= 1.15 * np.ceil(sum(lengths) / 30)


def test_long_records_are_cut_or_dropped():
    data = prepared(
        records(("a", "b"), ("a", "b c d e f g h a b"), ("a b c d e f g h a b", "c"), ("c", "d")),
        seq_len=6,
    )
    assert (data.cut, data.dropped) == (2, 1)
    assert len(data.train) + len(data.heldout) == 3
    assert max(len(e.tokens) for e in (*data.train, *data.heldout)) == 7


def test_batches_of_processes_make_up_the_batch():
    data = prepared(records(*[(w, "a b c d") for w in WORDS[2:10] * 3]))
    whole = next(instruction_iterator(data, 4, 8, 3))
    parts = [
        next(instruction_iterator(data, 4, 8, 3, process_index=i, process_count=2))
        for i in range(2)
    ]
    for name in FIELDS:
        np.testing.assert_array_equal(whole[name][0::2], parts[0][name])
        np.testing.assert_array_equal(whole[name][1::2], parts[1][name])
    held = heldout_rows(data, 4, 8, 10)
    halves = [heldout_rows(data, 4, 8, 10, process_index=i, process_count=2) for i in range(2)]
    for batch, left, right in zip(held, *halves, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(batch[name][0::2], left[name])
            np.testing.assert_array_equal(batch[name][1::2], right[name])


def test_iterator_goes_on_where_it_was():
    data = prepared(records(*[(w, "a b c d") for w in WORDS[2:10]]))
    iterator = instruction_iterator(data, 2, 8, 0)
    for _ in range(5):
        next(iterator)
    state, expected = iterator.get_state(), next(iterator)
    again = instruction_iterator(data, 2, 8, 0)
    again.set_state(state)
    chex.assert_trees_all_equal(next(again), expected)


def test_every_epoch_sees_every_example():
    data = prepared(records(*[(w, "a b c d") for w in WORDS[2:10]]), packed=False)
    rows = rows_per_epoch(data, 8)
    iterator = instruction_iterator(data, 1, 8, 0)
    for _ in range(2):
        epoch = sorted(tuple(next(iterator)["tokens"][0]) for _ in range(rows))
        source = RowSource(data.train, 8, packed=False)
        assert epoch == sorted(tuple(source[i]["tokens"]) for i in range(rows))


def test_heldout_rows_are_filled_up_with_nothing():
    data = prepared(records(*[(w, "a b c d") for w in WORDS[2:10]]))
    batches = heldout_rows(data, 4, 8, 10)
    learned = sum(int(batch["learned"].sum()) for batch in batches)
    assert learned == sum(int(e.learned.sum()) for e in data.heldout)
    assert {array.shape for batch in batches for array in batch.values()} == {(4, 9)}


def test_split_follows_the_seed():
    found = records(*[(w, "a b") for w in WORDS[2:10]])
    one, two, other = (prepared(found, seed=s) for s in (0, 0, 1))
    assert one.corpus_sha256 == two.corpus_sha256 == other.corpus_sha256
    assert [e.tokens.tolist() for e in one.heldout] == [e.tokens.tolist() for e in two.heldout]
    assert prepared(found[1:]).corpus_sha256 != one.corpus_sha256


def test_templates(tmp_path):
    record = {"problem": "1 + 1", "solution": "2"}
    prompt, response = prompt_template("alpaca")(record)
    assert "### Instruction:\n1 + 1\n" in prompt.text
    assert response == Part("2", True)
    path = tmp_path / "mine.txt"
    path.write_text("Q: {query} A:")
    assert prompt_template(str(path), query="solution")(record)[0].text == "Q: 2 A:"
    assert prompt_template("plain")({"query": "1"}) == [Part("1\n", False)]
    path.write_text("no place")
    with pytest.raises(DataError, match=r"has no \{query\}"):
        prompt_template(str(path))
    with pytest.raises(DataError, match="Unknown template 'vicuna'; use alpaca, plain, chat"):
        prompt_template("vicuna")


CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] "
    "{% elif m.role == 'assistant' %}{{ m.content }} {{ eos_token }} "
    "{% else %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{% endfor %}"
)


def chat(tmp_path, template=CHAT):
    config = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return chat_template(tmp_path)


def test_chat_learns_every_turn_of_the_assistant(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    parts = chat(tmp_path)({"messages": messages})
    assert "".join(part.text for part in parts) == (
        "<s>[INST] a [/INST] b </s> [INST] c [/INST] d </s> "
    )
    assert [part.text for part in parts if part.learned] == ["b </s> ", "d </s> "]
    asked = chat(tmp_path)({"messages": messages[:3]})
    assert (asked[-1].learned, asked[-1].text) == (False, "[INST] c [/INST] ")
    assert chat(tmp_path)({"query": "a", "response": "b"}) == parts[:2]


def test_chat_that_does_not_fit(tmp_path):
    with pytest.raises(DataError, match="refuses the record: no role tool"):
        chat(tmp_path)({"messages": [{"role": "tool", "content": "x"}]})
    with pytest.raises(DataError, match="no list of turns"):
        chat(tmp_path)({"messages": []})
    rewriting = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(DataError, match="changes earlier turns"):
        chat(tmp_path, rewriting)(
            {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}
        )
    with pytest.raises(DataError, match="has no chat template"):
        chat_template(tmp_path / "none")


def test_chat_without_jinja(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(DataError, match="needs the package `jinja2`"):
        chat(tmp_path)


def test_records_of_files(tmp_path):
    lines = '{"query": "a", "response": "b"}\n\n{"query": "c"}\n'
    plain, zipped = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"
    plain.write_text(lines)
    zipped.write_bytes(gzip.compress(lines.encode()))
    for path in (plain, zipped):
        found = list(read_records(str(path)))
        assert [where for where, _ in found] == ["line 1", "line 3"]
        assert len(list(read_records(str(path), limit=1))) == 1
    with pytest.raises(DataError, match=r"line 3 of .*no field 'response' or 'answer'"):
        prepare_instructions(
            read_records(str(plain)),
            lambda record: [Part(field(record, None, RESPONSE_FIELDS), True)],
            word_tokenizer(),
            seq_len=8,
            end_id=END,
            source=str(plain),
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Line 1 of .* is not JSON"), ("[1]", "Line 1 of .* is no object")],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_records(str(path)))


def test_bad_records_are_skipped_where_asked_for(tmp_path):
    """Lines that are no objects, and records that do not fit the template."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"query": "a", "response": "b"}\n{\n[1]\n{"query": "c"}\n' * 2)
    bad = BadRecords(skip=True)
    data = prepare_instructions(
        read_records(str(path), bad=bad),
        lambda record: [Part(field(record, None, RESPONSE_FIELDS), True)],
        word_tokenizer(),
        seq_len=8,
        end_id=END,
        source=str(path),
        heldout_fraction=0.5,
        bad=bad,
    )
    assert (len(data.train), len(data.heldout), len(bad.messages)) == (1, 1, 6)
    (note,) = data.notes
    assert note.startswith("Note: 6 records or files were skipped: the first: Line 2 of")


@pytest.mark.parametrize("source", ["nothing.jsonl", "arithmetic:x", "arithmetic:0:5:2:1", "hf:"])
def test_unknown_sources(source):
    with pytest.raises(DataError):
        list(read_records(source))


def test_generated_source():
    assert len(list(read_records("arithmetic:0:7"))) == 7
    assert all(record["response"].count("=") == 1 for _, record in read_records("arithmetic:0:7:1"))


def test_records_without_response_are_not_trained_on():
    with pytest.raises(DataError, match="0 records can be trained on"):
        prepared([("line 1", {"query": "a"})])


def test_too_few_rows_for_a_batch():
    with pytest.raises(DataError, match="fill 1 rows of 8 tokens, a batch has 4"):
        instruction_iterator(prepared(records(("a", "b"), ("c", "d"))), 4, 8, 0)


def test_hub_data_is_streamed(monkeypatch):
    class Hub:
        def load_dataset(self, name, config, *, split, streaming):
            assert (name, config, split, streaming) == ("org/set", "main", "test", True)
            return [{"question": "a", "answer": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", Hub())
    found = list(read_records("hf:org/set:main", split="test"))
    assert found == [("test record 0", {"question": "a", "answer": "b"})]
