"""README, Choosing and Recipes have the figures of the stored long table; the state sizes in Choosing hold."""

from __future__ import annotations

import json
import math
import pathlib
import re

import pytest

from benchmarks.tokens.page import summarize
from examples.llama.comparing.plan import PlanConfig, make_plan

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("README.md", "docs/choosing.md", "docs/results/recipes.md")
VARIANTS = {
    "LoRA-Pre Muon, rank 4, factored embedding (`RECOMMENDED_MUON`)": "factored+lorapre_muon_r4",
    "AdamW, `b2=0.95`": "adamw:b2=0.95",
    "Adafactor (optax's, which factors no side below 128)": "adafactor",
    "SAGE-Hybrid": "sage_hybrid",
}
ROW = r"^\| ([^|]+) \| ([\d.]+) \| ([^|]+) \| ([\d.]+), ([\d.]+)(, edge of the search)? \| ([\d.]+) % \|$"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_the_measured_rows(page):
    content = json.loads((ROOT / "docs/results/quality_long.json").read_text())
    cells = [cell for cell in content["cells"] if cell["shape"] == "core"]
    rows = {row["variant"]: row for row in summarize(cells)}
    text = (ROOT / page).read_text().partition("learning rate: matrices, embedding |")[2]
    found = re.findall(ROW, text.partition("\n\n")[0], re.MULTILINE)
    assert [VARIANTS[label] for label, *_ in found] == [
        name for name in rows if name in VARIANTS.values()
    ]
    for label, perplexity, seeds, rate, table_rate, edge, share in found:
        row = rows[VARIANTS[label]]
        best, spread = row["best"], [math.exp(loss) for loss in row["spread"]]
        assert perplexity == f"{math.exp(row['loss']):.1f}", label
        shown = (
            f"{spread[0]:.1f} to {spread[1]:.1f} ({row['seeds']})"
            if row["seeds"] > 1
            else "one seed"
        )
        assert seeds == shown, label
        assert (float(rate), float(table_rate)) == (best["learning_rate"], best["table_rate"]), (
            label
        )
        assert bool(edge) == row["edge"], label
        assert share == f"{100 * best['state_ratio']:.1f}", label
        assert best["budget"] == 4_194_304
        assert best["parameters"] == 361_280


@pytest.mark.parametrize(
    ("preset", "size", "share"),
    [("sage_1.3b", "0.0141", "0.14"), ("llama3.1_8b", "0.0420", "0.07")],
)
def test_the_state_of_the_recipe_is_what_choosing_says(preset, size, share):
    found = make_plan(
        PlanConfig(preset=preset, optimizers="adamw,lorapre_muon:rank=4:options=recommended")
    )
    adamw, recipe = found.rows
    assert f"{recipe.state_bytes / 2**30:.4f}" == size
    assert f"{100 * recipe.state_bytes / adamw.state_bytes:.2f}" == share
    text = (ROOT / "docs/choosing.md").read_text()
    assert f"{size} GiB for\n`{preset}`" in text or f"{size} GiB for `{preset}`" in text
    assert f"({share} % of" in text
