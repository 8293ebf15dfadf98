"""SAGE's row damper, ours: the formula in float64, its bounds and symmetries, the paper's rule without it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layout_optax import ParamLayout
from sage_optax import SageState, scale_by_sage
from tests import reference
from tests.checkpoint import save_restore_continue
from tests.sage.common import LAYOUTS, random_gradients, run

TABLE = ParamLayout("embedding", 0, 1)


def damping(q, power):
    """R of a table's running means by row, in float64."""
    root = np.sqrt(np.mean(np.square(q)))
    return np.minimum(q / root, 1.0) ** power if root else np.zeros_like(q)


def expected(gradients, layout, shape, power, b2=0.99):
    """The directions and the rows' running means of the plain formula, step by step."""
    matrices = reference.to_matrices(np.zeros(shape), layout)
    mu, magnitude = np.zeros(shape), np.zeros((matrices.shape[0], matrices.shape[2]))
    q = np.zeros(matrices.shape[:2])
    for t, g in enumerate(gradients, start=1):
        u, mu, magnitude, _ = reference.sage_step(g, mu, magnitude, t, layout)
        q = b2 * q + (1 - b2) * np.abs(reference.to_matrices(g, layout)).mean(axis=2)
        rows = np.stack([damping(one, power) for one in q])[:, :, None]
        whole = reference.from_matrices(np.broadcast_to(rows, matrices.shape), layout, shape)
        yield u * whole, q


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_the_formula_in_float64(name, power):
    layout, shape = LAYOUTS[name]
    with jax.enable_x64(True):
        gradients = random_gradients(shape, steps=5)
        tx = scale_by_sage(row_damper=power, layout=layout)
        state, update = tx.init(jnp.zeros(shape)), jax.jit(tx.update)
        wanted = list(expected(gradients, layout, shape, power))
        for g, (u, _) in zip(gradients, wanted, strict=True):
            updates, state = update(g, state)
            np.testing.assert_allclose(updates, u, rtol=1e-12)
            assert updates.dtype == state.row_magnitude.dtype == np.float64
        kept = np.sort(np.ravel(state.row_magnitude))
        np.testing.assert_allclose(kept, np.sort(np.ravel(wanted[-1][1])), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mu_dtype", [None, "int8"])
def test_narrow_gradients_are_damped_in_float32(dtype, mu_dtype):
    g = jnp.asarray(random_gradients((6, 4), steps=1)[0], dtype)
    plain, _ = run(scale_by_sage(mu_dtype=mu_dtype, layout=TABLE), g, [g])
    damped, state = run(scale_by_sage(mu_dtype=mu_dtype, row_damper=0.5, layout=TABLE), g, [g])
    q = np.abs(np.asarray(g, np.float64)).mean(axis=1)
    wanted = np.asarray(plain, np.float64) * damping(q, 0.5)[:, None]
    np.testing.assert_allclose(
        np.asarray(damped, np.float64), wanted, rtol=1e-5 if dtype == "float32" else 1e-2
    )
    assert damped.dtype == g.dtype
    assert state.row_magnitude.dtype == np.float32
    assert state.row_magnitude.shape == (6,)


@pytest.mark.parametrize("size", [1e-35, 1e-12, 1.0, 1e25])
def test_it_is_bounded_and_ignores_the_gradients_scale(size):
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.standard_normal((6, 4)) * 10 ** rng.uniform(-1, 1, (6, 1)), jnp.float32)
    damped, _ = run(
        scale_by_sage(eps_mode="relative", row_damper=1.0, layout=TABLE), g * size, [g * size]
    )
    plain, _ = run(scale_by_sage(eps_mode="relative", layout=TABLE), g * size, [g * size])
    ratio = np.abs(np.asarray(damped)) / np.abs(np.asarray(plain))
    assert (ratio <= 1 + 1e-6).all()
    assert ratio.max() == pytest.approx(1.0)  # at least one row has the rms or more
    np.testing.assert_allclose(
        ratio, np.broadcast_to(damping(np.abs(g).mean(1), 1.0)[:, None], g.shape), rtol=1e-4
    )


def test_a_rare_row_moves_less_and_a_frequent_one_as_before():
    g = jnp.ones((8, 4)).at[0].set(100.0)
    updates, _ = run(scale_by_sage(row_damper=0.5, layout=TABLE), g, [g])
    plain, _ = run(scale_by_sage(layout=TABLE), g, [g])
    assert updates[0, 0] == plain[0, 0]
    assert float(updates[1, 0]) == pytest.approx(
        float(plain[1, 0]) * (1 / np.sqrt((1e4 + 7) / 8)) ** 0.5, rel=1e-5
    )


def test_a_vector_is_a_single_row_and_is_not_damped():
    g = jnp.asarray([3.0, -1.0, 0.5])
    assert (run(scale_by_sage(row_damper=1.0), g, [g])[0] == run(scale_by_sage(), g, [g])[0]).all()


def test_nothing_moves_without_a_gradient_and_rows_without_one_stay():
    zeros = jnp.zeros((5, 3))
    updates, _ = run(scale_by_sage(row_damper=0.5, layout=TABLE), zeros, [zeros])
    assert not updates.any()
    g = jnp.ones((5, 3)).at[2].set(0.0)
    updates, _ = run(scale_by_sage(row_damper=0.5, layout=TABLE), g, [g])
    assert np.isfinite(updates).all()
    assert not updates[2].any()


def test_without_it_state_and_rule_are_the_papers():
    params = {"embed": jnp.ones((12, 8)), "norm": jnp.ones(8)}
    assert isinstance(scale_by_sage().init(params), SageState)
    state = scale_by_sage(row_damper=0.5).init(params)
    assert isinstance(state.sage, SageState)
    assert jax.tree.map(jnp.shape, state.row_magnitude) == {"embed": (12,), "norm": ()}


def test_leaves_that_are_not_ours_pass_through():
    tx = optax.masked(scale_by_sage(row_damper=0.5), {"embed": True, "other": False})
    params = {"embed": jnp.ones((12, 8)), "other": jnp.full((3,), 7.0)}
    updates, _ = run(tx, params, [params])
    assert (updates["other"] == 7.0).all()


def test_schedules_equal_numbers():
    gradients = jnp.asarray(random_gradients((6, 4), steps=3), jnp.float32)
    number, _ = run(scale_by_sage(row_damper=0.5), gradients[0], gradients)
    schedule, _ = run(
        scale_by_sage(row_damper=optax.constant_schedule(0.5)), gradients[0], gradients
    )
    np.testing.assert_allclose(number, schedule, rtol=1e-6)


@pytest.mark.parametrize("power", [0.0, -1.0, 1.5, float("nan")])
def test_errors(power):
    with pytest.raises(ValueError, match="row_damper must be"):
        scale_by_sage(row_damper=power)


def test_save_restore_continue(tmp_path):
    save_restore_continue(optax.chain(scale_by_sage(row_damper=0.5), optax.scale(-1e-3)), tmp_path)
