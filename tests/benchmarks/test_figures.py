"""The pictures of the explained pages: what is measured is what they say, and everything is written."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.figures import __main__ as figures
from benchmarks.figures import damper, sinkhorn, spectrum
from tests.llama import tiny

STEPS = 6


@pytest.fixture(scope="module")
def results():
    return figures.measure(
        STEPS,
        model=tiny.MODEL,
        dataset=tiny.dataset(),
        learning_rate=1e-2,
        batch_size=8,
        seq_len=16,
    )


def test_every_step_and_column_of_the_damper_is_there(results):
    found = results["damper"]
    assert found["steps"] == list(range(1, STEPS + 1))
    for role, numbers in found["roles"].items():
        quantiles = np.array(numbers["quantiles"])
        assert quantiles.shape == (STEPS, 4)
        assert (np.diff(quantiles) >= 0).all(), role
        assert quantiles.max() <= 1
        assert numbers["instant"][0] == 0  # both terms are equal at the first step
        assert max(numbers["instant"]) > 0
    table, vectors = (found["columns"][role] for role in ("embedding", "vector"))
    assert len(table["h"]) == tiny.MODEL.hidden_size
    assert len(vectors["h"]) == tiny.MODEL.hidden_size * (2 * tiny.MODEL.num_layers + 1)
    for columns in (table, vectors):  # the instantaneous term bounds H
        s, h = np.array(columns["s"]), np.array(columns["h"])
        assert (h <= np.minimum(1, 1 / s) * 1.01).all()


def test_sweeps_make_norms_equal(results):
    found = results["sinkhorn"]
    for side in ("rows", "columns"):
        spread = np.array(found[side])[:, 1]
        assert len(spread) == len(found["sweeps"])
        assert spread[0] > 2 * spread[-1]
    assert found["columns"][1][1] == pytest.approx(1, abs=1e-3)  # columns come last
    assert found["stable_rank"]["Sinkhorn, 5 sweeps"] > found["stable_rank"]["G"]


def test_spreads_and_spectra_of_a_known_matrix():
    stack = {"layers": {"mlp": {"up_proj": {"kernel": jnp.diag(jnp.array([4.0, 2.0, 1.0]))[None]}}}}
    assert sinkhorn._spreads(stack, "rows").tolist() == [4.0]
    assert sinkhorn._spectra(stack).tolist() == [[1.0, 0.5, 0.25]]
    held = spectrum._held(stack["layers"]["mlp"]["up_proj"]["kernel"])
    np.testing.assert_allclose(held, [[16 / 21, 20 / 21, 1]])


def test_ranks_grow_with_the_share(results):
    for name in ("G", *spectrum.TRACKED):
        ranks = [np.array(found)[:, 1] for found in results["spectrum"]["ranks"][name].values()]
        assert (ranks[0] <= ranks[1]).all()
        assert (ranks[1] <= ranks[2]).all()
    first = results["spectrum"]["curves"]
    assert first["first"]["1"] == pytest.approx(first["G"]["1"], abs=2e-3)  # one gradient so far


@pytest.mark.extended
def test_everything_is_written_and_drawn_again_from_the_file(results, tmp_path):
    stored = {"circumstances": figures.circumstances("test"), **results}
    (tmp_path / "explained.json").write_text(json.dumps(stored))
    results_folder = pathlib.Path(__file__).parents[2] / "docs" / "results"
    (tmp_path / "faithfulness.json").write_text((results_folder / "faithfulness.json").read_text())
    figures.main(["--draw-only", "--output", str(tmp_path)])
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        *("sage_damper.png", "sinkhorn_sweeps.png", "momentum_spectrum.png", "momentum_cosine.png")
    }
    page = (tmp_path / "explained.md").read_text()
    assert all(row[0] in page for row in damper.summary(results["damper"]))
