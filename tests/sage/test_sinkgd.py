"""SinkGD against golden vectors; in trees, wrappers and dtypes; compiled and sharded."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layout_optax import ParamLayout, infer_layout
from sage_optax import STATIC_ARGS, scale_by_sinkhorn, sinkgd
from tests import reference
from tests.sage.common import SOME_TREE, random_tree, run
from tests.sage.directions import KERNEL, TOLERANCE, WEIGHT, compiled, direction, normal

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
    static = [name for name in STATIC_ARGS if name != "mu_dtype"]
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
        ({"vectors_dtype": "int8"}, "None or a float dtype by its name.* got 'int8'"),
        ({"vectors_dtype": jnp.ones(())}, "None or a float dtype by its name"),
    ]


@pytest.mark.parametrize(("options", "message"), bad_settings())
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        sinkgd(0.02, **options)
    with pytest.raises(ValueError, match=message):
        scale_by_sinkhorn(**options)


@pytest.mark.parametrize("name", ["iterations", "eps"])
def test_schedules_are_for_rates_only(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, not a schedule"):
        scale_by_sinkhorn(**{name: optax.constant_schedule(1)})


def test_injected_callables_are_refused_with_the_way_out():
    factory, params = optax.inject_hyperparams(sinkgd), {"kernel": jnp.ones((4, 6))}
    for option in ({"weight_decay_mask": lambda _: False}, {"layout": infer_layout}):
        with pytest.raises(ValueError, match="static_args=STATIC_ARGS"):
            factory(0.02, **option).init(params)


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


@pytest.mark.full_codegen
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
