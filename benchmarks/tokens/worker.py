"""A worker: takes searches that no other worker has and runs their missing cells while there is time."""

from __future__ import annotations

import gc
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.peers import register_peers
from benchmarks.steps.updates import device_name
from benchmarks.tokens.file import Tokens
from benchmarks.tokens.program import OutOfTimeError, TokenProgram
from benchmarks.tokens.rules import register_crossing
from benchmarks.tokens.searches import BASE, RATIOS, Search, search
from benchmarks.tokens.shapes import token_settings
from benchmarks.tokens.store import SharedStore, claim
from examples.llama.optimizers.variants import parse_variant

WAIT_SECONDS = 2.0
"""Pause before another look at searches that other workers have."""


@dataclass(frozen=True)
class Protocol:
    """What all cells of a table share.

    Attributes:
        shape: Name of the model's shape.
        budget: Training tokens of a run.
        batch_size: Sequences of a step.
        seq_len: Predicted tokens of a sequence.
        dtype: Dtype of the matrix products.
        accumulate: Parts of a batch.
        final_rate_fraction: Rate at the end of the schedule, or None for the demo protocol's.
    """

    shape: str
    budget: int
    batch_size: int
    seq_len: int
    dtype: str = "float32"
    accumulate: int = 1
    final_rate_fraction: float | None = None


