"""What each optimizer reaches on the same tokens: tuned rates, seeds, controls and rates off the best.

    python -m benchmarks.quality --minutes 90

The demo Llama on this interpreter's standard library: the early table. A rate is searched with short runs
(`TRIAL` steps), the rows are then trained for `FULL` steps, the core rows with three seeds. Every run's result
is kept in quality.json at once and never repeated; what has not run is shown as missing. Stop it at any time,
start it again later.

    python -m benchmarks.quality --tokens 4e6 --workers 2

The long table: every row for a number of tokens, its rate and the ratio of the tables' rate to it searched at
full length, in quality_long.json. On a CPU a model of 128 wide and 4 layers, a process a core; on an
accelerator one of 256 wide and 6 layers, with `--tokens 16.384e6 --file tokens.npz` (`benchmarks.tokens.make`).
"""

from __future__ import annotations

import argparse
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common import circumstances
from benchmarks.peers import register_peers
from benchmarks.quality.cells import Cells
from benchmarks.quality.long import (
    long_protocol,
    long_searches,
    measure_long,
    text_tokens,
)
from benchmarks.quality.report import write_report
from benchmarks.quality.rows import (
    FULL,
    MOST_TRIALS,
    ROBUSTNESS,
    ROWS,
    SEEDS,
    TRIAL,
    QualityRow,
    controls,
)
from benchmarks.tokens.sharing import share_work
from examples.llama.comparing.tuning import search_rate


@dataclass(frozen=True)
class Job:
    """A run, or a search of several.

    Attributes:
        steps: So many steps it takes, or is likely to take.
        run: Does it; finished cells cost nothing.
    """

    steps: int
    run: Callable[[], object]


def jobs(cells: Cells) -> Iterator[Job]:
    """All work in its order: rows with one seed, controls, more seeds.

    What is finished is yielded too. A rate is only known after its search.
    """
    for row in sorted(ROWS, key=lambda row: not row.core):
        trials = 3 + (2 if row.core else 0)
        yield Job(trials * TRIAL, lambda row=row: _search(cells, row))
        yield Job(FULL, lambda row=row: _full(cells, row, 0))
    for key, rate in controls():
        yield Job(TRIAL, lambda key=key, rate=rate: cells.loss(key, rate, TRIAL))
    core = [row for row in ROWS if row.core]
    for seed in SEEDS[1:]:
        for row in core:
            yield Job(FULL, lambda row=row, seed=seed: _full(cells, row, seed))


def _search(cells: Cells, row: QualityRow) -> None:
    """Searches a row's rate; a core row is run away from it too, until no rate there is better."""
    search_rate(lambda rate: cells.loss(row.key, rate, TRIAL), row.start, max_trials=MOST_TRIALS)
    centre = None
    while row.core and centre != _best_rate(cells, row):
        centre = _best_rate(cells, row)
        for factor in ROBUSTNESS:
            cells.loss(row.key, float(f"{centre * factor:.4g}"), TRIAL)


def _best_rate(cells: Cells, row: QualityRow) -> float:
    best = cells.best(row.key, TRIAL)
    assert best is not None  # the search before raises where no rate trains
    return best["learning_rate"]


def _full(cells: Cells, row: QualityRow, seed: int) -> None:
    cells.loss(row.key, _best_rate(cells, row), FULL, seed)


def measure(cells: Cells, minutes: float, publish: Callable[[], None]) -> bool:
    """Runs what is missing until it is done or the time is over; returns whether it is done.

    Progress, and the time that the rest should take at the pace so far, are printed after every job.
    """
    started, trained = time.perf_counter(), 0
    work = list(jobs(cells))
    for number, job in enumerate(work, start=1):
        if time.perf_counter() - started > 60 * minutes:
            print(f"{minutes:g} minutes are over; {len(work) - number + 1} jobs are left.")
            return False
        before = cells.steps_run
        job.run()
        if cells.steps_run == before:
            continue
        trained += cells.steps_run - before
        pace = (time.perf_counter() - started) / trained
        left = sum(other.steps for other in work[number:])
        print(
            f"job {number} of {len(work)}; about {left * pace / 60:.0f} minutes if none of the rest "
            "has run",
            flush=True,
        )
        publish()
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report")
    parser.add_argument("--tokens", type=float, help="run the long table with so many tokens a row")
    parser.add_argument("--file", type=pathlib.Path, help="tokens of the long table")
    parser.add_argument("--workers", type=int, default=1, help="processes for the long table")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    register_peers()
    # Trials of the ranks' benchmark are the same runs.
    cells = Cells(
        options.output / "quality.json",
        also=[options.output / "lorapre_quality.json"],
        read_only=options.report or options.tokens is not None,
    )
    command = shlex.join(["python", "-m", "benchmarks.quality"])

    def publish() -> None:
        write_report(cells, options.output, circumstances(command))

    if options.tokens is not None:
        _long(options, arguments)
    elif not options.report:
        measure(cells, options.minutes, publish)
        publish()
        return
    # Nothing of the early table was measured: its circumstances stay.
    write_report(cells, options.output, cells.stored.get("circumstances") or circumstances(command))


def _long(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Runs what is missing of the long table."""
    if options.workers > 1:
        share_work("benchmarks.quality", arguments, options.workers)
        return
    protocol = long_protocol(int(options.tokens))
    tokens = text_tokens(protocol, options.file)
    measure_long(options.output, protocol, tokens, long_searches(), options.minutes, arguments)


if __name__ == "__main__":
    main()
