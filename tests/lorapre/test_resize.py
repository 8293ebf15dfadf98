"""Resized states: exact where they grow, the best approximation where they shrink, and fit to go on with."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layout_optax import ParamLayout
from lorapre_optax import (
    LorapreAdamState,
    LowRankState,
    low_rank_ema,
    resize_ranks,
    scale_by_lorapre_adam,
)
from tests import reference_lorapre as reference
from tests.lorapre.common import KERNEL, LAYOUTS, apart, assert_fits, filled
from tests.reference import from_matrices, to_matrices

TREE_LAYOUTS = {name: layout for name, (_, layout) in LAYOUTS.items()}
SHAPES = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in LAYOUTS.items()}


@functools.partial(jax.jit, static_argnames="rank")
def resize(state, rank):
    return resize_ranks(state, rank, SHAPES, layout=TREE_LAYOUTS, full_rank_fallback=False)


def ema(rank, layout=TREE_LAYOUTS, **options):
    return low_rank_ema(0.9, rank, layout=layout, full_rank_fallback=False, debias=False, **options)


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
