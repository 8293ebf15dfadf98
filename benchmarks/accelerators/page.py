"""The page about accelerators: the targets, the measurements, and the figures of 2026-11-27."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from benchmarks import mfu
from benchmarks.common import describe_circumstances, table

ONE_ITERATION = "sage_hybrid:sinkhorn_iterations=1"
TARGETS = (
    ("SAGE-Hybrid, 5 iterations, to AdamW", "galore_350m", "bfloat16", "sage_hybrid", "adamw", 1.9),
    ("SAGE-Hybrid, 5 iterations, to AdamW", "galore_350m", "float32", "sage_hybrid", "adamw", 1.6),
    ("SAGE-Hybrid, 5 iterations, to AdamW", "sage_1.3b", "bfloat16", "sage_hybrid", "adamw", 1.9),
    ("SAGE-Hybrid, 5 iterations, to AdamW", "sage_1.3b", "float32", "sage_hybrid", "adamw", 1.6),
    ("SAGE-Hybrid, 1 iteration, to AdamW", "galore_350m", "bfloat16", ONE_ITERATION, "adamw", 0.9),
    ("SAGE-Hybrid, 1 iteration, to AdamW", "galore_350m", "float32", ONE_ITERATION, "adamw", 1.0),
    ("SAGE-Hybrid, 1 iteration, to AdamW", "sage_1.3b", "bfloat16", ONE_ITERATION, "adamw", 0.9),
    ("SAGE-Hybrid, 1 iteration, to AdamW", "sage_1.3b", "float32", ONE_ITERATION, "adamw", 1.0),
    (
        "LoRA-Pre Adam, to products alone",
        "galore_350m",
        "bfloat16",
        "lorapre_adamw",
        "products",
        1.5,
    ),
    (
        "LoRA-Pre Adam, to products alone",
        "galore_350m",
        "float32",
        "lorapre_adamw",
        "products",
        1.5,
    ),
    ("LoRA-Pre Muon, to optax's Muon", "galore_350m", "bfloat16", "lorapre_muon", "muon", 1.05),
    ("LoRA-Pre Muon, to optax's Muon", "galore_350m", "float32", "lorapre_muon", "muon", 1.0),
)
"""Text, preset, dtype, optimizer, reference, and the largest ratio to aim for."""
TEMPORARIES, COMPILE = 2.0, 2.0


def page(folder: pathlib.Path, content: dict[str, Any]) -> str:
    """The page from a folder's figures of 2026-11-27 and later measurements."""
    earlier, old_parts, training = (
        json.loads((_ours(folder) / f"h200_{name}.json").read_text())
        for name in ("step_times", "parts", "training")
    )
    cells = content["cells"]
    return "\n".join(
        [
            "# On an accelerator\n",
            "One command measures the following on a machine with a GPU or TPU, most wanted first, within its "
            "budget of seconds; a restart continues where it stopped:\n",
            "    python -m benchmarks.accelerator --budget 350\n",
            "## Targets\n",
            _targets(earlier["rows"], cells),
            _measured(content),
            _earlier(earlier),
            _old_parts(old_parts),
            _training(training),
        ]
    )


def _ours(folder: pathlib.Path) -> pathlib.Path:
    """The folder if it holds the earlier figures, else that of the repository."""
    if (folder / "h200_parts.json").exists():
        return folder
    return pathlib.Path(__file__).parents[2] / "docs" / "results" / "accelerator"


def _targets(earlier: list[dict[str, Any]], cells: list[dict[str, Any]]) -> str:
    before = {(r["preset"], r["dtype"], r["key"]): r for r in earlier}
    devices = sorted({cell["device"] for cell in cells if cell["kind"] == "update"})
    rows = []
    for text, preset, dtype, name, to, target in TARGETS:
        row = [text, preset, dtype, f"{target:g}", _ratio(before, preset, dtype, name, to)]
        for device in devices:
            row.append(_ratio(_updates(cells, device), preset, dtype, name, to))
        rows.append(row)
    header = ["ratio of times", "tree", "dtype", "at most", "H200, 7ebf1c9", *devices]
    largest = max(
        (row["temp"] / row["largest"], row["key"]) for row in earlier if "muon" not in row["key"]
    )
    text = (
        f"A dash marks a target without a measurement, which is unverified. Two more hold for every row: "
        f"temporaries of at most {TEMPORARIES:g} times the largest float32 leaf (the most at 7ebf1c9: "
        f"{largest[0]:.1f}, `{largest[1]}`) and compile seconds of at most {COMPILE:g} times AdamW's.\n"
    )
    return f"{table(header, rows)}\n\n{text}"


def _updates(cells: list[dict[str, Any]], device: str) -> dict[Any, dict[str, Any]]:
    return {
        (cell["preset"], cell["dtype"], cell["name"]): cell
        for cell in cells
        if cell["kind"] == "update" and cell["device"] == device
    }


def _ratio(found: dict[Any, dict[str, Any]], preset: str, dtype: str, name: str, to: str) -> str:
    """A row's ratio to AdamW over its reference's; a dash if one is missing."""
    ours = found.get((preset, dtype, name))
    other = {"ratio": 1.0} if to == "adamw" else found.get((preset, dtype, to))
    return "-" if ours is None or other is None else f"{ours['ratio'] / other['ratio']:.2f}"


