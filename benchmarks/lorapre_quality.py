"""The effect of LoRA-Pre's rank and options: the demo Llama trained with each, on the same batches.

    python -m benchmarks.lorapre_quality

Every cell (a variant of an optimizer, a peak learning rate, a number of steps) is one run whose result is kept
in lorapre_quality.json at once. A finished cell is never repeated, and a missing cell is shown as missing.
`--report` writes the page and the picture from the existing cells.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common import circumstances, describe_circumstances, table
from benchmarks.quality.cells import Cells, as_row, perplexity_text
from examples.llama.comparing.rank_plot import plot_ranks
from examples.llama.comparing.rows import Row
from examples.llama.comparing.tuning import search_rate
from examples.llama.optimizers.rates import tuned_rate
from examples.llama.optimizers.variants import Variant, parse_variant
from examples.llama.reporting.files import write_json

RANKS = (16, 4, 64)
STEPS, LONG = 150, 400
FIXED_RATE = 1e-2
"""The learning rate of all ablations."""

OPTIONS = {
    "exact": "bias_correction=exact",
    "residual": "residual=0.9",
    "bound": "bound=1",
    "gradient start": "initial_subspace=gradient",
}
ABLATIONS = (
    (),
    *((name,) for name in OPTIONS),
    ("exact", "residual"),
    ("exact", "residual", "bound"),
    tuple(OPTIONS),
)
TOGETHER = tuple(OPTIONS)
"""The options to search besides the paper's."""
DAMPINGS = (0.01, 0.1)
"""Values besides the default, 1e-4, for LoRA-Pre Adam and Muon."""
WITHOUT_START = tuple(name for name in OPTIONS if name != "gradient start")

# At a quarter of the embedding's learning rate, as for GaLore's and the paper's low-rank groups.
_ADAM = "lorapre_adamw:rank={}:scale=0.25"
_SINKGD = "lorapre_sinkgd:rank={}:options=paper:scale=5"
_EVERYTHING = "lorapre_muon:rank={}:table_rank={}:b2=0.95"
CONTROL = "adamw:b2=0.95:matrix_rate=0.25"
"""AdamW with full moments, otherwise as in LoRA-Pre Adam's rows: b2 and the ratio of learning rates."""


def variant(template: str, rank: int, names: Sequence[str] = ()) -> str:
    """The canonical key of a variant.

    >>> variant("lorapre_adamw:rank={}:scale=0.25", 4, ("exact", "bound"))
    'lorapre_adamw:rank=4:scale=0.25:bias_correction=exact:bound=1'
    """
    table_rank = max(rank, 2)
    text = ":".join([template.format(rank, table_rank), *(OPTIONS[name] for name in names)])
    return parse_variant(text).key


def damped(key: str, damping: float) -> str:
    """The key of a variant with another damping.

    >>> damped("lorapre_muon:rank=4", 0.1)
    'lorapre_muon:rank=4:damping=0.1'
    """
    return parse_variant(f"{key}:damping={damping:g}").key


def table_starts() -> dict[str, tuple[str, str]]:
    """Low-rank embeddings, by label: the variant that starts in the first gradient and the one without."""
    templates = {f"LoRA-Pre SinkGD r={rank}": (_SINKGD, rank) for rank in sorted(RANKS)}
    return {
        label: (variant(template, rank, TOGETHER), variant(template, rank, WITHOUT_START))
        for label, (template, rank) in templates.items()
    }


def searches() -> dict[str, float]:
    """The variants with a learning-rate search, and the start of the search."""
    found = {variant(_EVERYTHING, rank): 1.2e-2 for rank in (1, 4, 16)}
    found |= {variant(_SINKGD, 3, TOGETHER): 6e-3, CONTROL: FIXED_RATE, "adamw:b2=0.95": 3e-3}
    found["muon"] = tuned_rate("demo", "muon")[0]
    for rank in RANKS:
        found[f"lorapre_muon:rank={rank}"] = found["muon"]
        found[variant(_ADAM, rank)] = FIXED_RATE
        found[variant(_ADAM, rank, TOGETHER)] = FIXED_RATE
        found[variant(_SINKGD, rank, TOGETHER)] = 6e-3
        found[f"galore:rank={rank}"] = 4e-2
    return found


def given() -> dict[str, float]:
    """The variants with the example's own learning rate, searched before."""
    return {name: tuned_rate("demo", name)[0] for name in ("adamw", "sage_hybrid")}


