"""SinkGD against golden vectors, a float64 plain loop, its fixed point and its own stated properties."""

import functools
import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layout_optax import ParamLayout
from sage_optax import scale_by_sinkhorn, sinkgd
from tests import reference
from tests.sage.common import LAYOUTS, SOME_TREE, random_tree, run

WEIGHT = ParamLayout("matrix", 0, 1)
KERNEL = ParamLayout("matrix", 1, 0)
TOLERANCE = 1e-6
SETTINGS = {
    "unit": {},
    "sqrt": {"variant": "sqrt"},
    "one sweep": {"iterations": 1},
    "many sweeps": {"iterations": 12, "variant": "sqrt"},
    "large eps": {"eps": 1e-2, "variant": "sqrt"},
    "tiny eps": {"eps": 1e-20},
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@functools.cache
def compiled(layout, variant="unit"):
    """A jitted update of one leaf; iterations and eps are traced, so it compiles once a shape."""

    def update(g, iterations, eps):
        return scale_by_sinkhorn(iterations, eps, variant=variant, layout=layout).update(g, ())[0]

    return jax.jit(update)


def direction(g, layout=WEIGHT, *, iterations=5, eps=1e-8, variant="unit"):
    return compiled(layout, variant)(g, iterations, eps)


def check(g, layout=WEIGHT, tolerance=TOLERANCE, dtype=np.float32, **options):
    """Compares with the plain loop as a whole and entry by entry."""
    g = np.asarray(g, dtype)
    g[np.abs(g) < np.finfo(dtype).tiny] = 0  # XLA flushes them, NumPy does not
    found = np.asarray(direction(jnp.asarray(g), layout, **options), np.float64)
    expected = reference.sinkhorn(g, layout, **options)
    error = np.abs(found - expected)
    assert np.linalg.norm(error) <= tolerance * np.linalg.norm(expected)
    # Entries that underflow in float32 have no relative error to speak of.
    smallest = np.finfo(dtype).tiny * 1e6
    assert np.all(error <= tolerance * np.abs(expected) + smallest)


# Golden vectors of the authors' released code


def golden_error(name, tensors, tx, turn):
    """The largest relative error of the parameters over a golden trajectory."""
    data = np.load(f"tests/golden/{name}.npz")
    params = {i: jnp.asarray(turn(data[f"params0_{i}"])) for i in tensors}
    state, update, errors = tx.init(params), jax.jit(tx.update), []
    for t in range(len(data[f"grads_{tensors[0]}"])):
        grads = {i: jnp.asarray(turn(data[f"grads_{i}"][t])) for i in tensors}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i in tensors:
            difference = turn(np.asarray(params[i], np.float64)) - data[f"params_{i}"][t]
            errors.append(np.linalg.norm(difference) / np.linalg.norm(data[f"params_{i}"][t]))
    return max(errors)


def golden_optimizer(name, layout):
    meta = json.loads(str(np.load(f"tests/golden/{name}.npz")["meta"]))
    scaling = (
        {"variant": "sqrt", "scale": meta["alpha"]}
        if name == "sinkgd"
        else {"variant": "unit", "scale": meta["sinkhorn_scale"]}
    )
    return sinkgd(
        meta["lr"],
        iterations=meta["sinkhorn_iterations"],
        eps=meta["eps"],
        weight_decay=meta["weight_decay"],
        layout=layout,
        **scaling,
    )


@pytest.mark.parametrize(
    ("turn", "layout"), [(np.asarray, WEIGHT), (np.transpose, KERNEL)], ids=["torch", "flax"]
)
@pytest.mark.parametrize(("name", "tensors"), [("sinkgd", "01"), ("sage_hybrid", "12")])
def test_golden(name, tensors, turn, layout):
    assert golden_error(name, tensors, golden_optimizer(name, layout), turn) < TOLERANCE


def test_golden_vectors_tell_the_order_of_rows_and_columns():
    wrong = golden_error("sinkgd", "01", golden_optimizer("sinkgd", KERNEL), np.asarray)
    assert 0.01 < wrong < 0.05


# Against the float64 plain loop


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("variant", ["unit", "sqrt"])
def test_reference_on_every_layout(name, variant):
    layout, shape = LAYOUTS[name]
    check(normal(*shape), layout, variant=variant)


@pytest.mark.parametrize("settings", SETTINGS)
def test_reference_with_settings(settings):
    check(normal(24, 40), **SETTINGS[settings])
    check(normal(40, 24), KERNEL, **SETTINGS[settings])


def with_rows(*changes, shape=(24, 40)):
    """A normal matrix with factors on some indices."""
    x = normal(*shape)
    for index, factor in changes:
        x[index] *= factor
    return x


ALL = slice(None)
BLOCKS = np.kron(np.eye(2), np.ones((12, 20)))
EXTREMES = {
    "zero row": with_rows((3, 0)),
    "zero column": with_rows(((ALL, 3), 0)),
    "zero rows and columns": with_rows((slice(4), 0), ((ALL, slice(30)), 0)),
    "zeros": np.zeros((24, 40)),
    "one entry": np.pad([[-3.0]], ((2, 5), (4, 1))),
    "row at 1e+25": with_rows((3, 1e25)),
    "row at 1e-25": with_rows((3, 1e-25)),
    "column at 1e+25": with_rows(((ALL, 3), 1e25)),
    "column at 1e-25": with_rows(((ALL, 3), 1e-25)),
    "row up, column down": with_rows((3, 1e25), ((ALL, 5), 1e-25)),
    "rows up and down": with_rows((3, 1e25), (4, 1e-25), (5, 0)),
    "columns up and down": with_rows(((ALL, 3), 1e25), ((ALL, 4), 1e-25), ((ALL, 5), 0)),
    "all at 1e+30": with_rows((ALL, 1e30)),
    "all at 1e-30": with_rows((ALL, 1e-30)),
    "all at 1e-36": with_rows((ALL, 1e-36)),
    "all at 1e+37": with_rows((ALL, 1e37)),
    "blocks at 1 and 1e-30": normal(24, 40)
    * BLOCKS
    * np.where(np.arange(24) < 12, 1, 1e-30)[:, None],
    "every size": normal(24, 40) * np.exp(60 * np.tanh(normal(24, 40, seed=1))),
    "rows and columns of every size": normal(24, 40)
    * np.exp(12 * normal(24, 1, seed=1))
    * np.exp(12 * normal(1, 40, seed=2)),
    "triangular": np.triu(normal(24, 40)),
    "mostly zero rows": normal(24, 40) * (np.arange(24) % 12 == 0)[:, None],
    "sparse": normal(24, 40) * (normal(24, 40, seed=1) > 1.5),
    "one row": normal(1, 40),
    "one column": normal(40, 1),
    "one column at 1e-30": 1e-30 * normal(40, 1),
    "one number": np.ones((1, 1)),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_reference_on_extremes(name):
    for settings in SETTINGS.values():
        check(EXTREMES[name], **settings)
    check(EXTREMES[name].T, KERNEL, iterations=25)


@pytest.mark.parametrize("name", ["all at 1e-36", "column at 1e-25", "zeros", "sparse"])
def test_no_eps_at_all(name):
    g = jnp.asarray(EXTREMES[name], jnp.float32)
    used = np.any(np.asarray(g) != 0, axis=0)
    for variant, norm in (("unit", 1.0), ("sqrt", g.shape[0] ** 0.5)):
        found = direction(g, eps=0.0, variant=variant)
        np.testing.assert_allclose(np.linalg.norm(found, axis=0), used * norm, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "variant"),
    [("query (d, heads, head_dim)", "unit"), ("layers on axis 1", "sqrt"), ("vector", "sqrt")],
)
def test_reference_in_float64(name, variant):
    layout, shape = LAYOUTS[name]
    with jax.enable_x64(True):
        check(normal(*shape), layout, 1e-12, np.float64, variant=variant)


@pytest.mark.parametrize("name", [name for name in EXTREMES if EXTREMES[name].shape == (24, 40)])
def test_reference_on_extremes_in_float64(name):
    with jax.enable_x64(True):
        for settings in ({}, {"variant": "sqrt", "iterations": 12}):
            check(EXTREMES[name], tolerance=1e-12, dtype=np.float64, **settings)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_narrow_gradients_are_normalised_in_float32(dtype, size):
    g = jnp.asarray(size * normal(24, 40), dtype)
    found = direction(g, variant="sqrt")
    assert found.dtype == dtype
    expected = reference.sinkhorn(g.astype(jnp.float32), WEIGHT, variant="sqrt")
    np.testing.assert_array_equal(
        found, direction(g.astype(jnp.float32), variant="sqrt").astype(dtype)
    )
    rounding = float(jnp.finfo(dtype).eps) / 2 + TOLERANCE
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rounding)


