"""LoRA-Pre Lion: the float64 reference on any layout, optax's Lion for full moments, the alias."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layout_optax import state_bytes
from lorapre_optax import lorapre_lion, scale_by_lorapre_lion
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
from tests.lorapre.common import KERNEL, LAYOUTS, apart, run_tree, signal

NUMBERS = {"b1": 0.8, "b2": 0.9}
LAYOUT_OF = {name: layout.resolve(len(shape)) for name, (shape, layout) in LAYOUTS.items()}


@functools.cache
def lion_on_every_layout(residual):
    """Gradients, directions, right factors at the start and products at the end, by layout."""
    grads = {name: signal(shape, LAYOUT_OF[name]) for name, (shape, _) in LAYOUTS.items()}
    tx = scale_by_lorapre_lion(
        2, **NUMBERS, residual=residual, full_rank_fallback=False, layout=LAYOUT_OF
    )
    with jax.enable_x64(True):
        shapes = {name: jnp.zeros(shape) for name, (shape, _) in LAYOUTS.items()}
        first = jax.jit(tx.init)(shapes)
        step = lambda state, g: tuple(reversed(tx.update(g, state)))  # noqa: E731
        last, out = jax.jit(lambda state: jax.lax.scan(step, state, grads))(first)
    factors = lambda state, name, side: reference.factor_matrices(  # noqa: E731
        getattr(state, side)[name], LAYOUT_OF[name], len(LAYOUTS[name][0]), side
    )
    rights = {name: factors(first, name, "right") for name in LAYOUTS}
    products = {
        name: reference.from_matrices(
            factors(last, name, "left") @ factors(last, name, "right"),
            LAYOUT_OF[name],
            LAYOUTS[name][0],
        )
        for name in LAYOUTS
    }
    return grads, jax.tree.map(np.asarray, out), rights, products


@pytest.mark.parametrize("kappa", [None, 0.8])
def test_equals_the_reference_on_any_layout(kappa):
    grads, out, rights, products = lion_on_every_layout(kappa)
    for name, layout in LAYOUT_OF.items():
        arguments, product = reference.lion(
            grads[name], rights[name], layout, **NUMBERS, kappa=kappa or 0.0
        )
        np.testing.assert_array_equal(out[name], np.sign(arguments), err_msg=name)
        assert apart(products[name], product) < 1e-9, name


@pytest.mark.parametrize(
    ("kappa", "wrong"),
    [
        (None, {"b1": 0.9}),
        (None, {"b2": 0.8}),  # factors that decay with b1
        (None, {"kappa": 0.8}),
        (0.8, {"kappa": 0.4}),
        (0.8, {"residual_b": 0.8}),  # the weight of an average with b1
    ],
    ids=str,
)
def test_the_signs_tell_wrong_numbers_apart(kappa, wrong):
    grads, out, rights, _ = lion_on_every_layout(kappa)
    options = NUMBERS | {"kappa": kappa or 0.0} | wrong
    different = [
        np.mean(
            out[name] != np.sign(reference.lion(grads[name], rights[name], layout, **options)[0])
        )
        for name, layout in LAYOUT_OF.items()
    ]
    assert np.mean(different) > 2e-3


def test_signs_of_new_factors_would_differ():
    grads, out, _, products = lion_on_every_layout(None)
    b1 = NUMBERS["b1"]
    assert any(
        np.any(out[name][-1] != np.sign(b1 * products[name] + (1 - b1) * grads[name][-1]))
        for name in LAYOUTS
    )


@pytest.mark.parametrize("kappa", [0.5, 0.9])
def test_residual_restores_the_weight_outside_the_subspace(kappa):
    """For a constant gradient the argument tends to that of Lion's where kappa is b1."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(12, 10))
    right = rng.normal(size=(1, 1, 12))
    arguments, _ = reference.lion(np.stack([g] * 300), right, KERNEL, 0.9, 0.95, kappa)
    weight = np.sum(arguments[-1] * g) / np.sum(g * g)
    full = 0.9 * (1 - 0.95**299) + 0.1
    outside = 1 - np.linalg.svd(g, compute_uv=False)[0] ** 2 / np.sum(g * g)
    # One direction is tracked and has the full weight; the rest weighs 1 - b1 + kappa.
    assert abs(weight - (full - (0.9 - kappa) * outside)) < 0.02


