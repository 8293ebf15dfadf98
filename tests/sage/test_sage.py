"""SAGE against golden vectors, a float64 reference, optax.lion and its own stated properties."""

import functools
import json
import math
import re
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from hypothesis.extra import numpy as hnp

from layout_optax import ParamLayout, infer_layout
from sage_optax import STATIC_ARGS, SageState, sage, sage_damper, scale_by_sage
from tests import reference
from tests.sage.common import LAYOUTS, SOME_TREE, random_gradients, random_tree, run

TABLE = ParamLayout("embedding", 0, 1)
TABLE_T = ParamLayout("embedding", 1, 0)
VECTOR = ParamLayout("vector", (), 0)
TOLERANCE = 1e-6  # shared/oracles/README.md


def relative_error(x, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(x, np.float64) - expected) / np.linalg.norm(expected)


# Golden vectors of the authors' released code


@pytest.mark.parametrize("transposed", [False, True], ids=["torch", "flax"])
@pytest.mark.parametrize(
    ("name", "tensors"), [("sage_pure", "012"), ("sage_hybrid", "03")], ids=["pure", "hybrid"]
)
def test_golden_released_order(name, tensors, transposed):
    data = np.load(f"tests/golden/{name}.npz")
    meta = json.loads(str(data["meta"]))
    turn = np.transpose if transposed else np.asarray
    table = TABLE_T if transposed else TABLE
    layout = {i: table if data[f"params0_{i}"].ndim == 2 else VECTOR for i in tensors}
    b1, b2 = meta["betas"]
    tx = sage(meta["lr"], b1 * b2, b2, weight_decay=meta["weight_decay"], layout=layout)
    params = {i: jnp.asarray(turn(data[f"params0_{i}"])) for i in tensors}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(len(data["grads_0"])):
        grads = {i: jnp.asarray(turn(data[f"grads_{i}"][t])) for i in tensors}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i in tensors:
            assert relative_error(turn(params[i]), data[f"params_{i}"][t]) < TOLERANCE


def test_paper_order_is_not_the_released_one():
    g = jnp.ones(1)
    steps = [g] * 40 + [-2.8 * g]
    m = 1 - 0.99**40  # signs turn at g = -9 m = -2.98 (paper), -8.17 m = -2.71 (released)
    assert 9 * m > 2.8 > 0.891 / 0.109 * m
    paper, _ = run(scale_by_sage(0.9, 0.99), g, steps)
    released, _ = run(scale_by_sage(0.9 * 0.99, 0.99), g, steps)
    assert (paper.item(), released.item()) == (1.0, -1.0)


# Float64 reference on every kind of layout


def check_reference(name, dtype, tolerance, relative=False, **options):
    layout, shape = LAYOUTS[name]
    gradients = random_gradients(shape, steps=6).astype(dtype)
    mode = "relative" if relative else "absolute"
    tx = scale_by_sage(layout=layout, eps_mode=mode, **options)
    logged = {k: v for k, v in options.items() if k != "b1"} | {"eps_mode": mode}

    @jax.jit
    def step(g, state):
        return sage_damper(g, state, layout=layout, **logged), *tx.update(g, state)

    matrices = reference.to_matrices(np.zeros(shape), layout)

    def whole(x):  # (batch, columns) to the parameter's shape
        return reference.from_matrices(np.broadcast_to(x[:, None], matrices.shape), layout, shape)

    mu, magnitude = np.zeros(shape), np.zeros((matrices.shape[0], matrices.shape[2]))
    scale = np.abs(gradients).max(axis=0)  # entries of m may cancel
    state = tx.init(jnp.zeros(shape, dtype))
    for t, g in enumerate(gradients, start=1):
        damping, updates, state = step(g, state)
        expected, mu, magnitude, expected_damping = reference.sage_step(
            g, mu, magnitude, t, layout, relative=relative, **options
        )
        rows = layout.row_axes
        close = functools.partial(np.testing.assert_allclose, rtol=tolerance)
        close(updates, expected)
        close(state.mu / scale, mu / scale, atol=tolerance / 100)
        close(np.broadcast_to(np.expand_dims(state.magnitude, rows), shape), whole(magnitude))
        close(np.broadcast_to(np.expand_dims(damping, rows), shape), whole(expected_damping))
        assert {updates.dtype, state.mu.dtype, state.magnitude.dtype} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", ["embedding", "head kernel", "layers on axis 1", "vector"])
