"""optax's wrappers around our optimizers do what they promise, on plain trees and around boxes, on a mesh.

Single transformations inside some of them: tests/sage and tests/lorapre.
"""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import lorapre_optax
import sage_optax
from layout_optax import state_shardings, unboxed
from tests.compatibility import runs

RATE = 1e-2
FACTORIES = {
    "sage_hybrid": (sage_optax.sage_hybrid, {}, sage_optax.STATIC_ARGS),
    "lorapre_adamw": (lorapre_optax.lorapre_adamw, {"rank": 2}, lorapre_optax.STATIC_ARGS),
}
each_family = pytest.mark.parametrize("name", FACTORIES)


@functools.cache
def make(name):
    factory, options, _ = FACTORIES[name]
    return factory(RATE, **options)


def boxed(tree):
    return jax.tree.map(lambda leaf, names: nn.Partitioned(leaf, names=names), tree, runs.SPECS)


def start():
    return jax.tree.map(jnp.asarray, runs.weights())


def gradients(seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), runs.weights()
    )


@functools.cache
def jitted(tx):
    """One compiled step from parameters, state and gradients to new parameters and state."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@each_family
def test_clipping_sees_the_whole_tree(name):
    """The norm is that of all roles together: a gradient beyond it counts as if it were scaled."""
    tx = make(name)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), tx)
    params, grads = start(), gradients(1)
    scaled = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)
    expected, _ = jitted(tx)(params, tx.init(params), scaled)
    found, _ = jitted(unboxed(clipped))(boxed(params), clipped.init(params), boxed(grads))
    chex.assert_trees_all_close(nn.meta.unbox(found), expected, atol=1e-6)


@each_family
def test_multi_steps_takes_the_mean_of_the_gradients(name):
    tx = make(name)
    every_second = optax.MultiSteps(tx, 2).gradient_transformation()
    params = start()
    step, plain = jitted(unboxed(every_second)), jitted(tx)
    found, state = boxed(params), every_second.init(params)
    expected, plain_state = params, tx.init(params)
    for seed in (1, 3):
        waiting, state = step(found, state, boxed(gradients(seed)))
        chex.assert_trees_all_equal(waiting, found)  # accumulated, not applied
        found, state = step(found, state, boxed(gradients(seed + 1)))
        mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients(seed), gradients(seed + 1))
        expected, plain_state = plain(expected, plain_state, mean)
        chex.assert_trees_all_close(nn.meta.unbox(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("factory", "static", "options"),
    [
        (lorapre_optax.lorapre_muon, lorapre_optax.STATIC_ARGS, {"rank": 2, "ns_steps": 5.0}),
        (sage_optax.sage_hybrid, (*sage_optax.STATIC_ARGS, "iterations"), {}),
    ],
    ids=["as a float", "left static"],
)
def test_multi_steps_of_injected_numbers_compiles_once(factory, static, options):
    """optax injects an int as a weakly typed array, and `MultiSteps` gives it back as a strong one."""
    tx = optax.MultiSteps(optax.inject_hyperparams(factory, static_args=static)(RATE, **options), 2)
    params = {"up": {"kernel": jnp.ones((6, 8))}}
    step, state = jax.jit(tx.update), tx.init(params)
    for _ in range(3):
        _, state = step(params, state, params)
    assert step._cache_size() == 1


@each_family
def test_apply_if_finite_skips_counts_and_goes_on_as_if_nothing_had_been(name):
    tx = optax.apply_if_finite(unboxed(make(name)), 3)
    step = jitted(tx)
    good = [boxed(gradients(seed)) for seed in (1, 2)]
    spoilt = good[0] | {"norm": jax.tree.map(lambda g: g.at[0].set(np.nan), good[0]["norm"])}

    params, state = step(boxed(start()), tx.init(boxed(start())), good[0])
    skipped, after = step(params, state, spoilt)
    chex.assert_trees_all_equal(skipped, params)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert (int(after.notfinite_count), int(after.total_notfinite)) == (1, 1)
    undisturbed = step(params, state, good[1])
    resumed = step(skipped, after, good[1])
    chex.assert_trees_all_equal(resumed[0], undisturbed[0])
    chex.assert_trees_all_equal(resumed[1].inner_state, undisturbed[1].inner_state)
    assert int(resumed[1].notfinite_count) == 0


@each_family
def test_inject_hyperparams_lets_the_rate_be_set_between_steps(name):
    factory, options, static = FACTORIES[name]
    tx = optax.inject_hyperparams(factory, static_args=static)(RATE, **options)
    params, grads = start(), gradients(1)
    step = jitted(unboxed(tx))
    state = tx.init(params)
    expected, _ = jitted(make(name))(params, make(name).init(params), grads)
    found, _ = step(boxed(params), state, boxed(grads))
    chex.assert_trees_all_close(nn.meta.unbox(found), expected, rtol=1e-5, atol=1e-6)
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    still, _ = step(boxed(params), state, boxed(grads))
    chex.assert_trees_all_equal(still, boxed(params))


@each_family
def test_schedule_free_averages_what_our_optimizer_proposes(name):
    """The three sequences of schedule-free learning, by hand, from the updates that our optimizer gives at y.

    With a constant rate all weights are equal: x is the mean of z, and y = b1 x + (1 - b1) z.
    """
    b1 = 0.9
    base = make(name)
    tx = optax.contrib.schedule_free(base, RATE, b1=b1)
    step, propose = jitted(unboxed(tx)), jitted(base)
    found, state = boxed(start()), tx.init(start())
    y, base_state = start(), base.init(start())
    z = x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), start())
    for t in range(1, 4):
        proposed, base_state = propose(y, base_state, gradients(t))
        found, state = step(found, state, boxed(gradients(t)))
        z = jax.tree.map(lambda z, new, y: z + np.asarray(new - y, np.float64), z, proposed, y)
        x = jax.tree.map(lambda x, z, t=t: x + (z - x) / t, x, z)
        y = jax.tree.map(lambda x, z: jnp.asarray(b1 * x + (1 - b1) * z, jnp.float32), x, z)
        chex.assert_trees_all_close(nn.meta.unbox(found), y, rtol=2e-4, atol=2e-5)
        evaluated = optax.contrib.schedule_free_eval_params(state, nn.meta.unbox(found))
        chex.assert_trees_all_close(evaluated, jax.tree.map(np.float32, x), rtol=2e-4, atol=2e-5)


def whole_stack(tx):
    """All of them at once: a bad batch is skipped, gradients accumulate, iterates are averaged."""
    averaged = optax.contrib.schedule_free(tx, 0.02)
    accumulated = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), averaged), 2)
    return optax.apply_if_finite(accumulated, 3)


@pytest.mark.extended
def test_all_of_them_at_once_on_a_mesh_through_a_checkpoint(tmp_path):
    def build(mesh, tx):
        tx = whole_stack(tx)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), runs.specs())
        params = jax.device_put(runs.weights(), shardings)
        placed = state_shardings(tx, params)

        def loss_fn(params, tokens):
            return runs.cross_entropy(runs.forward(params, tokens), tokens)

        @functools.partial(jax.jit, out_shardings=(shardings, placed, None))
        def step(params, state, tokens):
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        return runs.Run(params, jax.jit(tx.init, out_shardings=placed)(params), step)

    runs.check(build, "sage_hybrid", AxisType.Auto, tmp_path, same_numbers=False)
