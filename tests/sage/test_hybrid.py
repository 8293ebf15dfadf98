"""The hybrids: golden trajectory, routing by role, rates, decay masks, wrappers and state bytes."""

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

from layout_optax import ParamLayout, infer_layout
from sage_optax import (
    STATIC_ARGS,
    SageState,
    lion_hybrid,
    sage_damper,
    sage_hybrid,
    scale_by_sage,
    scale_by_sinkhorn,
    sinkgd_hybrid,
)
from tests import reference
from tests.sage.common import SMALL, SOME_TREE, random_tree, run

HYBRIDS = [sage_hybrid, lion_hybrid, sinkgd_hybrid]
STACK = ParamLayout("matrix", -1, -2)

# Golden trajectory of the authors' released code


def test_golden_trajectory_in_torch_layout():
    check_golden(lambda names: [f"{name.replace('.', '/')}" for name in names], lambda i, x: x)


def test_golden_trajectory_in_flax_layout():
    leaf = {0: "embedding", 1: "kernel", 2: "kernel", 3: "scale"}

    def rename(names):
        return [
            f"{n.removesuffix('.weight').replace('.', '/')}/{leaf[i]}" for i, n in enumerate(names)
        ]

    check_golden(rename, lambda i, x: x.T if leaf[i] == "kernel" else x)