class Worker:
    """Runs cells and finds them again.

    Args:
        protocol: What the cells share.
        tokens: What is trained on.
        store: Where cells are kept.
        facts: The circumstances that are stored with them.
        seconds: The budget of time from now.
        ratios: Ratios that a search over both rates tries.
        base: Rates of matrices and tables to keep where a search moves only one; by default those of the
            best cell of `BASE`.
        force_claims: See `store.claim`.

    Attributes:
        ran: Cells that this worker has run.
    """

    def __init__(
        self,
        protocol: Protocol,
        tokens: Tokens,
        store: SharedStore,
        facts: dict[str, Any],
        *,
        seconds: float = math.inf,
        ratios: Sequence[float] = RATIOS,
        base: tuple[float, float] | None = None,
        force_claims: bool = False,
    ):
        self.protocol, self.tokens, self.store, self.facts = protocol, tokens, store, facts
        self.ratios, self.force_claims = tuple(ratios), force_claims
        self.ran = 0
        self._given_base = base
        self._end = time.monotonic() + seconds
        self._program: tuple[str, TokenProgram] | None = None
        self._pace = 0.0

    def of(self, protocol: Protocol) -> Worker:
        """A worker of another table, with the time that is left."""
        return Worker(
            protocol,
            self.tokens,
            self.store,
            self.facts,
            seconds=self.left(),
            ratios=self.ratios,
            base=self._given_base,
            force_claims=self.force_claims,
        )

    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def work(self, searches: Sequence[Search], claims: pathlib.Path) -> Iterator[str]:
        """Does what no other worker does until all is done or the time is over; a line of text a step.

        A search that fails (memory, an operation that the device lacks) is left out with its reason.
        """
        missing, claims = list(searches), self.claims(claims)
        while missing and self.left() > 0:
            busy = True
            for wanted in list(missing):
                if wanted.needs_base and self.base() is None:
                    continue
                lock = claim(claims, wanted.name, force=self.force_claims)
                if lock is None:
                    continue
                busy = False
                try:
                    yield from self._search(wanted)
                except OutOfTimeError:
                    yield f"the time is over; {len(missing)} searches are not done"
                    return
                except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
                    yield f"{wanted.name}: left out, {str(error).splitlines()[0][:200]}"
                finally:
                    lock.__exit__(None, None, None)
                missing.remove(wanted)
                break  # from the first again: a base may be there by now
            if busy and missing:
                alone = all(wanted.needs_base for wanted in missing)
                if alone and self.base() is None and not self._base_is_coming(claims):
                    yield f"{len(missing)} searches wait for {BASE}; run the list `base` first"
                    return
                time.sleep(min(WAIT_SECONDS, max(0.0, self.left())))

    def base(self) -> tuple[float, float] | None:
        """Rates of matrices and tables of the base, once a worker has done its search."""
        if self._given_base is not None:
            return self._given_base
        self.store.refresh()
        if not any(item["name"] == f"{BASE}@both" for item in self._done()):
            return None
        found = self.best(BASE)
        return None if found is None else (found["learning_rate"], found["table_rate"])

    def cells(self) -> list[dict[str, Any]]:
        """The cells of the table that there are."""
        self.store.refresh()
        shared = self.shared()
        return [
            cell
            for cell in self.store.cells
            if all(cell[name] == value for name, value in shared.items())
        ]

    def claims(self, folder: pathlib.Path) -> pathlib.Path:
        """Where claims on this table's searches are."""
        parts = [str(value) for value in vars(self.protocol).values()]
        return folder / "-".join([*parts, self.tokens.sha256[:12]])

    def best(self, variant: str) -> dict[str, Any] | None:
        """The cell of a variant with the lowest loss, of the first seed."""
        found = [
            cell
            for cell in self.cells()
            if cell["variant"] == variant and cell["heldout_loss"] is not None and cell["seed"] == 0
        ]
        return min(found, key=lambda cell: cell["heldout_loss"], default=None)

    def loss(self, variant: str, rate: float, table_rate: float, seed: int = 0) -> float:
        """The held-out loss of a cell, which is run if it is missing; infinite if it diverged.

        Raises:
            OutOfTimeError: The time is over, or would be before the run's end at the pace of the last one.
        """
        fields = {
            **self.shared(),
            "variant": variant,
            "learning_rate": rate,
            "table_rate": table_rate,
            "seed": seed,
        }
        self.store.refresh()
        cell = self.store.find(**fields)
        if cell is None:
            program = self.program_of(variant)
            if self.left() <= self._pace:
                raise OutOfTimeError
            started = time.monotonic()
            found = program.run(self.tokens, rate, table_rate / rate, seed=seed, left=self.left)
            self._pace = time.monotonic() - started
            self.ran += 1
            cell = {**fields, "label": parse_variant(variant).label, **found}
            self.store.put(cell, self.facts)
        return math.inf if cell["heldout_loss"] is None else cell["heldout_loss"]

    def _search(self, wanted: Search) -> Iterator[str]:
        register_crossing(wanted.variant)
        before, started = self.ran, time.monotonic()
        best = search(
            lambda rate, table_rate: self.loss(wanted.variant, rate, table_rate),
            wanted,
            self.base() if wanted.needs_base else None,
            self.ratios,
        )
        losses = [self.loss(wanted.variant, *best, seed) for seed in range(wanted.seeds)]
        self._mark(wanted)
        yield (
            f"{wanted.name}: {sum(losses) / len(losses):.4f} at {best[0]:g}, tables {best[1]:g}; "
            f"{self.ran - before} runs in {time.monotonic() - started:.0f} s"
        )

    def _done(self) -> list[dict[str, Any]]:
        return [
            item
            for item in self.store.content.get("searches", [])
            if all(item[name] == value for name, value in self.shared().items())
        ]

    def _mark(self, wanted: Search) -> None:
        self.store.mark({**self.shared(), "name": wanted.name}, self.facts)

    def _base_is_coming(self, claims: pathlib.Path) -> bool:
        """Whether another worker is at the base."""
        lock = claim(claims, f"{BASE}@both", force=self.force_claims)
        if lock is None:
            return True
        lock.__exit__(None, None, None)
        return self.base() is not None

    def program_of(self, variant: str) -> TokenProgram:
        """The compiled program of a variant, kept until another one is asked for."""
        if self._program is None or self._program[0] != variant:
            self._program = None
            gc.collect()
            found = TokenProgram(self._settings(variant))
            found.compile()
            self._program = variant, found
        return self._program[1]

    def _settings(self, variant: str) -> Any:
        register_peers()
        register_crossing(variant)
        protocol = self.protocol
        return token_settings(
            protocol.shape,
            variant,
            tokens=protocol.budget,
            batch_size=protocol.batch_size,
            seq_len=protocol.seq_len,
            dtype=protocol.dtype,
            accumulate=protocol.accumulate,
            final_rate_fraction=protocol.final_rate_fraction,
        )

    def shared(self) -> dict[str, Any]:
        """The fields that all cells of the table have."""
        protocol = self.protocol
        return {
            "shape": protocol.shape,
            "dtype": protocol.dtype,
            "budget": protocol.budget,
            "batch_size": protocol.batch_size,
            "seq_len": protocol.seq_len,
            "accumulate": protocol.accumulate,
            "final_rate_fraction": protocol.final_rate_fraction,
            "tokens_sha256": self.tokens.sha256,
            "device": device_name(),
        }
