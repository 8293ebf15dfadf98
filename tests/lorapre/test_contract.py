"""Promises of every transformation here: injected numbers, odd trees, dtypes, meshes, lowering, batching."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_optax
from layout_optax import ParamLayout
from lorapre_optax import RECOMMENDED, STATIC_ARGS, _factors, _solves, lorapre_adamw
from lorapre_optax._rank import leaf_rank
from tests.lorapre.common import KERNEL, apart

MODEL = {
    "embed_tokens": {"embedding": (16, 8)},
    "layers": {
        "mlp": {"up_proj": {"kernel": (2, 8, 24)}},
        "query": {"kernel": (2, 8, 2, 12)},
        "norm": {"scale": (2, 8)},
    },
    "lm_head": {"kernel": (8, 16)},
}
ALIASES = {
    "adamw": functools.partial(lorapre_adamw, rank=2),
    "adamw, options": functools.partial(
        lorapre_adamw, rank=2, **(dict(RECOMMENDED) | {"initial_subspace": "gradient"})
    ),
    "muon": functools.partial(lorapre_optax.lorapre_muon, rank=2),
    "sgd": functools.partial(lorapre_optax.lorapre_sgd, rank=2, residual=0.9),
    "lion": functools.partial(lorapre_optax.lorapre_lion, rank=2, residual=0.9),
    "sinkgd": functools.partial(lorapre_optax.lorapre_sinkgd, rank=2, weight_decay=0.0),
}


def arrays(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return jax.tree.map(make, MODEL, is_leaf=lambda x: isinstance(x, tuple))


def test_injected_numbers_change_nothing_and_rank_must_be_static():
    factory = lorapre_adamw
    params, grads = arrays(), arrays(seed=1)
    plain = factory(1e-3, 2, residual=0.5)
    injected = optax.inject_hyperparams(factory, static_args=STATIC_ARGS)(1e-3, 2, residual=0.5)
    outs = []
    for tx in (plain, injected):
        state = jax.jit(tx.init)(params)
        outs.append(jax.jit(tx.update)(grads, state, params)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-9), *outs)
    with pytest.raises(TypeError, match="STATIC_ARGS"):
        optax.inject_hyperparams(factory)(1e-3, rank=2).init(params)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "sinkgd"])
def test_empty_leaves_masks_and_layout_trees(name):
    layout = {"a": ParamLayout("matrix", (1,), (0,)), "b": None, "c": optax.MaskedNode()}
    params = {"a": jnp.ones((12, 20)), "b": None, "c": jnp.ones(3), "d": optax.MaskedNode()}
    tx = ALIASES[name](1e-3, layout=layout | {"d": optax.MaskedNode()})
    state = jax.jit(tx.init)(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    assert updates["b"] is None
    assert isinstance(updates["d"], optax.MaskedNode)
    np.testing.assert_allclose(updates["c"], -1e-3, rtol=1e-5)
    assert all(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", [name for name in ALIASES if name != "adamw"])
def test_low_precision_gradients(name):
    dtype = "bfloat16" if name in ("muon", "lion") else "float16"
    params = arrays(dtype)
    tx = ALIASES[name](1e-3)
    state = jax.jit(tx.init)(params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state) if x.ndim)
    step = jax.jit(tx.update)
    updates, after = step(jax.tree.map(jnp.zeros_like, params), state, params)
    assert all(not np.any(x) for x in jax.tree.leaves(updates))  # no 0 / 0
    updates, after = step(arrays(dtype, 1), after, params)
    assert all(x.dtype == dtype for x in jax.tree.leaves(updates))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, after)))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.shape == b.shape, state, after)
    assert all(jax.tree.leaves(same))


def test_init_on_shapes():
    shapes = jax.eval_shape(arrays)
    for factory in ALIASES.values():
        tx = factory(1e-3)
        abstract = jax.eval_shape(tx.init, shapes)
        concrete = tx.init(shapes)
        assert jax.tree.map(jnp.shape, concrete) == jax.tree.map(lambda x: x.shape, abstract)


@pytest.mark.parametrize("name", ALIASES)
def test_sharded_equals_one_device(name):
    kind = AxisType.Auto if name in ("adamw", "sgd") else AxisType.Explicit
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {
        "embed_tokens": {"embedding": P("x", "y")},
        "layers": {
            "mlp": {"up_proj": {"kernel": P("x", None, "y")}},
            "query": {"kernel": P(None, "y", "x")},
            "norm": {"scale": P(None, "x")},
        },
        "lm_head": {"kernel": P("y", None)},
    }
    tx = ALIASES[name](1e-3)
    step = jax.jit(tx.update)
    params = arrays()
    reference, sharded = [jax.jit(tx.init)(params)], []
    place = lambda tree: jax.tree.map(  # noqa: E731
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )
    state, on_mesh = reference[0], tx.init(place(params))
    # The counts are scalars of no mesh at first, as in every optax state.
    types = lambda tree: [jax.typeof(x) for x in jax.tree.leaves(tree) if x.ndim]  # noqa: E731
    at_init = types(on_mesh)
    for seed in (1, 2):
        grads = arrays(seed=seed)
        expected, state = step(grads, state, params)
        found, on_mesh = step(place(grads), on_mesh, place(params))
        sharded.append((found, expected))
    assert types(on_mesh) == at_init
    for found, expected in sharded:
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert apart(a, np.asarray(b, np.float64)) < 1e-4
    # The factors keep their parameter's sharding with the rank replicated.
    shape, wanted = (2, 2, 24), {P("x", None, "y")}
    if name == "sinkgd":  # of the tables' rows: the embedding's and the head's
        shape, wanted = (2, 16), {P(None, "x"), P(None, None)}
    found = {x.sharding.spec for x in jax.tree.leaves(on_mesh) if x.shape == shape}
    assert found
    if kind == AxisType.Explicit:
        assert found == wanted


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_without_hardware(platform):
    shapes = jax.eval_shape(arrays)
    for name in set(ALIASES) - {"adamw"}:
        tx = ALIASES[name](1e-3)
        state = jax.eval_shape(tx.init, shapes)
        traced = jax.jit(tx.update).trace(shapes, state, shapes)
        assert traced.lower(lowering_platforms=(platform,)).as_text()


def galore_130m(layers):
    """Abstract parameters of GaLore's 130M model; ``layers`` None: 12 stacked."""
    lead = (12,) if layers is None else ()
    kernel = lambda *shape: {"kernel": (*lead, *shape)}  # noqa: E731
    attention = {name: kernel(768, 768) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    mlp = {"gate_proj": kernel(768, 2048), "up_proj": kernel(768, 2048)}
    block = {"self_attn": attention, "mlp": mlp | {"down_proj": kernel(2048, 768)}}
    stack = block if layers is None else {str(i): block for i in range(layers)}
    tree = {"layers": stack, "lm_head": {"kernel": (768, 32000)}}
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.mark.parametrize("layers", [None, 3], ids=["12 scanned", "3 unscanned"])
def test_few_cholesky_calls_solve_a_model(layers, monkeypatch):
    shapes = galore_130m(layers)

    def calls():
        tx = lorapre_adamw(1e-3, 256)
        traced = jax.jit(tx.update).trace(shapes, jax.eval_shape(tx.init, shapes), shapes)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.cholesky")

    # Matrices of two moments, two factors of 256 KiB each: 12 MiB for each of 7 stacks, 1 MiB for a layer.
    assert calls() == (4 if layers is None else 1)
    if layers is not None:
        monkeypatch.setattr(_solves, "GROUP_BYTES", 8 * 2**20)
        assert calls() == 3


def test_an_eager_init_compiles_the_hash_once_for_each_shape():
    params = {f"layer_{i}": {"q": {"kernel": jnp.ones((24, 40))}} for i in range(6)}
    before = _factors._hashed_normal._cache_size()
    lorapre_adamw(1e-3, 3).init(params)
    assert _factors._hashed_normal._cache_size() - before <= 1


def test_groups_return_each_inverse_to_its_place(monkeypatch):
    rng = np.random.default_rng(0)
    grams = []
    for shape in ((3, 3), (2, 5, 5), (3, 3), (2, 2, 3, 3), (5, 5)):
        x = rng.normal(size=(*shape[:-1], 9))
        grams.append(jnp.asarray(x @ x.swapaxes(-1, -2), jnp.float32))
    for limit in (1, 150, 2**20):
        monkeypatch.setattr(_solves, "GROUP_BYTES", limit)
        inverses = jax.jit(lambda grams: _solves.damped_inverses(grams, 1e-6))(grams)
        for gram, inverse in zip(grams, inverses, strict=True):
            identity = np.broadcast_to(np.eye(gram.shape[-1]), gram.shape)
            np.testing.assert_allclose(inverse @ gram, identity, atol=2e-3)


@jax.jit
def step_of(left, right, target, gamma=0.3, damping=1e-9):
    """B', A' of one matrix by the library's pure functions."""
    old = _factors.prepare(left, right, KERNEL, target.ndim, "relative")
    grams = [old.left_gram, old.right_gram]
    inverses = _solves.damped_inverses(grams, damping)
    return old, _factors.newton_step(target, old, *inverses, gamma, KERNEL, "relative")


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4))
def test_product_dynamics_fixed_point_and_balance(seed, rank):
    rng = np.random.default_rng(seed)
    g = 0.3
    with jax.enable_x64(True):
        B, A, G = (rng.normal(size=s) for s in ((9, rank), (rank, 6), (9, 6)))  # p = 9, q = 6
        left, right = jnp.asarray(1e-7 * B.T), jnp.asarray(1e5 * A)
        old, step = step_of(left, right, jnp.asarray(1e-2 * G.T), g)
        balanced = np.asarray(old.left).T @ np.asarray(old.right)
        new = np.asarray(step.left).T @ np.asarray(step.right)
        inside = balanced  # a target that the factors hold already
        fixed_old, fixed = step_of(left, right, jnp.asarray(inside.T), g)
        kept = np.asarray(fixed.left).T @ np.asarray(fixed.right)
        whole = jnp.asarray(inside.T)
        rest = whole + _factors.remembered(whole, fixed_old, fixed, 0, 1, KERNEL)
    np.testing.assert_array_equal(balanced, 1e-7 * B @ (1e5 * A))
    assert 0.5 <= np.abs(old.right).max() < 1
    G, BA = 1e-2 * G, balanced
    B_plus, A_plus = np.linalg.pinv(1e-7 * B), np.linalg.pinv(1e5 * A)
    P_B, P_A = 1e-7 * B @ B_plus, A_plus @ (1e5 * A)
    expected = (1 - g) ** 2 * BA + g * (1 - g) * (P_B @ G + G @ P_A)
    expected = expected + g**2 * G @ A_plus @ B_plus @ G
    assert apart(new, expected) < 1e-4
    assert apart(kept, BA) < 1e-6
    assert np.abs(rest).max() < 1e-5 * np.abs(BA).max()


