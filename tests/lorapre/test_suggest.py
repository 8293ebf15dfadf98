"""Suggested ranks against NumPy's singular values, and the mapping of ranks by path that they make."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layout_optax import ParamLayout
from lorapre_optax import low_rank_ema, suggest_ranks
from lorapre_optax._rank import leaf_rank
from tests.lorapre.common import KERNEL, LAYOUTS
from tests.reference import from_matrices, to_matrices

TREE_LAYOUTS = {name: layout for name, (_, layout) in LAYOUTS.items()}


def expected_rank(gradients, layout, energy):
    matrices = to_matrices(np.mean(np.asarray(gradients, np.float64), axis=0), layout)
    ranks = []
    for matrix in matrices:
        square = np.linalg.svd(matrix, compute_uv=False) ** 2
        shares = np.cumsum(square) / square.sum()
        ranks.append(1 + int(np.sum(shares < energy)))
    return max(ranks)


def spectrum(shape, layout, seed):
    """A gradient whose matrices have singular values that fall off at a random pace."""
    rng = np.random.default_rng(seed)
    matrices = to_matrices(rng.normal(size=shape), layout)
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    s = rng.uniform(0.2, 0.9, (len(s), 1)) ** np.arange(s.shape[1])
    return from_matrices(u * s[:, None] @ vt, layout, shape).astype(np.float32)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10**6),
    energy=st.sampled_from([0.5, 0.8, 0.9, 0.99, 0.999]),
    exponent=st.integers(-30, 30),
)
def test_ranks_hold_the_energy_in_every_layout_at_every_scale(seed, energy, exponent):
    one = {name: spectrum(shape, layout, seed) for name, (shape, layout) in LAYOUTS.items()}
    two = {name: spectrum(shape, layout, seed + 1) for name, (shape, layout) in LAYOUTS.items()}
    scaled = [jax.tree.map(lambda g: g * np.float32(10.0**exponent), tree) for tree in (one, two)]
    found = suggest_ranks(one, scaled, energy, layout=TREE_LAYOUTS)
    assert found == {
        name: expected_rank([one[name], two[name]], layout, energy)
        for name, layout in TREE_LAYOUTS.items()
    }


def test_whole_energy_zero_gradients_and_stacks():
    rng = np.random.default_rng(0)
    low = (rng.normal(size=(20, 3)) @ rng.normal(size=(3, 30))).astype(np.float32)
    stack = np.stack([np.zeros_like(low), low, 1e-20 * low])
    grads = {
        "low": low,
        "layers": {"low": stack, "zero": 0 * stack},
        "cancels": {"kernel": low},
        "norm": {"scale": np.ones((5,), np.float32)},
        "embed": {"embedding": low.astype("bfloat16")},
        "frozen": None,
        "masked": optax.MaskedNode(),
        "empty": {"kernel": np.ones((0, 6), np.float32)},
    }
    other = {**grads, "cancels": {"kernel": -low}}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), grads)
    ranks = suggest_ranks(shapes, [grads, other], 1.0)
    assert 3 <= ranks.pop("embed/embedding") <= 20  # bfloat16 rounds the rank away
    assert ranks == {"low": 3, "layers/low": 3, "layers/zero": 1, "cancels/kernel": 1}
    assert all(type(rank) is int for rank in ranks.values())


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_sharded_gradients(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    shape, layout = (4, 8, 2, 12), ParamLayout("matrix", (2, 3), (1,))
    gradient = spectrum(shape, layout, 0)
    placed = jax.device_put(gradient, NamedSharding(mesh, P(None, "x", None, "y")))
    found = suggest_ranks({"q": placed}, [{"q": placed}], 0.95, layout=layout)
    assert found == {"q": expected_rank([gradient], layout, 0.95)}


def test_suggestion_is_a_rank_mapping():
    grads = {
        "q_proj": {"kernel": jnp.asarray(spectrum((24, 40), KERNEL, 0))},
        "b": {"q_proj": {"kernel": jnp.ones((24, 40))}},
        "norm": {"scale": jnp.ones(40)},
    }
    ranks = suggest_ranks(grads, [grads], 0.95)
    assert ranks["q_proj/kernel"] > 1 == ranks["b/q_proj/kernel"]
    state = low_rank_ema(0.9, ranks, full_rank_fallback=False).init(grads)
    assert state.left["q_proj"]["kernel"].shape == (ranks["q_proj/kernel"], 40)
    # "q_proj/kernel" is found in this path too, and stands first.
    assert state.left["b"]["q_proj"]["kernel"].shape == (1, 40)


def test_a_whole_path_wins_over_patterns_and_roles():
    shape = (64, 32)
    mapping = {"kernel": 2, "matrix": 3, "a/kernel": 4, "head": 5, "b/kernel": None}
    assert leaf_rank(mapping, "a/kernel", KERNEL, shape) == 4
    assert leaf_rank(mapping, "b/kernel", KERNEL, shape) is None
    assert leaf_rank(mapping, "b/a/kernel", KERNEL, shape) == 2
    assert leaf_rank(mapping, "head", KERNEL, shape) == 5
    assert leaf_rank(mapping, "c", KERNEL, shape) == 3
    assert leaf_rank({"": 6, "matrix": 3}, "", KERNEL, shape) == 6  # a bare array


def test_bad_input():
    grads = {"a": {"kernel": np.ones((4, 6), np.float32)}}
    bad = {"a": {"kernel": grads["a"]["kernel"].copy()}}
    bad["a"]["kernel"][1, 2] = np.inf
    for energy in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="energy"):
            suggest_ranks(grads, [grads], energy)
    with pytest.raises(ValueError, match="at least one"):
        suggest_ranks(grads, [])
    with pytest.raises(ValueError, match="gradient 1 of 'a/kernel' is not finite"):
        suggest_ranks(grads, [grads, bad, grads])
    with pytest.raises(ValueError, match="gradient 0 has another structure"):
        suggest_ranks(grads, [{"b": grads["a"]}])
    with pytest.raises(ValueError, match="'a/kernel' has shape"):
        suggest_ranks(grads, [{"a": {"kernel": np.ones((6, 4))}}])
