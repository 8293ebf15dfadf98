"""Trains optimizers on a file of tokens, each at its own searched rates; needs JAX, optax and Flax only.

    python -m benchmarks.tokens.make tokens.npz --vocab-size 8192
    python -m benchmarks.tokens tokens.npz --list issue --workers 3 --minutes 30

The first command needs the trainer's packages and makes the file; the second needs the file alone, and fits
an accelerator by default: 256 wide, 6 layers, tied table of 8192, 16.4 million tokens a run. `--list` names
what is searched (`benchmarks.tokens.searches`); `issue` is all of it, with the best crossings, the hypotheses
and a trace of SAGE-Hybrid (`benchmarks.tokens.issue`). `--optimizers` names other variants, each with the rate
where its search begins:

    python -m benchmarks.tokens tokens.npz --optimizers adamw=3e-3,sage+muon=6e-3
    python -m benchmarks.tokens tokens.npz --optimizers sage+muon=6e-3/1.2e-2 --seeds 3

A second rate is the tables': then each of the two is searched in turn, by factors of two, until neither moves.
With `@matrices` or `@tables` behind its name an optimizer moves this rate alone, beside the other one of
`--base`:

    python -m benchmarks.tokens tokens.npz --optimizers lion+muon@tables=2e-3 --base 1.2e-2,1.2e-2

Every finished run is kept in OUT/recipes.json at once and not run again; several workers share the list through
claims, so that commands can be stopped and started, also beside each other. `--trace sage_hybrid=5e-4` follows
one optimizer over a run instead; `--report` writes the page of cells only. With `--name quality_long` the runs
are rows of the long table, whose page `python -m benchmarks.quality --report` writes.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from benchmarks.common import circumstances
from benchmarks.tokens.file import load_tokens
from benchmarks.tokens.issue import everything
from benchmarks.tokens.page import page
from benchmarks.tokens.rules import register_crossing
from benchmarks.tokens.searches import LISTS, ONE_SIDE, RATIOS, Search
from benchmarks.tokens.sharing import plain_command, share_work
from benchmarks.tokens.store import SharedStore
from benchmarks.tokens.trace import trace
from benchmarks.tokens.worker import Protocol, Worker
from examples.llama.devices.host_memory import keep_freed_memory
from examples.llama.optimizers.rates import parse_rate

NAME = "recipes"


def parse_searches(text: str, seeds: int = 1) -> list[Search]:
    """Reads `variant=rate,variant=rate/table_rate,variant@tables=rate`: the last `=` is before the rates.

    Args:
        text: The searches; those with two rates move each in turn, those with `@matrices` or `@tables` this
            rate beside the base's other one, the rest both at each ratio.
        seeds: Seeds of each search's best.

    Raises:
        ValueError: A variant, a rule or what is to move is unknown, or a rate is no positive number.

    >>> parse_searches("sage+muon=6e-3")
    [Search(variant='sage+muon', start=0.006, moves='both', seeds=1, table_start=None)]
    >>> parse_searches("sage+muon=6e-3/1.2e-2", 3)
    [Search(variant='sage+muon', start=0.006, moves='each', seeds=3, table_start=0.012)]
    >>> parse_searches("lion+muon@tables=2e-3")
    [Search(variant='lion+muon', start=0.002, moves='tables', seeds=1, table_start=None)]
    """
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, rates = (part.strip() for part in item.rpartition("="))
        variant, one_side, side = name.partition("@")
        register_crossing(variant)
        start, *table = (
            parse_rate(rate, variant, item, "optimizer") for rate in rates.split("/", 1)
        )
        if one_side:
            if side not in ONE_SIDE:
                raise ValueError(f"{item!r} moves {side!r}; use one of {', '.join(ONE_SIDE)}")
            if table:
                raise ValueError(f"{item!r} moves one rate and names two; --base keeps the other")
            moves = "tables" if side == "tables" else "matrices"
            found.append(Search(variant, start, moves, seeds))
        elif table:
            found.append(Search(variant, start, "each", seeds, table[0]))
        else:
            found.append(Search(variant, start, seeds=seeds))
    return found


def listed(names: str, only: str = "") -> list[Search]:
    """The searches of lists by name, `issue` for all of them.

    Args:
        names: The lists, by commas.
        only: Variants to take out of them, by commas; all if empty.

    Raises:
        ValueError: A list is unknown, or none has such a variant.

    >>> len(listed("issue")) == sum(len(listed(name)) for name in LISTS)
    True
    >>> [one.variant for one in listed("base,tables", "lion+muon,sage+muon")]
    ['lion+muon', 'sage+muon']
    """
    found = []
    for name in LISTS if names == "issue" else names.split(","):
        if name not in LISTS:
            raise ValueError(f"unknown list {name!r}; use one of {', '.join(LISTS)}, or issue")
        found += LISTS[name]()
    if not only:
        return found
    chosen = []
    for variant in only.split(","):
        own = [one for one in found if one.variant == variant.strip()]
        if not own:
            raise ValueError(f"no list of {names} has {variant.strip()!r}")
        chosen += own
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=pathlib.Path, nargs="?", help="the file of tokens")
    parser.add_argument("--list", default="", help="lists of searches, by commas")
    parser.add_argument("--only", default="", help="these variants of the lists, in this order")
    parser.add_argument("--optimizers", default="", help="searches of your own")
    parser.add_argument("--seeds", type=int, default=1, help="of each search of your own")
    parser.add_argument("--trace", default="", help="variant=rate[/rate], to follow over a run")
    parser.add_argument("--shape", default="wide")
    parser.add_argument("--tokens", type=float, default=16.384e6, help="of a run")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", help="of the matrix products")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch")
    parser.add_argument("--final-rate", type=float, help="at the end, as a share of the peak")
    parser.add_argument("--ratios", default=",".join(f"{ratio:g}" for ratio in RATIOS))
    parser.add_argument("--base", help="matrices,tables: rates to keep instead of searching them")
    parser.add_argument("--workers", type=int, default=1, help="processes on the device")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--force-claims", action="store_true", help="those of other hosts too")
    parser.add_argument("--report", action="store_true", help="write the page only")
    parser.add_argument("--name", default=NAME, help="of the files of results")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        arguments: command line, without the program's name.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(given)
    store = SharedStore(options.out / f"{options.name}.json")
    if not options.report:
        if options.file is None:
            parser.error("name a file of tokens; `python -m benchmarks.tokens.make` makes one")
        try:
            searches = listed(options.list, options.only) if options.list else []
            searches += parse_searches(options.optimizers, options.seeds)
            if options.workers > 1:
                share_work("benchmarks.tokens", given, options.workers)
            elif options.trace:
                _trace(options, store, given)
            else:
                _work(options, store, searches, given)
        except ValueError as error:
            parser.error(str(error))
    store.refresh()
    if options.name == NAME:
        (options.out / f"{NAME}_cells.md").write_text(page(store.content))


def _protocol(options: argparse.Namespace) -> Protocol:
    return Protocol(
        options.shape,
        int(options.tokens),
        options.batch_size,
        options.seq_len,
        options.dtype,
        options.accumulate,
        options.final_rate,
    )


def _worker(options: argparse.Namespace, store: SharedStore, given: Sequence[str]) -> Worker:
    base = None
    if options.base:
        matrices, tables = map(float, options.base.split(","))
        base = matrices, tables
    return Worker(
        _protocol(options),
        load_tokens(options.file),
        store,
        circumstances(plain_command("benchmarks.tokens", given)),
        seconds=60 * options.minutes,
        ratios=[float(ratio) for ratio in options.ratios.split(",")],
        base=base,
        force_claims=options.force_claims,
    )


def _work(
    options: argparse.Namespace,
    store: SharedStore,
    searches: Sequence[Search],
    given: Sequence[str],
) -> None:
    keep_freed_memory()
    claims = options.out / f".{options.name}_claims"
    worker = _worker(options, store, given)
    lines = worker.work(searches, claims)
    if options.list == "issue" and not options.only:
        lines = everything(worker.of, worker.protocol, claims)
    for line in lines:
        print(line, flush=True)


def _trace(options: argparse.Namespace, store: SharedStore, given: Sequence[str]) -> None:
    (wanted,) = parse_searches(options.trace)
    worker = _worker(options, store, given)
    found = trace(worker, wanted.variant, wanted.start, wanted.table_start)
    store.trace(found, worker.facts)


if __name__ == "__main__":
    main()
