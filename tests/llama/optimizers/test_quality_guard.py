"""A silent change of an update rule shows in the loss: every main optimizer trains for thirty steps.

The bands are three times what a disturbance of the initial parameters by 1e-6 moves the loss, and at least
0.003. Changed rules must fall outside, or the guard would guard nothing. It does not see everything: LoRA-Pre
Muon at rank 2 instead of 4, or with half the step on matrices, moves the loss by 0.002, inside its band.
"""

from __future__ import annotations

import optax
import pytest

from tests.llama.guard import RECORDED, RUNS, band, trainer

OPTAX = ("adamw", "lion")  # no rule of ours
NAMES = [pytest.param(name, marks=pytest.mark.extended if name in OPTAX else ()) for name in RUNS]


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_as_recorded(name):
    recorded, _ = RECORDED[name]
    assert trainer(*RUNS[name])() == pytest.approx(recorded, abs=band(name)), (
        f"{name}: the update rule changed. If that was meant, run python -m tests.llama.guard"
    )


def flipped(tx):
    """Ascent instead of descent."""
    return optax.chain(tx, optax.scale(-1.0))


def twice(tx):
    """Every update of twice its size."""
    return optax.chain(tx, optax.scale(2.0))


def without_state(tx):
    """Every step is the first: no momentum, no second moment, no step count."""

    def update(updates, state, params=None):
        return tx.update(updates, tx.init(params), params)[0], state

    return optax.GradientTransformation(tx.init, update)


CHANGES = {
    "a flipped sign": ("sage_hybrid", {}, flipped),
    "a factor": ("sinkgd_hybrid", {}, twice),
    "no state": ("lorapre_adamw", {}, without_state),
    "no damper": ("sage_hybrid", {"damper": "none"}, None),
    "the averaged damper alone": ("sage_hybrid", {"damper": "ema"}, None),
    "another scale of SinkGD": ("lion_hybrid", {"scale": 5.0}, None),
    "another momentum": ("lorapre_lion", {"b2": 0.9}, None),
    "another bias correction": ("lorapre_adamw", {"bias_correction": "exact"}, None),
    "no residual": ("lorapre_adamw recommended", {"residual": 0.0}, None),
    "another start": ("lorapre_sinkgd", {"initial_subspace": "normal"}, None),
    "no accumulation": ("lorapre_muon", {}, without_state),
}


@pytest.mark.extended
@pytest.mark.parametrize("mistake", CHANGES)
def test_a_changed_rule_falls_outside(mistake):
    name, options, change = CHANGES[mistake]
    optimizer, rate, usual = RUNS[name]
    changed = trainer(optimizer, rate, {**usual, **options}, change or (lambda tx: tx))()
    assert not abs(changed - RECORDED[name][0]) <= 2 * band(name), mistake
