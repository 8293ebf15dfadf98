"""Adafactor's rule for embedding and head: against float64 and optax, its state, and in SinkGD-Hybrid."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sage_optax import scale_by_factored_rms, sinkgd_hybrid
from tests import reference
from tests.sage.common import LAYOUTS, SMALL, random_tree, run

STEPS = 4
SIZES = np.array([1, 10, 1, 3])  # of the steps; growing ones make the clip act


def directions(tx, tree, gradients):
    """The directions of gradients (steps, ...), and the state after the last."""
    state, found = tx.init(tree), []
    update = jax.jit(tx.update)
    for step in range(STEPS):
        u, state = update(jax.tree.map(lambda g, step=step: g[step], gradients), state, tree)
        found.append(u)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found), state


def steps_of(tree, seed):
    """Gradients (steps, ...) of the sizes above, like a tree."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        sizes = SIZES.reshape(STEPS, *(1,) * leaf.ndim)
        return jnp.asarray(rng.normal(size=(STEPS, *leaf.shape)) * sizes, leaf.dtype)

    return jax.tree.map(draw, tree)


def rows_of_all_sizes(layout, shape):
    """Gradients (steps, ...) whose rows span five decades, the first row without any gradient."""
    sizes = np.ones(shape)
    for axis in layout.resolve(len(shape)).row_axes:
        factors = np.geomspace(1e-3, 1e2, shape[axis])
        factors[0] = 0
        sizes *= factors.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    normal = np.random.default_rng(3).normal(size=(STEPS, *shape))
    return normal * sizes * SIZES.reshape(STEPS, *(1,) * len(shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_direction_is_adafactors(kind, dtype):
    layout, shape = LAYOUTS[kind]
    g = jnp.asarray(rows_of_all_sizes(layout, shape), dtype)
    found, _ = directions(scale_by_factored_rms(layout), {"w": jnp.zeros(shape, dtype)}, {"w": g})
    assert found["w"].dtype == dtype
    wanted = reference.factored_rms_directions(np.asarray(g, np.float64), layout)
    tolerance = 1e-5 if dtype == jnp.float32 else 8e-3
    np.testing.assert_allclose(np.asarray(found["w"], np.float64), wanted, tolerance, tolerance)


def test_the_clip_acts_and_holds_the_rms_at_one():
    tree = random_tree({"embed": (30, 6)})
    found, _ = directions(scale_by_factored_rms(), tree, steps_of(tree, 1))
    rms = np.sqrt(np.mean(np.square(found["embed"]), (1, 2)))
    assert rms.max() == pytest.approx(1, abs=1e-5)
    assert rms.min() < 0.9


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_it_is_optaxs_where_both_factor(name):
    """In float32, on two axes; a head's rows are its vocabulary, which changes nothing."""
    tree = random_tree({"embed": (9, 5), "lm_head": {"kernel": (5, 9)}})
    tree = {name: tree[name]}
    theirs = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=4), optax.clip_by_block_rms(1.0)
    )
    gradients = steps_of(tree, 2)
    found, _ = directions(scale_by_factored_rms(), tree, gradients)
    wanted, _ = directions(theirs, tree, gradients)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_embedding_keeps_a_float32_for_each_row_and_column(dtype):
    tree = random_tree({"embed": (30, 6)}, dtype=dtype)
    _, state = directions(scale_by_factored_rms(), tree, steps_of(tree, 1))
    numbers = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in numbers} == {jnp.dtype(jnp.float32)}
    assert sum(leaf.size for leaf in numbers) == 30 + 6


def test_shapes_and_empty_tables_start_and_step():
    tx = scale_by_factored_rms()
    chex.assert_trees_all_equal_shapes_and_dtypes(
        tx.init({"e": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)}),
        jax.eval_shape(tx.init, {"e": jnp.zeros((8, 4), jnp.bfloat16)}),
    )
    tree = {"e": jnp.ones((0, 4)), "f": jnp.ones((3, 4))}
    with jax.debug_nans(True):
        u, _ = jax.jit(tx.update)(tree, tx.init(tree))
    chex.assert_trees_all_close(u, tree)


# In SinkGD-Hybrid


def test_sinkgd_hybrid_gives_it_to_embedding_and_head():
    params = random_tree(SMALL)
    grads = [jax.tree.map(lambda x, k=k: x * (1 + k), params) for k in range(3)]
    found, state = run(
        sinkgd_hybrid(-1.0, weight_decay=0.0, table_rule="factored_rms"), params, grads
    )
    plain, _ = run(sinkgd_hybrid(-1.0, weight_decay=0.0), params, grads)
    factored, _ = run(scale_by_factored_rms(), params, grads)
    expected = dict(plain, embed=factored["embed"], lm_head=factored["lm_head"])
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert np.abs(plain["embed"] - found["embed"]).max() > 0.1
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(moments) == [(4,), (4,), (4,), (4,), (6,), (6,)]


@pytest.mark.parametrize("rule", ["matrix", "adamw"])
def test_the_head_may_have_another_rule_than_the_embedding(rule):
    params = random_tree(SMALL)
    options = {"weight_decay": 0.0, "head_rule": rule}
    found, _ = run(sinkgd_hybrid(1e-2, table_rule="factored_rms", **options), params, [params])
    plain, _ = run(sinkgd_hybrid(1e-2, **options), params, [params])
    chex.assert_trees_all_close(found["lm_head"], plain["lm_head"], rtol=1e-6)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match=r"table_rule must be one of .'adamw', 'factored_rms'"):
        sinkgd_hybrid(1e-3, table_rule="sage")  # type: ignore[arg-type]
