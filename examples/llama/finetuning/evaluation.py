"""Exact match on problems with known answers: prompts, completions, answers, accuracy."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from examples.llama.data.documents import DataError
from examples.llama.data.instructions import QUERY_FIELDS, Template, field, read_records
from examples.llama.finetuning.answers import AnswerKind, find_answer, same_answer, wilson_interval
from examples.llama.finetuning.loading import Model, load_model
from examples.llama.finetuning.run import template_of
from examples.llama.model.generation import GREEDY, Generator, Sampling, round_up
from examples.llama.reporting.files import SUMMARY, jsonable, versions, write_json, write_text
from examples.llama.reporting.folders import ITEMS, check_output
from examples.llama.reporting.locks import FolderLock
from examples.llama.reporting.progress import counting
from examples.llama.training.config import check_not_empty


@dataclass(frozen=True)
class Task:
    """A set of problems with known answers.

    Attributes:
        data: The data, as for `read_records`.
        split: Split of a hub data set.
        query_field: Field of the problem.
        answer_field: Field of the answer, or of a solution that ends in it.
        kind: Whether answers are numbers or LaTeX.
    """

    data: str
    split: str = "test"
    query_field: str | None = None
    answer_field: str = "answer"
    kind: AnswerKind = "number"


TASKS = {
    "gsm8k": Task("hf:openai/gsm8k:main", query_field="question"),
    "math500": Task("hf:HuggingFaceH4/MATH-500", query_field="problem", kind="math"),
}
"""The tasks of the LoRA-Pre paper's fine-tuning table."""


@dataclass(frozen=True)
class Item:
    """One problem's result.

    Attributes:
        query: The problem.
        response: The model's text.
        predicted: The answer found in it, or None.
        reference: The correct answer.
        correct: Whether they are the same.
        stopped: Whether the model ended by itself rather than at the limit.
    """

    query: str
    response: str
    predicted: str | None
    reference: str
    correct: bool
    stopped: bool


@dataclass(frozen=True)
class Evaluation:
    """The result of a task.

    Attributes:
        items: One for each problem.
    """

    items: Sequence[Item]

    @property
    def correct(self) -> int:
        """The number of problems with a correct answer."""
        return sum(item.correct for item in self.items)

    @property
    def accuracy(self) -> float:
        """The share of problems with a correct answer."""
        return self.correct / len(self.items)

    def summary(self) -> dict[str, Any]:
        """The figures to report."""
        low, high = wilson_interval(self.correct, len(self.items))
        return {
            "problems": len(self.items),
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval_95": [low, high],
            "without_answer": sum(item.predicted is None for item in self.items),
            "not_stopped": sum(not item.stopped for item in self.items),
        }


