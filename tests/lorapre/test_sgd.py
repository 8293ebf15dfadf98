"""LoRA-Pre SGD: the low-rank heavy ball on matrices, optax.sgd on everything else."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from lorapre_optax import lorapre_sgd
from sage_optax import scale_by_sage
from tests import reference_lorapre as reference
from tests.lorapre.aliases import (
    LEAVES,
    NOT_OURS,
    as_float32,
    check_injection,
    check_rates_and_decay,
    draw,
    owned,
    run,
)
from tests.lorapre.common import KERNEL, apart

GRADS = draw(1, 8)


@pytest.mark.parametrize("nesterov", [False, True])
def test_matrices_follow_the_reference_and_the_rest_is_optax_sgd(nesterov):
    mu = 0.8
    with jax.enable_x64(True):
        params = draw()
        tx = lorapre_sgd(0.1, 3, mu, nesterov=nesterov, scale=2.0, layout=NOT_OURS)
        found, first, last = run(tx, params, GRADS)
        expected, _, _ = run(optax.sgd(0.1, mu, nesterov), params, GRADS)
    rights = [x for x in jax.tree.leaves(first) if x.shape == (3, 16)]
    assert len(rights) == 1
    right = reference.factor_matrices(rights[0], KERNEL, 2, "right")
    m = reference.trace(GRADS["up"]["kernel"], right, KERNEL, mu)
    m = GRADS["up"]["kernel"] + mu * m if nesterov else m
    for step, wanted in zip(found["up"]["kernel"], -0.2 * m, strict=True):
        assert apart(step, wanted) < 1e-9
    for role in ("embedding", "vector", "head", "other"):
        leaf = LEAVES[role]
        np.testing.assert_allclose(leaf(found), leaf(expected), rtol=1e-12, err_msg=role)
    assert owned(last, "up/kernel") == [(3, 16), (3, 24)]
    assert owned(last, "embed/embedding") == [(30, 16)]
    assert owned(last, "norm/scale") == [(16,)]


def test_full_moments_equal_optax_sgd():
    """Where factors do not pay, the matrix too is plain momentum SGD."""
    params = as_float32(draw())
    grads = as_float32(GRADS)
    found, first, _ = run(lorapre_sgd(0.1, 10, nesterov=True, layout=NOT_OURS), params, grads)
    expected, _, _ = run(optax.sgd(0.1, 0.9, nesterov=True), params, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    assert owned(first, "up/kernel") == [(16, 24)]  # 10 * 40 > 16 * 24


@pytest.mark.full_codegen
def test_others_sage():
    params = as_float32(draw())
    grads = as_float32(GRADS)
    found, first, _ = run(lorapre_sgd(1.0, 3, others="sage", layout=NOT_OURS), params, grads)
    expected, _, _ = run(scale_by_sage(layout=NOT_OURS), params, grads)
    plain, _, _ = run(lorapre_sgd(1.0, 3, layout=NOT_OURS), params, grads)
    for role in ("embedding", "vector", "head"):
        np.testing.assert_allclose(LEAVES[role](found), -LEAVES[role](expected), rtol=1e-5)
    for role in ("matrix", "other"):
        np.testing.assert_array_equal(LEAVES[role](found), LEAVES[role](plain))
    assert owned(first, "embed/embedding") == [(16,), (30, 16)]


def test_rates_and_decay():
    check_rates_and_decay(lambda *args, **options: lorapre_sgd(*args, rank=3, **options))


def test_injection():
    check_injection(lorapre_sgd)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"gamma": 2.0}, "gamma"),
        ({"residual": -0.5}, "residual"),
        ({"damping": -1.0}, "damping"),
        ({"damping_kind": "none"}, "damping_kind"),
        ({"initial_subspace": "zero"}, "initial_subspace"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"others": "adamw"}, r"others must be one of \('sgd', 'sage'\), got 'adamw'"),
        ({"learning_rate_multipliers": {"dense": 2.0}}, "unknown role 'dense'"),
        ({"weight_decay_mask": True}, "STATIC_ARGS"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        lorapre_sgd(0.1, 4, **options)