# Properties. Rows and columns at the fixed point, and what the direction does not depend on


SEEDS = st.integers(0, 2**31)
SHAPES = st.sampled_from([(8, 12), (12, 8), (12, 1)])


@hypothesis.settings(max_examples=6)
@hypothesis.given(SEEDS, SHAPES)
def test_norms_at_the_fixed_point(seed, shape):
    g = jnp.asarray(normal(*shape, seed=seed), jnp.float32)
    n_rows, n_columns = shape
    for variant, gain in (("unit", 1), ("sqrt", n_rows**0.5)):
        x = np.asarray(direction(g, iterations=300, variant=variant)) / gain
        np.testing.assert_allclose(np.linalg.norm(x, axis=0), 1, rtol=1e-5)
        np.testing.assert_allclose(
            np.linalg.norm(x, axis=1), (n_columns / n_rows) ** 0.5, rtol=1e-3
        )


@hypothesis.given(SEEDS, SHAPES, st.integers(1, 6))
def test_columns_come_last_so_the_frobenius_norm_is_theirs(seed, shape, iterations):
    g = jnp.asarray(normal(*shape, seed=seed), jnp.float32)
    x = direction(g, iterations=iterations)
    np.testing.assert_allclose(np.linalg.norm(x, axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(x), shape[1] ** 0.5, rtol=1e-5)
    np.testing.assert_array_equal(np.sign(x), np.sign(g))


@hypothesis.given(SEEDS, SHAPES, st.integers(1, 6))
def test_sqrt_variant_is_a_multiple_of_the_unit_variant(seed, shape, iterations):
    g = jnp.asarray(normal(*shape, seed=seed), jnp.float32)
    unit = direction(g, iterations=iterations, eps=1e-20)
    sqrt = direction(g, iterations=iterations, eps=1e-20, variant="sqrt")
    np.testing.assert_allclose(sqrt, shape[0] ** 0.5 * np.asarray(unit), rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(sqrt))), 1, rtol=1e-5)


