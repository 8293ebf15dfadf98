"""The precision benchmark emulates what it says, and its committed figures carry the choice of defaults."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import precision

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def committed():
    return json.loads((FOLDER / "precision.json").read_text())


def test_the_page_is_made_of_the_figures(committed):
    assert (FOLDER / "precision.md").read_text() == precision.page(committed).rstrip() + "\n"


def test_passes_are_rounded_as_the_devices_round():
    a = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    np.testing.assert_array_equal(
        precision.rounded(a, "bfloat16"), a.astype(jnp.bfloat16).astype(jnp.float32)
    )
    bits = np.asarray(precision.rounded(a, "TF32")).view(np.uint32)
    assert not np.any(bits & 0x1FFF)  # 10 of 23 bits are left
    assert precision.measure_parts(8)["Gram matrix"].keys() == {
        "float32",
        "three passes of TF32",
        "three passes of bfloat16",
        "TF32",
        "bfloat16",
    }


def test_a_setting_changes_the_products_while_it_lasts():
    a = jnp.full((3, 3), 1 / 3)
    exact = precision._factors.exact_product
    with precision.emulated(precision.Setting("TF32", "bfloat16", 1)):
        low = precision._factors.exact_product("ij,jk->ik", a, a)
        assert abs(float(low[0, 0]) - 1 / 3) > 1e-4
    assert precision._factors.exact_product is exact


def test_the_defaults_lose_nothing_and_fewer_passes_do(committed):
    (rows,) = committed["runs"].values()
    low_rank = rows["float64"]["faithful"]
    used = [name for name in rows if name.startswith(("CUDA, ", "TPU"))]
    assert len(used) == 3
    for name in used:
        for what in ("average", "Adam"):
            assert rows[name][what]["lost_cosine"] < 1e-4
            assert abs(rows[name][what]["norm_ratio"] - 1) < 1e-3
        assert rows[name]["faithful"]["lost_cosine"] < low_rank["lost_cosine"] + 1e-4
    for name in rows.keys() - set(used):
        if name.startswith("not used"):
            assert abs(rows[name]["average"]["norm_ratio"] - 1) > 5e-3
    for row in committed["disturbances"].values():
        assert all(cell["finite"] for cell in row.values())
    for name in used:
        for cell in committed["disturbances"][name].values():
            assert min(cell["before"], cell["after"]) > 0.99