@pytest.mark.full_codegen
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_moments_are_exactly_lion(dtype):
    """Vectors, tables without a rank and matrices where factors do not pay; state and directions."""
    grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), draw(1, 8))
    params = jax.tree.map(lambda g: g[0], grads)
    ours = scale_by_lorapre_lion({"matrix": 10}, layout=NOT_OURS)
    # Our arithmetic and state are float32 whatever the gradient: so are optax's on wider gradients.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    theirs = optax.scale_by_lion(0.9, 0.99)
    state = jax.jit(ours.init)(params)
    assert owned(state, "up/kernel") == [(16, 24)]
    found = run_tree(ours, grads, state)
    expected = run_tree(theirs, wide, theirs.init(jax.tree.map(lambda g: g[0], wide)))
    for role in ("embedding", "matrix", "vector", "head"):
        leaf = LEAVES[role]
        assert leaf(found).dtype == dtype
        np.testing.assert_array_equal(leaf(found), leaf(expected).astype(dtype))
    np.testing.assert_array_equal(found["odd"], grads["odd"])  # not ours: passes through


def test_alias_routes():
    params = as_float32(draw())
    grads = as_float32(draw(1, 6))
    found, first, _ = run(lorapre_lion(1.0, 3, scale=0.5, layout=NOT_OURS), params, grads)
    lion, _, _ = run(optax.scale_by_lion(), params, grads)
    low_rank, _, _ = run(scale_by_lorapre_lion(3, scale=0.5, layout=NOT_OURS), params, grads)
    for role in ("embedding", "vector", "head", "other"):
        np.testing.assert_array_equal(LEAVES[role](found), -LEAVES[role](lion), err_msg=role)
    np.testing.assert_array_equal(found["up"]["kernel"], -low_rank["up"]["kernel"])
    assert set(np.unique(found["up"]["kernel"])) == {-0.5, 0.5}
    assert owned(first, "up/kernel") == [(3, 16), (3, 24)]
    assert owned(first, "embed/embedding") == [(30, 16)]
    assert owned(first, "odd") == [(2, 3, 4)]


def test_others_sage_has_the_same_betas():
    params = as_float32(draw())
    grads = as_float32(draw(1, 6))
    tx = lorapre_lion(1.0, 3, 0.8, 0.9, others="sage", layout=NOT_OURS)
    found, first, _ = run(tx, params, grads)
    sage, _, _ = run(scale_by_sage(0.8, 0.9, layout=NOT_OURS), params, grads)
    for role in ("embedding", "vector", "head"):
        np.testing.assert_allclose(LEAVES[role](found), -LEAVES[role](sage), rtol=1e-5)
    assert owned(first, "embed/embedding") == [(16,), (30, 16)]
    matrices, tables, vectors = 3 * (16 + 24), 2 * 30 * 16, 16
    magnitudes, counts = 3 * 16, 5  # of two tables and a vector; one a role
    expected = 4 * (matrices + tables + vectors + magnitudes + 24 + counts)
    assert state_bytes(tx, params) == expected


def test_rates_and_decay():
    check_rates_and_decay(lambda *args, **options: lorapre_lion(*args, rank=3, **options))


def test_injection():
    check_injection(lorapre_lion)


def test_schedules_equal_numbers():
    constant = optax.constant_schedule
    numbers = {"b1": 0.8, "b2": 0.9, "scale": 0.5, "residual": 0.4, "gamma": 0.1, "damping": 1e-3}
    grads = signal((12, 20), KERNEL, steps=4)
    outs = []
    for options in (numbers, {k: constant(v) for k, v in numbers.items()}):
        with jax.enable_x64(True):
            tx = scale_by_lorapre_lion(3, **options)
            outs.append(run_tree(tx, grads, tx.init(jnp.zeros((12, 20)))))
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "b1 must be in"),
        ({"b2": -0.1}, "b2 must be in"),
        ({"residual": 1.5}, "residual"),
        ({"gamma": -1.0}, "gamma"),
        ({"damping": -1.0}, "damping"),
        ({"damping_kind": "none"}, "damping_kind"),
        ({"initial_subspace": "zero"}, "initial_subspace"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"others": "adamw"}, r"others must be one of \('lion', 'sage'\), got 'adamw'"),
        ({"learning_rate_multipliers": {"dense": 2.0}}, "unknown role 'dense'"),
        ({"weight_decay_mask": True}, "STATIC_ARGS"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        lorapre_lion(1e-4, 4, **options)
