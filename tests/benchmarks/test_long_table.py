"""README, Choosing and Recipes have the figures of the stored long table; the state sizes in Choosing hold."""

from __future__ import annotations

import json
import math
import pathlib
import re
import statistics

import optax
import pytest

from benchmarks.tokens.page import summarize
from examples.llama.comparing.plan import PlanConfig, make_plan
from examples.llama.model.config import preset
from examples.llama.model.llama import abstract
from examples.llama.optimizers.lorapre import SAGE_BESIDE_FACTORS
from layout_optax import state_bytes
from lorapre_optax import RECOMMENDED_MUON, lorapre_muon
from sage_optax import RECOMMENDED_SINKGD, RECOMMENDED_WITH_MUON, sinkgd_hybrid
from tests.snippets import snippets

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("README.md", "docs/choosing.md", "docs/results/recipes.md")
HEADER = "learning rate: matrices, embedding |"
PARAMETERS = {"core": 361_280, "small": 1_840_256}
"""The parameters of the shapes, in the order of their tables on a page."""
VARIANTS = {
    "LoRA-Pre Muon, rank 4, factored embedding (`RECOMMENDED_MUON`)": "factored+lorapre_muon_r4",
    "orthogonalised gradient, factored embedding": "factored+orthogonal",
    "AdamW, `b2=0.95`": "adamw:b2=0.95",
    "Adafactor (optax's, which factors no side below 128)": "adafactor",
    "orthogonalised gradient, SAGE int8 on the embedding": "sage_int8+orthogonal",
    "LoRA-Pre Muon, rank 8, SAGE int8 on the embedding": "sage_int8+lorapre_muon_r8",
    "LoRA-Pre Muon, rank 8, factored embedding": "factored+lorapre_muon_r8",
    "LoRA-Pre Muon, rank 16, factored embedding": "factored+lorapre_muon_r16",
    "SAGE-Hybrid": "sage_hybrid",
    "SinkGD, factored embedding": "factored+sinkgd",
    "Muon, factored embedding": "factored+muon",
    "Muon, SAGE on the embedding": "sage+muon",
    "Muon, SAGE int8 on the embedding": "sage_int8+muon",
    "Muon, AdamW on the embedding": "adamw+muon",
    "LoRA-Pre Adam, rank 13, recommended options": (
        "lorapre_adamw:rank=13:options=recommended:b2=0.95"
    ),
    "Fira, rank 16": "fira:rank=16:b2=0.95",
    "APOLLO, rank 20": "apollo:rank=20:b2=0.95",
    "GaLore, rank 16": "galore:rank=16:b2=0.95",
}
LARGER_BATCH = VARIANTS | {
    "SinkGD, AdamW on the embedding": "adamw+sinkgd",
    "SinkGD, SAGE on the embedding, AdamW on vectors": "sage+sinkgd",
    "SAGE-Hybrid, vectors at ten times the rate": "sage_hybrid:vector_rate=10",
    "AdamW, SAGE on the embedding": "sage+adamw",
    "SinkGD sqrt on the EMA, SAGE on the embedding": "sage+sinkgd_ema",
    "SinkGD with capped singular values, SAGE on the embedding": "sage+sinkgd_capped",
    "SinkGD, centred SAGE on the embedding": "sage_centred+sinkgd",
    "SinkGD, SAGE with a row damper of 1 on the embedding": "sage_rows_1+sinkgd",
}
CHANGES = {
    "untied": {"shape": "core_untied"},
    "constant": {"final_rate": 1.0},
}
"""The protocols of the table of changes, beside the ordinary one."""
LEFT_OUT = {
    ("README.md", "small"): {"factored+sinkgd"},
    ("README.md", "core"): {
        "sage_int8+muon",
        "apollo:rank=20:b2=0.95",
        "sage_int8+orthogonal",
        "sage_int8+lorapre_muon_r8",
        "factored+lorapre_muon_r8",
    },
}
"""Rows that a page's table does not show; those of one seed are none of the README's."""
BUDGETS = (
    "factored+sinkgd",
    "factored+orthogonal",
    "factored+lorapre_muon_r4",
    "factored+lorapre_muon_r16",
    None,
    "factored+muon",
    "sage_int8+muon",
)
"""The variants of the long table that are the calls of the table of budgets; None was not run."""
BUDGET = r"^\| `((?:lorapre_muon|sinkgd_hybrid)\(.+\))`[^|]* \| ([^|]+) \| ([^|]+) \| ([\d.]+|not run) \|$"
RECIPES = {
    "RECOMMENDED_MUON": RECOMMENDED_MUON,
    "RECOMMENDED_SINKGD": RECOMMENDED_SINKGD,
    "RECOMMENDED_WITH_MUON": RECOMMENDED_WITH_MUON,
}
ROW = r"^\| ([^|]+) \| ([\d.]+) \| ([^|]+) \| ([\d.]+), ([\d.]+)(, edge of the search)? \| ([\d.]+) % \|$"


