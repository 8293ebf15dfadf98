"""What each optimizer reaches on the same tokens: tuned rates, seeds, controls and rates off the best.

    python -m benchmarks.quality --minutes 90

The demo Llama on this interpreter's standard library. A rate is searched with short runs (`TRIAL` steps), the
rows are then trained for `FULL` steps, the core rows with three seeds. Every run's result is kept in
quality.json at once and never repeated; what has not run is shown as missing. Stop it at any time, start it
again later.
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
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    register_peers()
    # Trials of the ranks' benchmark are the same runs.
    cells = Cells(options.output / "quality.json", also=[options.output / "lorapre_quality.json"])
    command = shlex.join(["python", "-m", "benchmarks.quality"])

    def publish() -> None:
        write_report(cells, options.output, circumstances(command))

    if not options.report:
        measure(cells, options.minutes, publish)
    publish()


if __name__ == "__main__":
    main()
