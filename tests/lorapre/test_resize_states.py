"""Resized states inside wrappers, on meshes, in checkpoints, and in a run that goes on with them."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapre_optax import (
    STATIC_ARGS,
    lorapre_adamw,
    low_rank_ema,
    resize_ranks,
    scale_by_lorapre_adam,
)
from tests import reference_lorapre as reference
from tests.lorapre.common import assert_fits, filled

MODEL = {
    "embed": {"embedding": jax.ShapeDtypeStruct((16, 8), jnp.float32)},
    "layers": {"up": {"kernel": jax.ShapeDtypeStruct((2, 8, 24), jnp.float32)}},
    "norm": {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)},
    "frozen": None,
}


def test_any_wrapper_and_what_has_no_factors_stays():
    injected = optax.inject_hyperparams(lorapre_adamw, static_args=STATIC_ARGS)

    def make(rank):
        chain = optax.chain(optax.clip_by_global_norm(1.0), injected(1e-3, rank=rank))
        return optax.MultiSteps(optax.apply_if_finite(chain, 5), 2)

    state = filled(make(3), MODEL)
    for rank in (1, 5, None):
        resized = resize_ranks(state, rank, MODEL)
        assert_fits(resized, make(rank), MODEL)
        lists = [
            [x for x in jax.tree.leaves(tree) if x.shape not in {(2, 8, 24)} and x.ndim < 3]
            for tree in (state, resized)
        ]
        chex.assert_trees_all_equal(*lists)  # counts, rates, the full Adam of the others
    abstract = jax.eval_shape(lambda s: resize_ranks(s, 5, MODEL), state)
    assert_fits(abstract, make(5), MODEL)

    # optax.masked puts one MaskedNode in the place of a subtree.
    mask = {"embed": False, "layers": True, "norm": False, "frozen": None}
    masked = lambda rank: optax.masked(low_rank_ema(0.9, rank), mask)  # noqa: E731
    assert_fits(resize_ranks(filled(masked(3), MODEL), 4, MODEL), masked(4), MODEL)
    # The second moment may have no factors by choice.
    half = lambda rank: scale_by_lorapre_adam(rank, second_moment="full")  # noqa: E731
    assert_fits(resize_ranks(filled(half(3), MODEL), 2, MODEL), half(2), MODEL)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_sharding_is_kept(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {"layers": {"up": P("x", None, "y"), "down": P(None, None, "x")}, "out": P("y", "x")}
    shapes = {"layers": {"up": (2, 12, 16), "down": (2, 16, 12)}, "out": (12, 16)}
    params = jax.tree.map(
        lambda spec, shape: jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec)),
        specs,
        shapes,
    )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    old, ranks = {"up": 4, "down": 4}, {"up": 2, "out": 3}
    state = low_rank_ema(0.9, old).init(params)
    values = filled(low_rank_ema(0.9, old), abstract)
    state = jax.tree.map(lambda x, v: jax.device_put(v, x.sharding) if v.ndim else v, state, values)
    new = resize_ranks(state, ranks, params)
    template = low_rank_ema(0.9, ranks).init(params)
    specs = lambda tree: [x.sharding.spec for x in jax.tree.leaves(tree) if x.ndim]  # noqa: E731
    pad = lambda tree: [  # noqa: E731
        (*spec, *(None,) * (x.ndim - len(spec)))
        for x, spec in zip([x for x in jax.tree.leaves(tree) if x.ndim], specs(tree), strict=True)
    ]
    assert pad(new) == pad(template)
    assert_fits(new, low_rank_ema(0.9, ranks), params)
    expected = resize_ranks(values, ranks, params)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.abs(a), np.abs(b), rtol=1e-4, atol=1e-5)
    grown = resize_ranks(state, {"up": 5, "down": 5}, params)
    assert grown.left["layers"]["up"].sharding.spec == P("x", None, "y")
    if kind == AxisType.Explicit:  # traced, a type carries its sharding
        traced = jax.jit(lambda s: resize_ranks(s, ranks, abstract))(state)
        assert pad(traced) == pad(template)
        traced = jax.jit(lambda s: resize_ranks(s, {"up": 5, "down": 4}, abstract))(state)
        assert traced.left["layers"]["up"].sharding.spec == P("x", None, "y")


def drifting(steps, rank=8, shape=(40, 48), seed=0):
    """Gradients from ``rank`` slowly turning directions."""
    rng = np.random.default_rng(seed)
    u, v = np.linalg.qr(rng.normal(size=(shape[0], rank)))[0], rng.normal(size=(rank, shape[1]))
    out = []
    for _ in range(steps):
        v = v + 0.03 * rng.normal(size=v.shape)
        out.append(u * rng.uniform(0.5, 1.5, rank) @ v + 0.02 * rng.normal(size=shape))
    return np.stack(out)


@functools.partial(jax.jit, static_argnames="rank")
def follow(state, grads, rank):
    """The low-rank EMA's products over some gradients, and the last state."""
    tx = low_rank_ema(0.9, rank)

    def step(state, g):
        state = tx.update(g, state)[1]
        return state, jnp.einsum("zq,zp->pq", state.left, state.right)

    state, products = jax.lax.scan(step, state, grads)
    return state, products


def test_a_run_goes_on_after_growing_and_shrinking():
    grads = drifting(160)
    exact = reference.ema(grads, 0.9)
    head, tail = (jnp.asarray(g, jnp.float32) for g in (grads[:80], grads[80:]))
    params = jnp.zeros(grads.shape[1:])

    def cosines(products):
        rows = zip(products, exact[-len(products) :], strict=True)
        return [reference.cosine(p, e) for p, e in rows]

    starts = {rank: follow(low_rank_ema(0.9, rank).init(params), head, rank)[0] for rank in (2, 8)}
    stay = {rank: cosines(follow(starts[rank], tail, rank)[1]) for rank in (2, 8)}
    grown = cosines(follow(resize_ranks(starts[2], 8, params), tail, 8)[1])
    assert grown[0] < 0.85
    assert np.mean(stay[2][-20:]) < 0.75
    assert np.mean(grown[-20:]) > 0.95
    assert np.mean(grown[-20:]) > np.mean(stay[8][-20:]) - 0.01
    shrunk = cosines(follow(resize_ranks(starts[8], 2, params), tail, 2)[1])
    assert np.all(np.isfinite(shrunk))
    assert np.mean(shrunk[:20]) > np.mean(stay[2][:20]) - 0.05
    assert np.mean(shrunk[-20:]) > np.mean(stay[2][-20:]) - 0.1


def test_orbax_restores_a_resized_state_into_the_new_optimizer(tmp_path):
    make = lambda rank: lorapre_adamw(1e-3, rank)  # noqa: E731
    params = {key: MODEL[key] for key in ("embed", "layers", "norm")}
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
    old = filled(make(2), params)
    resized = resize_ranks(old, 4, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", resized)
        checkpointer.wait_until_finished()
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, make(4).init(params))
        restored = checkpointer.restore(tmp_path / "state", template)
    chex.assert_trees_all_equal(restored, resized)
    chex.assert_trees_all_equal_dtypes(restored, resized)
    updates, after = jax.jit(make(4).update)(params, restored, params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, after)))