def _measured(content: dict[str, Any]) -> str:
    cells = content["cells"]
    title = "## Measured with the command\n\n"
    if not cells:
        return f"{title}No row has been measured with it yet: all targets are unverified.\n"
    parts = [title + describe_circumstances(content["circumstances"]) + "\n"]
    updates = [cell for cell in cells if cell["kind"] == "update"]
    if updates:
        rows = [
            [
                *(cell[key] for key in ("device", "preset", "dtype", "label")),
                f"{cell['milliseconds']:.3g}",
                f"{cell['ratio']:.2f}",
                "{:.2f} to {:.2f}".format(*cell["time"]["ratio_quartiles"]),
                f"{cell['temporaries']:.2f}",
                f"{cell['compile_ratio']:.1f}",
            ]
            for cell in updates
        ]
        header = ["device", "tree", "dtype", "optimizer", "ms", "to AdamW", "quartiles"]
        header += ["temporaries / largest leaf", "compile, to AdamW"]
        parts.append(f"### Update and apply\n\n{table(header, rows)}\n")
    steps = [cell for cell in cells if cell["kind"] == "mfu"]
    if steps:
        parts.append(f"### The trainer's step\n\n{mfu.rows_table(steps)}\n")
    timed = [cell for cell in cells if cell["kind"] == "part"]
    if timed:
        rows = [[cell["device"], cell["name"], f"{cell['milliseconds']:.3g}"] for cell in timed]
        parts.append(f"### Parts\n\n{table(['device', 'part', 'ms'], rows)}\n")
    return "\n".join(parts)


def _about(facts: dict[str, Any]) -> str:
    return (
        f"One {facts['device']}, JAX {facts['jax']}, optax {facts['optax']}, {facts['date']}, commit "
        f"{facts['commit']}"
    )


def _earlier(data: dict[str, Any]) -> str:
    facts = data["circumstances"]
    rows = [
        [
            *(row[key] for key in ("preset", "dtype", "key")),
            "-" if row["rank"] is None else row["rank"],
            f"{row['ms']:.2f}",
            f"{row['ratio']:.2f}",
            "{:.2f} to {:.2f}".format(*row["q"]),
            f"{row['temp'] / row['largest']:.2f}",
            f"{row['compile']:.0f}",
        ]
        for row in data["rows"]
    ]
    header = ["tree", "dtype", "optimizer", "rank", "ms", "to AdamW", "quartiles"]
    header += ["temporaries / largest leaf", "compile, s"]
    sinkhorn = []
    for row in data["sinkhorn"]:
        shape = "x".join(map(str, row["shape"]))
        for name, text in _SINKHORN.items():
            sinkhorn.append(
                [shape, row["dtype"], text, f"{row[name][0]:.3f}", f"{row[name][1]:.1e}"]
            )
    return f"""## The figures of {facts["date"]}

{_about(facts)}. The scripts that measured them became `benchmarks.accelerator`.

### Update and apply

{facts["pairs"]} pairs of stretches in turns with AdamW's; {facts["compilations_at_once"]} updates compiled at
once, so that compile seconds are longer than alone.

{table(header, rows)}

### Sinkhorn

Milliseconds, and the error relative to a plain loop in float32 (in bfloat16 the rounding of the result; one
iteration is compared with five).

{table(["stack", "dtype", "form", "ms", "error"], sinkhorn)}

The package has no kernel of its own (Pallas): one is worth its code only where it wins a measurement, and the
trial above, in blocks of 16 columns, lost to sums that XLA compiles. No other form has been measured.
"""


_SINKHORN = {
    "copy": "read and write once",
    "project": "the package's at 7ebf1c9",
    "simple": "two vectors, squares in float32, no range handling",
    "simple_bf16sq": "two vectors, squares in bfloat16",
    "reduce": "two vectors, no squares written",
    "plain": "plain loop",
    "one_iter_reduce": "one iteration, no squares written",
    "fused16w8": "a trial kernel, blocks of 16 columns",
}


def _old_parts(data: dict[str, Any]) -> str:
    rows = [
        [name, f"{value:.3g}"] for name, value in data["parts"].items() if not name.endswith("err")
    ]
    return f"""### LoRA-Pre's parts

The shapes of galore_350m: a stack of 24 matrices of 1024 x 2736, rank 256, and the model's 672 Gram matrices.
"Default" precision is TF32.

{table(["part", "ms"], rows)}
"""


def _training(data: dict[str, Any]) -> str:
    facts, runs = data["circumstances"], data["rows"]
    by_key: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_key.setdefault(run["key"], []).append(run)
    best = {key: min(found, key=_perplexity) for key, found in by_key.items()}
    rows = []
    for key, run in sorted(best.items(), key=lambda item: _perplexity(item[1])):
        near = {other["rate"]: other for other in by_key[key]}
        sides = [near.get(run["rate"] * factor) for factor in (0.5, 2)]
        edge = " (edge)" if None in sides else ""
        rows.append(
            [
                f"`{key}`",
                f"{run['ppl']:.2f}",
                f"{run['rate']:g}{edge}",
                *("-" if side is None else f"{_perplexity(side):.1f}" for side in sides),
                f"{100 * run['state'] / run['adamw_state']:.1f} %",
            ]
        )
    run = runs[0]
    tokens = run["steps"] * run["batch"] * run["seq"] / 1e6
    header = [
        "optimizer",
        "perplexity",
        "rate",
        "at half the rate",
        "at twice",
        "state, of AdamW's",
    ]
    return f"""### Training

{data["model"]}; {data["tokens"]}.
{run["steps"]} steps of {run["batch"]} x {run["seq"]} tokens ({tokens:.1f}M in all), products in bfloat16,
{facts["seeds"]} seed, {facts["workers_on_the_device"]} runs at once on the device. Every row was searched by
factors of two; "edge" means that the best rate was the last that was tried. Perplexity is held out.

{table(header, rows)}

One seed separates only rows that lie far apart.
"""


def _perplexity(run: dict[str, Any]) -> float:
    return math.inf if run.get("ppl") is None else run["ppl"]