def evaluate(
    model: Model,
    records: Sequence[Mapping[str, Any]],
    template: Template,
    task: Task,
    *,
    batch_size: int = 32,
    new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    dtype: str = "float32",
    console: Console | None = None,
) -> Evaluation:
    """Solves problems with a model and checks the answers.

    Args:
        model: The model.
        records: The problems; the model does not see a response in them.
        template: From a record to the prompt.
        task: Fields and kind of the answers; its data is not read.
        batch_size: Problems that are solved at the same time.
        new_tokens: Longest response.
        sampling: How tokens are chosen.
        dtype: Compute dtype.
        console: The console that shows progress, or None.

    Raises:
        DataError: There is no problem, or a record has no answer; the message says which.
    """
    if not records:
        raise DataError("There are no problems to evaluate on.")
    queries, references, prompts = [], [], []
    for i, record in enumerate(records):
        solution = str(record.get(task.answer_field, ""))
        reference = find_answer(solution, task.kind) or (solution if task.kind == "math" else "")
        if not reference:
            raise DataError(
                f"Problem {i}: no {task.kind} answer in its field {task.answer_field!r}: {solution!r}."
            )
        parts = template(record)
        unlearned = parts[:-1] if parts[-1].learned else parts
        prompts.append(model.encode("".join(part.text for part in unlearned)))
        references.append(reference)
        queries.append(field(record, task.query_field, QUERY_FIELDS))
    generator = Generator(
        model.structure(dtype),
        model.params,
        batch_size=min(batch_size, len(prompts)),
        prompt_tokens=min(
            round_up(max(map(len, prompts))), max(1, model.config.max_seq_len - new_tokens)
        ),
        new_tokens=new_tokens,
        stop_ids=model.stop_ids,
    )
    shown = contextlib.nullcontext()
    if console is not None:
        shown = counting(console, "problems", len(prompts))
    with shown as report:
        completions = generator(prompts, sampling, report)
    items = []
    rows = zip(queries, references, completions, strict=True)
    for query, reference, completion in rows:
        response = model.decode(completion.tokens)
        predicted = find_answer(response, task.kind)
        correct = same_answer(predicted, reference)
        items.append(Item(query, response, predicted, reference, correct, completion.stopped))
    return Evaluation(items)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures exact match on problems with known answers."""

    model: str
    """Folder of a run, or a Hugging Face folder."""
    out: Path
    """Folder for items.jsonl and summary.json."""
    task: Annotated[
        str | None, tyro.conf.arg(help=f"A named task: {', '.join(TASKS)}; otherwise give --data.")
    ] = None
    data: str | None = None
    """A JSONL file, hf:NAME[:CONFIG] or arithmetic:SEED[:COUNT[:STEPS]]."""
    split: str = "test"
    """Split of a hub data set."""
    query_field: str | None = None
    """Field of the problem; by default query, question, problem or instruction."""
    answer_field: str = "answer"
    """Field of the answer, or of a solution that ends in it."""
    kind: AnswerKind = "number"
    """Whether answers are numbers or LaTeX."""
    template: str = "alpaca"
    """alpaca, plain, chat (the tokenizer's own), or a file with {query}; the one of the fine-tuning."""
    tokenizer: str | None = None
    """A tokenizer.json or its folder; by default the model's."""
    limit: int | None = None
    """Evaluate only on this many problems, the first ones."""
    batch_size: int = 32
    """Problems solved at the same time."""
    new_tokens: int = 512
    """Longest response."""
    temperature: float = 0.0
    """0 takes the most likely token; otherwise logits are divided by this number."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this probability."""
    seed: int = 0
    """Seed of the draws."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and cache."""


def task_of(config: EvaluateConfig) -> Task:
    """The task that a configuration names or describes.

    Raises:
        DataError: It is unknown, or there is neither task nor data.
    """
    if config.task is not None:
        if config.task not in TASKS:
            raise DataError(f"Unknown task {config.task!r}; the tasks are {', '.join(TASKS)}.")
        return TASKS[config.task]
    if config.data is None:
        raise DataError("Give --task or --data.")
    return Task(
        config.data, config.split, config.query_field, config.answer_field, kind=config.kind
    )


def check(config: EvaluateConfig) -> Sampling:
    """The sampling settings; raises ValueError for invalid ones before anything is read."""
    check_not_empty(config)
    for name in ("batch_size", "new_tokens", "limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return Sampling(config.temperature, config.top_p, config.seed)


def run(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluates as a command line asks, writes the results, and returns the summary."""
    sampling = check(config)
    check_output(
        config.out,
        "evaluation",
        {"--model": config.model, "--data": config.data},
        may_be_inside=True,
    )
    task = task_of(config)
    model = load_model(config.model, tokenizer=config.tokenizer)
    found = read_records(task.data, split=task.split, limit=config.limit)
    records = [record for _, record in found]
    template = template_of(model, config.template, config.tokenizer, query=task.query_field)
    started = time.perf_counter()
    result = evaluate(
        model,
        records,
        template,
        task,
        batch_size=config.batch_size,
        new_tokens=config.new_tokens,
        sampling=sampling,
        dtype=config.compute_dtype,
        console=console,
    )
    summary = result.summary() | {
        "seconds": time.perf_counter() - started,
        "config": jsonable(config),
        "task": asdict(task),
        "versions": versions(),
    }
    with FolderLock(config.out):
        write_text(
            config.out / ITEMS, "".join(json.dumps(asdict(item)) + "\n" for item in result.items)
        )
        write_json(config.out / SUMMARY, summary)
    return summary
