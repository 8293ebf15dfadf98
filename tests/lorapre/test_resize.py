"""Resized states: exact where they grow, the best approximation where they shrink, and fit to go on with."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layout_optax import ParamLayout
from lorapre_optax import (
    STATIC_ARGS,
    LorapreAdamState,
    LowRankState,
    lorapre_adamw,
    low_rank_ema,
    resize_ranks,
    scale_by_lorapre_adam,
)
from tests import reference_lorapre as reference
from tests.lorapre.common import KERNEL, LAYOUTS, apart
from tests.reference import from_matrices, to_matrices

TREE_LAYOUTS = {name: layout for name, (_, layout) in LAYOUTS.items()}
SHAPES = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in LAYOUTS.items()}


@functools.partial(jax.jit, static_argnames="rank")
def resize(state, rank):
    return resize_ranks(state, rank, SHAPES, layout=TREE_LAYOUTS, full_rank_fallback=False)


def ema(rank, layout=TREE_LAYOUTS, **options):
    return low_rank_ema(0.9, rank, layout=layout, full_rank_fallback=False, debias=False, **options)


def filled(tx, params, seed=0, scale=1.0):
    """A state of the optimizer with random positive factors and full moments."""
    rng = np.random.default_rng(seed)

    def fill(x):
        values = np.abs(rng.normal(size=x.shape)) if x.ndim else 3
        return jnp.asarray(values * scale if x.ndim else 3, x.dtype)

    return jax.tree.map(fill, jax.eval_shape(tx.init, params))


def product(left, right, layout, shape):
    """B A of one parameter in float64."""
    B, A = (
        reference.factor_matrices(factor, layout, len(shape), side)
        for factor, side in ((left, "left"), (right, "right"))
    )
    return from_matrices(B @ A, layout, shape)


def best(full, layout, rank):
    """The best approximation of this rank, matrix by matrix."""
    u, s, vt = np.linalg.svd(to_matrices(full, layout), full_matrices=False)
    return from_matrices(u[..., :rank] * s[:, None, :rank] @ vt[:, :rank], layout, np.shape(full))


def assert_fits(state, tx, params):
    """Structure, shapes and dtypes are those of ``tx.init``."""
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)  # noqa: E731
    assert kinds(state) == kinds(jax.eval_shape(tx.init, params))


def test_growing_changes_no_bit_in_every_layout():
    state = filled(ema(2), SHAPES, scale=1e-3)
    grown = resize(state, 4)
    assert_fits(grown, ema(4), SHAPES)
    assert int(grown.count) == 3
    start = jax.jit(ema(4).init)({name: jnp.zeros(x.shape) for name, x in SHAPES.items()}).right
    for name in LAYOUTS:
        left, right = np.asarray(grown.left[name]), np.asarray(grown.right[name])
        np.testing.assert_array_equal(left[..., :2, :], state.left[name])
        np.testing.assert_array_equal(right[..., :2, :], state.right[name])
        assert not np.any(left[..., 2:, :])
        fresh = right[..., 2:, :]
        assert 0.5 < np.std(fresh) / 1e-3 < 2
        for rows in (start[name][..., :2, :], start[name][..., 2:, :]):
            assert abs(reference.cosine(fresh, rows)) < 0.9  # not the draws of init again
    chex.assert_trees_all_equal(resize(state, 2), state)


@settings(max_examples=5)
@given(
    seed=st.integers(0, 10**6),
    rank=st.sampled_from([1, 3]),
    left=st.integers(-25, 25),
    right=st.integers(-12, 12),
)
def test_shrinking_is_the_best_approximation_whatever_the_scales(seed, rank, left, right):
    state = filled(ema(4), SHAPES, seed)
    state = state._replace(
        left=jax.tree.map(lambda x: (x - 0.5) * np.float32(10.0**left), state.left),
        right=jax.tree.map(lambda x: (x - 0.5) * np.float32(10.0**right), state.right),
    )
    shrunk = resize(state, rank)
    assert_fits(shrunk, ema(rank), SHAPES)
    for name, (shape, layout) in LAYOUTS.items():
        before = product(state.left[name], state.right[name], layout, shape)
        after = product(shrunk.left[name], shrunk.right[name], layout, shape)
        assert apart(after, best(before, layout, rank)) < 1e-4, name
        # The roots of the singular values on both sides.
        sizes = [np.linalg.norm(np.asarray(f[name], np.float64)) for f in shrunk[1:3]]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_what_has_no_direction_gets_rows_that_can_learn():
    params = {"w": jax.ShapeDtypeStruct((3, 12, 20), jnp.float32)}
    layout = ParamLayout("matrix", (2,), (1,))
    tx = functools.partial(ema, layout=layout)
    state = filled(tx(6), params)
    left = state.left["w"].at[0].set(0).at[1, 1:].set(0)  # rank 0, 1 and 6
    state = state._replace(left={"w": left})
    shrunk = resize_ranks(state, 3, params, layout=layout)
    B, A = shrunk.left["w"], shrunk.right["w"]
    assert not np.any(B[0])
    assert not np.any(B[1, 1:])
    assert np.all(np.linalg.matrix_rank(A) == 3)
    assert 0.005 < np.std(A[0]) < 0.05  # as at the start
    assert 0.3 < np.linalg.norm(A[1, 1]) / np.linalg.norm(A[1, 0]) < 3
    before = product(state.left["w"], state.right["w"], layout, params["w"].shape)
    after = product(B, A, layout, params["w"].shape)
    assert apart(after[1], before[1]) < 1e-5


def test_scanned_equals_unscanned():
    stack = jax.ShapeDtypeStruct((3, 12, 20), jnp.float32)
    one = {"layers": {"q": {"kernel": stack}}}
    single = jax.ShapeDtypeStruct((12, 20), jnp.float32)
    many = {"layers": {str(i): {"q": {"kernel": single}} for i in range(3)}}
    tx = low_rank_ema(0.9, 4)
    state = filled(tx, one)
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree["layers"])  # noqa: E731
    listed = filled(tx, many)._replace(
        left={"layers": {str(i): pick(state.left, i) for i in range(3)}},
        right={"layers": {str(i): pick(state.right, i) for i in range(3)}},
    )
    for rank in (2, 6):
        a, b = resize_ranks(state, rank, one), resize_ranks(listed, rank, many)
        for i in range(3):
            for x, y in ((a.left, b.left), (a.right, b.right)):
                found, expected = pick(x, i), y["layers"][str(i)]
                # A singular direction's sign is free.
                np.testing.assert_allclose(
                    np.abs(found["q"]["kernel"]),
                    np.abs(expected["q"]["kernel"]),
                    rtol=1e-3,
                    atol=1e-5,
                )


def test_adam_to_full_moments_and_back():
    shapes = {"a": (12, 20), "b": (2, 12, 20), "c": (16, 12), "norm": (20,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    layout = {
        "a": KERNEL,
        "b": ParamLayout("matrix", (2,), (1,)),
        "c": KERNEL,
        "norm": ParamLayout("vector", (), (0,)),
    }
    first, second = {"a": 3, "b": 3, "c": None}, {"a": 3, "b": 40, "c": 2}
    make = lambda rank: scale_by_lorapre_adam(rank, layout=layout)  # noqa: E731
    state = filled(make(first), params)
    new = resize_ranks(state, second, params, layout=layout)
    assert_fits(new, make(second), params)
    for moment, old, power in ((new.mu, state.mu, 1), (new.nu, state.nu, 2)):
        chex.assert_trees_all_equal(moment.left["a"], old.left["a"])
        chex.assert_trees_all_equal(moment.full["norm"], old.full["norm"])
        expected = product(old.left["b"], old.right["b"], layout["b"], shapes["b"]) ** power
        assert apart(moment.full["b"], expected) < 1e-5
        expected = best(np.asarray(old.full["c"], np.float64) ** (1 / power), KERNEL, 2)
        assert (
            apart(product(moment.left["c"], moment.right["c"], KERNEL, (16, 12)), expected) < 1e-4
        )
    again = resize_ranks(new, first, params, layout=layout)  # b has rank 3 still
    assert_fits(again, make(first), params)
    for moment, old, tolerance in ((again.mu, state.mu, 1e-5), (again.nu, state.nu, 1e-3)):
        found, expected = (
            product(each.left["b"], each.right["b"], layout["b"], shapes["b"])
            for each in (moment, old)
        )
        assert apart(np.abs(found), np.abs(expected)) < tolerance
    # A zero moment has no direction; its factors start as those of init.
    state = state._replace(mu=state.mu._replace(full={**state.mu.full, "c": jnp.zeros((16, 12))}))
    mu = resize_ranks(state, second, params, layout=layout).mu
    assert not np.any(mu.left["c"])
    assert 0.005 < np.std(mu.right["c"]) < 0.05


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


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_low_precision_factors_keep_their_dtype(dtype, tolerance):
    make = functools.partial(ema, factor_dtype=dtype)
    state = filled(make(3), SHAPES, scale=3e-3)  # products far below the normals of float16
    for rank in (2, 4):
        new = resize(state, rank)
        assert_fits(new, make(rank), SHAPES)
        for name, (shape, layout) in LAYOUTS.items():
            before = product(state.left[name], state.right[name], layout, shape)
            after = product(new.left[name], new.right[name], layout, shape)
            assert apart(after, best(before, layout, rank)) < tolerance


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


def test_bad_input():
    params = {"up": {"kernel": jnp.ones((12, 20))}}
    state = low_rank_ema(0.9, 2).init(params)
    with pytest.raises(ValueError, match="no LowRankState"):
        resize_ranks(optax.adam(1e-3).init(params), 2, params)
    with pytest.raises(ValueError, match="'up/kernel', which params"):
        resize_ranks(state, 2, {"down": params["up"]})
    with pytest.raises(ValueError, match="'up/kernel' has shape"):
        resize_ranks(state, 2, {"up": {"kernel": jnp.ones((12, 21))}})
    with pytest.raises(ValueError, match="'up/kernel' has shape"):
        resize_ranks(state, 2, params, layout=ParamLayout("matrix", (0,), (1,)))
    with pytest.raises(ValueError, match="'up/kernel': must be at least 1"):
        resize_ranks(state, 0, params)
    both = {**params, "norm": {"scale": jnp.ones(20)}}
    state = low_rank_ema(0.9, 2).init(both)
    with pytest.raises(ValueError, match="'norm/scale' has shape"):
        resize_ranks(state, 2, {**params, "norm": {"scale": jnp.ones(21)}})
    # Not a single factor: left alone, whatever the ranks.
    full = scale_by_lorapre_adam(None).init(params)
    assert isinstance(full, LorapreAdamState)
    assert isinstance(full.mu, LowRankState)
    chex.assert_trees_all_equal(resize_ranks(full, 2, params), full)
