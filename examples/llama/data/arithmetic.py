"""Generates word problems with worked answers, and text that teaches their arithmetic, from a seed.

    python -m examples.llama.data.arithmetic --seed 0 --count 1000 --out problems.jsonl

A problem has one to three steps over small numbers. Its response states every step and ends in "The answer is:
N", the form of MetaMathQA. `arithmetic_text` states facts and short stories without questions, for pretraining.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.llama.data.documents import DataError, Document

NAMES = ("Ana", "Ben", "Chloe", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon")
THINGS = ("apples", "books", "coins", "cards", "shells", "pens", "stamps", "beads", "cups", "nuts")
MAX_STEPS = 3


@dataclass(frozen=True)
class ArithmeticConfig:
    """Writes generated word problems as JSONL of query, response and answer."""

    out: Path
    """File to write."""
    seed: int = 0
    """Seed of the problems."""
    count: int = 1000
    """Number of problems."""
    steps: int = 2
    """Largest number of steps per problem, 1 to 3."""
    largest: int = 20
    """Largest initial number of a problem."""


def arithmetic_problems(
    seed: int, count: int = 1000, *, steps: int = 2, largest: int = 20
) -> list[dict[str, str]]:
    """Word problems with worked answers; no two have the same query.

    Only `random.Random.random` is used, whose sequence Python guarantees for a seed.

    Args:
        seed: Seed; other seeds give other problems, with a few in common.
        count: Number of problems.
        steps: Largest number of steps per problem, 1 to `MAX_STEPS`.
        largest: Largest initial number of a problem; no later number exceeds four times it.

    Returns:
        Records with `query`, `response` and `answer`.

    Raises:
        DataError: A number is out of its range, or there are not enough different problems.

    >>> problem = arithmetic_problems(0, 1)[0]
    >>> print(problem["query"])
    Hugo has 6 shells. Hugo gets 9 more shells. Hugo gets 7 more shells. How many shells does Hugo have now?
    >>> print(problem["response"])
    6 + 9 = 15. 15 + 7 = 22. The answer is: 22
    """
    if count < 1 or not 1 <= steps <= MAX_STEPS or largest < 5:
        raise DataError(
            f"Word problems need count >= 1, steps in 1..{MAX_STEPS} and largest >= 5, got "
            f"count={count}, steps={steps}, largest={largest}."
        )
    below = _below(seed)
    found: dict[str, dict[str, str]] = {}
    for _ in range(50 * count):
        problem = _problem(below, 1 + below(steps), largest)
        found.setdefault(problem["query"], problem)
        if len(found) == count:
            return list(found.values())
    raise DataError(f"There are not {count} different problems with {steps} steps up to {largest}.")


def arithmetic_text(seed: int, count: int = 1000, *, largest: int = 20) -> list[Document]:
    """Documents of facts and of one-step stories that state the result.

    Args:
        seed: Seed.
        count: Number of documents, of eight sentences each.
        largest: As in `arithmetic_problems`.

    >>> arithmetic_text(0, 1)[0].text[:28]
    '70 - 9 = 61. 49 - 16 = 33. F'
    """
    below = _below(seed)
    documents = []
    for index in range(count):
        sentences = []
        for _ in range(8):
            if below(2):
                a, b = 1 + below(4 * largest), 1 + below(largest)
                sentences.append(f"{a} + {b} = {a + b}." if below(2) else f"{a + b} - {b} = {a}.")
            else:
                name, thing = NAMES[below(len(NAMES))], THINGS[below(len(THINGS))]
                start = 1 + below(largest)
                event, equation, _ = _event(below, name, thing, start, largest)
                sentences.append(f"{name} has {start} {thing}. {event} {equation}")
        documents.append(Document(f"arithmetic/{seed}/{index:05d}", " ".join(sentences) + "\n"))
    return documents


def _problem(below: Callable[[int], int], steps: int, largest: int) -> dict[str, str]:
    name, thing = NAMES[below(len(NAMES))], THINGS[below(len(THINGS))]
    number = 1 + below(largest)
    told = [f"{name} has {number} {thing}."]
    worked = []
    for _ in range(steps):
        event, equation, number = _event(below, name, thing, number, largest)
        told.append(event)
        worked.append(equation)
    told.append(f"How many {thing} does {name} have now?")
    worked.append(f"The answer is: {number}")
    return {"query": " ".join(told), "response": " ".join(worked), "answer": str(number)}


def _event(
    below: Callable[[int], int], name: str, thing: str, have: int, largest: int
) -> tuple[str, str, int]:
    """An event that changes a number of things, its equation, and the new number."""
    kind = below(4)
    if kind == 0 and 1 < have <= 2 * largest:
        factor = 2 + below(2) if have <= largest else 2
        times = "twice" if factor == 2 else "three times"
        event = f"{name} now gets {times} as many {thing} in place of these."
        return event, f"{have} * {factor} = {factor * have}.", factor * have
    if kind == 1 and have > 1:
        less = 1 + below(min(have - 1, largest))
        return (
            f"{name} gives away {less} {thing}.",
            f"{have} - {less} = {have - less}.",
            have - less,
        )
    if have < 4 * largest:
        more = 1 + below(min(largest, 4 * largest - have))
        return f"{name} gets {more} more {thing}.", f"{have} + {more} = {have + more}.", have + more
    return f"{name} loses 1 of the {thing}.", f"{have} - 1 = {have - 1}.", have - 1


def _below(seed: int) -> Callable[[int], int]:
    draw = random.Random(seed).random
    return lambda n: int(draw() * n)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = tyro.cli(
        ArithmeticConfig, args=arguments, prog="python -m examples.llama.data.arithmetic"
    )
    try:
        problems = arithmetic_problems(
            config.seed, config.count, steps=config.steps, largest=config.largest
        )
        write_problems(config.out, problems)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_problems(path: Path, problems: Sequence[Mapping[str, str]]) -> None:
    """Writes problems as JSON lines, atomically.

    Raises:
        DataError: There is a folder, or a file that holds something else.
        OSError: The file cannot be written.
    """
    if path.is_dir():
        raise DataError(f"--out {path} is a folder; name a file.")
    if path.exists() and not _holds_problems(path):
        raise DataError(f"--out {path} is another file of yours; give a new name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    part.replace(path)


def _holds_problems(path: Path) -> bool:
    """Whether a file is empty or begins with a problem, so that it may be replaced."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        return not first or {"query", "response", "answer"} <= json.loads(first).keys()
    except (ValueError, AttributeError):
        return False


if __name__ == "__main__":
    sys.exit(main())
