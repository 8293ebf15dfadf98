"""Instruction data: records of a JSONL file or the hub, and their prompt and response texts.

A record is {query, response} (MetaMathQA's form; the field names can differ) or {messages: [{role, content},
...]}. A template turns it into parts, each a text with a flag that says whether the model learns it.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from examples.llama.data.arithmetic import arithmetic_problems
from examples.llama.data.documents import BadRecords, DataError

Record = Mapping[str, Any]

PROMPTS = {
    # The published prompt for tuning and evaluation of models of this family.
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{query}\n\n### Response:\n"
    ),
    "plain": "{query}\n",
}
"""Prompts by name; `{query}` stands for the record's query."""

QUERY_FIELDS = ("query", "question", "problem", "instruction")
RESPONSE_FIELDS = ("response", "answer", "output", "solution")


class Part(NamedTuple):
    """A piece of a conversation.

    Attributes:
        text: The text, with special tokens written out.
        learned: Whether the loss counts its tokens.
    """

    text: str
    learned: bool


Template = Callable[[Record], list[Part]]


def read_records(
    source: str, *, split: str = "train", limit: int | None = None, bad: BadRecords | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields records and their sources.

    Args:
        source: A `.jsonl` or `.jsonl.gz` file, `hf:NAME` or `hf:NAME:CONFIG` on the Hugging Face hub, or
            `arithmetic:SEED[:COUNT[:STEPS]]`, generated.
        split: Split of a hub data set.
        limit: Largest number of records.
        bad: How to treat a line that is not a JSON object; by default the first is an error.

    Raises:
        DataError: There is no such source, or a record is not a JSON object; the message says where.

    >>> where, record = next(read_records("arithmetic:0:5"))
    >>> where, sorted(record)
    ('problem 0', ['answer', 'query', 'response'])
    """
    if source.startswith("hf:"):
        records = _hub_records(source, split)
    elif source.startswith("arithmetic:"):
        records = _generated(source)
    else:
        records = _file_records(Path(source).expanduser(), bad or BadRecords())
    return itertools.islice(records, limit)


def prompt_template(
    name: str, *, query: str | None = None, response: str | None = None
) -> Template:
    r"""A template with one question and one answer.

    Args:
        name: A key of `PROMPTS`, or a file whose text contains `{query}`.
        query: Name of the record's field; by default the first of `QUERY_FIELDS` that it has.
        response: Likewise, for `RESPONSE_FIELDS`.

    Raises:
        DataError: There is no such prompt.

    >>> prompt_template("plain")({"query": "1 + 1?", "response": "2"})
    [Part(text='1 + 1?\n', learned=False), Part(text='2', learned=True)]
    """
    text = PROMPTS.get(name)
    if text is None:
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(
                f"Unknown template {name!r}; use {', '.join(PROMPTS)}, chat, or a file with {{query}}."
            )
        text = path.read_text(encoding="utf-8")
    if "{query}" not in text:
        raise DataError(f"The template {name!r} has no {{query}} in it.")
    before, after = text.split("{query}", 1)

    def fill(record: Record) -> list[Part]:
        asked = field(record, query, QUERY_FIELDS)
        prompt = Part(before + asked + after, False)
        if response is None and not any(name in record for name in RESPONSE_FIELDS):
            return [prompt]
        return [prompt, Part(field(record, response, RESPONSE_FIELDS), True)]

    return fill


def chat_template(tokenizer_folder: str | Path) -> Template:
    """The template of a Hugging Face tokenizer, for records with `messages`.

    Each assistant's turn adds text to the conversation so far; the model learns this text, including the tokens
    that end the turn.

    Args:
        tokenizer_folder: Folder with `tokenizer_config.json` (and `chat_template.jinja`, if separate).

    Raises:
        DataError: There is no template, `jinja2` is missing, or a record does not fit; the message says why.
    """
    folder = Path(tokenizer_folder).expanduser()
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = known.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(text, list):  # several by name
        text = next((item["template"] for item in text if item["name"] == "default"), None)
    if not text:
        raise DataError(
            f"The tokenizer in '{folder}' has no chat template; use {', '.join(PROMPTS)} or a file."
        )
    render = _compile_chat(text, known)

    def fill(record: Record) -> list[Part]:
        if "messages" not in record:
            record = {
                "messages": [
                    {"role": "user", "content": field(record, None, QUERY_FIELDS)},
                    {"role": "assistant", "content": field(record, None, RESPONSE_FIELDS)},
                ]
            }
        return _chat_parts(record["messages"], render)

    return fill


def field(record: Record, name: str | None, usual: Sequence[str]) -> str:
    """The text of a record's field.

    Raises:
        DataError: The field is missing or not a text.
    """
    names = usual if name is None else (name,)
    found = next((name for name in names if name in record), None)
    if found is None:
        fields = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"The record has no field {' or '.join(map(repr, names))} (it has {fields})."
        )
    text = record[found]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"The record's field {found!r} is not a text: {text!r}.")
    return text


def _chat_parts(messages: Any, render: Callable[..., str]) -> list[Part]:
    if not isinstance(messages, list) or not messages:
        raise DataError("The record's messages are no list of turns.")
    parts: list[Part] = []
    done = ""

    def add(text: str, learned: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise DataError(
                "The chat template changes earlier turns when later ones are added, so that its "
                "responses cannot be told apart; use another template."
            )
        if len(text) > len(done):
            parts.append(Part(text[len(done) :], learned))
        done = text

    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            add(render(messages[:i], True), False)
            add(render(messages[: i + 1], False), True)
    if messages[-1].get("role") != "assistant":
        add(render(messages, True), False)
    return parts


def _compile_chat(text: str, known: dict[str, Any]) -> Callable[..., str]:
    try:
        sandbox = importlib.import_module("jinja2.sandbox")
    except ImportError as error:
        raise DataError(
            "A chat template needs the package `jinja2`; install it with "
            "`pip install datasets jinja2`."
        ) from error
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise DataError(f"The chat template refuses the record: {message}.")

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    template = environment.from_string(text)
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = known.get(name) or ""
        tokens[name] = token["content"] if isinstance(token, dict) else token

    def render(messages: Sequence[Any], add_generation_prompt: bool) -> str:
        try:
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **tokens
            )
        except DataError:
            raise
        except Exception as error:  # any error that a template's expressions raise
            raise DataError(f"The chat template failed on the record: {error}.") from error

    return render


def _generated(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        seed, count, steps = [int(x) for x in source.split(":")[1:]] + [1000, 2][
            source.count(":") - 1 :
        ]
    except ValueError:
        raise DataError(
            f"The data {source!r} is not of the form arithmetic:SEED[:COUNT[:STEPS]]."
        ) from None
    for i, problem in enumerate(arithmetic_problems(seed, count, steps=steps)):
        yield f"problem {i}", problem


def _file_records(path: Path, bad: BadRecords) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(
            f"The data '{path}' does not exist; give a .jsonl file, 'hf:NAME' or 'arithmetic:SEED'."
        )
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    bad.met(DataError(f"Line {number} of '{path}' is not JSON: {error}."))
                    continue
                if not isinstance(record, dict):
                    bad.met(DataError(f"Line {number} of '{path}' is no object with fields."))
                    continue
                yield f"line {number}", record
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"The data '{path}' cannot be read: {error}.") from error


def _hub_records(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    _, name, config = [*source.split(":", 2), ""][:3]
    if not name:
        raise DataError(f"The data {source!r} names no data set; write 'hf:NAME[:CONFIG]'.")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"The data {source!r} needs the package `datasets`; install it with "
            "`pip install datasets jinja2`."
        ) from error
    # The hub's client passes on any error of its HTTP and parsing layers.
    try:
        records = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for i, record in enumerate(records):
            yield f"{split} record {i}", dict(record)
    except Exception as error:
        raise DataError(f"Reading {source!r} ({split}) from the hub failed: {error}.") from error
