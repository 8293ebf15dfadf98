"""The Sinkhorn benchmark runs as documented, and its committed figures keep the promise made of them."""

import json
import pathlib

import pytest

from benchmarks import sinkhorn
from benchmarks.common import paired_times

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results" / "sinkhorn.json"


def test_writes_numbers_and_a_page(tmp_path):
    arguments = ["--pairs", "2", "--cases", "small", "--output", str(tmp_path)]
    results = sinkhorn.main(arguments)
    assert json.loads((tmp_path / "sinkhorn.json").read_text()) == results
    small = results["cases"]["small"]
    assert small["time"]["pairs"] == 2
    assert small["error"]["1"] < 1e-6
    assert small["error"]["1e+22"] < 1e-6 < small["baseline_error"]["1e+22"]
    assert small["temporary_bytes"] < 0.2 * small["float32_matrix_bytes"]
    page = (tmp_path / "sinkhorn.md").read_text()
    assert "| small kernel 256x688 |" in page
    assert "python -m benchmarks.sinkhorn" in page


def test_one_pair_has_no_spread():
    with pytest.raises(ValueError, match="at least 2 pairs, got 1"):
        paired_times(abs, abs, -1.0, pairs=1)


def test_committed_figures():
    cases = json.loads(RESULTS.read_text())["cases"]
    assert set(cases) == set(sinkhorn.CASES)
    assert all(case["time"]["pairs"] >= 20 for case in cases.values())
    assert cases["torch"]["time"]["ratio"] <= 0.35
    # The small one is over within a millisecond, most of it dispatch.
    assert all(case["time"]["ratio"] < 1 for name, case in cases.items() if name != "small")
