"""Muon on whole matrices: equal to the sharded iteration and to one device, with two exchanges of a shard."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.meshes.hlo import collectives, moved
from layout_optax import ParamLayout, infer_layout
from lorapre_optax import scale_by_lorapre_muon
from lorapre_optax._distributed_newton_schulz import distributed_orthogonalize
from lorapre_optax._newton_schulz import orthogonalize
from tests.sharding import grid

MATRIX = ParamLayout("matrix", (1,), (0,))
STACK = ParamLayout("matrix", (2,), (1,))
# Name: shapes, layouts, specs; and the elements moved, in sizes of one device's share of all leaves, on
# Explicit and Auto meshes. Traced on an Auto mesh an array does not tell that experts are spread already.
CASES = {
    "stack of 8": ([(8, 16, 32)], [STACK], [P(None, "x", "y")], (4, 4)),
    "stack of 8, both axes on rows": ([(8, 16, 32)], [STACK], [P(None, ("x", "y"), None)], (4, 4)),
    "eight leaves": ([(16, 32)] * 8, [MATRIX] * 8, [P("x", "y")] * 8, (4, 4)),
    "stack of 12: x is gathered": ([(12, 16, 32)], [STACK], [P(None, "x", "y")], (4, 5)),
    "experts sharded already": (
        [(2, 4, 16, 32)],
        [ParamLayout("matrix", (3,), (2,))],
        None,
        (2, 8),
    ),
    "one matrix, gathered": ([(16, 32)], [MATRIX], [P("x", "y")], (12, 12)),
}


@pytest.mark.parametrize("kind", grid.KINDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_one_device_and_moves_shards_only(case, kind):
    shapes, layouts, specs, shares = CASES[case]
    mesh = grid.mesh_of(kind)
    placed = [NamedSharding(mesh, s) for s in specs or [P("x", None, None, "y")]]
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    whole = lambda xs: distributed_orthogonalize(xs, layouts)  # noqa: E731
    step = jax.jit(
        whole, out_shardings=placed if kind == "auto" else None, compiler_options=grid.quick()
    )
    compiled = step.lower(jax.device_put(xs, placed)).compile()
    found = compiled(jax.device_put(xs, placed))
    for value, x, layout, sharding in zip(found, xs, layouts, placed, strict=True):
        np.testing.assert_allclose(value, orthogonalize(x, layout), atol=1e-5)
        assert value.sharding.is_equivalent_to(sharding, x.ndim)
    share = sum(x.size for x in xs) // 8
    text = compiled.as_text()
    assert moved(text) == share * shares[kind == "auto"]
    assert all(each.times == 1 for each in collectives(text))  # none in the iteration


@pytest.mark.parametrize("kind", grid.KINDS)
def test_in_the_optimizer(kind):
    """Several shapes, layers on axis 1, sharded experts; vectors stay what they are."""
    paths = [f"x_y/{name}" for name in ("query/kernel", "scanned_second/kernel", "experts/kernel")]
    paths += ["_y/norm/scale"]
    placed = grid.shardings(paths, grid.mesh_of(kind))
    params = grid.draw(paths, 0)
    layout = functools.partial(infer_layout, rules=grid.RULES[:1])  # those of these leaves
    plain = scale_by_lorapre_muon(4, layout=layout)
    whole = scale_by_lorapre_muon(4, whole_matrices=True, layout=layout)
    options = {"compiler_options": grid.quick()}
    expected, _ = jax.jit(plain.update, **options)(params, plain.init(params))
    alone, _ = jax.jit(whole.update, **options)(params, whole.init(params))
    on_mesh = jax.device_put(params, placed)
    state = whole.init(on_mesh)
    found, _ = jax.jit(whole.update, out_shardings=(placed, None), compiler_options=grid.quick())(
        on_mesh, state
    )
    for path in paths:
        np.testing.assert_array_equal(alone[path], expected[path])
        difference = np.linalg.norm(found[path] - expected[path])
        assert difference <= 1e-4 * np.linalg.norm(expected[path]), path


@pytest.mark.parametrize("kind", grid.KINDS)
def test_outside_of_jit(kind):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 32)), jnp.float32)
    sharding = NamedSharding(grid.mesh_of(kind), P(None, "x", "y"))
    (found,) = distributed_orthogonalize([jax.device_put(x, sharding)], [STACK])
    assert found.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(found, orthogonalize(x, STACK), atol=1e-5)
    whole = jax.device_put(x, NamedSharding(grid.mesh_of(kind), P()))
    (found,) = distributed_orthogonalize([whole], [STACK])
    assert found.sharding.is_fully_replicated
    np.testing.assert_allclose(found, orthogonalize(x, STACK), atol=1e-5)