def shown() -> list[str]:
    """All variants of the main table, in its order."""

    def place(key: str) -> tuple[Any, ...]:
        named = _shown(key)
        kind = ("options" in named.options, "table_rank" in named.options)
        ours = named.optimizer.startswith("lorapre_")
        return ours, named.optimizer, kind, named.options.get("rank", 0), key

    return sorted({**given(), **searches()}, key=place)


def long_runs() -> list[str]:
    """The variants that also train for `LONG` steps, at the learning rate found for `STEPS`."""
    adam = variant(_ADAM, 16, TOGETHER)
    return [CONTROL, variant(_EVERYTHING, 1), variant(_SINKGD, 3, TOGETHER), adam, "muon"]


def measure(cells: Cells, after: Callable[[], Any]) -> None:
    """Runs the missing cells: ablations, searches, long runs; calls ``after`` from time to time."""
    for rank in RANKS:
        for names in ABLATIONS:
            cells.loss(variant(_ADAM, rank, names), FIXED_RATE, STEPS)
        after()
    for key, rate in given().items():
        cells.loss(key, rate, STEPS)
    for key, start in searches().items():
        search_rate(lambda rate, key=key: cells.loss(key, rate, STEPS), start, max_trials=5)
        after()
    for with_start, without in table_starts().values():
        best = cells.best(with_start, STEPS)
        assert best is not None  # searched above
        cells.loss(without, best["learning_rate"], STEPS)
    for rank in RANKS:
        for damping in DAMPINGS:
            cells.loss(damped(variant(_ADAM, rank, TOGETHER), damping), FIXED_RATE, STEPS)
            muon = f"lorapre_muon:rank={rank}"
            cells.loss(damped(muon, damping), searches()[muon], STEPS)
    after()
    for key in long_runs():
        best = cells.best(key, STEPS)
        assert best is not None  # the search raises if no learning rate trains
        cells.loss(key, best["learning_rate"], LONG)
        after()


def rows_of(cells: Cells, steps: int) -> list[Row]:
    """The best cell of every searched variant, named for readers."""
    found = ((key, cells.best(key, steps)) for key in shown())
    return [as_row(cell, _shown(key)) for key, cell in found if cell is not None]


def page(cells: Cells, facts: Mapping[str, Any]) -> str:
    """The page of results."""
    main = []
    for key in shown():
        cell, rates = cells.best(key, STEPS), cells.rates(key, STEPS)
        if cell is None:
            main.append([_shown(key).label, "missing", *["-"] * 5])
            continue
        inside = len(rates) == 1 or rates[0] < cell["learning_rate"] < rates[-1]
        searched = f"{rates[0]:g} to {rates[-1]:g}" if len(rates) > 1 else "not yet"
        long = cells.best(key, LONG)
        main.append(
            [
                _shown(key).label,
                f"{cell['heldout_perplexity']:.1f}",
                "-" if long is None else f"{long['heldout_perplexity']:.1f}",
                f"{cell['learning_rate']:g}" + ("" if inside else " (edge)"),
                "before" if key in given() else searched,
                f"{cell['optimizer_state_bytes'] / 2**20:.2f}",
                f"{100 * cell['state_ratio']:.2f} %",
            ]
        )
    ablation = []
    for names in ABLATIONS:
        line = [", ".join(names) or "the paper's rule"]
        for rank in sorted(RANKS):
            cell = cells.find(variant(_ADAM, rank, names), FIXED_RATE, STEPS)
            line.append(perplexity_text(cell))
        ablation.append(line)
    ranks = [f"r = {rank}" for rank in sorted(RANKS)]
    header = ["optimizer", f"{STEPS} steps", f"{LONG} steps", "rate", "searched", "state, MiB"]
    return f"""# The effect of LoRA-Pre's rank and options

The demo Llama (3.3 million parameters, tied embedding of 8192 x 192), {STEPS} steps of 2048 tokens, the same
batches and start in every row, one seed; held-out perplexity, exp of the plain mean loss. Learning rates are
searched on a grid of factor 2 with runs of full length; "edge": the best is at the end of the grid, a better
one may lie outside; "before": [the demo's rates](demo/rates.json); "not yet": one learning rate was run.
{LONG} steps use the learning rate found for {STEPS}; a dash marks a run that does
not exist.

LoRA-Pre Adam and GaLore act on the matrices, at 0.25 of the learning rate of the embedding, which uses AdamW
(b2 = 0.95 in LoRA-Pre's rows; `AdamW b2=0.95 matrix x0.25` is the control: the same with full moments).
LoRA-Pre SinkGD acts on the embedding, with SinkGD (scale 5) and no state on the matrices. LoRA-Pre Muon with
`table r` has low rank everywhere. "Recommended": {", ".join(TOGETHER)}; all low-rank embeddings have these
options.

{describe_circumstances(facts)} Corpus {cells.corpus}, seed 0.

{table([*header, "of AdamW's"], main)}

For a matrix (or embedding) of p x q LoRA-Pre Adam stores two pairs of factors, (2p + 2q) r numbers. LoRA-Pre
Muon stores one pair, (p + q) r, and with `table r` two pairs for the embedding. `optax.contrib.galore` stores
a projection and two moments on the small side, (max + 2 min) r. In the rows of LoRA-Pre Adam, GaLore and
LoRA-Pre Muon without `table r` the embedding has AdamW's two full moments, 47 % of AdamW's state.

![perplexity against rank and state](lorapre_quality.png)

## The options, one at a time and together

LoRA-Pre Adam on the matrices at one learning rate, {FIXED_RATE:g} ({STEPS} steps); AdamW at the same two
learning rates:
{_control(cells)}.

{table(["options", *ranks], ablation)}

## The start of low-rank embeddings

LoRA-Pre SinkGD with the other three options, at the learning rate found with the gradient start ({STEPS}
steps):

{table(["optimizer", "gradient start", "normal start"], _starts(cells))}

## Damping

Relative damping of the r x r systems ({STEPS} steps). LoRA-Pre Adam with all four options
at {FIXED_RATE:g}, LoRA-Pre Muon with AdamW on the embedding at its best learning rate:

{table(["optimizer, damping", *ranks], _dampings(cells))}
"""