@hypothesis.given(SEEDS, SHAPES, st.integers(-100, 100))
def test_a_power_of_two_changes_nothing_without_eps(seed, shape, power):
    g = jnp.asarray(normal(*shape, seed=seed), jnp.float32)
    np.testing.assert_array_equal(direction(g * 2.0**power, eps=0.0), direction(g, eps=0.0))


@hypothesis.given(SEEDS, SHAPES, st.floats(1e-3, 1e3))
def test_scaling_the_gradient_far_above_eps(seed, shape, factor):
    g = jnp.asarray(normal(*shape, seed=seed), jnp.float32)
    np.testing.assert_allclose(direction(factor * g), direction(g), rtol=1e-4)


@hypothesis.given(SEEDS, st.sampled_from([(8, 12), (12, 8)]))
def test_scaling_rows_and_columns_in_the_limit(seed, shape):
    # Bounded away from 0, so that the loop converges geometrically.
    g = jnp.asarray(1.5 + np.tanh(normal(*shape, seed=seed)), jnp.float32)
    left = jnp.asarray(np.exp(3 * normal(shape[0], 1, seed=seed + 1)), jnp.float32)
    right = jnp.asarray(np.exp(3 * normal(1, shape[1], seed=seed + 2)), jnp.float32)
    x = direction(g, iterations=100)
    np.testing.assert_allclose(direction(left * g * right, iterations=100), x, rtol=1e-4)


