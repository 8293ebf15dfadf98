"""Disturbances that a training run can meet: always finite, and the momentum is found again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layout_optax import ParamLayout
from lorapre_optax import low_rank_ema

LAYOUT = ParamLayout("matrix", (0,), (1,))
P, Q = 40, 48
DECAYS = (0.9, 0.95**0.5)  # Adam's first moment, and the size that its second moment squares

# Each takes the step within the disturbance, a normal gradient of size 1e-3, and a random key.
DISTURBANCES = {
    "scales from 1e-12 up to 1e6": (2000, lambda j, g, k: 1e3 * g * 10.0 ** (-12 + 18 * j / 2000)),
    "scales from 1e6 down to 1e-12": (2000, lambda j, g, k: 1e3 * g * 10.0 ** (6 - 18 * j / 2000)),
    "random scales from 1e-12 to 1e6": (
        2000,
        lambda j, g, k: 1e3 * g * 10.0 ** jax.random.uniform(k, (), minval=-12, maxval=6),
    ),
    "zeros": (10_000, lambda j, g, k: 0 * g),
    "too few zeros to underflow": (600, lambda j, g, k: 0 * g),
    "spike": (1, lambda j, g, k: 1e6 * g),
    "rank one": (
        100,
        lambda j, g, k: 1e-3 * jnp.outer(jnp.sin(jnp.arange(1.0, P + 1)), jnp.cos(jnp.arange(Q))),
    ),
    "one entry": (3000, lambda j, g, k: jnp.zeros((P, Q)).at[3, 5].set(1e-3)),
    "bfloat16 gradients": (500, lambda j, g, k: g.astype(jnp.bfloat16).astype(g.dtype)),
}

# Between the others: test-all has them.
EXTENDED = ("scales from 1e6 down to 1e-12", "too few zeros to underflow", "bfloat16 gradients")


def cosine(x, y):
    x, y = (z / jnp.maximum(jnp.max(jnp.abs(z)), 1e-38) for z in (x, y))
    return jnp.sum(x * y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y) + 1e-30)


@functools.cache
def experiment(rank):
    """A compiled run: 300 steps, a disturbance of some kind and length, 500 steps; fewer at high rank."""
    warm, rest = (300, 500) if rank < 32 else (80, 150)
    maps = (lambda x: x, jnp.abs)
    options = {"debias": False, "layout": LAYOUT, "full_rank_fallback": False}
    emas = [low_rank_ema(b, rank, target=f, **options) for b, f in zip(DECAYS, maps, strict=True)]
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=(P, 4)), jnp.float32)
    functions = [disturb for _, disturb in DISTURBANCES.values()]

    def step(carry, i, disturb):
        v, states, exact, finite = carry
        key = jax.random.fold_in(jax.random.key(0), i)
        drift, noise = jax.random.split(key)
        v = v + 0.05 * jax.random.normal(drift, v.shape)
        g = disturb(1e-3 * (u @ v + jax.random.normal(noise, (P, Q))), key)
        cosines, new_states, new_exact = [], [], []
        for tx, f, b, state, m in zip(emas, maps, DECAYS, states, exact, strict=True):
            found, state = tx.update(g, state)
            m = b * m + (1 - b) * f(g)
            cosines.append(cosine(found, m))
            for leaf in (found, state.left, state.right):
                finite &= jnp.all(jnp.isfinite(leaf))
            new_states.append(state)
            new_exact.append(m)
        return (v, new_states, new_exact, finite), jnp.stack(cosines)

    @jax.jit
    def run(kind, length):
        normal = lambda carry, i: step(carry, i, lambda g, key: g)  # noqa: E731
        disturbed = lambda j, carry: step(  # noqa: E731
            carry, warm + j, lambda g, key: jax.lax.switch(kind, functions, j, g, key)
        )[0]
        v = jnp.asarray(rng.normal(size=(4, Q)), jnp.float32)
        states = [tx.init(jnp.zeros((P, Q))) for tx in emas]
        carry = (v, states, [jnp.zeros((P, Q))] * 2, jnp.array(True))
        carry, before = jax.lax.scan(normal, carry, jnp.arange(warm))
        carry = jax.lax.fori_loop(0, length, disturbed, carry)
        carry, after = jax.lax.scan(normal, carry, 20_000 + jnp.arange(rest))
        return carry[3], before[-20:].mean(0), after[-20:].mean(0)

    return run


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param(
            name,
            32 if name == "rank one" else 8,
            marks=pytest.mark.extended if name in EXTENDED else (),
        )
        for name in DISTURBANCES
    ],
)
def test_finite_and_found_again_within_500_steps(name, rank):
    length, _ = DISTURBANCES[name]
    kind = list(DISTURBANCES).index(name)
    finite, before, after = experiment(rank)(kind, length)
    assert finite
    assert np.all(before > 0.95)
    assert np.all(after > 0.9 * before), (before, after)


def test_nan_is_contained_by_apply_if_finite():
    import optax

    from lorapre_optax import lorapre_adamw

    params = {"kernel": jnp.ones((12, 20)), "norm": {"scale": jnp.ones(5)}}
    tx = optax.apply_if_finite(lorapre_adamw(1e-3, 2, initial_subspace="gradient"), 3)
    step = jax.jit(tx.update)
    poisoned = jax.tree.map(lambda p: p.at[0].set(jnp.nan), params)
    updates, state = step(poisoned, jax.jit(tx.init)(params), params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    updates, state = step(params, state, params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))
    np.testing.assert_allclose(updates["kernel"], -1e-3, rtol=1e-5)  # still Adam's step 1