def rows_of(shape="core", batch_size=16, final_rate=None):
    """The rows of one part of the long table, by variant, in the order of their losses."""
    content = json.loads((ROOT / "docs/results/quality_long.json").read_text())
    cells = [
        cell
        for cell in content["cells"]
        if (cell["shape"], cell["batch_size"], cell["final_rate_fraction"])
        == (shape, batch_size, final_rate)
    ]
    return {row["variant"]: row for row in summarize(cells)}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("shape", PARAMETERS)
def test_every_page_has_the_measured_rows(page, shape):
    rows = rows_of(shape)
    _, *tables = (ROOT / page).read_text().split(HEADER)
    assert len(tables) == len(PARAMETERS)
    text = tables[list(PARAMETERS).index(shape)]
    found = re.findall(ROW, text.partition("\n\n")[0], re.MULTILINE)
    names = [VARIANTS[label] for label, *_ in found]
    wanted = set(VARIANTS.values()) - LEFT_OUT.get((page, shape), set())
    assert names == [name for name in rows if name in wanted]
    for label, perplexity, seeds, rate, table_rate, edge, share in found:
        row = rows[VARIANTS[label]]
        best, spread = row["best"], [math.exp(loss) for loss in row["spread"]]
        assert row["seeds"] == 3 or page != "README.md", label
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
        assert best["parameters"] == PARAMETERS[shape]


def test_the_larger_batch_is_what_was_measured():
    rows = rows_of("core", 128)
    text = (ROOT / "docs/results/recipes.md").read_text().partition("### Larger batches")[2]
    found = re.findall(
        r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+), ([\d.]+)(, edge of the search)? \|$",
        text,
        re.MULTILINE,
    )
    assert [LARGER_BATCH[label] for label, *_ in found] == list(rows)
    for label, perplexity, rate, table_rate, edge in found:
        row = rows[LARGER_BATCH[label]]
        assert perplexity == f"{math.exp(row['loss']):.1f}", label
        assert float(rate) == row["best"]["learning_rate"], label
        assert float(table_rate) == row["best"]["table_rate"], label
        assert bool(edge) == row["edge"], label


def test_untied_tables_and_a_constant_rate_are_what_was_measured():
    text = (ROOT / "docs/results/recipes.md").read_text().partition("### Untied")[2]
    place = r" ([\d.]+) \(([\d.]+), ([\d.]+)(, edge)?\) \|"
    found = re.findall(r"^\| ([^|]+) \|" + 3 * place + "$", text, re.MULTILINE)
    protocols = [rows_of(), *(rows_of(**changed) for changed in CHANGES.values())]
    assert {VARIANTS[label] for label, *_ in found} == set(protocols[1]) == set(protocols[2])
    for label, *columns in found:
        for number, rows in enumerate(protocols):
            perplexity, rate, table_rate, edge = columns[4 * number : 4 * number + 4]
            row = rows[VARIANTS[label]]
            assert perplexity == f"{math.exp(row['loss']):.1f}", label
            assert float(rate) == row["best"]["learning_rate"], label
            assert float(table_rate) == row["best"]["table_rate"], label
            assert bool(edge) == row["edge"], label


def test_the_best_rates_of_the_tuning_page_are_those_of_the_searches():
    text = (ROOT / "docs/tuning.md").read_text().partition("### Best rates by run")[2]
    labels = {
        "AdamW, `b2=0.95`": "adamw:b2=0.95",
        "SAGE-Hybrid": "sage_hybrid",
        "LoRA-Pre Muon with factored embedding, rank 4": "factored+lorapre_muon_r4",
        "Muon": "adamw+muon",
        "orthogonalised gradient with factored embedding": "factored+orthogonal",
        "SinkGD with factored embedding": "factored+sinkgd",
        "Adafactor": "adafactor",
    }
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    places = {2: rows_of("core"), 3: rows_of("core", 128), 4: rows_of("small")}
    compared = 0
    for label, *columns in (line for line in lines if line[0] in labels):
        for place, rows in places.items():
            said = re.match(r"([\d.]+) / ([\d.]+)", columns[place - 1])
            row = rows.get(labels[label])
            assert (said is None) == (row is None), (label, place)
            if said and row:
                best = row["best"]["learning_rate"], row["best"]["table_rate"]
                assert tuple(map(float, said.groups())) == best, (label, place)
                compared += 1
    assert compared == 16


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


@pytest.mark.parametrize("name", ["sage_1.3b", "llama3.1_8b"])
def test_the_state_of_sinkgd_with_a_factored_embedding_is_what_choosing_says(name):
    section = (ROOT / "docs/choosing.md").read_text().partition("### SinkGD with a factored")[2]
    made = {}
    exec(snippets(section)[0], made)
    found = state_bytes(made["tx"], abstract(preset(name)))
    said = " ".join(section.partition("### ")[0].split())
    assert f"{found / 2**30:.4f} GiB for `{name}`" in said


