"""The share of a gradient that the factors hold, against projections in NumPy."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layout_optax import ParamLayout
from lorapre_optax import (
    LorapreAdamState,
    LowRankState,
    lorapre_metrics,
    low_rank_ema,
    low_rank_trace,
    scale_by_lorapre_adam,
)
from tests import reference_lorapre as reference
from tests.lorapre.common import KERNEL, LAYOUTS, signal
from tests.reference import to_matrices

TREE_LAYOUTS = {name: layout for name, (_, layout) in LAYOUTS.items()}


def expected_share(gradient, left, right, layout):
    """By orthogonal projections, one number a matrix."""
    shares = []
    for G, B, A in zip(
        to_matrices(gradient, layout),
        reference.factor_matrices(left, layout, np.ndim(gradient), "left"),
        reference.factor_matrices(right, layout, np.ndim(gradient), "right"),
        strict=True,
    ):
        P_B, P_A = B @ np.linalg.pinv(B), np.linalg.pinv(A) @ A
        inside = np.linalg.norm(P_B @ G) ** 2 + np.linalg.norm(G @ P_A) ** 2
        shares.append(inside / (2 * np.linalg.norm(G) ** 2))
    return np.array(shares)


def after(tx, grads, steps):
    """The state after some of the gradients of a tree whose leaves are (steps, ...)."""
    state = jax.jit(tx.init)(jax.tree.map(lambda g: jnp.zeros(g.shape[1:], jnp.float32), grads))
    update = jax.jit(tx.update)
    for step in range(steps):
        _, state = update(
            jax.tree.map(lambda g, t=step: jnp.asarray(g[t], jnp.float32), grads), state
        )
    return state


def test_energy_share_is_that_of_the_projections_in_every_layout():
    grads = {name: signal(shape, layout) for name, (shape, layout) in LAYOUTS.items()}
    tx = low_rank_ema(0.9, 2, layout=TREE_LAYOUTS, full_rank_fallback=False)
    state = after(tx, grads, 8)
    now = {name: jnp.asarray(g[8], jnp.float32) for name, g in grads.items()}
    metrics = jax.jit(
        lambda state, now: lorapre_metrics(state, now, layout=TREE_LAYOUTS, damping=1e-6)
    )(state, now)
    assert set(metrics) == set(LAYOUTS)
    for name, layout in TREE_LAYOUTS.items():
        share = metrics[name]["energy_share"]
        batch = layout.batch_axes(now[name].ndim)
        assert share.shape == tuple(now[name].shape[axis] for axis in batch)
        expected = expected_share(now[name], state.left[name], state.right[name], layout)
        np.testing.assert_allclose(np.ravel(share), expected, rtol=2e-3)
        assert list(metrics[name]) == ["energy_share"]


def test_share_is_the_weight_with_which_the_newton_step_takes_in_the_gradient():
    # <G, P_B G + G P_A> / (2 ||G||^2), with what the optimizer's residual leaves out: same damping.
    grads = {"w": signal((12, 20), KERNEL)}
    state = after(low_rank_ema(0.9, 3, residual=0.9, debias=False), grads, 6)
    now = {"w": jnp.asarray(grads["w"][6], jnp.float32)}
    outs = [
        low_rank_ema(0.9, 3, residual=kappa, debias=False).update(now, state)[0]["w"]
        for kappa in (None, 0.9)
    ]
    G = np.asarray(now["w"], np.float64)
    outside = np.sum(G * (np.asarray(outs[1], np.float64) - np.asarray(outs[0]))) / (
        0.9 * (1 - 0.9**6)
    )
    share = lorapre_metrics(state, now)["w"]["energy_share"]
    assert float(share) == pytest.approx(1 - outside / np.sum(G**2), rel=1e-4)


def test_extremes_have_no_nan():
    rng = np.random.default_rng(0)
    low = jnp.asarray(rng.normal(size=(12, 2)) @ rng.normal(size=(2, 20)), jnp.float32)
    tx = low_rank_ema(0.9, 2)
    fresh = tx.init({"w": low})
    _, learnt = jax.jit(tx.update)({"w": low}, fresh)
    for _ in range(60):
        _, learnt = jax.jit(tx.update)({"w": low}, learnt)
    share = jax.jit(lambda s, g: lorapre_metrics(s, g, g)["w"])
    for state in (fresh, learnt):
        zero = share(state, {"w": 0 * low})
        assert {key: float(value) for key, value in zero.items()} == {
            "energy_share": 0.0,
            "update_rms": 0.0,
            "update_max": 0.0,
        }
    one = float(share(learnt, {"w": low})["energy_share"])
    assert 0.99 < one <= 1
    for scale in (1e-35, 1e30):  # squares of these are no float32
        scaled = share(learnt, {"w": scale * low})
        assert float(scaled["energy_share"]) == pytest.approx(one, rel=1e-4)
        rms = scale * np.sqrt(np.mean(np.square(np.asarray(low, np.float64))))
        assert float(scaled["update_rms"]) == pytest.approx(rms, rel=1e-4)
    # Both factors may be tiny, or large.
    drifted = learnt._replace(
        left=jax.tree.map(lambda x: 1e-25 * x, learnt.left),
        right=jax.tree.map(lambda x: 1e25 * x, learnt.right),
    )
    assert float(share(drifted, {"w": low})["energy_share"]) == pytest.approx(one, rel=1e-4)
    noise = jnp.asarray(rng.normal(size=(12, 20)), jnp.float32)
    assert float(share(fresh, {"w": noise})["energy_share"]) < 0.5


def test_any_chain_and_only_first_moments():
    params = {
        "layers": {"up": {"kernel": jnp.ones((3, 12, 20))}},
        "small": {"kernel": jnp.ones((4, 4))},
        "norm": {"scale": jnp.ones(20)},
        "embed": {"embedding": jnp.ones((30, 12))},
    }
    grads = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32), params
    )
    adam = scale_by_lorapre_adam(3)
    labels = {"layers": "low", "small": "low", "norm": "low", "embed": "full"}
    inner = optax.partition({"low": adam, "full": optax.scale_by_adam()}, labels)
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), inner), 1)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    metrics = jax.jit(lorapre_metrics)(state, grads, updates)
    assert set(metrics) == {"layers/up/kernel"}  # the others have full moments
    own = metrics["layers/up/kernel"]
    (mu,) = (node.mu for node in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(node))
    kernels = [tree["layers"]["up"]["kernel"] for tree in (grads, mu.left, mu.right)]
    layout = ParamLayout("matrix", (2,), (1,))
    np.testing.assert_allclose(own["energy_share"], expected_share(*kernels, layout), rtol=1e-2)
    u = np.asarray(updates["layers"]["up"]["kernel"], np.float64)
    np.testing.assert_allclose(own["update_rms"], np.sqrt(np.mean(u**2, axis=(1, 2))), rtol=1e-5)
    np.testing.assert_allclose(own["update_max"], np.abs(u).max(axis=(1, 2)), rtol=1e-6)
    assert lorapre_metrics(optax.adam(1e-3).init(params), grads, updates) == {}

    # A mask may stand for a whole subtree; of two moments of one leaf the first is looked at.
    masked = optax.masked(
        optax.chain(low_rank_ema(0.9, 2), low_rank_trace(0.9, 3)),
        {"layers": True, "small": False, "norm": False, "embed": False},
    )
    state = masked.init(params)
    first = next(s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s))
    assert first.left["layers"]["up"]["kernel"].shape[-2] == 2
    np.testing.assert_array_equal(
        lorapre_metrics(state, grads)["layers/up/kernel"]["energy_share"],
        lorapre_metrics(first, grads)["layers/up/kernel"]["energy_share"],
    )


def _is_adam(node):
    return isinstance(node, LorapreAdamState)


def _is_state(node):
    return isinstance(node, LowRankState)


def test_bad_input():
    grads = {"up": {"kernel": jnp.ones((12, 20))}}
    state = low_rank_ema(0.9, 2).init(grads)
    with pytest.raises(ValueError, match="'up/kernel', which gradients"):
        lorapre_metrics(state, {"down": grads["up"]})
    with pytest.raises(ValueError, match="'up/kernel', which updates"):
        lorapre_metrics(state, grads, {"up": None})
    with pytest.raises(ValueError, match="'up/kernel' has shape"):
        lorapre_metrics(state, {"up": {"kernel": jnp.ones((12, 10))}})
    with pytest.raises(ValueError, match="'up/kernel' has shape"):
        lorapre_metrics(state, grads, layout=ParamLayout("matrix", (0,), (1,)))
    with pytest.raises(ValueError, match="'up/kernel', which this layout leaves unmanaged"):
        lorapre_metrics(state, grads, layout={"up": optax.MaskedNode()})


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_sharded_equals_one_device_and_moves_only_thin_arrays(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {"layers": {"up": {"kernel": P(None, "x", "y")}}, "q": {"kernel": P("y", "x", None)}}
    shapes = {"layers": {"up": {"kernel": (2, 64, 128)}}, "q": {"kernel": (64, 4, 32)}}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tx = low_rank_ema(0.9, 2)
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    expected = lorapre_metrics(state, grads, grads)
    place = lambda g, spec: jax.device_put(g, NamedSharding(mesh, spec))  # noqa: E731
    placed = jax.tree.map(place, grads, specs)
    on_mesh = jax.tree.map(
        lambda factor, new: jax.device_put(factor, new.sharding), state, tx.init(placed)
    )
    step = jax.jit(lorapre_metrics).lower(on_mesh, placed, placed).compile()
    found = step(on_mesh, placed, placed)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    lines = re.findall(rf"= (.*) (?:{kinds})(?:-start)?\(", step.as_text())
    moved = sum(
        math.prod(int(n) for n in shape.split(",") if n)
        for line in lines
        for shape in re.findall(r"\w+\[([\d,]*)\]", line)
    )
    smallest = 64 * 128
    assert 0 < moved < smallest / 4