def test_reference_float32(name):
    check_reference(name, np.float32, 1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_float64(name):
    with jax.enable_x64(True):
        check_reference(name, np.float64, 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"damper": "ema"},
        {"relative": True, "eps": 0.1},
        {"b1": 0.95, "b2": 0.98, "eps": 1e-4},
        {"b1": 0.0, "b2": 0.0},
    ],
    ids=str,
)
def test_reference_options(options):
    for name in ("layers on axis 1", "vector"):
        with jax.enable_x64(True):
            check_reference(name, np.float64, 1e-12, **options)


class SageVariants(chex.TestCase):
    """The same numbers with and without jit."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("both", "ema", None)
    def test_update(self, damper):
        layout, shape = LAYOUTS["output (heads, head_dim, d)"]
        tx = scale_by_sage(damper=damper, layout=layout)
        gradients = random_gradients(shape, steps=3).astype(np.float32)
        updates, state = run(tx, jnp.zeros(shape), gradients, self.variant(tx.update))
        mu, magnitude, expected = np.zeros(shape), np.zeros((1, 6)), None
        for t, g in enumerate(gradients, start=1):
            expected, mu, magnitude, _ = reference.sage_step(
                g, mu, magnitude, t, layout, damper=damper
            )
        chex.assert_trees_all_close(updates, jnp.asarray(expected, jnp.float32), rtol=1e-5)
        chex.assert_trees_all_close(state.mu, jnp.asarray(mu, jnp.float32), rtol=1e-5)
        assert int(state.count) == 3


# Properties of the specification, section 5

gradients_2d = hnp.arrays(
    np.float32,
    st.sampled_from([(3, 4, 3), (3, 1, 6)]),  # few shapes: each costs a compilation
    elements=st.floats(-4096, 4096, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32),
).map(lambda x: np.where(np.abs(x) < 1e-30, np.float32(0), x))  # products stay normal numbers


@functools.partial(jax.jit, static_argnames=("damper", "eps_mode"))
def step(g, state, damper="both", eps_mode="absolute"):
    """One step on a table: H and what the transformation returns."""
    tx = scale_by_sage(damper=damper, eps_mode=eps_mode, layout=TABLE)
    damping = None
    if damper is not None:
        damping = sage_damper(g, state, damper=damper, eps_mode=eps_mode, layout=TABLE)
    return damping, *tx.update(g, state)


@functools.cache
def compiled_sage(rate, decay, damper):
    return jax.jit(sage(rate, weight_decay=decay, damper=damper, layout=TABLE).update)


def damping_after(gradients, **options):
    """H of the last gradient, after steps with those before it."""
    state, damping = scale_by_sage(layout=TABLE).init(jnp.asarray(gradients[0])), None
    for g in gradients:
        damping, _, state = step(g, state, **options)
    return np.asarray(damping)


@hypothesis.given(gradients_2d, st.sampled_from(["both", "ema"]))
def test_damper_bounds(gradients, damper):
    eps, d = 1e-8, gradients.shape[-1]
    state = scale_by_sage(layout=TABLE).init(jnp.asarray(gradients[0]))
    for t, g in enumerate(gradients, start=1):
        damping, updates, state = step(g, state, damper=damper)
        damping = np.asarray(damping)
        assert np.all((damping >= 0) & (damping <= 1))
        assert np.all(np.abs(updates) <= damping)
        s = np.abs(g).mean(axis=0)
        corrected = np.asarray(state.magnitude) / (1 - np.float32(0.99) ** t)
        if damper == "both" and s.max() == 0:
            assert not damping.any()
        elif s.max() > 0:
            terms = [corrected, s] if damper == "both" else [corrected]
            bound = min(term.max() / (term.max() + eps) for term in terms) / np.sqrt(d)
            assert damping.min() >= bound * (1 - 1e-5)


@hypothesis.given(gradients_2d, st.sampled_from(["both", "ema", None]))
def test_step_is_at_most_the_learning_rate(gradients, damper):
    rate, decay = 1e-2, 0.1
    shape = gradients[0].shape
    params = jnp.asarray(np.linspace(-3, 3, gradients[0].size).reshape(shape), jnp.float32)
    tx = sage(rate, weight_decay=decay, damper=damper, layout=TABLE)
    state = tx.init(params)
    for g in gradients:
        updates, state = compiled_sage(rate, decay, damper)(g, state, params)
        moved = np.asarray(optax.apply_updates(params, updates))
        assert np.all(np.abs(moved - (1 - rate * decay) * params) <= rate * (1 + 1e-4))
        params = moved


@hypothesis.given(gradients_2d, st.randoms(use_true_random=False))
def test_damper_ignores_the_order_of_rows(gradients, random):
    order = list(range(gradients.shape[1]))
    random.shuffle(order)
    np.testing.assert_allclose(
        damping_after(gradients), damping_after(gradients[:, order]), rtol=1e-5
    )


@pytest.mark.full_codegen
@hypothesis.given(gradients_2d, st.integers(-20, 20))
def test_relative_damper_ignores_the_scale_exactly(gradients, power):
    np.testing.assert_array_equal(
        damping_after(gradients, eps_mode="relative"),
        damping_after(gradients * np.float32(2.0**power), eps_mode="relative"),
    )


@hypothesis.given(st.integers(0, 2**31), st.floats(1e-2, 1e2))
def test_absolute_damper_ignores_the_scale_far_above_eps(seed, factor):
    gradients = np.random.default_rng(seed).uniform(1, 2, (3, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(
        damping_after(gradients), damping_after(gradients * np.float32(factor)), rtol=1e-5
    )


@hypothesis.given(gradients_2d)
def test_first_step(gradients):
    g = gradients[0]
    state = scale_by_sage(layout=TABLE).init(jnp.asarray(g))
    both, updates, _ = step(g, state)
    ema, _, _ = step(g, state, damper="ema")
    np.testing.assert_allclose(both, ema, rtol=1e-5)
    np.testing.assert_array_equal(np.sign(updates), np.sign(g) * (np.asarray(both) > 0))


def test_absolute_eps_halves_the_damper_at_eps():
    g = jnp.full((6,), 1e-8)
    state = scale_by_sage().init(g)
    np.testing.assert_allclose(sage_damper(g, state), 0.5, rtol=1e-6)
    relative = sage_damper(g, state, eps_mode="relative")
    np.testing.assert_allclose(relative, 1.0, rtol=1e-6)


@pytest.mark.parametrize("eps_mode", ["absolute", "relative"])
@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e25, 1e37])
def test_extreme_magnitudes(eps_mode, size):
    g = jnp.array([[1.0, 2.0, 4.0]]) * size
    damping = sage_damper(g, scale_by_sage(layout=TABLE).init(g), eps_mode=eps_mode, layout=TABLE)
    offset = 1e-8 if eps_mode == "absolute" else 0.0
    s = np.asarray(g[0], np.float64)
    expected = np.minimum(np.sqrt(np.mean(s**2)) / (s + offset), 1)
    np.testing.assert_allclose(damping, expected, rtol=1e-5)


@pytest.mark.parametrize("eps_mode", ["absolute", "relative"])
def test_nothing_moves_without_a_gradient(eps_mode):
    g = jnp.array([1.0, -2.0])
    zero = jnp.zeros_like(g)
    updates, state = run(scale_by_sage(eps_mode=eps_mode), g, [g, zero])
    assert updates.tolist() == [0.0, 0.0]
    assert np.all(state.mu != 0)
    updates, _ = run(scale_by_sage(eps_mode=eps_mode, damper="ema"), g, [g, zero])
    assert np.all(updates != 0)


# Lion, bit for bit


@pytest.mark.full_codegen
@pytest.mark.parametrize(
    ("dtype", "mu_dtype", "jit"),
    [
        ("float32", None, True),
        ("float32", "bfloat16", True),
        ("bfloat16", None, True),
        ("bfloat16", "float32", True),
        ("float16", None, True),
        ("float32", None, False),
        ("bfloat16", None, False),
    ],
)
def test_without_damper_it_is_lion(dtype, mu_dtype, jit):
    shapes = {"kernel": (5, 6)}
    params = random_tree(shapes, dtype=dtype)
    pairs = [
        (scale_by_sage(mu_dtype=mu_dtype, damper=None), optax.scale_by_lion(mu_dtype=mu_dtype))
    ]
    if mu_dtype is None or mu_dtype == dtype:  # else optax widens the update, which ours does not
        options = {"mu_dtype": mu_dtype, "weight_decay": 0.1}
        pairs.append((sage(1e-3, damper=None, **options), optax.lion(1e-3, **options)))
    for pair in pairs:
        states = [tx.init(params) for tx in pair]
        updates = [jax.jit(tx.update) if jit else tx.update for tx in pair]
        for seed in range(4):
            grads = jax.tree.map(lambda x: x * 0.01, random_tree(shapes, seed, dtype))
            ours, theirs = (
                update(grads, state, params) for update, state in zip(updates, states, strict=True)
            )
            states = [ours[1], theirs[1]]
            assert {x.dtype for x in jax.tree.leaves(ours[0])} == {jnp.dtype(dtype)}
            chex.assert_trees_all_equal(ours[0], jax.tree.map(lambda x: x.astype(dtype), theirs[0]))
            # The momenta, leaf by leaf: the states are different NamedTuples.
            for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


# dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("mu_dtype", "damper"),
    [(None, "both"), ("bfloat16", "ema"), ("int8", None)],
)
def test_dtypes_are_kept(dtype, mu_dtype, damper):
    with jax.enable_x64(dtype == "float64"):
        params = random_tree({"kernel": (2, 3)}, dtype=dtype)
        tx = scale_by_sage(mu_dtype=mu_dtype, damper=damper)
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        wide = "float64" if dtype == "float64" else "float32"
        assert {x.dtype for x in jax.tree.leaves(state.magnitude)} <= {jnp.dtype(wide)}
        assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(mu_dtype or dtype)}
        chex.assert_tree_all_finite(updates)


def test_zero_float16_gradients_are_finite():
    params = random_tree({"kernel": (2, 3), "scale": (4,)}, dtype="float16")
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = run(scale_by_sage(), params, [zeros] * 3)
    chex.assert_trees_all_equal(updates, zeros)
    chex.assert_tree_all_finite(state)


def test_magnitude_shapes():
    state = scale_by_sage(mu_dtype="int8").init(random_tree(SOME_TREE))
    shapes = jax.tree.map(jnp.shape, state)
    assert shapes.magnitude == {
        "embed_tokens": {"embedding": (6,)},
        "layers": {"norm": {"scale": (3, 6)}, "mlp": {"up": {"kernel": (3, 6)}}},
        "lm_head": {"kernel": (6,)},
    }
    assert shapes.mu_row_max == {
        "embed_tokens": {"embedding": (10,)},
        "layers": {"norm": {"scale": (3,)}, "mlp": {"up": {"kernel": (3, 8)}}},
        "lm_head": {"kernel": (10,)},
    }


def test_stacked_vectors_are_separate_vectors():
    stack = jnp.array([[1.0, 2.0, 3.0], [100.0, 100.0, 400.0]])
    updates, _ = run(scale_by_sage(), {"layers": {"scale": stack}}, [{"layers": {"scale": stack}}])
    for i, row in enumerate(stack):
        alone, _ = run(scale_by_sage(), {"scale": row}, [{"scale": row}])
        np.testing.assert_array_equal(updates["layers"]["scale"][i], alone["scale"])


# Trees, wrappers, options


def test_empty_leaves_are_kept():
    params = {"kernel": jnp.ones((2, 3)), "bias": None, "rest": optax.MaskedNode()}
    tx = scale_by_sage(mu_dtype="int8")
    updates, state = run(tx, params, [params])
    trees: list[Any] = [updates, *state[1:]]
    for tree in trees:
        assert tree["bias"] is None
        assert tree["rest"] == optax.MaskedNode()
        assert tree["kernel"].size
    assert run(tx, {}, [{}])[0] == {}


def test_leaves_that_are_not_ours_pass_through():
    params = {"a": jnp.ones((2, 3)), "b": jnp.full((2, 3), 7.0)}
    layout = {"a": TABLE, "b": optax.MaskedNode()}
    updates, state = run(scale_by_sage(layout=layout), params, [params])
    chex.assert_trees_all_equal(updates, {"a": jnp.ones((2, 3)), "b": jnp.full((2, 3), 7.0)})
    assert state.mu["b"] == state.magnitude["b"] == optax.MaskedNode()
    damping = sage_damper(params, state, layout={"a": TABLE, "b": TABLE})
    assert damping["b"] == optax.MaskedNode()


def test_layout_tree_inside_partition_and_masked():
    params = random_tree({"a": (2, 3), "b": (2, 3), "c": (4,)})
    layout = {"a": TABLE, "b": TABLE_T, "c": VECTOR}
    labels = {"a": "sgd", "b": "sage", "c": "sage"}
    wrapped = optax.partition(
        {"sgd": optax.identity(), "sage": scale_by_sage(layout=layout)}, labels
    )
    masked = optax.masked(scale_by_sage(layout=layout), {k: v == "sage" for k, v in labels.items()})
    plain, _ = run(scale_by_sage(layout=layout), params, [params])
    for tx in (wrapped, masked):
        updates, _ = run(tx, params, [params])
        chex.assert_trees_all_equal(updates, plain | {"a": params["a"]})


def test_layout_may_be_a_callable_or_rules():
    params = {"odd": jnp.ones((2, 3, 4))}
    with pytest.raises(ValueError, match="odd"):
        scale_by_sage().init(params)
    state = scale_by_sage(
        layout=lambda tree: infer_layout(tree, rules=[("odd", ParamLayout("matrix", -1, -2))])
    ).init(params)
    assert state.magnitude["odd"].shape == (2, 3)


def test_tree_map_params():
    params = random_tree(SOME_TREE)
    tx = sage(1e-3, mu_dtype="int8")
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda x: "param", state, transform_non_params=lambda x: 0)
    assert set(jax.tree.leaves(marked[0][1:])) == {"param"}
    assert marked[0].count == 0


def test_init_on_shapes():
    params = random_tree(SOME_TREE)
    tx = scale_by_sage(mu_dtype="int8")
    shapes = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(params))


def test_nan_is_contained_by_apply_if_finite():
    g = {"scale": jnp.array([1.0, 2.0])}
    tx = optax.apply_if_finite(sage(1e-3, mu_dtype="int8"), 3)
    _, state = tx.update(g, tx.init(g), g)
    updates, after = tx.update({"scale": jnp.array([1.0, jnp.nan])}, state, g)
    assert updates["scale"].tolist() == [0.0, 0.0]
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_nan_is_not_hidden():
    updates, state = run(
        scale_by_sage(layout=TABLE), jnp.ones((2, 2)), [jnp.array([[1, jnp.nan], [1, 1]])]
    )
    assert np.isnan(updates).all()
    assert np.isnan(state.magnitude).tolist() == [False, True]


def test_schedules_equal_numbers():
    params = random_tree({"kernel": (2, 3)})
    fixed = sage(1e-3, 0.8, 0.9, 1e-3, weight_decay=0.1)
    constant = optax.constant_schedule
    scheduled = sage(
        constant(1e-3), constant(0.8), constant(0.9), constant(1e-3), weight_decay=constant(0.1)
    )
    a, _ = run(fixed, params, [params] * 3)
    b, _ = run(scheduled, params, [params] * 3)
    chex.assert_trees_all_close(a, b, rtol=1e-6)
    ramp = scale_by_sage(b1=lambda count: jnp.where(count == 0, 0.9, 0.0))
    g = jnp.array([1.0])
    # With b1 = 0 from the second step on, the sign follows the gradient at once.
    assert run(ramp, g, [100 * g, -g])[0][0] < 0
    assert run(scale_by_sage(), g, [100 * g, -g])[0][0] > 0


def test_inject_hyperparams():
    params = random_tree({"kernel": (2, 3), "scale": (4,)})
    injected = optax.inject_hyperparams(sage, static_args=STATIC_ARGS)(
        1e-3,
        weight_decay_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        mu_dtype=jnp.float32,
    )
    plain = sage(
        1e-3,
        weight_decay_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        mu_dtype=jnp.float32,
    )
    a, state = run(injected, params, [params] * 2, jax.jit(injected.update))
    b, expected = run(plain, params, [params] * 2)
    chex.assert_trees_all_close(a, b, rtol=1e-6)
    chex.assert_trees_all_close(state.inner_state, expected, rtol=1e-5, atol=1e-8)
    assert {"b1", "b2", "eps", "learning_rate", "weight_decay"} == set(state.hyperparams)
    for option in (
        {"mu_dtype": jnp.bfloat16},
        {"layout": functools.partial(infer_layout, rules=[("x", "matrix")])},
        {"weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p)},
    ):
        with pytest.raises(ValueError, match=r"arrived as .*pass static_args=STATIC_ARGS"):
            optax.inject_hyperparams(sage)(1e-3, **option).init(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"damper": "instant"}, "damper must be 'both', 'ema' or None, got 'instant'"),
        ({"eps_mode": "rel"}, "eps_mode must be 'absolute' or 'relative', got 'rel'"),
        ({"mu_dtype": jnp.int16}, "mu_dtype must be None, a float dtype or int8"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_sage(**options)


def test_damper_needs_a_magnitude():
    g = jnp.ones(2)
    with pytest.raises(ValueError, match="keeps no magnitude"):
        sage_damper(g, scale_by_sage(damper=None).init(g))


def test_state_is_the_documented_one():
    state = scale_by_sage().init({"scale": jnp.ones(3)})
    assert isinstance(state, SageState)
    assert state._fields == ("count", "mu", "magnitude", "mu_row_max")
    assert state.mu_row_max is None
    assert state.count.dtype == jnp.int32


def test_extra_arguments_are_ignored():
    g = jnp.ones(2)
    tx = scale_by_sage()
    updates, _ = tx.update(g, tx.init(g), None, value=1.0, unknown="x")
    assert updates.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("mu_dtype", [None, "int8"])
def test_lowers_without_hardware(platform, mu_dtype):
    params = jax.eval_shape(lambda: random_tree(SOME_TREE, dtype="bfloat16"))
    tx = sage(1e-3, mu_dtype=mu_dtype)
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.full_codegen
@pytest.mark.parametrize(("axis_type", "mu_dtype"), [("Explicit", "int8"), ("Auto", None)])
def test_only_statistics_are_communicated(axis_type, mu_dtype):
    types = (getattr(jax.sharding.AxisType, axis_type),) * 2
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=types)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    rows, columns = 128, 64
    g = {"embed": jax.device_put(jnp.ones((rows, columns)), sharding)}
    tx = scale_by_sage(mu_dtype=mu_dtype)
    text = jax.jit(tx.update).lower(g, tx.init(g)).compile().as_text()
    lines = re.findall(
        r"= (.*) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        text,
    )
    moved = sum(
        math.prod(int(n) for n in shape.split(",") if n)
        for line in lines
        for shape in re.findall(r"\w+\[([\d,]*)\]", line)
    )
    # Sums of |g| for the columns of a shard, row maxima in int8, and a few scalars.
    assert 0 < moved <= columns // 4 + (rows // 2 if mu_dtype else 0) + 16
