"""The convergence benchmark measures what it says, and its figures carry what the pages say of bounds."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from benchmarks import convergence
from benchmarks.convergence import NEAR, SETTINGS, Setting

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "results"
PAPER = "LoRA-Pre Adam, the paper's rule"


@pytest.fixture(scope="module")
def committed():
    return json.loads((FOLDER / "convergence.json").read_text())


def test_the_page_is_made_of_the_figures(committed):
    assert list(committed["rows"]) == list(SETTINGS)
    assert (FOLDER / "convergence.md").read_text() == convergence.page(committed).rstrip() + "\n"


def test_only_rules_without_a_bound_miss_the_target(committed):
    assert {len(row["distance"]) for row in committed["rows"].values()} == {256}
    missed = {
        label: sum(distance >= NEAR for distance in row["distance"])
        for label, row in committed["rows"].items()
    }
    for label, setting in SETTINGS.items():
        if setting.options is None or "bound" in setting.options:
            assert missed[label] == 0
    assert missed[PAPER] == 4  # as docs/lorapre.md says
    assert missed["the same at a tenth of the rate"] == 0  # the setting of test_contrib.py
    near = np.array(committed["rows"][PAPER]["distance"]).reshape(-1, committed["copies"]) < NEAR
    assert near.any(axis=1).all()  # every target was also reached
    assert max(committed["rows"][PAPER]["distance"]) > 1
    assert max(committed["rows"][PAPER]["direction"]) > 400


def test_targets_are_copies_a_rounding_apart():
    found = convergence.targets(2, 3).reshape(2, 3, *convergence.SHAPE)
    np.testing.assert_allclose(found[0, 0], found[0, 1], rtol=2e-5)
    assert np.any(found[0, 0] != found[0, 1])
    assert np.abs(found[0, 0] - found[1, 0]).max() > 1


@pytest.mark.parametrize(("options", "largest"), [(None, 1.01), ({"bound": 0.5}, 0.5)])
def test_a_run_reaches_its_target_and_tells_its_largest_direction(options, largest):
    found = convergence.measure(Setting(options, 0.1, 400), convergence.targets(1, 2))
    assert max(found["distance"]) < NEAR
    assert 0.4 < max(found["direction"]) <= largest
