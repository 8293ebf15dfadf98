"""What is searched: one optimizer's rates, by factors of two until the best lies inside, and lists of such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.tokens.rules import MATRICES, RANKS, TABLES
from examples.llama.comparing.tuning import rounded_rate, search_rate

RATIOS = (1.0, 0.3, 0.1)
"""The tables' rate over the matrices', in the order in which they are tried."""
HIGHER_RATIOS = (3.0, 10.0)
"""Tried where the first of `RATIOS` is better than the second."""
BASE = "adamw+muon"
"""The pair beside which single rules are replaced."""
ONE_SIDE = ("matrices", "tables")
"""What a search moves that keeps the base's other rate."""
MOST_TRIALS = 7
Run = Callable[[float, float], float]
"""From the matrices' peak rate and the tables' to the held-out loss."""


@dataclass(frozen=True)
class Search:
    """A search over one optimizer's rates.

    Attributes:
        variant: The optimizer.
        start: The rate where it begins.
        moves: `both` rates at each ratio of `RATIOS`, `each` rate in turn, or one of them beside the base's
            best other one.
        seeds: Seeds of the best; the search itself has the first.
        table_start: The tables' rate where a search of `each` begins, the other one's if None.
    """

    variant: str
    start: float
    moves: Literal["both", "each", "matrices", "tables"] = "both"
    seeds: int = 1
    table_start: float | None = None

    @property
    def name(self) -> str:
        """Its name as a folder's."""
        return f"{self.variant.replace(':', '__')}@{self.moves}"

    @property
    def needs_base(self) -> bool:
        """Whether one of its rates is the base's."""
        return self.moves in ONE_SIDE


def search(
    run: Run,
    wanted: Search,
    base: tuple[float, float] | None = None,
    ratios: Sequence[float] = RATIOS,
) -> tuple[float, float]:
    """Searches; returns the best rates of matrices and tables.

    With both rates, smaller ratios are tried as long as the last one was better, and larger ones where the
    second was no better than the first; each begins at the best rate of the one before. With each rate in turn,
    a rate is searched beside the other's best one until neither moves: five runs where the start is the best.

    Args:
        run: See `Run`.
        wanted: What to search.
        base: The base's best rates of matrices and tables, where one of them is kept.
        ratios: See `RATIOS`.

    Raises:
        ValueError: A rate is to be kept and there is no base.
        RuntimeError: No rate trains.

    >>> import math
    >>> bowl = lambda rate, table: abs(math.log(rate / 4e-3)) + abs(math.log(table / 1e-3))
    >>> search(bowl, Search("adamw", 1e-3))
    (0.004, 0.0012)
    >>> search(bowl, Search("adamw", 1e-3, "tables"), (8e-3, 8e-3))
    (0.008, 0.001)
    >>> search(bowl, Search("adamw", 1e-3, "each"))
    (0.004, 0.001)
    """
    if wanted.moves == "each":
        return _each_in_turn(run, wanted)
    if wanted.needs_base:
        if base is None:
            raise ValueError(f"{wanted.name}: there is no base to keep a rate of")
        matrices, tables = base
        if wanted.moves == "matrices":
            return _best(lambda rate: run(rate, tables), wanted.start), tables
        return matrices, _best(lambda rate: run(matrices, rate), wanted.start)
    loss, best = _at(run, ratios[0], wanted.start)
    for direction in (ratios[1:], HIGHER_RATIOS if len(ratios) > 1 else ()):
        before = best
        for ratio in direction:
            found, rates = _at(run, ratio, best[0])
            if found >= loss:
                break
            loss, best = found, rates
        if best != before:
            break
    return best


def _each_in_turn(run: Run, wanted: Search) -> tuple[float, float]:
    """Coordinate descent over the two rates; rates that were run are not run again (`Worker.loss`)."""
    matrices, tables = wanted.start, wanted.table_start or wanted.start
    while True:
        before = tables
        matrices = _best(lambda rate, kept=tables: run(rate, kept), matrices)
        tables = _best(lambda rate, kept=matrices: run(kept, rate), tables)
        if tables == before:
            return matrices, tables


def _best(run: Callable[[float], float], start: float) -> float:
    """The best rate of a search that begins at `start`."""
    return search_rate(run, start, max_trials=MOST_TRIALS).best.rate


def _at(run: Run, ratio: float, start: float) -> tuple[float, tuple[float, float]]:
    """The lowest loss at a ratio, and its rates."""
    found = search_rate(
        lambda rate: run(rate, rounded_rate(rate * ratio)), start, max_trials=MOST_TRIALS
    ).best
    return found.loss, (found.rate, rounded_rate(found.rate * ratio))


def matrix_rules() -> list[Search]:
    """Each matrix rule with AdamW's tables at the base's rate, the most telling first."""
    first = ["adamw", "sinkgd", "orthogonal", "lorapre_muon_r4", "sinkgd_ema", "sinkgd_sqrt"]
    first += ["lorapre_muon_r4_residual", "sinkgd_1", "sinkgd_ema_r4"]
    names = dict.fromkeys([*first, *(name for name in MATRICES if name != "muon")])
    return [Search(f"adamw+{name}", MATRICES[name].start, "matrices") for name in names]


def table_rules() -> list[Search]:
    """Each table rule with Muon's matrices at the base's rate."""
    names = [name for name in TABLES if name != "adamw"]
    return [Search(f"{name}+muon", TABLES[name].start, "tables") for name in names]


def methods() -> list[Search]:
    """The optimizers as users take them, at both rates."""
    rank = RANKS[-1]
    return [
        Search("adamw:b2=0.95", 3e-3, seeds=3),
        Search("sage_hybrid", 5e-4, seeds=3),
        Search("muon", 6e-3, seeds=3),
        Search("adafactor", 6e-2, seeds=3),
        Search(f"lorapre_adamw:rank={rank}:options=recommended:scale=0.25", 5e-3, seeds=3),
        Search(f"lorapre_muon:rank={rank}", 6e-3, seeds=3),
        Search("sage_hybrid_int8", 5e-4, seeds=3),
        Search("lion_hybrid", 5e-4),
        Search("sinkgd_hybrid", 4e-3),
        Search("sage_hybrid:scale=0.6:sinkhorn_variant=sqrt", 1e-3),
        Search(f"lorapre_adamw:rank={rank}:scale=0.25", 5e-3),
        Search(f"galore:rank={rank}", 2e-2),
        Search(f"fira:rank={rank}", 5e-3),
        Search(f"apollo:rank={rank}", 5e-3),
    ]


def composites() -> list[Search]:
    """Crossings of both packages by budget of state, at both rates."""
    tables = ("factored", "sage_int8")
    matrices = ("lorapre_muon_r4", "lorapre_muon_r8", "orthogonal", "sinkgd_ema_r4")
    return [
        Search(f"{table}+{matrix}", MATRICES[matrix].start, seeds=3)
        for matrix in matrices
        for table in tables
    ]


LISTS: dict[str, Callable[[], list[Search]]] = {
    "base": lambda: [Search(BASE, 1.2e-2, seeds=3)],
    "matrices": matrix_rules,
    "tables": table_rules,
    "methods": methods,
    "composites": composites,
}
"""The lists by name."""
