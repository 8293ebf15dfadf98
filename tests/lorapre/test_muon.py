"""LoRA-Pre Muon: Newton-Schulz against optax, the accumulator inside, the alias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapre_optax import (
    RECOMMENDED,
    lorapre_muon,
    low_rank_trace,
    scale_by_lorapre_adam,
    scale_by_lorapre_muon,
)
from lorapre_optax._newton_schulz import orthogonalize
from tests.lorapre.common import KERNEL, LAYOUTS, TORCH, apart, run, run_tree, signal
from tests.reference import to_matrices


def optax_muon_direction(x, axes):
    """optax's Newton-Schulz through public names: one step of Muon without momentum."""
    tx = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=axes)
    return tx.update(x, tx.init(x))[0]


def test_newton_schulz_equals_optax():
    rng = np.random.default_rng(0)
    shapes = {"matrix": (7, 12), "torch matrix": (12, 7), "output (heads, head_dim, d)": (3, 2, 8)}
    for name, shape in shapes.items():
        layout = LAYOUTS[name][1]
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        axes = optax.contrib.MuonDimensionNumbers(layout.column_axes, layout.row_axes)
        ours = jax.jit(orthogonalize, static_argnums=1)(x, layout)
        np.testing.assert_allclose(ours, optax_muon_direction(x, axes), atol=2e-5)


@pytest.mark.parametrize("name", ["stacked experts", "layers on axis 1"])
def test_newton_schulz_flattens_singular_values_of_each_matrix(name):
    shape, layout = LAYOUTS[name]
    layout = layout.resolve(len(shape))
    x = np.random.default_rng(0).normal(size=shape) * 1e-12
    out = jax.jit(orthogonalize, static_argnums=1)(jnp.asarray(x, jnp.float32), layout)
    for matrix, original in zip(to_matrices(out, layout), to_matrices(x, layout), strict=True):
        u, _, vt = np.linalg.svd(original, full_matrices=False)
        inner = u.T @ matrix @ vt.T
        assert np.all((np.diag(inner) > 0.5) & (np.diag(inner) < 1.3))
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
    assert not np.any(orthogonalize(jnp.zeros((3, 4)), KERNEL))


def test_direction_is_newton_schulz_of_the_low_rank_trace():
    grads = {"kernel": signal((12, 20), KERNEL), "norm": {"scale": np.ones((12, 5))}}
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
    params = jax.tree.map(lambda g: g[0], grads)
    for nesterov in (False, True):
        trace = low_rank_trace(0.95, 3, nesterov=nesterov)
        muon = scale_by_lorapre_muon(3, nesterov=nesterov)
        state = jax.jit(muon.init)(params)
        m, out = run_tree(trace, grads, state), run_tree(muon, grads, state)
        expected = jax.vmap(lambda x: orthogonalize(x, KERNEL))(m["kernel"])
        np.testing.assert_allclose(out["kernel"], expected * (20 / 12) ** 0.5, atol=2e-4)
        np.testing.assert_allclose(out["norm"]["scale"], m["norm"]["scale"], rtol=1e-6)


def test_shape_factor_is_optax_muons():
    g = jnp.asarray(signal((20, 12), TORCH, steps=1)[0], jnp.float32)
    for options in ({}, {"consistent_rms": 0.2}):
        ours = lorapre_muon(1.0, 2, layout=TORCH, **options)
        theirs = optax.contrib.muon(
            1.0,
            nesterov=False,
            muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 0),
            **options,
        )
        a, b = (run(tx, [g], tx.init(g), jnp.float32)[0] for tx in with_params((ours, theirs), g))
        assert apart(a, b) < 1e-4  # optax divides by 1 - beta first; Newton-Schulz does not mind


def with_params(transformations, params):
    return [
        optax.GradientTransformation(tx.init, lambda g, s, tx=tx: tx.update(g, s, params))
        for tx in transformations
    ]


def test_low_rank_tables():
    shapes = {
        "embed": {"embedding": (30, 8)},
        "mlp": {"kernel": (24, 40)},
        "norm": {"scale": (8,)},
        "lm_head": {"kernel": (8, 30)},
    }
    rng = np.random.default_rng(0)
    make = lambda s: jnp.asarray(rng.normal(size=(3, *s)), jnp.float32)  # noqa: E731
    grads = jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.map(lambda g: g[0], grads)
    adam = scale_by_lorapre_adam(2, 0.9, 0.999, **RECOMMENDED)
    tables = {name: grads[name] for name in ("embed", "lm_head")}
    (tx,) = with_params([lorapre_muon(1.0, 3, table_rank=2)], params)
    state = jax.jit(tx.init)(params)
    # Two moments of the vector, one factor pair of the matrix, two of each table.
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == sorted([8, 8, 3 * 24, 3 * 40, *[2 * 30, 2 * 8] * 4])
    found = run_tree(tx, grads, state)
    start = jax.jit(adam.init)({name: params[name] for name in tables})
    expected = run_tree(adam, tables, start)
    for name, tree in expected.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(tree), strict=True):
            np.testing.assert_allclose(-a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found["norm"]["scale"][0], -np.sign(grads["norm"]["scale"][0]), rtol=1e-4
    )
    with pytest.raises(ValueError, match="rank of 'embed/embedding'"):
        lorapre_muon(1.0, 3, table_rank=0).init(params)