def check_golden(rename, turn):
    data = np.load("tests/golden/sage_hybrid.npz")
    meta = json.loads(str(data["meta"]))
    names = rename(meta["names"])
    b1, b2 = meta["betas"]
    tx = sage_hybrid(
        meta["lr"],
        b1 * b2,  # released order
        b2,
        meta["eps"],
        scale=meta["sinkhorn_scale"],
        iterations=meta["sinkhorn_iterations"],
        weight_decay=meta["weight_decay"],
    )
    params = {n: jnp.asarray(turn(i, data[f"params0_{i}"])) for i, n in enumerate(names)}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(len(data["grads_0"])):
        grads = {n: jnp.asarray(turn(i, data[f"grads_{i}"][t])) for i, n in enumerate(names)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i, n in enumerate(names):
            expected = turn(i, data[f"params_{i}"][t])
            error = np.linalg.norm(params[n] - expected) / np.linalg.norm(expected)
            assert error < 1e-6, (n, t)


# Directions by role


def directions(tx, params, steps=3):
    """Updates after some steps, without decay and at rate -1: the directions."""
    grads = [jax.tree.map(lambda x, k=k: x * (1 + k), params) for k in range(steps)]
    return run(tx, params, grads)[0], grads


def test_sage_hybrid_directions():
    params = random_tree(SMALL)
    found, grads = directions(sage_hybrid(-1.0, weight_decay=0.0), params)
    sage, _ = run(scale_by_sage(), params, grads)
    sinkhorn, _ = run(scale_by_sinkhorn(), params, grads)
    expected = dict(sage, up={"kernel": 10 * sinkhorn["up"]["kernel"]})
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def adam_directions(params, grads):
    def one(path, p):
        mu = nu = np.zeros(p.shape)
        direction = None
        for t, g in enumerate(grads, start=1):
            for key in path:
                g = g[key.key]
            direction, mu, nu = reference.adam_step(g, mu, nu, t)
        return jnp.asarray(direction, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, params)


def test_sinkgd_hybrid_directions():
    params = random_tree(SMALL)
    found, grads = directions(sinkgd_hybrid(-1.0, weight_decay=0.0, scale=2.0), params)
    sinkhorn, _ = run(scale_by_sinkhorn(), params, grads)
    expected = adam_directions(params, grads)
    expected["up"] = {"kernel": 2 * sinkhorn["up"]["kernel"]}
    chex.assert_trees_all_close(found, expected, rtol=2e-5)


def test_lion_hybrid_directions():
    params = random_tree(SMALL)
    found, grads = directions(lion_hybrid(-1.0, weight_decay=0.0), params)
    lion, _ = run(optax.scale_by_lion(0.9, 0.99), params, grads)
    sinkhorn, _ = run(scale_by_sinkhorn(), params, grads)
    expected = dict(lion, up={"kernel": 10 * sinkhorn["up"]["kernel"]})
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_head_rules():
    params = random_tree({"lm_head": SMALL["lm_head"]})
    options = {"learning_rate": -1.0, "weight_decay": 0.0, "scale": 2.0}
    found, grads = directions(lion_hybrid(**options, head_rule="matrix"), params)
    sinkhorn, _ = run(scale_by_sinkhorn(), params, grads)
    chex.assert_trees_all_close(found, jax.tree.map(lambda x: 2 * x, sinkhorn), rtol=1e-6)
    adam = adam_directions(params, grads)
    for hybrid, rule in [
        (sage_hybrid, "adamw"),
        (sinkgd_hybrid, "adamw"),
        (sinkgd_hybrid, "table"),
    ]:
        found, _ = directions(hybrid(**options, head_rule=rule), params)
        chex.assert_trees_all_close(found, adam, rtol=2e-5)
    for hybrid in HYBRIDS:
        with pytest.raises(ValueError, match=r"head_rule must be one of .*'matrix'.*got 'dense'"):
            hybrid(1e-3, head_rule="dense")


def test_vector_rule():
    params = random_tree({"norm": SMALL["norm"]})
    found, grads = directions(sage_hybrid(-1.0, weight_decay=0.0, vector_rule="adamw"), params)
    chex.assert_trees_all_close(found["norm"], adam_directions(params, grads)["norm"], rtol=2e-5)
    with pytest.raises(ValueError, match="vector_rule must be one of"):
        sage_hybrid(1e-3, vector_rule="lion")  # pyright: ignore[reportArgumentType]


def test_leaves_that_are_not_ours_get_adamw():
    params = random_tree({"odd": (2, 3, 4)})
    layout = functools.partial(infer_layout, rules=[("odd", None)])
    found, grads = directions(sage_hybrid(-1.0, weight_decay=0.0, layout=layout), params)
    chex.assert_trees_all_close(found["odd"], adam_directions(params, grads)["odd"], rtol=2e-5)
    with pytest.raises(ValueError, match="no rule explains 'odd'"):
        sage_hybrid(1e-3).init(params)


def test_layout_reaches_the_inner_transformations():
    params = {"odd": random_tree((2, 3, 4))}
    found, grads = directions(
        sage_hybrid(-1.0, weight_decay=0.0, scale=1.0, layout={"odd": STACK}), params
    )
    expected, _ = run(scale_by_sinkhorn(layout={"odd": STACK}), params, grads)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    one, _ = directions(sage_hybrid(-1.0, weight_decay=0.0, scale=1.0, layout=STACK), params)
    chex.assert_trees_all_close(one, expected, rtol=1e-6)


# Learning rates and decay


RATES = {"embedding": 0.1, "head": 0.2, "vector": 0.3, "matrix": 0.4}
LEAVES = {
    "embedding": lambda tree: tree["embed"],
    "head": lambda tree: tree["lm_head"]["kernel"],
    "vector": lambda tree: tree["norm"]["scale"],
    "matrix": lambda tree: tree["up"]["kernel"],
}


def rates_as(form):
    """Options that give each role its rate of `RATES`, on a base rate of one."""
    constant = optax.constant_schedule
    return {
        "rates": {f"{role}_learning_rate": rate for role, rate in RATES.items()},
        "schedules": {f"{role}_learning_rate": constant(rate) for role, rate in RATES.items()},
        "multipliers": {"learning_rate_multipliers": RATES},
        "scheduled multipliers": {
            "learning_rate": constant(1.0),
            "learning_rate_multipliers": RATES,
        },
    }[form]


@functools.cache
def updates_without_rates(hybrid):
    params = random_tree(SMALL)
    return run(hybrid(1.0, weight_decay=0.1), params, [params] * 2)[0]


@pytest.mark.parametrize(
    ("hybrid", "form"),
    [
        (sage_hybrid, "rates"),
        (sinkgd_hybrid, "rates"),
        (lion_hybrid, "rates"),
        (lion_hybrid, "schedules"),
        (lion_hybrid, "multipliers"),
        (lion_hybrid, "scheduled multipliers"),
    ],
)
def test_rates_by_role(hybrid, form):
    params = random_tree(SMALL)
    options = {"learning_rate": 1.0, "weight_decay": 0.1} | rates_as(form)
    found, _ = run(hybrid(**options), params, [params] * 2)
    for role, leaf in LEAVES.items():
        expected = RATES[role] * leaf(updates_without_rates(hybrid))
        np.testing.assert_allclose(leaf(found), expected, rtol=1e-6)


def test_only_the_named_role_changes():
    params = random_tree(SMALL)
    plain, _ = run(lion_hybrid(1e-3), params, [params])
    found, _ = run(lion_hybrid(1e-3, matrix_learning_rate=0.0), params, [params])
    assert not found["up"]["kernel"].any()
    chex.assert_trees_all_close(dict(found, up=None), dict(plain, up=None), rtol=1e-6)
    other, _ = run(lion_hybrid(1e-3, other_learning_rate=1.0), params, [params])
    chex.assert_trees_all_close(other, plain, rtol=1e-6)


def test_rate_schedules_advance():
    params = random_tree(SMALL)
    tx = lion_hybrid(1.0, matrix_learning_rate=lambda count: jnp.where(count == 2, 1.0, 0.0))
    moved, state, update = [], tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(params, state, params)
        moved.append(bool(updates["up"]["kernel"].any()))
    assert moved == [False, False, True, False]


def test_scale_comes_before_decay():
    params = random_tree(SMALL)
    tx = lambda scale, decay: lion_hybrid(1.0, scale=scale, weight_decay=decay)  # noqa: E731
    decayed, _ = run(tx(4.0, 0.1), params, [params])
    plain, _ = run(tx(1.0, 0.0), params, [params])
    kernel = lambda tree: tree["up"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(
        kernel(decayed), 4 * kernel(plain) - 0.1 * kernel(params), rtol=1e-5, atol=1e-7
    )
    scheduled, _ = run(tx(lambda count: 4.0, lambda count: 0.1), params, [params])
    chex.assert_trees_all_close(scheduled, decayed, rtol=1e-6)


@pytest.mark.parametrize("kind", ["tree", "callable"])
def test_weight_decay_mask(kind):
    params = random_tree(SMALL)
    select = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
    mask = select(params) if kind == "tree" else select
    masked, _ = run(lion_hybrid(1.0, weight_decay=0.5, weight_decay_mask=mask), params, [params])
    full, _ = run(lion_hybrid(1.0, weight_decay=0.5), params, [params])
    none, _ = run(lion_hybrid(1.0, weight_decay=0.0), params, [params])
    chex.assert_trees_all_close(masked, dict(full, norm=none["norm"]), rtol=1e-6)


def test_adam_schedules_equal_numbers():
    params = random_tree(SMALL)
    constant = optax.constant_schedule
    fixed = sinkgd_hybrid(1e-3, 0.8, 0.9, 1e-4)
    scheduled = sinkgd_hybrid(1e-3, constant(0.8), constant(0.9), constant(1e-4))
    a, _ = run(fixed, params, [params] * 3)
    b, _ = run(scheduled, params, [params] * 3)
    chex.assert_trees_all_close(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate_multipliers": {"dense": 2.0}}, "unknown role 'dense'.*'matrix'"),
        (
            {"learning_rate_multipliers": {"head": 2.0}, "head_learning_rate": 1.0},
            "head has both head_learning_rate and a multiplier",
        ),
        ({"variant": "sqr"}, "variant must be"),
        ({"iterations": 0}, "iterations"),
        ({"mu_dtype": "int16"}, "mu_dtype must be"),
    ],
)
@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_errors(hybrid, options, message):
    with pytest.raises(ValueError, match=message):
        hybrid(1e-3, **options)


def test_adam_has_no_int8():
    with pytest.raises(ValueError, match="no int8 form"):
        sinkgd_hybrid(1e-3, mu_dtype="int8")


# Trees and wrappers


@pytest.mark.parametrize("hybrid", [lion_hybrid, sinkgd_hybrid])
def test_empty_leaves_and_frozen_dicts(hybrid):
    params = dict(random_tree(SMALL), none=None, masked=optax.MaskedNode(), empty={})
    tx = hybrid(1e-3)
    updates, _ = run(tx, params, [params])
    chex.assert_trees_all_equal_structs(updates, params)
    for key in ("none", "masked", "empty"):
        del params[key]
    frozen = FrozenDict(params)
    again, _ = run(tx, frozen, [frozen])
    chex.assert_trees_all_equal_structs(again, frozen)
    chex.assert_trees_all_close(jax.tree.leaves(again), jax.tree.leaves(updates), rtol=1e-6)
    assert run(tx, {}, [{}])[0] == {}


@pytest.mark.parametrize("hybrid", [sage_hybrid, sinkgd_hybrid])
def test_nnx_optimizer(hybrid):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(6, 4, rngs=rngs)
            self.up = nnx.Linear(4, 5, rngs=rngs)
            self.norm = nnx.RMSNorm(5, rngs=rngs)

        def __call__(self, tokens):
            return self.norm(self.up(self.embed(tokens)))

    def loss(model):
        return jnp.sum(model(jnp.arange(6)) ** 3)

    model = Model(nnx.Rngs(0))
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = nnx.to_pure_dict(nnx.grad(loss)(model))
    optimizer = nnx.Optimizer(model, hybrid(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    step(model, optimizer)
    tx = hybrid(1e-2)
    updates, _ = tx.update(grads, tx.init(expected), expected)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        optax.apply_updates(expected, updates),
        rtol=1e-5,
    )


@pytest.mark.parametrize("hybrid", [sage_hybrid, sinkgd_hybrid])
def test_inject_hyperparams(hybrid):
    params = random_tree({"embed": (6, 4), "up": {"kernel": (4, 5)}})
    mask = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
    options = {
        "mu_dtype": jnp.float32,
        "weight_decay_mask": mask,
        "layout": infer_layout,
        "matrix_learning_rate": 2e-3,
        "iterations": 3,
    }
    injected = optax.inject_hyperparams(hybrid, static_args=STATIC_ARGS)(1e-3, **options)
    a, state = run(injected, params, [params] * 2)
    b, expected = run(hybrid(1e-3, **options), params, [params] * 2)
    chex.assert_trees_all_close(a, b, rtol=1e-5)
    chex.assert_trees_all_close(state.inner_state, expected, rtol=1e-4, atol=1e-8)
    injectable = {"learning_rate", "matrix_learning_rate", "scale", "iterations", "weight_decay"}
    assert injectable <= set(state.hyperparams)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = jax.jit(injected.update)(params, state, params)
    assert not updates["embed"].any()
    assert updates["up"]["kernel"].any()
    for name, value in (("mu_dtype", jnp.bfloat16), ("layout", infer_layout)):
        with pytest.raises(ValueError, match=f"{name} arrived as .* static_args=STATIC_ARGS"):
            optax.inject_hyperparams(hybrid)(1e-3, **{name: value}).init(params)
    with pytest.raises(
        ValueError, match=r"weight_decay_mask arrived as .* static_args=STATIC_ARGS"
    ):
        optax.inject_hyperparams(hybrid)(1e-3, weight_decay_mask=mask).init(params)


@pytest.mark.parametrize("hybrid", [sage_hybrid, sinkgd_hybrid])
def test_mixed_dtypes_are_kept_under_injection(hybrid):
    params = random_tree({"embed": (6, 4), "up": {"kernel": (4, 5)}})
    params["up"]["kernel"] = params["up"]["kernel"].astype(jnp.bfloat16)
    params["embed"] = params["embed"].astype(jnp.bfloat16)
    tx = optax.inject_hyperparams(hybrid, static_args=STATIC_ARGS)(1e-3, mu_dtype="float32")
    updates, _ = run(tx, params, [params])
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_tree_map_params():
    params = random_tree(SMALL)
    for hybrid in HYBRIDS:
        tx = hybrid(1e-3, matrix_learning_rate=1e-4)
        state = tx.init(params)
        doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
        momenta = optax.tree.get_all_with_path(doubled, "mu")
        assert momenta
        assert all((x == 1).all() for _, tree in momenta for x in jax.tree.leaves(tree))


def test_damper_from_the_hybrids_state():
    params = random_tree(SMALL)
    state = sage_hybrid(1e-3).init(params)
    inner = state[0].inner_states["embedding"].inner_state
    assert isinstance(inner, SageState)
    damping = sage_damper(params, inner)
    alone = sage_damper(params, scale_by_sage().init(params))
    np.testing.assert_array_equal(damping["embed"], alone["embed"])
    assert damping["norm"]["scale"] == optax.MaskedNode()


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_extra_arguments_are_ignored(hybrid):
    params = random_tree({"norm": SMALL["norm"]})
    tx = hybrid(1e-3, vector_learning_rate=1e-4)
    updates, _ = tx.update(params, tx.init(params), params, value=jnp.float32(1.0), unknown="x")
    chex.assert_trees_all_equal_structs(updates, params)


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_without_hardware(hybrid, platform):
    params = jax.eval_shape(lambda: random_tree(SOME_TREE, dtype="bfloat16"))
    tx = hybrid(1e-3)
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
def test_sharded_equals_one_device(axis_type):
    types = (getattr(jax.sharding.AxisType, axis_type),) * 2
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=types)
    params = random_tree({"embed": (8, 8), "up": {"kernel": (8, 16)}, "norm": {"scale": (8,)}})

    def place(x):
        spec = jax.sharding.PartitionSpec(*("x", "y")[-x.ndim :])
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    sharded = jax.tree.map(place, params)
    tx = sage_hybrid(1e-2)
    expected, _ = run(tx, params, [params] * 2)
    updates, state = run(tx, sharded, [sharded] * 2)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    embedding = state[0].inner_states["embedding"].inner_state
    assert embedding.mu["embed"].sharding.is_equivalent_to(sharded["embed"].sharding, 2)
    assert embedding.magnitude["embed"].sharding.spec == jax.sharding.PartitionSpec("y")


# State bytes


def llama_1_3b():
    """Shapes of the paper's 1.3B Llama: tied embedding, 24 scanned layers, 8 of 32 key heads."""
    d, layers, ffn, kv, vocabulary = 2048, 24, 5461, 512, 128256
    kernel = lambda n, m: {"kernel": (layers, n, m)}  # noqa: E731
    shapes = {
        "embed_tokens": {"embedding": (vocabulary, d)},
        "layers": {
            "q_proj": kernel(d, d),
            "k_proj": kernel(d, kv),
            "v_proj": kernel(d, kv),
            "o_proj": kernel(d, d),
            "gate_proj": kernel(d, ffn),
            "up_proj": kernel(d, ffn),
            "down_proj": kernel(ffn, d),
            "input_layernorm": {"scale": (layers, d)},
            "post_attention_layernorm": {"scale": (layers, d)},
        },
        "norm": {"scale": (d,)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def nbytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("tx", "gib"),
    [
        (optax.adamw(1e-3), 9.832),
        (optax.lion(1e-3), 4.916),
        (sinkgd_hybrid(1e-3), 1.958),
        (lion_hybrid(1e-3), 0.979),
        (sage_hybrid(1e-3), 0.979),
        (sage_hybrid(1e-3, mu_dtype="bfloat16"), 0.490),
        (sage_hybrid(1e-3, mu_dtype="int8"), 0.246),
        (sinkgd_hybrid(1e-3, table_rule="factored_rms"), 0.001),
    ],
    ids=[
        "adamw",
        "lion",
        "sinkgd_hybrid",
        "lion_hybrid",
        "sage_hybrid",
        "bfloat16",
        "int8",
        "factored",
    ],
)
def test_state_bytes_of_the_paper(tx, gib):
    params = llama_1_3b()
    assert nbytes(params) == 4 * 1_319_684_096
    assert round(nbytes(jax.eval_shape(tx.init, params)) / 2**30, 3) == gib


def test_state_is_one_momentum_of_tables_and_vectors():
    params = random_tree(SMALL)
    state = sage_hybrid(1e-3).init(params)
    tables_and_vectors = 6 * 4 + 4 * 6 + 4
    magnitudes = 4 + 4 + 4
    counters = 4  # embedding, head, vector, and Adam's for leaves that are not ours
    assert nbytes(state) == 4 * (tables_and_vectors + magnitudes + counters)
