"""The quality benchmark runs each cell once, in any number of sittings, and reports what there is."""

from __future__ import annotations

import json

import jax
import pytest

from benchmarks.common import circumstances
from benchmarks.peers import PEERS, register_peers
from benchmarks.quality import __main__ as quality
from benchmarks.quality import long
from benchmarks.quality import report as quality_report
from benchmarks.quality import rows as quality_rows
from benchmarks.quality.cells import Cells
from benchmarks.tokens.file import Tokens
from benchmarks.tokens.shapes import SHAPES
from benchmarks.tokens.worker import Protocol
from examples.llama.optimizers.registry import OPTIMIZERS, make_optimizer
from examples.llama.optimizers.variants import parse_variant
from tests.llama import tiny
from tests.llama.random_params import random_params

COMMON = {"batch_size": 8, "seq_len": 16, "eval_batches": 2, "log_every": 2}


@pytest.fixture
def few_rows(monkeypatch):
    rows = (
        quality_rows.QualityRow("sage_hybrid", 1e-3, core=True),
        quality_rows.QualityRow("lion_hybrid", 1e-3),
    )
    for module in (quality, quality_report):
        monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(module, "SEEDS", (0, 1))
        monkeypatch.setattr(module, "TRIAL", 2)
        monkeypatch.setattr(module, "FULL", 3)
    for module in (quality_rows, quality_report):
        monkeypatch.setattr(module, "DAMPERS", ("both",))
        monkeypatch.setattr(module, "SINKHORN", {"one": "sage_hybrid"})
    monkeypatch.setattr(quality, "MOST_TRIALS", 3)
    monkeypatch.setattr(quality, "ROBUSTNESS", (4.0,))
    return rows


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("examples.llama.optimizers.registry.OPTIMIZERS", dict(OPTIMIZERS))
    register_peers()
    register_peers()


@pytest.mark.extended
def test_it_goes_on_where_it_stopped_and_ends_with_nothing_missing(few_rows, tmp_path, capsys):
    cells = Cells(
        tmp_path / "quality.json", model=tiny.MODEL, dataset=tiny.dataset(), common=COMMON
    )
    published = []
    assert not quality.measure(cells, 0.0, lambda: published.append(1))
    assert "minutes are over" in capsys.readouterr().out
    assert not cells.stored["cells"]
    quality_report.write_report(cells, tmp_path, circumstances("here"))
    assert "| SAGE-Hybrid | missing |" in (tmp_path / "quality.md").read_text()

    assert quality.measure(cells, 60.0, lambda: published.append(1))
    done = len(cells.stored["cells"])
    again = Cells(cells.path, model=tiny.MODEL, dataset=tiny.dataset(), common=COMMON)
    assert quality.measure(again, 60.0, lambda: published.append(1))
    assert (again.steps_run, len(again.stored["cells"])) == (0, done)

    quality_report.write_report(again, tmp_path, circumstances("here"))
    page = (tmp_path / "quality.md").read_text()
    tables, _, off_best = page.partition("## A rate that is off")
    assert "missing" not in tables
    assert (
        off_best.count("missing") == 2
    )  # of four multiples, the search ran one and ROBUSTNESS one
    core, single = quality_report.full_cells(again, few_rows[0]), again.best("lion_hybrid", 3)
    assert [cell["seed"] for cell in core] == [0, 1]
    assert core[0]["heldout_loss"] != core[1]["heldout_loss"]
    assert f"| {single['heldout_perplexity']:.1f} | 1 of 1 |" in page
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "quality.png",
        "quality_pareto.png",
        "quality_rates.png",
    }


def test_runs_on_other_data_are_read_but_not_continued(tmp_path):
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"data": {"corpus_sha256": "f" * 64}, "cells": []}))
    with pytest.raises(ValueError, match="holds runs on other data"):
        Cells(path, model=tiny.MODEL, dataset=tiny.dataset(), common=COMMON)
    cells = Cells(path, read_only=True)
    assert cells.corpus == "f" * 12
    assert cells.best("adamw", 3) is None
    with pytest.raises(ValueError, match="opened to read"):
        cells.loss("adamw", 1e-3, 3)


def test_the_long_table_is_at_a_budget_of_tokens_and_beside_the_early_one(
    few_rows, tmp_path, monkeypatch
):
    monkeypatch.setitem(SHAPES, "tiny", tiny.MODEL)
    data = tiny.dataset()
    cells = Cells(tmp_path / "quality.json", model=tiny.MODEL, dataset=data, common=COMMON)
    quality_report.write_report(cells, tmp_path, circumstances("here"))
    assert "No row has been run yet" in (tmp_path / "quality.md").read_text()

    tokens = Tokens(data.train_tokens, data.heldout_tokens, "f" * 64, {})
    protocol = Protocol("tiny", 4 * 8 * 16, 8, 16)
    searches = long.long_searches(few_rows, seeds=2)
    long.measure_long(tmp_path, protocol, tokens, searches, 0.0)
    assert not long.long_content(tmp_path)["cells"]
    long.measure_long(tmp_path, protocol, tokens, searches, 60.0)
    found = long.long_content(tmp_path)["cells"]
    finished = [cell for cell in found if cell["heldout_loss"] is not None]
    assert {cell["tokens"] for cell in finished} == {4 * 8 * 16}
    assert len({cell["table_rate"] / cell["learning_rate"] for cell in found}) > 1
    assert {cell["seed"] for cell in found if cell["variant"] == "sage_hybrid"} == {0, 1}
    quality_report.write_report(cells, tmp_path, circumstances("here"))
    page = (tmp_path / "quality.md").read_text()
    points = {one.label: one for one in long.long_points(found)}
    assert points.keys() == {"SAGE-Hybrid", "Lion-Hybrid"}
    sage = points["SAGE-Hybrid"]
    assert sage.low < sage.perplexity < sage.high
    assert sage.ours
    assert f"| {sage.perplexity:.2f} |" in page
    assert (tmp_path / "quality_long_pareto.png").stat().st_size > 0
    assert page.index("## Long") < page.index("| Lion-Hybrid |") < page.index("## Early")


def test_the_long_rows_are_the_early_ones_without_ratios_of_their_own():
    searched = {one.variant for one in long.long_searches()}
    rows = {row.key for row in quality_rows.ROWS}
    assert searched == {key for key in rows if "matrix_rate" not in key}
    assert long.long_searches()[0].seeds == len(quality_rows.SEEDS)


@pytest.mark.usefixtures("registry")
def test_rows_are_written_in_the_form_of_their_keys():
    keys = [row.key for row in quality_rows.ROWS] + [key for key, _ in quality_rows.controls()]
    for key in keys:
        assert parse_variant(key).key == key
    assert len(set(quality_rows.ROWS)) == len(quality_rows.ROWS)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", PEERS)
def test_peers_update_every_parameter(name):
    params = random_params(tiny.MODEL)
    tx = make_optimizer(name, 1e-2, rank=2 if PEERS[name].has_rank else None)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert all(jax.tree.leaves(jax.tree.map(lambda u: bool((u != 0).any()), updates)))
