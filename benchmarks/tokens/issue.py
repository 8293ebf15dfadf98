"""The whole list in its order: single rules, whole methods, the best crossings, composites, hypotheses."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.tokens.program import OutOfTimeError
from benchmarks.tokens.searches import LISTS, Search
from benchmarks.tokens.shapes import SHAPES
from benchmarks.tokens.store import claim
from benchmarks.tokens.trace import trace
from benchmarks.tokens.worker import Protocol, Worker

CROSSED = 3
"""So many of the best table rules are crossed with as many of the best matrix rules."""
BIG_BATCH = 8
"""Parts that a step of the large batch accumulates, each as large as the ordinary step."""
NARROWER = {"wide": "small"}
"""A shape of half the width, for rates by width."""
TRACED = "sage_hybrid"
HYPOTHESES = (
    Search("adamw:b2=0.95", 3e-3),
    Search(TRACED, 5e-4),
    Search("adamw+sinkgd", 2e-3),
    Search("factored+lorapre_muon_r4", 6e-3),
)
"""What runs again under each changed protocol (`changes`)."""


def everything(
    worker_for: Callable[[Protocol], Worker], protocol: Protocol, claims: pathlib.Path
) -> Iterator[str]:
    """Does what is missing of all of it while there is time; a line of text a search.

    Several workers meet at the end of each stage: the crossings are those of the best single rules.

    Args:
        worker_for: Makes the worker of a protocol, with the time that is left.
        protocol: The ordinary one.
        claims: Where claims are.
    """
    worker = worker_for(protocol)
    first = [one for name in ("base", "matrices", "tables", "methods") for one in LISTS[name]()]
    for searches in (lambda: first, lambda: crossings(worker.cells()), LISTS["composites"]):
        yield from worker.work(searches(), claims)
        if worker.left() <= 0:
            return
    yield from follow(worker, claims)
    for changed in changes(protocol):
        yield from worker_for(changed).work(HYPOTHESES, claims)


def changes(protocol: Protocol) -> list[Protocol]:
    """The protocol with a larger batch, untied tables, a narrower model and a constant end of the schedule.

    Untied and narrower shapes only where there are such.

    >>> [(one.shape, one.batch_size, one.final_rate_fraction)
    ...  for one in changes(Protocol("wide", 2**24, 32, 512))]
    [('wide', 256, None), ('wide_untied', 32, None), ('small', 32, None), ('wide', 32, 1.0)]
    """
    found = [
        dataclasses.replace(
            protocol,
            batch_size=BIG_BATCH * protocol.batch_size,
            accumulate=BIG_BATCH * protocol.accumulate,
        )
    ]
    for shape in (f"{protocol.shape}_untied", NARROWER.get(protocol.shape, "")):
        if shape in SHAPES:
            found.append(dataclasses.replace(protocol, shape=shape))
    return [*found, dataclasses.replace(protocol, final_rate_fraction=1.0)]


def crossings(cells: Sequence[Mapping[str, Any]]) -> list[Search]:
    """The best table rules with the best matrix rules, those that were not searched yet.

    Each search begins at the rate that the matrix rule had beside AdamW's tables.
    """
    best: dict[str, Mapping[str, Any]] = {}
    for cell in cells:
        if cell["heldout_loss"] is None or "+" not in cell["variant"] or cell["seed"]:
            continue
        held = best.get(cell["variant"])
        if held is None or cell["heldout_loss"] < held["heldout_loss"]:
            best[cell["variant"]] = cell
    ranked = sorted(best, key=lambda variant: best[variant]["heldout_loss"])
    tables = [name.partition("+")[0] for name in ranked if name.endswith("+muon")][:CROSSED]
    matrices = [name.partition("+")[2] for name in ranked if name.startswith("adamw+")][:CROSSED]
    return [
        Search(f"{table}+{matrix}", best[f"adamw+{matrix}"]["learning_rate"])
        for table in tables
        for matrix in matrices
        if table != "adamw" and matrix != "muon"
    ]


def follow(worker: Worker, claims: pathlib.Path) -> Iterator[str]:
    """Traces SAGE-Hybrid at its best common rate, once."""
    common = [
        cell
        for cell in worker.cells()
        if cell["variant"] == TRACED
        and cell["heldout_loss"] is not None
        and cell["table_rate"] == cell["learning_rate"]
    ]
    if not common:
        return
    rate = min(common, key=lambda cell: cell["heldout_loss"])["learning_rate"]
    wanted = {**worker.shared(), "variant": TRACED, "learning_rate": rate, "table_rate": rate}
    traces = worker.store.content.get("traces", [])
    if any(all(one[name] == value for name, value in wanted.items()) for one in traces):
        return
    lock = claim(worker.claims(claims), "trace", force=worker.force_claims)
    if lock is None:
        return
    try:
        worker.store.trace(trace(worker, TRACED, rate), worker.facts)
        yield f"{TRACED} at {rate:g} followed"
    except OutOfTimeError:
        yield "the time was over before the trace"
    finally:
        lock.__exit__(None, None, None)
