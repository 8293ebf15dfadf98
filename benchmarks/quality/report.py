"""The page and the pictures of the quality benchmark, from the cells that there are."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.common import describe_circumstances, table
from benchmarks.quality.cells import Cells, as_row, perplexity_text
from benchmarks.quality.long import OURS, long_content, long_section, plot_long
from benchmarks.quality.pareto import Point, plot_pareto
from benchmarks.quality.rows import (
    DAMPER_RATES,
    DAMPERS,
    FULL,
    ROWS,
    SEEDS,
    SINKHORN,
    SINKHORN_RATE,
    TRIAL,
    QualityRow,
    damper_key,
)
from examples.llama.comparing import palette
from examples.llama.comparing.labels import name_at_the_right
from examples.llama.comparing.palette import row_styles
from examples.llama.comparing.plots import (
    WIDTH,
    keep_room,
    perplexity_axis,
    plot_comparison,
    save,
    write_footer,
)
from examples.llama.comparing.rows import Row
from examples.llama.optimizers.variants import Variant, parse_variant
from examples.llama.reporting.files import write_json

TITLE = f"Demo Llama: {FULL} steps of 2048 tokens"


def write_report(cells: Cells, folder: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes quality.md and, once there are rows, its pictures; keeps the circumstances with the cells."""
    cells.stored["circumstances"] = dict(facts)
    write_json(cells.path, cells.stored)
    text = page(cells, facts, long_section(long_content(folder)))
    (folder / "quality.md").write_text(text.rstrip() + "\n")
    plot_long(folder)
    rows = finished_rows(cells)
    if rows:
        plot_comparison(rows, folder / "quality.png", TITLE, facts["command"])
        title = f"Perplexity against state. {TITLE}"
        plot_pareto(points(cells), folder / "quality_pareto.png", title, facts["command"])
    curves = robustness(cells)
    if curves:
        plot_robustness(curves, folder / "quality_rates.png", facts["command"])


def shown(key: str) -> Variant:
    """A variant as the page names it: settings that all rows of its kind share are left out.

    >>> shown("lorapre_adamw:rank=16:scale=0.25:bias_correction=exact:bound=1").label
    'LoRA-Pre Adam r=16 recommended'
    >>> shown("adamw:b2=0.95:matrix_rate=0.25").label
    'AdamW b2=0.95 matrix x0.25'
    """
    found = parse_variant(key)
    if not found.optimizer.startswith("lorapre_"):
        return found
    options = {name: value for name, value in found.options.items() if name.endswith("rank")}
    if found.optimizer == "lorapre_adamw" and "bound" in found.options:
        options["options"] = "recommended"
    return Variant(found.optimizer, options)


def finished_rows(cells: Cells) -> list[Row]:
    """The rows that were trained in full, with the mean perplexity of their seeds."""
    rows = []
    for row in ROWS:
        found = full_cells(cells, row)
        if found and all(cell["status"] == "finished" for cell in found):
            mean = statistics.fmean(float(cell["heldout_perplexity"]) for cell in found)
            rows.append(as_row({**found[0], "heldout_loss": math.log(mean)}, shown(row.key)))
    return rows


def points(cells: Cells) -> list[Point]:
    """The finished rows as points of the Pareto plot."""
    found = []
    for row in ROWS:
        runs = [cell for cell in full_cells(cells, row) if cell["status"] == "finished"]
        if runs:
            perplexities = [float(cell["heldout_perplexity"]) for cell in runs]
            found.append(
                Point(
                    shown(row.key).label,
                    100 * runs[0]["state_ratio"],
                    statistics.fmean(perplexities),
                    min(perplexities),
                    max(perplexities),
                    parse_variant(row.key).optimizer.startswith(OURS),
                    palette.colour(parse_variant(row.key).optimizer),
                )
            )
    return found


def full_cells(cells: Cells, row: QualityRow) -> list[dict[str, Any]]:
    """The full runs of a row at the rate that its search found, by seed."""
    best = cells.best(row.key, TRIAL)
    if best is None:
        return []
    seeds = SEEDS if row.core else SEEDS[:1]
    found = (cells.find(row.key, best["learning_rate"], FULL, seed) for seed in seeds)
    return [cell for cell in found if cell is not None]


def robustness(cells: Cells) -> dict[str, list[tuple[float, float]]]:
    """Rate and perplexity of the short runs of each core row that has at least three; diverged ones too."""
    curves = {}
    for row in ROWS:
        points = [
            (cell["learning_rate"], float(cell["heldout_perplexity"]))
            for cell in cells.select(row.key, TRIAL)
        ]
        if row.core and len(points) >= 3:
            curves[row.key] = points
    return curves


def plot_robustness(
    curves: Mapping[str, Sequence[tuple[float, float]]], path: pathlib.Path, footer: str
) -> None:
    """Draws perplexity against the rate as a multiple of the best one; a diverged run ends its line."""
    figure, axes = plt.subplots(figsize=(WIDTH, 6.0), layout="constrained")
    keep_room(figure, write_footer(figure, footer))
    rows = [_bare_row(key) for key in curves]
    ends = []
    for (key, points), style in zip(curves.items(), row_styles(rows), strict=True):
        best = min(points, key=lambda point: point[1])[0]
        finite = [(rate / best, loss) for rate, loss in points if math.isfinite(loss)]
        axes.plot(*zip(*finite, strict=True), **style)
        ends.append((shown(key).label, *finite[-1], style))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("peak learning rate, as a multiple of the best one (log scale)")
    axes.set_title(
        f"Held-out perplexity after {TRIAL} steps against the rate, one seed", fontsize=11
    )
    perplexity_axis(axes)
    axes.grid(alpha=0.3)
    name_at_the_right(axes, ends)
    save(figure, path)


