"""The page and the picture of `benchmarks.steps.step_time`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.common import describe_circumstances, table
from benchmarks.steps.updates import VARIANTS

TARGETS = {
    "sage_hybrid": 1.0,
    "lorapre_adamw": 1.5,
}
"""Largest ratio of the update to AdamW's that is aimed at on a CPU."""
COMPILE_TARGET = 1.5
OURS, PEERS = "#0072B2", "#999999"
_PEER_NAMES = ("adamw", "lion", "adafactor", "muon", "galore")


def page(content: dict[str, Any]) -> str:
    """The results as Markdown; what is above its target is bold."""
    parts = [
        f"""# Time of a step, against AdamW

`update` and `apply_updates` on a Llama's parameters, jitted, parameters and state donated; and the
trainer's whole step. Each time is compared with `optax.adamw` on the same tree (stacked layers, but
unstacked ones for GaLore, which needs them), in turns in one process; the ratio is the median of
the pairs' ratios, beside it their quartiles. AdamW against itself shows the noise. Rows
are kept from run to run, so that they may be of several runs; each has the load of its own. Compile time:
tracing, lowering and compiling, median ratio of pairs. Rows with a rank use the preset's published
one (60M: 128, 350M: 256), in the demo a quarter of the width. GaLore takes new projections (an SVD
of every matrix) once in 200 steps: that step is not in the ratio, its time stands below the table.
Aims, on a CPU: SAGE-Hybrid at most {TARGETS["sage_hybrid"]}, LoRA-Pre Adam at rank 128 at most
{TARGETS["lorapre_adamw"]}, compile time at most {COMPILE_TARGET}; bold is above.

{describe_circumstances(content["circumstances"])}

Freed memory stays with the process, as in the trainer (`examples/llama/devices/host_memory.py`); tables that
say "default allocator" leave it to glibc, which gives large blocks back, so that every step faults in pages for
its temporaries. AdamW has none and does not notice. Its whole step nevertheless takes up to a fifth longer in
one process than in another (column "AdamW, ms"), by where its buffers come to lie: ratios of the trainer's step
are uncertain by as much.

What is above its aim, and why:

* **SAGE-Hybrid, tables.** Lion and SAGE read the old momentum for the direction. XLA:CPU writes one
  result a loop, so direction and momentum are two loops, and the donated momentum is copied before the
  second overwrites it: 9 arrays are read or written where one loop with two results, as on accelerators,
  needs 5. AdamW moves 10 on XLA:CPU. The means of SAGE's damper read the gradient once more.
* **SAGE-Hybrid, matrices.** Sinkhorn reads the gradient twice for its range, writes the squares once and
  reads them ten times (five iterations). Taking row norms and column sums from one read, block by block,
  would halve these reads on a CPU but is a chain of small kernels on an accelerator; not done.
* **LoRA-Pre.** "Products alone" are the matrix products it cannot do without, 12 r operations an entry at
  rank r for both moments, against AdamW's dozen. A step of the model itself takes six operations an
  entry and token, so in training they fade with the number of tokens a step.
* **Compilation.** Nearly all is XLA:CPU's code generation, about a tenth of a second for each leaf with a
  Sinkhorn loop. It is paid once, beside that of the model's own step (the trainer's tables).

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
    """Draws every ratio as a bar with the quartiles of its pairs, a panel a table."""
    groups = [group for group in _groups(content) if group[0][-1] == "keep"]
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 4.6 * lines), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, ((kind, preset, dtype, device, _), cells) in zip(axes.flat, groups, strict=False):
        ratios = [cell["time"]["ratio"] for cell in cells]
        spread = [
            [
                max(0.0, cell["time"]["ratio"] - cell["time"]["ratio_quartiles"][0])
                for cell in cells
            ],
            [
                max(0.0, cell["time"]["ratio_quartiles"][1] - cell["time"]["ratio"])
                for cell in cells
            ],
        ]
        names = [cell["variant"].partition(":")[0] for cell in cells]
        colours = [PEERS if name in _PEER_NAMES else OURS for name in names]
        axis.barh(range(len(cells)), ratios, xerr=spread, color=colours, ecolor="#333333")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(cells)), [cell["label"] for cell in cells])
        axis.invert_yaxis()
        what = "update" if kind == "update" else "whole step"
        axis.set_title(f"{preset}, {dtype}\n{what}, {device}", fontsize=9)
        axis.set_xlabel("time / AdamW's (quartiles of pairs)")
        for place, (ratio, above) in enumerate(zip(ratios, spread[1], strict=True)):
            text = f" {ratio:.2f}"
            axis.text(max(1.0, ratio + above), place, text, fontsize=8, verticalalignment="center")
        axis.set_xlim(0, 1.15 * max(1.0, *(r + a for r, a in zip(ratios, spread[1], strict=True))))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _groups(content: dict[str, Any]) -> list[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Cells of one table together, in the order of `VARIANTS`."""
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
