"""The page and the picture of `benchmarks.steps.step_time`."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.common import describe_circumstances, table
from benchmarks.steps.updates import VARIANTS
from examples.llama.comparing import palette
from examples.llama.comparing.labels import FONT
from examples.llama.comparing.plots import WIDTH

TARGETS = {
    "sage_hybrid": 1.0,
    "lorapre_adamw": 1.5,
}
"""Upper aim for the ratio of the update to AdamW's on a CPU."""
COMPILE_TARGET = 1.5


def page(content: dict[str, Any]) -> str:
    """The results as Markdown; what is above its target is bold."""
    parts = [
        f"""# Time of a step, against AdamW

`update` and `apply_updates` on a Llama's parameters, jitted, parameters and state donated; and the
trainer's whole step. Each time is compared with `optax.adamw` on the same tree (stacked layers, but
unstacked ones for GaLore, which needs them), in turns in one process; the ratio is the median of
the pairs' ratios, with their quartiles. AdamW against itself shows the noise. Rows are
kept between runs, so a table may mix several runs; each row has its own load average. Compile time:
tracing, lowering and compiling, median ratio of pairs. Rows with a rank use the preset's published
one (60M: 128, 350M: 256), in the demo a quarter of the width. GaLore takes new projections (an SVD
of every matrix) once in 200 steps. The ratio omits that step; its time is below the table.
Aims, on a CPU: SAGE-Hybrid at most {TARGETS["sage_hybrid"]}, LoRA-Pre Adam at rank 128 at most
{TARGETS["lorapre_adamw"]}, compile time at most {COMPILE_TARGET}; bold is above.

{describe_circumstances(content["circumstances"])}

Freed memory stays with the process, as in the trainer (`examples/llama/devices/host_memory.py`); tables that
say "default allocator" leave it to glibc, which gives large blocks back, so that every step faults in pages
for its temporaries. AdamW has none, so this does not affect it. Its whole step nevertheless takes up to a
fifth longer in one process than in another (column "AdamW, ms"), depending on the placement of its buffers.
Ratios of the trainer's step are uncertain by as much.

These rows are above their aim:

* **SAGE-Hybrid, embedding and head.** Lion and SAGE read the old momentum for the direction. XLA:CPU writes one
  result per loop, so direction and momentum are two loops, and the donated momentum is copied before the
  second overwrites it: 9 arrays are read or written where one loop with two results, as on accelerators,
  needs 5. AdamW moves 10 on XLA:CPU. The means of SAGE's damper read the gradient once more.
* **SAGE-Hybrid, matrices.** Sinkhorn reads the gradient twice for its range, writes the squares once and
  reads them ten times (five iterations). Computing row norms and column sums in one read, block by block,
  would halve these reads on a CPU, but on an accelerator it is a chain of small kernels, so it is not done.
* **LoRA-Pre.** "Products alone" are its unavoidable matrix products, 12 r operations per entry at rank r for
  both moments, against AdamW's dozen. A step of the model itself takes six operations per entry and token, so
  their share falls with the number of tokens per step.
* **Compilation.** Nearly all is XLA:CPU's code generation, about a tenth of a second for each leaf with a
  Sinkhorn loop. It happens once, in addition to the compilation of the model's step (the trainer's tables).

![ratios](step_time.png)
"""
    ]
    for group, cells in _groups(content):
        kind, preset, dtype, device, allocator = group
        rows = []
        for cell in cells:
            timed = cell["time"]
            low, high = timed["ratio_quartiles"]
            row = [
                cell["label"],
                "-" if cell["rank"] is None else cell["rank"],
                timed["pairs"],
                f"{1e3 * timed['median_seconds']:.4g}",
                f"{1e3 * timed['baseline_median_seconds']:.4g}",
                _marked(timed["ratio"], TARGETS.get(cell["variant"].partition(":")[0])),
                f"{low:.2f} to {high:.2f}",
                _marked(cell["compile_ratio"], COMPILE_TARGET),
                cell["load_average_one_minute"],
            ]
            if kind == "train":
                row.insert(6, f"{cell['tokens_per_second']:,.0f}")
            else:
                row.insert(8, _thousands(cell.get("page_faults")))
            rows.append(row)
        header = ["optimizer", "rank", "pairs", "ms", "AdamW, ms", "ratio", "quartiles"]
        header += ["compile", "load"]
        if kind == "train":
            header.insert(6, "tokens/s")
        else:
            header.insert(8, "page faults, thousands")
        title = "update and apply" if kind == "update" else "the trainer's step"
        title += ", default allocator" if allocator == "default" else ""
        parts.append(f"## {preset}, {dtype}, {title}, {device}\n\n{table(header, rows)}\n")
        galore = [cell for cell in cells if cell["variant"].startswith("galore")]
        if kind == "update" and galore:
            first, usual = galore[0]["first_step_seconds"], galore[0]["time"]["median_seconds"]
            parts.append(
                f"GaLore's step with new projections: {first:.1f} s, {first / usual:.0f} times the "
                "others.\n"
            )
    return "\n".join(parts)