def page(cells: Cells, facts: Mapping[str, Any], long: str) -> str:
    """The page of results: the part about the long table, then the early one."""
    header = ["optimizer", "perplexity", "seeds", "lowest to highest", "rate", "searched"]
    return f"""# What each optimizer reaches

Two tables: the long one at a budget of tokens, and the early one, which is the first million tokens of a run
and **says nothing about its end** ([what changed after 16.4 million](../choosing.md#after-164-million-tokens)).

{long}

## Early

The demo Llama (3.3 million parameters, tied table of 8192 x 192), {FULL} steps of 2048 tokens, the same
batches in every row, held-out perplexity (exp of the plain mean loss) at the end: the mean over seeds, which
change the start and the order of the text, not the held-out part. Rates are searched with runs of {TRIAL}
steps on a grid of factor 2; "edge": the best is at the end of the grid. Missing cells have not been run; the
command runs them.

{describe_circumstances(facts)} Corpus {cells.corpus}.

{table([*header, "state, MiB", "of AdamW's"], [_line(cells, row) for row in ROWS])}

LoRA-Pre Adam and GaLore work on the matrices, at 0.25 of the rate of the table, which has AdamW;
`AdamW b2=0.95 matrix x0.25` is their control with full moments. LoRA-Pre SinkGD and Muon with `table r`
have the recommended options on the table. "Factored tables" is optax's factored RMS on the table, SinkGD on
matrices. [APOLLO](../../benchmarks/baselines/apollo.py) and [Fira](../../benchmarks/baselines/fira.py) are
ours, after their papers.

![perplexity against optimizer state](quality_pareto.png)

![loss and state](quality.png)

## SAGE's damper

SAGE-Hybrid, {TRIAL} steps at three rates, one seed; the damper "none" is Lion's direction:

{table(["damper", *(f"{rate:g}" for rate in DAMPER_RATES)], _dampers(cells))}

## Sinkhorn's iterations and form

SAGE-Hybrid at {SINKHORN_RATE:g}, {TRIAL} steps, one seed:

{table(["SinkGD", "perplexity"], _sinkhorn(cells))}

LoRA-Pre's rank, options, damping and first subspace: [a page of their own](lorapre_quality.md).

## A rate that is off

Perplexity after {TRIAL} steps at multiples of the best rate, one seed:

{table(["optimizer", "best rate", "x 0.25", "x 0.5", "x 1", "x 2", "x 4"], _off_best(cells))}

![perplexity against the rate](quality_rates.png)
"""


def _line(cells: Cells, row: QualityRow) -> list[str]:
    found = full_cells(cells, row)
    rates, best = cells.rates(row.key, TRIAL), cells.best(row.key, TRIAL)
    label = shown(row.key).label
    if best is None or not found:
        return [label, "missing", *["-"] * 6]
    rate = best["learning_rate"]
    edge = "" if rates[0] < rate < rates[-1] else " (edge)"
    perplexities = [float(cell["heldout_perplexity"]) for cell in found]
    wanted = len(SEEDS) if row.core else 1
    spread = f"{min(perplexities):.1f} to {max(perplexities):.1f}" if len(found) > 1 else "-"
    mean = statistics.fmean(perplexities)
    return [
        label,
        f"{mean:.1f}" if math.isfinite(mean) else "diverged",
        f"{len(found)} of {wanted}",
        spread,
        f"{rate:g}{edge}",
        f"{rates[0]:g} to {rates[-1]:g}",
        f"{found[0]['optimizer_state_bytes'] / 2**20:.2f}",
        f"{100 * found[0]['state_ratio']:.2f} %",
    ]


def _dampers(cells: Cells) -> list[list[str]]:
    return [
        [
            damper,
            *(
                perplexity_text(cells.find(damper_key(damper), rate, TRIAL))
                for rate in DAMPER_RATES
            ),
        ]
        for damper in DAMPERS
    ]


def _sinkhorn(cells: Cells) -> list[list[str]]:
    return [
        [label, perplexity_text(cells.find(key, SINKHORN_RATE, TRIAL))]
        for label, key in SINKHORN.items()
    ]


def _off_best(cells: Cells) -> list[list[str]]:
    lines = []
    for row in ROWS:
        best = cells.best(row.key, TRIAL)
        if not row.core or best is None:
            continue
        rate = best["learning_rate"]
        found = (
            cells.find(row.key, _times(rate, factor), TRIAL) for factor in (0.25, 0.5, 1, 2, 4)
        )
        lines.append([shown(row.key).label, f"{rate:g}", *map(perplexity_text, found)])
    return lines


def _times(rate: float, factor: float) -> float:
    return float(f"{rate * factor:.4g}")


def _bare_row(key: str) -> Row:
    """A row that only has a name, for its style."""
    found = shown(key)
    nothing: dict[str, Any] = dict.fromkeys(
        ("steps", "tokens", "parameters", "optimizer_state_bytes", "state_ratio"), 0
    )
    nothing |= dict.fromkeys(("learning_rate", "heldout_loss"), math.nan)
    named = {"optimizer": found.optimizer, "rank": found.options.get("rank"), "variant": key}
    return as_row({**nothing, **named, "status": "finished", "rate_source": ""}, found)
