"""Golden data, the float64 reference on random layouts, and the two momentum transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapre_optax import LowRankState, low_rank_ema, low_rank_trace
from tests import reference_lorapre as reference
from tests.lorapre.common import KERNEL, LAYOUTS, TORCH, apart, golden, run, run_tree, signal


def golden_trace(data, meta, layout, dtype, **options):
    grads = data["grads"] if layout == TORCH else data["grads"].swapaxes(1, 2)
    tx = low_rank_trace(
        meta["mu"],
        meta["rank"],
        damping=meta["damping"],
        full_rank_fallback=False,
        layout=layout,
        **options,
    )
    state = tx.init(jnp.asarray(grads[0], dtype))
    state = state._replace(right=jnp.asarray(data["mA0"], dtype))
    out, state = run(tx, grads, state, dtype)
    return (out if layout == TORCH else out.swapaxes(1, 2)), state


@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [(TORCH, "float64", 1e-9), (KERNEL, "float64", 1e-9), (KERNEL, "float32", 1e-4)],
)
def test_trace_golden(layout, dtype, tolerance):
    data, meta = golden("muon_momentum")
    with jax.enable_x64(dtype == "float64"):
        momenta, state = golden_trace(data, meta, layout, dtype)
        product = np.asarray(state.left, np.float64).T @ np.asarray(state.right, np.float64)
    for step, expected in zip(momenta, data["momenta"], strict=True):
        assert apart(step, expected) < tolerance
    assert momenta.dtype == dtype
    assert apart(product, data["mB"] @ data["mA"]) < tolerance


def test_trace_golden_refuses_wrong_couplings():
    data, meta = golden("muon_momentum")
    grads = jnp.asarray(data["grads"], jnp.float32)

    @jax.jit
    def momenta(gamma):
        options = {"damping": meta["damping"], "full_rank_fallback": False, "layout": TORCH}
        tx = low_rank_trace(meta["mu"], meta["rank"], gamma=gamma, **options)
        state = tx.init(grads[0])._replace(right=jnp.asarray(data["mA0"], jnp.float32))
        return jax.lax.scan(lambda s, g: tuple(reversed(tx.update(g, s))), state, grads)[1]

    assert apart(momenta(1 - 0.95**0.5), data["momenta"]) < 1e-4
    # d = 1 - sqrt(mu); gamma = 1 - mu; the second moment's fourth root
    for gamma in (0.95**0.5, 1 - 0.95, 1 - 0.95**0.25):
        assert apart(momenta(gamma), data["momenta"]) > 1e-2


def test_trace_equals_the_reference_on_any_layout():
    layouts = {name: layout.resolve(len(shape)) for name, (shape, layout) in LAYOUTS.items()}
    grads = {name: signal(shape, layouts[name]) for name, (shape, _) in LAYOUTS.items()}
    with jax.enable_x64(True):
        options = {"rank": 2, "full_rank_fallback": False, "layout": layouts}
        tx = low_rank_trace(0.95, **options)
        state = jax.jit(tx.init)({name: jnp.zeros(shape) for name, (shape, _) in LAYOUTS.items()})
        out = run_tree(tx, grads, state)
    for name, layout in layouts.items():
        ndim = len(LAYOUTS[name][0])
        right = reference.factor_matrices(state.right[name], layout, ndim, "right")
        expected = reference.trace(grads[name], right, layout)
        assert apart(out[name], expected) < 1e-9, name


def test_trace_is_the_ema_of_the_scaled_gradient():
    grads = signal((12, 20), KERNEL)
    trace, ema = (
        low_rank_trace(0.95, 3),
        low_rank_ema(0.95, 3, debias=False, target=lambda g: 20 * g),
    )
    state = jax.jit(trace.init)(jnp.zeros((12, 20)))
    assert apart(run(ema, grads, state)[0], run(trace, grads, state)[0]) < 1e-5


def test_factor_shapes_and_start():
    shape, layout = LAYOUTS["layers on axis 1, output"]
    state = low_rank_ema(0.9, 2, layout=layout, full_rank_fallback=False).init(jnp.ones(shape))
    assert state.left.shape == (2, 2, 6)  # layers, rank, d
    assert state.right.shape == (3, 2, 2, 4)  # heads, layers, rank, head_dim
    assert not np.any(state.left)
    big = low_rank_ema(0.9, 16).init(jnp.ones((300, 400))).right
    assert abs(float(jnp.std(big)) - 0.02) < 1e-3
    assert abs(float(jnp.mean(big))) < 1e-3
    assert abs(float(jnp.mean((big / 0.02) ** 4)) - 3) < 0.2


def test_full_moments_equal_optax():
    grads = signal((6, 5), KERNEL)
    for ours, theirs in (
        (low_rank_ema(0.9, None), optax.ema(0.9)),
        (low_rank_ema(0.9, 5, debias=False), optax.ema(0.9, debias=False)),
        (low_rank_trace(0.9, 4), optax.trace(0.9)),
        (low_rank_trace(0.9, 4, nesterov=True), optax.trace(0.9, nesterov=True)),
    ):
        params = jnp.zeros((6, 5))
        out, _ = run(ours, grads, ours.init(params))
        expected, _ = run(theirs, grads, theirs.init(params))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-9)


def test_low_rank_tracks_a_low_rank_ema():
    grads = signal((24, 40), TORCH, steps=60, rank=3, noise=0.02)
    tx = low_rank_ema(0.9, 6, layout=TORCH, debias=False)
    out, _ = run(tx, grads, tx.init(jnp.zeros((24, 40))))
    exact = reference.ema(grads, 0.9)
    assert reference.cosine(out[-1], exact[-1]) > 0.98
    assert abs(np.linalg.norm(out[-1]) / np.linalg.norm(exact[-1]) - 1) < 0.1


def test_scanned_equals_unscanned():
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(4, 3, 12, 8)).astype(np.float32)  # steps, layers, in, out
    for options in ({}, {"initial_subspace": "gradient", "residual": 0.9}):
        tx = low_rank_ema(0.9, 3, **options)
        one = {"layers": {"q": {"kernel": jnp.zeros((3, 12, 8))}}}
        many = {"layers": {str(i): {"q": {"kernel": jnp.zeros((12, 8))}} for i in range(3)}}
        a, b = jax.jit(tx.init)(one), jax.jit(tx.init)(many)
        update = jax.jit(tx.update)
        for i in range(3):
            np.testing.assert_array_equal(
                a.right["layers"]["q"]["kernel"][i], b.right["layers"][str(i)]["q"]["kernel"]
            )
        for g in stack:
            scanned, a = update({"layers": {"q": {"kernel": g}}}, a)
            listed, b = update({"layers": {str(i): {"q": {"kernel": g[i]}} for i in range(3)}}, b)
            for i in range(3):
                np.testing.assert_allclose(
                    scanned["layers"]["q"]["kernel"][i],
                    listed["layers"][str(i)]["q"]["kernel"],
                    rtol=1e-4,
                    atol=1e-5,
                )


def test_draws_differ_between_leaves_and_not_with_dict_order():
    shape = (12, 8)
    tx = low_rank_ema(0.9, 3)
    state = tx.init({"q": {"kernel": jnp.ones(shape)}, "k": {"kernel": jnp.ones(shape)}})
    again = tx.init({"k": {"kernel": jnp.ones(shape)}, "q": {"kernel": jnp.ones(shape)}})
    assert isinstance(state, LowRankState)
    np.testing.assert_array_equal(state.right["q"]["kernel"], again.right["q"]["kernel"])
    assert reference.cosine(state.right["q"]["kernel"], state.right["k"]["kernel"]) < 0.5