def plot(content: dict[str, Any], path: pathlib.Path) -> None:
    """Draws every ratio as a bar with the quartiles of its pairs: whole steps, then updates by size."""
    groups = [group for group in _groups(content) if group[0][-1] == "keep"]
    groups.sort(key=lambda group: (group[0][0] == "update", _adamw_seconds(group[1])))
    lines = [len(cells) for _, cells in groups]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(WIDTH, 0.235 * sum(lines) + 0.6 * len(groups) + 0.9),
        height_ratios=lines,
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    figure.suptitle(
        "Time of a step or update as a multiple of AdamW's (thin lines: quartiles of pairs)\n"
        "products alone: the matrix products that LoRA-Pre Adam cannot do without",
        fontsize=11,
    )
    for axis, ((kind, preset, dtype, device, _), cells) in zip(axes.flat, groups, strict=True):
        for place, cell in enumerate(cells):
            timed, name = cell["time"], cell["variant"].partition(":")[0]
            low, high = timed["ratio_quartiles"]
            ratio = timed["ratio"]
            spread = [[max(0.0, ratio - low)], [max(0.0, high - ratio)]]
            axis.barh(place, ratio - 1, left=1, color=palette.colour(name), height=0.7)
            axis.errorbar(ratio, place, xerr=spread, color="0.2", linewidth=1, fmt="none")
            end = max(1.0, ratio + spread[1][0])
            axis.text(1.06 * end, place, f"{ratio:.2f}", fontsize=FONT, va="center")
        axis.axvline(1.0, color="black", linewidth=0.8)
        labels = [cell["label"].replace("LoRA-Pre Adam's products", "products") for cell in cells]
        axis.set_yticks(range(len(cells)), labels, fontsize=FONT)
        axis.invert_yaxis()
        what = "update and apply" if kind == "update" else "the trainer's whole step"
        axis.set_title(f"{preset}, {dtype}: {what}, {device}", fontsize=10)
        axis.set_xscale("log")
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelbottom=True)
    longest = max(cell["time"]["ratio_quartiles"][1] for _, cells in groups for cell in cells)
    last = axes.flat[-1]
    last.set_xlim(0.5, 1.5 * max(longest, 2.0))
    last.xaxis.set_major_locator(FixedLocator([t for t in _TICKS if t <= longest or t <= 2]))
    last.xaxis.set_minor_locator(NullLocator())
    last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    last.set_xlabel("time, multiple of AdamW's on the same tree (log scale)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


_TICKS = (0.5, 0.7, 1, 2, 3, 5, 10, 20, 30, 50, 100)


def _adamw_seconds(cells: Sequence[dict[str, Any]]) -> float:
    """AdamW's median time for these cells, which orders the sizes of models."""
    return statistics.median(cell["time"]["baseline_median_seconds"] for cell in cells)


def _groups(content: dict[str, Any]) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Cells grouped by table, in the order of `VARIANTS`."""
    keys = dict.fromkeys(_group(cell) for cell in content["cells"])
    found = []
    for key in sorted(
        keys, key=lambda key: (key[4] != "keep", key[3], key[0] == "train", *key[1:3])
    ):
        cells = [cell for cell in content["cells"] if _group(cell) == key]
        found.append((key, sorted(cells, key=lambda cell: _place(cell["variant"], VARIANTS))))
    return found


def _group(cell: dict[str, Any]) -> tuple[str, ...]:
    return tuple(cell[key] for key in ("kind", "preset", "dtype", "device", "allocator"))


def _place(key: str, order: Sequence[str]) -> int:
    return order.index(key) if key in order else len(order)


def _thousands(count: float | None) -> str:
    return "-" if count is None else f"{count / 1000:.1f}"


def _marked(ratio: float, target: float | None) -> str:
    return f"**{ratio:.2f}**" if target is not None and ratio > target else f"{ratio:.2f}"