def test_the_runs_of_sinkgd_with_a_factored_embedding_are_the_measured_ones():
    section = (ROOT / "docs/choosing.md").read_text().partition("### SinkGD with a factored")[2]
    section = section.partition("### ")[0]
    found = re.findall(r"^\| [\d]+ wide.* \|$", section, re.MULTILINE)
    runs = [rows_of(), rows_of("core", 128), rows_of("small")]
    variants = ("factored+sinkgd", "adamw:b2=0.95", "factored+lorapre_muon_r4")
    at_ratio = []
    recommended = RECOMMENDED_SINKGD["learning_rate_multipliers"]["embedding"]
    for line, rows in zip(found, runs, strict=True):
        _, *perplexities, rates = (cell.strip() for cell in line.strip("|").split("|"))
        for said, variant in zip(perplexities, variants, strict=True):
            row = rows[variant]
            seeds = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
            assert said == f"{math.exp(row['loss']):.1f}{seeds}", (line, variant)
        best = rows["factored+sinkgd"]["best"]
        edge = ", edge" if rows["factored+sinkgd"]["edge"] else ""
        assert rates == f"{best['learning_rate']:g}, {best['table_rate']:g}{edge}", line
        at_ratio.append(perplexity_at(best, recommended))
    said = f"the ratio of `RECOMMENDED_SINKGD`, it ends at {', '.join(at_ratio[:-1])} and {at_ratio[-1]}"
    assert said in " ".join(section.split())
    spreads = (runs[0][variant]["spread"] for variant in variants[:2])
    (low, high), (theirs_low, theirs_high) = ((math.exp(x) for x in spread) for spread in spreads)
    said = f"({low:.1f} to {high:.1f}, AdamW {theirs_low:.1f} to {theirs_high:.1f})"
    assert said in " ".join(section.split())
    low = perplexity_at(runs[1]["factored+sinkgd"]["best"], 3)
    assert f"at three times it ends at {low} in the larger steps" in " ".join(section.split())


def perplexity_at(best, multiplier):
    """Of the cells of a variant in the protocol of `best`, at its matrices' rate; the mean over seeds."""
    same = ("variant", "shape", "batch_size", "final_rate_fraction", "learning_rate")
    cells = json.loads((ROOT / "docs/results/quality_long.json").read_text())["cells"]
    losses = [
        cell["heldout_loss"]
        for cell in cells
        if all(cell[key] == best[key] for key in same)
        and cell["table_rate"] == pytest.approx(multiplier * cell["learning_rate"])
    ]
    return f"{math.exp(statistics.fmean(losses)):.1f}"


@pytest.mark.parametrize(("place", "name"), [(0, "sage_1.3b"), (1, "llama3.1_8b")])
def test_the_budgets_that_choosing_shows_are_those_of_the_calls(place, name):
    params = abstract(preset(name))
    whole = state_bytes(optax.adamw(1e-3), params)
    rows = re.findall(BUDGET, (ROOT / "docs/choosing.md").read_text(), re.MULTILINE)
    measured = rows_of()
    assert len(rows) == len(BUDGETS)
    for (call, *said, perplexity), variant in zip(rows, BUDGETS, strict=True):
        made = {"lorapre_muon": lorapre_muon, "sinkgd_hybrid": sinkgd_hybrid, "rate": 0.012}
        tx = eval(call, made | RECIPES)
        found = state_bytes(tx, params)
        share = 100 * found / whole
        digits = 2 if share >= 0.01 else 3
        assert said[place] == f"{found / 2**30:.4f} ({share:.{digits}f} %)", call
        wanted = "not run" if variant is None else f"{math.exp(measured[variant]['loss']):.1f}"
        assert perplexity == wanted, call


def test_the_trainers_ratio_of_sage_beside_factors_is_the_searched_one():
    best = rows_of()["sage_int8+lorapre_muon_r8"]["best"]
    ratio = best["table_rate"] / best["learning_rate"]
    assert SAGE_BESIDE_FACTORS["learning_rate_multipliers"] == pytest.approx(
        {"embedding": ratio, "head": ratio}
    )


def test_the_perplexity_at_sages_recommended_ratio_is_the_measured_one():
    multiplier = RECOMMENDED_WITH_MUON["learning_rate_multipliers"]["embedding"]
    cells = json.loads((ROOT / "docs/results/quality_long.json").read_text())["cells"]
    (cell,) = (
        cell
        for cell in cells
        if cell["variant"] == "sage_int8+muon"
        and cell["table_rate"] == pytest.approx(multiplier * cell["learning_rate"])
    )
    text = " ".join((ROOT / "docs/choosing.md").read_text().split())
    said = f"{math.exp(cell['heldout_loss']):.1f} at 64 wide with this ratio"
    assert said in text
