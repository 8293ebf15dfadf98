"""The figures of the page on recipes are those of the stored cells, and the page of cells is up to date."""

from __future__ import annotations

import json
import math
import pathlib
import re

import pytest

from benchmarks.tokens.page import page, summarize

LARGE_BATCH = 128
RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"


def content():
    return json.loads((RESULTS / "recipes.json").read_text())


def single_rules():
    """The cells of the long table that the page's tables of rules show."""
    cells = json.loads((RESULTS / "quality_long.json").read_text())["cells"]
    wanted = ("core", 16, None)
    names = ("shape", "batch_size", "final_rate_fraction")
    return [cell for cell in cells if tuple(cell[name] for name in names) == wanted]


def test_every_row_is_the_best_of_its_search():
    rows = {row["variant"]: row for row in summarize(single_rules())}
    text = (RESULTS / "recipes.md").read_text()
    found = re.findall(
        r"^\| [^|]+ \(`([^`]+)`\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)(, edge)? \| ([\d.]+) \| (\d) "
        r"\| ([\d.]+) % \|$",
        text,
        re.MULTILINE,
    )
    wanted = {name for name in rows if "+" in name} | {"adamw:b2=0.95"}
    assert len(found) >= 10
    assert {name for name, *_ in found} == wanted
    for name, loss, perplexity, rate, edge, table_rate, seeds, share in found:
        row = rows[name]
        best = row["best"]
        assert loss == f"{row['loss']:.3f}", name
        assert perplexity == f"{math.exp(row['loss']):.1f}", name
        assert (float(rate), float(table_rate)) == (best["learning_rate"], best["table_rate"]), name
        assert bool(edge) == row["edge"], name
        assert int(seeds) == row["seeds"], name
        assert share == f"{100 * best['state_ratio']:.1f}", name


def test_the_spread_of_seeds_that_the_page_names_is_the_measured_one():
    (row,) = (row for row in summarize(single_rules()) if row["variant"] == "adamw:b2=0.95")
    low, high = row["spread"]
    text = " ".join((RESULTS / "recipes.md").read_text().split())
    assert f"The three seeds of AdamW lie between {low:.3f} and {high:.3f}" in text
    (own,) = (row for row in summarize(single_rules()) if row["variant"] == "factored+sinkgd")
    said = "{:.3f} over 3 seeds ({:.3f} to {:.3f}, AdamW {:.3f} to {:.3f})"
    assert said.format(own["loss"], *own["spread"], low, high) in text


def test_the_sizes_that_the_page_names_are_those_of_the_cells():
    text = (RESULTS / "recipes.md").read_text()
    for cell in [*content()["cells"], *single_rules()]:
        assert f"{cell['parameters']:,} parameters" in text
        assert f"{cell['tokens']:,} tokens" in text or cell["heldout_loss"] is None
        assert cell["tokens_sha256"][:12] in text


def test_the_traces_that_the_page_shows_are_those_of_the_runs():
    """After a quarter of the run, after its half and near its end."""
    text = (RESULTS / "recipes.md").read_text()
    found = re.findall(
        r"^\| [^|]+ \(`([^`]+)`\) \| ([\d.]+), ([\d.]+) \|" + 4 * r" ([^|]+) \|" + "$",
        text.partition("### What the traces show")[2],
        re.MULTILINE,
    )
    traces = {
        one["variant"]: one for one in content()["traces"] if one["batch_size"] == LARGE_BATCH
    }
    assert [name for name, *_ in found] == list(traces)
    columns = ("spectrum/gradient", "spectrum/update", "cosine/matrix", "common/update")
    for name, rate, table_rate, *said in found:
        one = traces[name]
        assert (float(rate), float(table_rate)) == (one["learning_rate"], one["table_rate"])
        points = [one["points"][place] for place in (4, 10, -2)]
        assert [point["tokens"] / one["budget"] for point in points] == pytest.approx(
            [0.234, 0.516, 0.984], abs=1e-3
        )
        for column, shown in zip(columns, said, strict=True):
            digits = 1 if column.startswith("spectrum") else 2
            assert shown == ", ".join(f"{point[column]:.{digits}f}" for point in points), name


def test_the_trace_of_sage_hybrid_that_the_page_shows_is_that_of_the_run():
    """After a tenth, a quarter, a half and three quarters of the run, and at its end."""
    section = (RESULTS / "recipes.md").read_text().partition("## SAGE-Hybrid over a run")[2]
    section = section.partition("## ")[0]
    (one,) = (
        trace
        for trace in content()["traces"]
        if (trace["variant"], trace["budget"]) == ("sage_hybrid", 4_194_304)
    )
    assert one["learning_rate"] == one["table_rate"] == 0.004
    columns = (
        (".2f", "loss"),
        (".2g", "update/embedding/rms", "update/matrix/rms", "update/vector/rms"),
        (".2f", "damper/embedding/mean", "damper/vector/mean"),
        (".2f", "cosine/embedding", "cosine/matrix"),
        (".1f", "spectrum/gradient", "spectrum/update"),
        (".2f", "common/update"),
        (".2f", "rows/0/moved", "rows/3/moved"),
    )
    wanted = []
    for place in (1, 4, 9, 14, 19):
        point = one["points"][place]
        shown = [", ".join(format(point[n], form) for n in names) for form, *names in columns]
        share = f"{100 * point['tokens'] / one['budget']:.0f} %"
        wanted.append(f"| {' | '.join([share, *shown])} |")
    assert re.findall(r"^\| \d+ % .*$", section, re.MULTILINE) == wanted
    rare, *_, frequent = one["group_share"]
    said = " ".join(section.split())
    assert (
        f"({100 * rare:.1f} % of the text) and with the most frequent ({100 * frequent:.0f} %)"
        in said
    )


def test_the_page_of_cells_is_written_from_them():
    assert (RESULTS / "recipes_cells.md").read_text().rstrip() == page(content()).rstrip()


def test_the_rates_of_the_tuning_page_are_the_best_of_their_searches():
    rows = {row["variant"]: row["best"] for row in summarize(single_rules())}
    text = (RESULTS.parent / "tuning.md").read_text()
    beside = text.partition("best of grids of factor two")[2].partition("SAGE's best rate there")[0]
    found = re.findall(r"^\| ([^|]+) \| (embedding|matrices) \| ([\d.]+) \|$", beside, re.MULTILINE)
    variants = {
        ("SAGE", "embedding"): "sage+muon",
        ("Lion", "embedding"): "lion+muon",
        ("AdamW", "embedding"): "adamw+muon",
        ("factored RMS", "embedding"): "factored+muon",
        ("AdamW", "matrices"): "adamw:b2=0.95",
        ("SinkGD", "matrices"): "adamw+sinkgd",
        ("square-root SinkGD", "matrices"): "adamw+sinkgd_sqrt",
        ("LoRA-Pre Muon", "matrices"): "adamw+lorapre_muon_r32",
        ("Muon", "matrices"): "adamw+muon",
        ("orthogonalised gradient", "matrices"): "adamw+orthogonal",
    }
    assert len(found) == len(variants)
    for rule, side, rate in found:
        best = rows[variants[rule.partition(",")[0], side]]
        assert float(rate) == best["table_rate" if side == "embedding" else "learning_rate"], rule
