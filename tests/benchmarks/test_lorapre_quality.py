"""The benchmark of LoRA-Pre's ranks and options keeps what has run, shows what is missing, and its figures."""

from __future__ import annotations

import json
import math
import pathlib

import pytest

from benchmarks import lorapre_quality as quality
from benchmarks.common import circumstances
from benchmarks.quality import cells as cells_module
from examples.llama.optimizers.options import OptimizerOptions
from examples.llama.optimizers.variants import parse_variant
from lorapre_optax import RECOMMENDED
from tests.llama import tiny

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results" / "lorapre_quality.json"
COMMON = {"batch_size": 8, "seq_len": 16, "eval_batches": 2, "log_every": 2}


def cells(path):
    return cells_module.Cells(path, model=tiny.MODEL, dataset=tiny.dataset(), common=COMMON)


@pytest.mark.extended
def test_a_finished_cell_is_kept_and_a_missing_one_shown(tmp_path, monkeypatch):
    key = quality.variant(quality._SINKGD, 4, quality.TOGETHER)
    first = cells(tmp_path / "cells.json")
    losses = [first.loss(key, rate, 3) for rate in (1e-3, 3e-2)]
    assert all(map(math.isfinite, losses))
    assert losses[0] != losses[1]

    def refuse(*_, **__):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cells_module, "prepare_run", refuse)
    again = cells(tmp_path / "cells.json")
    assert [again.loss(key, rate, 3) for rate in (1e-3, 3e-2)] == losses
    assert again.best(key, 3)["heldout_loss"] == min(losses)
    monkeypatch.setattr(quality, "STEPS", 3)
    page = quality.page(again, circumstances("here"))
    assert "| LoRA-Pre SinkGD r=4 | " + f"{math.exp(min(losses)):.1f}" in page
    assert "| Muon | missing |" in page
    assert len(quality.rows_of(again, 3)) == 1


def test_other_data_is_refused(tmp_path):
    (tmp_path / "cells.json").write_text(json.dumps({"data": {}, "cells": []}))
    with pytest.raises(ValueError, match="other data"):
        cells(tmp_path / "cells.json")


def test_together_are_the_recommended_options():
    fields = parse_variant(quality.variant(quality._ADAM, 4, quality.TOGETHER)).fields()
    given = OptimizerOptions(**{k: v for k, v in fields.items() if k != "optimizer"})
    assert given.only(*RECOMMENDED) == RECOMMENDED


def test_committed_figures():
    found = [cell for cell in json.loads(RESULTS.read_text())["cells"] if cell["steps"] == 150]
    best = {}
    for cell in sorted(found, key=lambda cell: -float(cell["heldout_perplexity"])):
        best[cell["variant"]] = cell
    thin = best[quality.variant(quality._EVERYTHING, 1)]
    # The goal: AdamW's perplexity with at most 1 % of its state, also beside AdamW at two rates.
    assert thin["state_ratio"] < 0.01
    assert thin["heldout_perplexity"] < best[quality.CONTROL]["heldout_perplexity"]
    assert best[quality.CONTROL]["heldout_perplexity"] < best["adamw"]["heldout_perplexity"]
    sinkgd = best[quality.variant(quality._SINKGD, 3, quality.TOGETHER)]
    assert sinkgd["state_ratio"] < 0.01
    assert sinkgd["heldout_perplexity"] < best["adamw"]["heldout_perplexity"]


def test_committed_figures_are_why_the_gradient_start_is_recommended():
    cells = json.loads(RESULTS.read_text())["cells"]
    loss = {(cell["variant"], cell["learning_rate"]): cell["heldout_loss"] for cell in cells}
    for gradient, normal in quality.table_starts().values():
        ours = min(value for (key, _), value in loss.items() if key == gradient)
        theirs = [value for (key, _), value in loss.items() if key == normal]
        assert theirs, normal
        assert ours < min(theirs)