@hypothesis.given(SEEDS)
def test_scaling_rows_alone_is_undone_by_the_first_half_step(seed):
    g = jnp.asarray(normal(8, 12, seed=seed), jnp.float32)
    left = jnp.asarray(np.exp(3 * normal(8, 1, seed=seed + 1)), jnp.float32)
    np.testing.assert_allclose(direction(left * g), direction(g), rtol=1e-4)


@pytest.mark.parametrize("variant", ["unit", "sqrt"])
@pytest.mark.parametrize("name", ["vector", "stacked norm", "bias (heads, head_dim)", "scalar"])
def test_a_vector_moves_along_its_sign(name, variant):
    layout, shape = LAYOUTS[name]
    g = jnp.asarray(1 + np.abs(normal(*shape)), jnp.float32) * jnp.asarray(np.sign(normal(*shape)))
    g = g.astype(jnp.float32)
    np.testing.assert_allclose(direction(g, layout, variant=variant), jnp.sign(g), rtol=1e-6)


# Trees, wrappers, dtypes


def test_scanned_equals_unscanned():
    stack = jnp.asarray(normal(3, 8, 12), jnp.float32)
    update = jax.jit(scale_by_sinkhorn().update)
    scanned, _ = update({"layers": {"kernel": stack}}, optax.EmptyState())
    unscanned, _ = update({"layers": [{"kernel": g} for g in stack]}, optax.EmptyState())
    for i, layer in enumerate(unscanned["layers"]):
        np.testing.assert_allclose(scanned["layers"]["kernel"][i], layer["kernel"], rtol=1e-6)
    second_axis = direction(stack.swapaxes(0, 1), ParamLayout("matrix", 2, 0)).swapaxes(0, 1)
    np.testing.assert_allclose(second_axis, scanned["layers"]["kernel"], rtol=1e-6)


def test_leaves_that_are_not_ours_pass_through():
    g = {"kernel": jnp.ones((4, 3)), "other": jnp.full((4, 3), 7.0), "none": None}
    g["masked"] = optax.MaskedNode()
    layout = {"kernel": KERNEL, "other": optax.MaskedNode(), "none": None, "masked": None}
    tx = scale_by_sinkhorn(layout=layout)
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    assert updates["none"] is None
    assert updates["masked"] == optax.MaskedNode()
    np.testing.assert_array_equal(updates["other"], g["other"])
    np.testing.assert_allclose(updates["kernel"], 3**-0.5, rtol=1e-6)
    assert state == optax.EmptyState()


def test_layout_tree_inside_partition():
    params = random_tree({"a": (4, 6), "b": (4, 6)})
    inner = scale_by_sinkhorn(layout={"a": WEIGHT, "b": KERNEL})
    tx = optax.partition({"ours": inner, "not": optax.identity()}, {"a": "ours", "b": "not"})
    updates, _ = run(tx, params, [params])
    np.testing.assert_allclose(updates["a"], direction(params["a"]), rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], params["b"])


def test_an_unexplained_leaf_is_an_error_at_init():
    with pytest.raises(ValueError, match="mystery"):
        scale_by_sinkhorn().init({"mystery": jnp.ones((2, 3, 4, 5))})


def test_init_on_shapes_allocates_nothing():
    shapes = {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    assert jax.tree.leaves(sinkgd(0.02).init(shapes)) == []


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
    params = random_tree(SOME_TREE, dtype=dtype)
    tx = sinkgd(0.02, weight_decay=0.1)
    updates, _ = run(tx, params, [params] * 2, update=jax.jit(tx.update))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))


