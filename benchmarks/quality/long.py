"""The long table: every row at a budget of tokens, at its own learning rates of matrices and of tables."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks.common import circumstances, describe_circumstances
from benchmarks.quality.pareto import Point, plot_pareto
from benchmarks.quality.rows import ROWS, SEEDS, QualityRow
from benchmarks.tokens.file import Tokens, load_tokens, tokens_sha256
from benchmarks.tokens.page import cells_by_group, describe_protocol, sections, summarize
from benchmarks.tokens.searches import Search
from benchmarks.tokens.shapes import shape
from benchmarks.tokens.sharing import plain_command
from benchmarks.tokens.store import SharedStore
from benchmarks.tokens.worker import Protocol, Worker
from examples.llama.comparing import palette
from examples.llama.data.dataset import DataConfig, prepare_data

NAME = "quality_long"
OURS = ("sage", "sinkgd", "lion_hybrid", "lorapre")
"""How the names of this repository's optimizers begin."""
BATCH, LENGTH = 16, 128
"""Sequences of a step on a CPU, and their predicted tokens."""
DEVICE_BATCH, DEVICE_LENGTH = 32, 512
"""Likewise on an accelerator."""


def long_protocol(tokens: int) -> Protocol:
    """The size for this machine: 128 wide and 4 layers on a CPU, 256 wide and 6 layers on an accelerator.

    >>> long_protocol(4_000_000).shape
    'small'
    """
    if jax.default_backend() == "cpu":
        return Protocol("small", tokens, BATCH, LENGTH)
    return Protocol("wide", tokens, DEVICE_BATCH, DEVICE_LENGTH, "bfloat16")


def long_searches(rows: Sequence[QualityRow] = ROWS, seeds: int = len(SEEDS)) -> list[Search]:
    """The rows to search, the core rows first and with all seeds.

    Rows that are another one with a ratio of their own are left out: the ratio is searched here.

    >>> [one.variant for one in long_searches([QualityRow("adamw:matrix_rate=0.25", 1e-2)])]
    []
    """
    return [
        Search(row.key, row.start, seeds=seeds if row.core else 1)
        for row in sorted(rows, key=lambda row: not row.core)
        if "matrix_rate" not in row.key
    ]


def text_tokens(protocol: Protocol, file: pathlib.Path | None = None) -> Tokens:
    """A file of tokens, or this interpreter's standard library as the trainer tokenizes it."""
    if file is not None:
        return load_tokens(file)
    found = prepare_data(DataConfig(vocab_size=shape(protocol.shape).vocab_size))
    sides = found.train_tokens, found.heldout_tokens
    return Tokens(*sides, tokens_sha256(*sides), found.describe())


def measure_long(
    folder: pathlib.Path,
    protocol: Protocol,
    tokens: Tokens,
    searches: Sequence[Search],
    minutes: float,
    command: Sequence[str] = (),
) -> None:
    """Runs what is missing and no other worker runs, until it is done or the time is over."""
    store = SharedStore(folder / f"{NAME}.json")
    facts = circumstances(plain_command("benchmarks.quality", command))
    worker = Worker(protocol, tokens, store, facts, seconds=60 * minutes)
    for line in worker.work(searches, folder / f".{NAME}_claims"):
        print(line, flush=True)


def long_content(folder: pathlib.Path) -> Mapping[str, Any]:
    """What has been measured for the long table so far."""
    return SharedStore(folder / f"{NAME}.json").content


def long_points(cells: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The rows of a group of cells as points of the Pareto plot."""
    return [
        Point(
            row["label"].removeprefix("tables ").replace(", matrices ", " + "),
            100 * row["best"]["state_ratio"],
            math.exp(row["loss"]),
            math.exp(row["spread"][0]),
            math.exp(row["spread"][1]),
            _ours(row["variant"]),
            palette.colour(_matrix_optimizer(row["variant"])),
        )
        for row in summarize(cells)
        if math.isfinite(row["loss"])
    ]


def _ours(variant: str) -> bool:
    """Whether an optimizer, or one half of a crossing, is this repository's.

    >>> [_ours(name) for name in ("factored+lorapre_muon_r4", "sage_hybrid:scale=2", "adamw:b2=0.95")]
    [True, True, False]
    """
    return any(half.startswith(OURS) for half in variant.partition(":")[0].split("+"))


def _matrix_optimizer(variant: str) -> str:
    """The optimizer of a variant; of a crossing that of its matrices, without rank.

    >>> _matrix_optimizer("factored+lorapre_muon_r4"), _matrix_optimizer("adamw:b2=0.95")
    ('lorapre_muon', 'adamw')
    """
    return re.sub(r"_r\d+.*", "", variant.partition(":")[0].rpartition("+")[2])


def _picture(number: int) -> str:
    """The file name of the plot of the group of this number.

    >>> _picture(0), _picture(1)
    ('quality_long_pareto.png', 'quality_long_pareto_2.png')
    """
    return f"{NAME}_pareto{f'_{number + 1}' if number else ''}.png"


def plot_long(folder: pathlib.Path) -> None:
    """Draws perplexity against state, a picture for each group of cells."""
    content = long_content(folder)
    for number, cells in enumerate(cells_by_group(content)):
        points = long_points(cells)
        if points:
            title = (
                f"Perplexity against state: {cells[0]['parameters']:,} parameters,\n"
                f"{describe_protocol(cells[0])}"
            )
            command = content["circumstances"]["command"]
            plot_pareto(points, folder / _picture(number), title, command)


def long_section(content: Mapping[str, Any]) -> str:
    """The part of the page about the long table."""
    begin = """## Long

Each row has a budget of tokens, its own learning rate of the matrices and its own of embedding and head. Both
are searched at full length by factors of two: each in turn, beside the best of the other, together at
ratios of 1, 0.3, 0.1 or 3, 10 as long as one helps, or one beside a rate of the other that is kept (`searched`
says which). One row with rates in turn, and one with the embedding's rate kept:

    python -m benchmarks.tokens tokens.npz --optimizers NAME=RATE/RATE --seeds 3 --name quality_long
    python -m benchmarks.tokens tokens.npz --optimizers NAME@matrices=RATE --base RATE,RATE --name quality_long

All rows with ratios on two CPU cores (128 wide, 4 layers):

    python -m benchmarks.quality --tokens 4e6 --workers 2

and on an accelerator (256 wide, 6 layers):

    python -m benchmarks.quality --tokens 16.384e6 --file tokens.npz --workers 3"""
    if not content["cells"]:
        return f"{begin}\n\nNo row has been run yet."
    found = [begin, describe_circumstances(content["circumstances"])]
    groups = cells_by_group(content)
    for number, section in enumerate(sections(content, "###")):
        found.append(section)
        if number < len(groups) and long_points(groups[number]):
            found.append(f"![perplexity against optimizer state]({_picture(number)})")
    return "\n\n".join(part.strip() for part in found)