def report(cells: Cells, folder: pathlib.Path, command: str) -> None:
    """Writes the page and, once there are rows, the picture."""
    cells.stored["circumstances"] = facts = circumstances(command)
    write_json(cells.path, cells.stored)
    (folder / "lorapre_quality.md").write_text(page(cells, facts).rstrip() + "\n")
    rows = rows_of(cells, STEPS)
    if rows:
        title = f"Demo Llama: held-out perplexity after {STEPS} steps of 2048 tokens"
        plot_ranks(rows, folder / "lorapre_quality.png", title, command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the missing cells and writes everything."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lorapre_quality", description=__doc__
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument("--report", action="store_true", help="run nothing, write the report")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    # Runs of the quality benchmark are the same; its long ones fill the second column.
    cells = Cells(options.output / "lorapre_quality.json", also=[options.output / "quality.json"])
    command = shlex.join(["python", "-m", "benchmarks.lorapre_quality"])

    def publish() -> None:
        report(cells, options.output, command)

    if not options.report:
        measure(cells, publish)
    publish()


def _shown(key: str) -> Variant:
    """A variant's label for readers, without the settings that all rows of a kind share."""
    found = parse_variant(key)
    if not found.optimizer.startswith("lorapre_"):
        return found
    options = {name: value for name, value in found.options.items() if name.endswith("rank")}
    if "bound" in found.options and found.optimizer == "lorapre_adamw":
        options["options"] = "recommended"
    return Variant(found.optimizer, options)


def _control(cells: Cells) -> str:
    return perplexity_text(cells.find(CONTROL, FIXED_RATE, STEPS))


def _starts(cells: Cells) -> list[list[str]]:
    lines = []
    for label, keys in table_starts().items():
        best = cells.best(keys[0], STEPS)
        rate = math.nan if best is None else best["learning_rate"]
        lines.append([label, *(perplexity_text(cells.find(key, rate, STEPS)) for key in keys)])
    return lines


def _dampings(cells: Cells) -> list[list[str]]:
    rules = {
        "Adam": (lambda rank: variant(_ADAM, rank, TOGETHER), lambda _: FIXED_RATE),
        "Muon": (lambda rank: f"lorapre_muon:rank={rank}", lambda key: searches()[key]),
    }
    lines = []
    for label, (key_of, rate_of) in rules.items():
        for damping in (None, *DAMPINGS):
            line = [f"{label}, {1e-4 if damping is None else damping:g}"]
            for key in map(key_of, sorted(RANKS)):
                used = key if damping is None else damped(key, damping)
                line.append(perplexity_text(cells.find(used, rate_of(key), STEPS)))
            lines.append(line)
    return lines


if __name__ == "__main__":
    main()