def test_scale_comes_before_decay():
    params = {"kernel": jnp.asarray(normal(4, 6), jnp.float32)}
    g = jnp.asarray(normal(4, 6, seed=1), jnp.float32)
    updates, _ = run(sinkgd(0.1, scale=3.0, weight_decay=0.5), params, [{"kernel": g}])
    x = reference.sinkhorn(g, KERNEL, variant="sqrt")
    expected = reference.decayed_step(params["kernel"], 3 * x, 0.1, 0.5)
    np.testing.assert_allclose(params["kernel"] + updates["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_mask():
    params = random_tree({"a": {"kernel": (4, 6)}, "b": {"kernel": (4, 6)}})
    zeros = jax.tree.map(jnp.zeros_like, params)
    mask = {"a": {"kernel": True}, "b": {"kernel": False}}
    tx = sinkgd(0.1, weight_decay=0.5, weight_decay_mask=mask)
    updates, _ = run(tx, params, [zeros])
    np.testing.assert_allclose(updates["a"]["kernel"], -0.05 * params["a"]["kernel"], rtol=1e-6)
    assert not np.any(updates["b"]["kernel"])


@pytest.mark.parametrize("wrap", [lambda x: x, jnp.float32, lambda x: optax.constant_schedule(x)])
def test_inject_hyperparams(wrap):
    params = {"layers": {"kernel": jnp.asarray(normal(2, 4, 6), jnp.float32)}}
    static = ("variant", "layout", "weight_decay_mask")
    factory = optax.inject_hyperparams(sinkgd, static_args=static)
    tx = factory(0.02, iterations=wrap(3), eps=wrap(1e-3), scale=wrap(0.1))
    updates, state = run(tx, params, [params] * 2, update=jax.jit(tx.update))
    assert {"iterations", "eps", "learning_rate"} <= set(state.hyperparams)
    expected, _ = run(sinkgd(0.02, iterations=3, eps=1e-3, scale=0.1), params, [params])
    np.testing.assert_allclose(updates["layers"]["kernel"], expected["layers"]["kernel"], rtol=1e-6)


def test_zero_float16_gradients_are_finite_under_injection():
    params = {"kernel": jnp.zeros((4, 6), jnp.float16)}  # eps arrives as float16, hence as 0
    tx = optax.inject_hyperparams(sinkgd)(0.02)
    updates, _ = run(tx, params, [params])
    np.testing.assert_array_equal(updates["kernel"], 0)


def test_iterations_may_follow_the_step():
    update = compiled(KERNEL)
    g = jnp.asarray(normal(4, 6), jnp.float32)
    for iterations in (1, 2, 7):
        expected = reference.sinkhorn(g, KERNEL, iterations=iterations)
        np.testing.assert_allclose(update(g, iterations, 1e-8), expected, rtol=1e-5)
    np.testing.assert_array_equal(update(g, 0, 1e-8), update(g, 1, 1e-8))
    assert update._cache_size() == 1


def test_learning_rate_schedule():
    params = {"kernel": jnp.asarray(normal(4, 6), jnp.float32)}
    tx = sinkgd(optax.linear_schedule(0.02, 0.0, 2))
    update = jax.jit(tx.update)
    first, state = update(params, tx.init(params), params)
    second, _ = update(params, state, params)
    np.testing.assert_allclose(first["kernel"], 2 * second["kernel"], rtol=1e-6)


def test_one_compilation_and_extra_arguments():
    params = random_tree(SOME_TREE)
    tx, traces = sinkgd(0.02), []

    @jax.jit
    def step(grads, state, params):
        traces.append(1)
        updates, state = tx.update(grads, state, params, loss=1.0)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, params)
    assert traces == [1]


def test_multi_steps_and_map_params():
    params = random_tree({"kernel": (4, 6)})
    tx = optax.MultiSteps(sinkgd(0.02), 2)
    updates, state = run(tx, params, [params] * 2)
    expected, _ = run(sinkgd(0.02), params, [params])
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-6)
    optax.tree.map_params(tx, lambda x: x + 1, state)