@pytest.mark.parametrize("rank", [1, 8])
def test_a_constant_rank_one_gradient_is_learned_at_the_emas_pace(rank):
    rng = np.random.default_rng(0)
    g = jnp.asarray(np.outer(rng.normal(size=24), rng.normal(size=20)), jnp.float32)
    tx = lorapre_optax.low_rank_ema(0.9, rank, debias=False, full_rank_fallback=False)

    def step(state, _):
        _, state = tx.update(g, state)
        return state, _factors.reconstruct(state.left, state.right, KERNEL, g)

    products = jax.jit(lambda s: jax.lax.scan(step, s, length=120)[1])(tx.init(g))
    errors = [
        apart(product, (1 - 0.9**t) * np.asarray(g, np.float64))
        for t, product in enumerate(products, 1)
    ]
    assert errors[4] < 0.2
    assert max(errors[39:]) < 0.05
    assert errors[-1] < 2e-3


def test_ranks():
    shape = (64, 32)
    by_role = {"matrix": 8, "head": 0.5}
    by_path = {"q_proj": 4, "matrix": 8}
    assert leaf_rank(by_role, "mlp/kernel", KERNEL, shape) == 8
    assert leaf_rank(by_role, "x", ParamLayout("embedding", (0,), (1,)), shape) is None
    assert leaf_rank(by_path, "layers/q_proj/kernel", KERNEL, shape) == 4
    assert leaf_rank(lambda path, layout, shape: shape[0] // 8, "x", KERNEL, shape) == 8
    assert leaf_rank(21, "x", KERNEL, shape) == 21  # 21 * 96 < 64 * 32
    assert leaf_rank(22, "x", KERNEL, shape) is None
    assert leaf_rank(99, "x", KERNEL, shape, fallback=False) == 32
    assert leaf_rank(2, "x", ParamLayout("vector", (), (0,)), (7,)) is None
    for bad in (0, -3, 1.5, -0.1, 0.0):
        with pytest.raises(ValueError, match="'a/b'"):
            leaf_rank(bad, "a/b", KERNEL, shape)
    with pytest.raises(TypeError, match="static"):
        leaf_rank(jnp.array(3), "a/b", KERNEL, shape)


def test_bad_input():
    for options in (
        {"b1": 1.0},
        {"b2": -0.1},
        {"eps": -1.0},
        {"residual": 1.5},
        {"gamma1": 2.0},
        {"damping": -1.0},
        {"damping_kind": "other"},
        {"bias_correction": "none"},
        {"second_moment": "none"},
        {"initial_subspace": "zero"},
        {"weight_decay": -1.0},
        {"others": "sgd"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            lorapre_adamw(1e-3, 4, **options)
    with pytest.warns(UserWarning, match="vanishes in float32"):
        lorapre_adamw(1e-3, 4, b2=1 - 1e-8)
    for dtype in (jnp.int32, jnp.complex64):
        with pytest.raises(TypeError, match="'w/kernel'"):
            lorapre_optax.low_rank_ema(0.9, 2).init({"w": {"kernel": jnp.ones((8, 8), dtype)}})


def test_lapack_gets_one_matrix_at_a_time():
    # XLA:CPU's batched calls wait for its threads: two at once never returned on two cores.
    grams = [jnp.eye(5) * jnp.ones((7, 1, 1)), jnp.eye(5)]
    text = jax.jit(lambda grams: _solves.damped_inverses(grams, 1e-4)).lower(grams).as_text()
    calls = [line for line in text.splitlines() if "@lapack_spotrf" in line]
    assert len(calls) == 1
    assert "tensor<8x5x5xf32>" not in calls[0]
