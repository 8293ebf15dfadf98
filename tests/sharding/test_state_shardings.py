"""A sharding for every array of any optax state: on any mesh, for any tree, and with errors that name paths."""

from __future__ import annotations

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_optax
import sage_optax
from layout_optax import state_shardings, unboxed

KINDS = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "auto": (AxisType.Auto, AxisType.Auto),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}
PARAMS = {
    "embed": jax.ShapeDtypeStruct((64, 16), jnp.float32),
    "layers": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((3, 16, 32), jnp.bfloat16)}}},
    "norm": {"scale": jax.ShapeDtypeStruct((16,), jnp.float32)},
}
SPECS = {
    "embed": P("x", "y"),
    "layers": {"mlp": {"up": {"kernel": P(None, "x", "y")}}},
    "norm": {"scale": P("x")},
}


def mesh_of(kind="auto"):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=KINDS[kind])


def on(mesh, specs=SPECS):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def specs_of(tree):
    """The specs of a tree of shardings by path."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): s.spec for k, s in flat}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_context", [False, True])
def test_factors_and_statistics_are_projections(kind, in_context):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        low_rank = state_shardings(lorapre_optax.low_rank_ema(0.9, 4), PARAMS, on(mesh))
        sage = state_shardings(sage_optax.scale_by_sage(mu_dtype="int8"), PARAMS, on(mesh))
    found = specs_of(low_rank)
    assert found["count"] == P()
    assert found["left/layers/mlp/up/kernel"] == P(None, "x", "y")
    assert found["right/layers/mlp/up/kernel"] == P(None, "y", "x")
    assert found["left/embed"] == P("y", "x")
    assert found["right/embed"] == P("x", "y")
    assert found["full/norm/scale"] == P("x")
    found = specs_of(sage)
    assert found["mu/layers/mlp/up/kernel"] == P(None, "x", "y")
    assert found["magnitude/embed"] == P("y")
    assert found["mu_row_max/embed"] == P("x")
    assert found["magnitude/layers/mlp/up/kernel"] == P(None, "x")
    assert found["mu_row_max/layers/mlp/up/kernel"] == P(None, "y")
    assert found["mu_row_max/norm/scale"] == P()
    assert all(s.mesh == mesh for s in jax.tree.leaves((low_rank, sage)))


def test_any_chain_of_optax():
    mesh = mesh_of()
    inner = optax.partition(
        {"ours": optax.masked(optax.adafactor(1e-3, min_dim_size_to_factor=8), lambda tree: True)}
        | {"theirs": optax.inject_hyperparams(optax.adamw)(1e-3)},
        {"embed": "theirs", "layers": "ours", "norm": "theirs"},
    )
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), inner), 2)
    shardings = state_shardings(tx, PARAMS, on(mesh))
    found = specs_of(shardings)
    ends = lambda text: [spec for path, spec in found.items() if path.endswith(text)]  # noqa: E731
    assert ends("acc_grads/layers/mlp/up/kernel") == [P(None, "x", "y")]
    assert ends("v_row/layers/mlp/up/kernel") == [P(None, "x")]
    assert ends("v_col/layers/mlp/up/kernel") == [P(None, "y")]
    assert ends("mu/embed") == [P("x", "y")]
    assert ends("hyperparams/learning_rate") == [P()]
    structure = jax.tree.structure(jax.eval_shape(tx.init, PARAMS))
    assert jax.tree.structure(shardings) == structure  # masks among it


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_jitted_init_gives_these_shardings_and_each_device_its_share(kind):
    mesh = mesh_of(kind)
    params = jax.tree.map(
        lambda p, s: jax.device_put(jnp.ones(p.shape, p.dtype), s), PARAMS, on(mesh)
    )
    tx = optax.chain(
        optax.MultiSteps(
            sage_optax.sage_hybrid(1e-3, mu_dtype="int8"), 2
        ).gradient_transformation(),
        lorapre_optax.lorapre_muon(1e-3, rank=4, table_rank=4),
    )
    shardings = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    sharded = 0
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert array.sharding == sharding
        names = [part for part in sharding.spec if part is not None]
        shards = np.prod([mesh.shape[name] for name in names], dtype=int)
        sharded += shards > 1
        assert {s.data.nbytes for s in array.addressable_shards} == {array.nbytes // shards}
    assert sharded > 15


def test_what_params_may_be():
    mesh = mesh_of("explicit")
    tx = optax.masked(optax.adam(1e-3), {"a": True, "b": True, "c": True, "d": False})
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("x", "y")))
    params = {"a": shape, "b": None, "c": optax.MaskedNode(), "d": shape}
    state = state_shardings(tx, params)
    mu = state.inner_state[0].mu
    assert mu["a"] == NamedSharding(mesh, P("x", "y"))
    assert mu["b"] is None
    assert isinstance(mu["c"], optax.MaskedNode)
    assert isinstance(mu["d"], optax.MaskedNode)
    # A prefix tree; a scalar; a device-free mesh to plan with.
    plan = AbstractMesh((2, 4), ("x", "y"))
    params = {"a": {"one": jnp.ones((8, 8)), "two": np.ones((4, 4))}, "b": 1.0}
    given = {"a": NamedSharding(plan, P("x")), "b": NamedSharding(plan, P())}
    mu = state_shardings(optax.adam(1e-3), params, given)[0].mu
    assert [s.spec for s in jax.tree.leaves(mu)] == [P("x", None), P("x", None), P()]
    assert mu["a"]["one"].mesh == plan
    # Inside of jit, where a type carries the sharding.
    seen = []
    jax.jit(lambda p: seen.append(state_shardings(optax.adam(1e-3), p)[0].mu))(
        jax.device_put(jnp.ones((8, 4)), shape.sharding)
    )
    assert seen[0].spec == P("x", "y")


def test_nnx_and_linen():
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        kernel_init = nnx.with_partitioning(nnx.initializers.ones_init(), ("x", "y"))
        model = nnx.Linear(16, 32, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        params = nnx.state(model, nnx.Param)
        tx = unboxed(lorapre_optax.low_rank_ema(0.9, 4))
        shardings = state_shardings(tx, params, nnx.get_named_sharding(params, mesh))
    assert shardings.left["kernel"].get_value().spec == P("x", "y")
    assert shardings.right["kernel"].get_value().spec == P("y", "x")
    assert shardings.full["bias"].spec == P(None)

    kernel_init = nn.with_partitioning(nn.initializers.ones_init(), ("x", "y"))
    boxed = jax.eval_shape(
        nn.Dense(32, kernel_init=kernel_init).init, jax.random.key(0), jnp.ones((2, 16))
    )
    given = nn.get_sharding(boxed, mesh)  # has no boxes
    shardings = state_shardings(tx, boxed, given)
    assert shardings.right["params"]["kernel"].spec == P("y", "x")


def test_errors_name_the_path_and_the_fix():
    mesh = mesh_of()
    tx = optax.adam(1e-3)
    shape = jax.ShapeDtypeStruct((30, 16), jnp.float32)
    params = {"a": {"b": shape}}
    given = lambda spec: {"a": {"b": NamedSharding(mesh, spec)}}  # noqa: E731
    with pytest.raises(ValueError, match="no entry for 'a/b'"):
        state_shardings(tx, params, {"b": NamedSharding(mesh, P())})
    with pytest.raises(ValueError, match="sharding of 'a/b' is None"):
        state_shardings(tx, params, {"a": {"b": None}})
    with pytest.raises(TypeError, match=r"'a/b' is P.'x'.*NamedSharding"):
        state_shardings(tx, params, {"a": {"b": P("x")}})
    with pytest.raises(ValueError, match=r"axis 0 of 'a/b' has 30 entries.*8 devices"):
        state_shardings(tx, params, given(P(("x", "y"))))
    with pytest.raises(ValueError, match="names 3 axes, but 'a/b' has shape"):
        state_shardings(tx, params, given(P(None, None, None)))
    with pytest.raises(ValueError, match="'a/b' has no named sharding of its own"):
        state_shardings(tx, params)
    with pytest.raises(ValueError, match="'a/b' has no named sharding of its own"):
        jax.jit(lambda p: state_shardings(tx, {"a": {"b": p}}))(
            jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("x")))
        )
    with pytest.raises(ValueError, match="no parameters"):
        state_shardings(tx, {"a": None}, {})
    other = jax.make_mesh((4, 2), ("x", "y"), axis_types=KINDS["auto"])
    with pytest.raises(ValueError, match=r"'a' is on .* but 'b' on"):
        state_shardings(
            tx,
            {"a": shape, "b": shape},
            {"a": NamedSharding(mesh, P()), "b": NamedSharding(other, P())},
        )


def test_a_failing_init_says_where_it_was_evaluated():
    def init(params):
        return jnp.linalg.svd(params["w"])

    tx = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
    sharding = NamedSharding(mesh_of(), P("x", "y"))
    params = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
    with pytest.raises(Exception, match=r"(?i)shard") as caught:
        state_shardings(tx, params)
    assert "mesh of Explicit axes" in "".join(caught.value.__notes__)