def test_decreases_a_loss():
    target = jnp.asarray(normal(24, 40), jnp.float32)
    tx = sinkgd(1.0)
    params = {"kernel": jnp.zeros_like(target)}

    def loss(params):
        return jnp.mean(jnp.square(params["kernel"] - target))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < 0.02 * jnp.mean(jnp.square(target))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_entry_is_not_hidden_and_contained_by_apply_if_finite(bad):
    g = normal(24, 40)
    g[1, 2] = bad
    params = {"kernel": jnp.asarray(g, jnp.float32)}
    x = np.asarray(direction(params["kernel"], iterations=2))
    assert np.all(np.isnan(x))
    tx = optax.apply_if_finite(sinkgd(0.02), 3)
    update = jax.jit(tx.update)
    updates, state = update(params, tx.init(params), params)
    assert not np.any(updates["kernel"])
    good = {"kernel": jnp.asarray(normal(24, 40), jnp.float32)}
    updates, _ = update(good, state, good)
    expected, _ = jax.jit(sinkgd(0.02).update)(good, state.inner_state, good)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_sweep_hides_no_nan_of_the_plain_loop(bad):
    g = normal(24, 40)
    g[1, 2] = bad
    with np.errstate(invalid="ignore"):
        expected = np.isnan(reference.sinkhorn(g, WEIGHT, iterations=1))
    found = np.isnan(direction(jnp.asarray(g, jnp.float32), iterations=1))
    assert np.all(found[expected])
    assert np.any(expected)


def bad_settings() -> list[Any]:
    return [
        ({"variant": "rms"}, "'unit' or 'sqrt', got 'rms'"),
        ({"iterations": 0}, "at least 1, got 0"),
        ({"iterations": -2}, "at least 1, got -2"),
        ({"iterations": np.nan}, "at least 1, got nan"),
        ({"iterations": np.arange(3)}, "number of at least 1"),
        ({"eps": -1e-8}, "not negative, got -1e-08"),
        ({"eps": np.inf}, "finite and not negative, got inf"),
    ]


@pytest.mark.parametrize(("options", "message"), bad_settings())
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        sinkgd(0.02, **options)
    with pytest.raises(ValueError, match=message):
        scale_by_sinkhorn(**options)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_without_hardware(platform):
    params = {**random_tree(SOME_TREE), "narrow": {"kernel": jnp.ones((4, 6), jnp.bfloat16)}}
    tx = sinkgd(0.02, weight_decay=0.1)
    lowered = jax.jit(tx.update).trace(params, tx.init(params), params)
    assert lowered.lower(lowering_platforms=(platform,)).as_text()


def test_contractions_ask_for_full_precision():
    g = jnp.ones((4, 6))
    text = str(jax.make_jaxpr(lambda g: scale_by_sinkhorn(layout=WEIGHT).update(g, ())[0])(g))
    assert text.count("dot_general") == 2
    assert text.count("Precision.HIGHEST, Precision.HIGHEST") == 2


def test_no_matrix_is_written_but_the_direction():
    g = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    compiled_update = compiled(WEIGHT).lower(g, 5, 1e-8).compile()
    temporary = compiled_update.memory_analysis().temp_size_in_bytes
    assert temporary < 0.2 * 256 * 512 * 4


@pytest.mark.parametrize("name", ["kernel", "query (d, heads, head_dim)", "layers on axis 1"])
def test_sharded_equals_one_device(name):
    layout, shape = {
        "kernel": (KERNEL, (8, 16)),
        "query (d, heads, head_dim)": (ParamLayout("matrix", (1, 2), 0), (8, 2, 16)),
        "layers on axis 1": (ParamLayout("matrix", 2, 0), (8, 3, 16)),
    }[name]
    g = np.asarray(normal(*shape), np.float32)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    spec = jax.sharding.PartitionSpec("x", *[None] * (len(shape) - 2), "y")
    sharded = jax.device_put(g, jax.sharding.NamedSharding(mesh, spec))
    found = direction(sharded, layout)
    assert found.sharding.spec == spec
    np.testing.assert_allclose(found, direction(jnp.asarray(g), layout), rtol=1e-5)
