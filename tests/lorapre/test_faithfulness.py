"""The faithfulness benchmark measures what it says, on a tiny model, and its committed figures are whole."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from benchmarks import faithfulness
from tests.llama import tiny

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results" / "faithfulness.json"


def test_runs_and_writes(tmp_path):
    config = tiny.config(tmp_path, steps=12)
    results = faithfulness.run([1, 16], config, model=tiny.MODEL, dataset=tiny.dataset(), every=4)
    assert results["steps"] == [*range(1, 11), 12]
    assert results["matrices"] == 7 * tiny.MODEL.num_layers
    assert results["loss"][-1] < results["loss"][0]
    low, high = (
        {key: np.array(rows) for key, rows in results["ranks"][rank].items()}
        for rank in ("1", "16")
    )
    for name in faithfulness.MOMENTS:
        # At step 1 there is no history: what is applied is exact, and what is stored is not.
        for rank in (low, high):
            np.testing.assert_allclose(rank[f"{name}/applied/cosine"][0], 1, atol=1e-3)
            np.testing.assert_allclose(rank[f"{name}/applied/ratio"][0], 1, atol=1e-3)
            assert np.all(np.diff(rank[f"{name}/stored/cosine"], axis=1) >= 0)
        assert low[f"{name}/stored/cosine"][-1, 1] < high[f"{name}/stored/cosine"][-1, 1]
    assert np.all(high["first/stored/cosine"][5:, 1] > 0.8)
    assert np.all(high["outside"][1:, 1] < low["outside"][1:, 1])
    faithfulness.publish(results, tmp_path, ["python", "-m", "benchmarks.faithfulness"])
    page = (tmp_path / "faithfulness.md").read_text()
    assert "| 16 | Muon's accumulator |" in page
    assert (tmp_path / "faithfulness.png").stat().st_size > 10_000
    assert (tmp_path / "faithfulness_weights.png").stat().st_size > 10_000


def test_committed_figures():
    results = json.loads(RESULTS.read_text())
    assert list(results["ranks"]) == ["4", "16", "64"]
    assert results["matrices"] == 28
    middle = {
        rank: np.median([row[1] for row in numbers["first/stored/cosine"]])
        for rank, numbers in results["ranks"].items()
    }
    assert middle["4"] < middle["16"] < middle["64"] < 1
