"""A statistic as long as a vocabulary is sharded where its parameter is; a short one is copied."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.meshes.hlo import collectives
from layout_optax import ParamLayout, state_shardings
from layout_optax.axes import LARGE_STATISTIC, statistic_sharding
from sage_optax import sage_damper, scale_by_sage

KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
VOCABULARY, FEATURES = LARGE_STATISTIC, 8
LAYOUT = {
    "embedding": ParamLayout("embedding", (0,), (1,)),
    "kernel": ParamLayout("matrix", (2,), (1,)),
    "small": ParamLayout("embedding", (0,), (1,)),
}
SHAPES = {"embedding": (VOCABULARY, FEATURES), "kernel": (8, 8192, 8), "small": (64, FEATURES)}
SPECS = {
    "embedding": P(None, "fsdp"),
    "kernel": P(None, "tensor", "fsdp"),
    "small": P(None, "fsdp"),
}
TX = scale_by_sage(mu_dtype="int8", layout=LAYOUT)


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


@functools.cache
def on_one_device():
    state = TX.init(draw(0))
    for seed in (1, 2):
        updates, state = jax.jit(TX.update)(draw(seed), state)
    return jax.device_get((updates, state, sage_damper(draw(3), state, layout=LAYOUT)))


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_one_device_and_only_vectors_move(kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(KINDS[kind],) * 2)
    placed = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    with jax.set_mesh(mesh):
        params = jax.device_put(draw(0), placed)
        expected = state_shardings(TX, params, placed)
        assert expected.mu_row_max["embedding"].spec == P("fsdp")
        assert expected.mu_row_max["small"].spec == P(None)
        assert expected.magnitude["embedding"].spec == P("fsdp")
        assert expected.magnitude["kernel"].spec == P(None, ("tensor", "fsdp"))
        init = jax.jit(TX.init) if kind == "explicit" else TX.init
        state = jax.device_put(init(params), expected)
        step = jax.jit(TX.update, out_shardings=(placed, expected))
        text = step.lower(params, state).compile().as_text()
        assert max(each.elements for each in collectives(text)) <= 2 * VOCABULARY + 4 * FEATURES
        for seed in (1, 2):
            updates, state = step(jax.device_put(draw(seed), placed), state)
        assert step._cache_size() == 1
        damper = sage_damper(jax.device_put(draw(3), placed), state, layout=LAYOUT)
    found = jax.device_get((updates, state, damper))
    for value, reference in zip(
        jax.tree.leaves(found), jax.tree.leaves(on_one_device()), strict=True
    ):
        if value.dtype == np.int8:  # stochastic rounding of what differs in the last bit
            assert np.mean(value != reference) <= 1e-3
        else:
            apart = np.abs(value - reference) > 1e-5 * np.abs(reference).max()
            assert apart.mean() <= 1e-3  # signs at rounding level


def spec_of(shape, removed, spec):
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    return statistic_sharding(NamedSharding(mesh, spec), shape, removed).spec


def test_the_rule():
    long = LARGE_STATISTIC
    assert spec_of((long, 8), (1,), P(None, "fsdp")) == P("fsdp")
    assert spec_of((long - 8, 8), (1,), P(None, "fsdp")) == P(None)
    assert spec_of((long, 8), (1,), P("tensor", "fsdp")) == P(("tensor", "fsdp"))
    assert spec_of((long, 8), (1,), P("tensor", None)) == P("tensor")
    # The longest axis takes what divides it, and never what is there already.
    assert spec_of((8, long, 8), (2,), P(None, None, "fsdp")) == P(None, "fsdp")
    assert spec_of((long + 2, 8), (1,), P(None, ("fsdp", "tensor"))) == P("tensor")
    assert spec_of((long + 1, 8), (1,), P(None, "fsdp")) == P(None)
    assert statistic_sharding(None, (long, 8), (1,)) is None
    assert LARGE_STATISTIC == 65536  # docs/sharding.md names it
