"""Momentum in int8: unbiased, bounded, deterministic, equal for scanned and unscanned layers."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis.extra import numpy as hnp

from layout_optax import ParamLayout
from sage_optax import sage, scale_by_sage
from sage_optax._int8 import decode, encode
from tests import reference
from tests.sage.common import LAYOUTS, SOME_TREE, random_tree, run

TABLE = ParamLayout("embedding", 0, 1)

encode_table = jax.jit(lambda x, count: encode(x, "table", TABLE, count))
decode_table = jax.jit(lambda codes, row_max: decode(codes, row_max, TABLE))
tables = hnp.arrays(
    np.float32, (3, 4), elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
)


def steps_of(x):
    """Per entry the distance between the two levels around it, from the definition of the code."""
    size = np.abs(np.asarray(x, np.float64))
    row_max = size.max(axis=-1, keepdims=True)
    k = np.floor(np.sqrt(size / np.where(row_max == 0, 1, row_max) * 127**2))
    return row_max * (2 * k + 1) / 127**2


def test_rounding_is_unbiased():
    x = random_tree((5, 8)) ** 3  # three decades within a row
    draws = 4000
    many = jax.jit(jax.vmap(lambda count: decode(*encode(x, "table", TABLE, count), TABLE)))
    decoded = np.asarray(many(jnp.arange(draws)), np.float64)
    error = decoded.mean(axis=0) - np.asarray(x)
    # A rounding to one of two levels deviates by at most half a step: six standard errors.
    assert np.all(np.abs(error) <= 6 * steps_of(x) / 2 / np.sqrt(draws))
    assert np.all(decoded.std(axis=0)[np.abs(x) < np.abs(x).max(axis=1, keepdims=True)] > 0)
    # Draws of neighbouring entries and of successive steps are not tied to each other.
    noise = (decoded - decoded.mean(axis=0)).reshape(draws, -1)
    noise = noise[:, noise.std(axis=0) > 0]
    across = np.corrcoef(noise.T) - np.eye(noise.shape[1])
    later = [np.corrcoef(column[:-1], column[1:])[0, 1] for column in noise.T]
    assert np.abs(across).max() < 6 / np.sqrt(draws)
    assert np.abs(later).max() < 6 / np.sqrt(draws)


@hypothesis.given(tables, st.integers(0, 2**31 - 1))
def test_error_is_below_one_step(x, count):
    codes, row_max = encode_table(x, count)
    assert codes.dtype == jnp.int8
    assert row_max.dtype == jnp.float32
    np.testing.assert_array_equal(row_max, np.abs(x).max(axis=1))
    decoded = np.asarray(decode_table(codes, row_max), np.float64)
    assert np.all(np.abs(decoded - x) <= steps_of(x) * (1 + 1e-3))
    assert np.all(decoded * x >= 0)
    np.testing.assert_array_equal(codes[x == 0], 0)
    largest = np.abs(x) == np.abs(x).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(np.abs(np.asarray(codes, int))[largest & (x != 0)], 127)


@hypothesis.given(hnp.arrays(np.int8, (3, 4), elements=st.integers(-127, 127)))
def test_levels_are_kept(codes):
    codes[:, 0] = 127
    row_max = jnp.array([1.0, 2.0**-40, 3e30])
    again, same = encode_table(decode_table(codes, row_max), 7)
    np.testing.assert_array_equal(same, row_max)
    # A level may be off by rounding, which turns it into a neighbour with a probability of that size.
    assert np.abs(np.asarray(again, int) - codes).max() <= 1
    assert np.mean(np.asarray(again) != codes) < 0.1


def test_zero_stays_zero():
    codes, row_max = encode_table(jnp.zeros((3, 4)), 1)
    assert not codes.any()
    assert not row_max.any()
    assert not decode_table(codes, row_max).any()


@pytest.mark.parametrize("name", ["head kernel", "layers on axis 1", "stacked norm", "scalar"])
def test_rows_follow_the_layout(name):
    layout, shape = LAYOUTS[name]
    x = random_tree(shape)
    codes, row_max = jax.jit(lambda x: encode(x, "x", layout, jnp.int32(3)))(x)
    decoded = decode(codes, row_max, layout)
    rows = reference.to_matrices(x, layout)
    bound = reference.from_matrices(steps_of(rows), layout, shape)[()] if shape else steps_of(rows)
    assert np.all(np.abs(np.asarray(decoded) - x) <= np.reshape(bound, shape) * (1 + 1e-3))
    expected = np.abs(rows).max(axis=-1)
    np.testing.assert_allclose(np.sort(np.ravel(row_max)), np.sort(np.ravel(expected)), rtol=1e-6)


def test_rounding_depends_on_step_and_path_only():
    x = random_tree((6, 8))
    compiled = jax.jit(lambda x, path, count: encode(x, path, TABLE, count)[0], static_argnums=1)
    code = lambda path, count: np.asarray(compiled(x, path, count))  # noqa: E731
    np.testing.assert_array_equal(code("a", 1), code("a", 1))
    assert (code("a", 1) != code("a", 2)).any()
    assert (code("a", 1) != code("b", 1)).any()


@pytest.mark.full_codegen
@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers_equal_unscanned_layers_bit_for_bit(axis):
    stack = random_tree({"norm": {"scale": (3, 8)}, "up": {"kernel": (3, 4, 8)}})
    stack = jax.tree.map(np.asarray, stack)
    split = [jax.tree.map(lambda x: x[i], stack) for i in range(3)]  # noqa: B023
    if axis == 1:
        stack["up"]["kernel"] = stack["up"]["kernel"].swapaxes(0, 1)
    kernel = ParamLayout("matrix", 2, 1) if axis == 0 else ParamLayout("matrix", 2, 0)
    layout = {"layers": {"norm": ParamLayout("vector", (), 1), "up": kernel}}
    scanned = scale_by_sage(mu_dtype="int8", layout=layout)
    unscanned = scale_by_sage(mu_dtype="int8")
    updates, state = run(scanned, {"layers": stack}, [{"layers": stack}] * 4)
    expected, expected_state = run(unscanned, {"layers": split}, [{"layers": split}] * 4)
    for found, wanted in (
        (updates, expected),
        (state.mu, expected_state.mu),
        (state.magnitude, expected_state.magnitude),
        (state.mu_row_max, expected_state.mu_row_max),
    ):
        found, wanted = jax.tree.map(np.asarray, (found, wanted))
        for i in range(3):
            one, layer = found["layers"], wanted["layers"][i]
            np.testing.assert_array_equal(one["norm"]["scale"][i], layer["norm"]["scale"])
            stacked = one["up"]["kernel"]
            along = stacked.shape.index(3)  # the only axis of three
            np.testing.assert_array_equal(np.take(stacked, i, along), layer["up"]["kernel"])


def test_state_dtypes_are_stable():
    params = random_tree({"embed": (6, 4), "scale": (5,)})
    tx = optax.MultiSteps(sage(1e-3, mu_dtype="int8"), 2)

    @jax.jit
    def step(params, state):
        def move():
            updates, after = tx.update(params, state, params)
            return optax.apply_updates(params, updates), after

        return jax.lax.cond(state.gradient_step < 3, move, lambda: (params, state))

    state = tx.init(params)
    after = state
    for _ in range(8):
        params, after = step(params, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert after.gradient_step == 3
    momentum = after.inner_opt_state[0].mu
    assert {x.dtype for x in jax.tree.leaves(momentum)} == {jnp.dtype("int8")}
    assert all(x.any() for x in jax.tree.leaves(momentum))


def test_momentum_stays_close_to_float32():
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-4, 0, (1, 64))
    signal = rng.standard_normal((32, 64)) * 0.2
    states = [
        scale_by_sage(mu_dtype=d).init({"embed": jnp.zeros((32, 64))}) for d in (None, "int8")
    ]
    updates = [jax.jit(scale_by_sage(mu_dtype=d).update) for d in (None, "int8")]
    agree = []
    for _ in range(200):
        g = {"embed": jnp.asarray((signal + rng.standard_normal((32, 64))) * size, jnp.float32)}
        results = [update(g, state) for update, state in zip(updates, states, strict=True)]
        states = [state for _, state in results]
        signs = [np.sign(u["embed"]) for u, _ in results]
        agree.append(np.mean(signs[0] == signs[1]))
    exact = np.asarray(states[0].mu["embed"], np.float64)
    decoded = np.asarray(
        decode(states[1].mu["embed"], states[1].mu_row_max["embed"], TABLE), np.float64
    )
    cosine = np.sum(exact * decoded) / np.linalg.norm(exact) / np.linalg.norm(decoded)
    assert cosine > 0.998
    # Also where a column is a hundred times smaller than the largest of its row.
    small = (size[0] < 3e-2) & (size[0] > 3e-3)
    part = lambda x: x[:, small] / size[:, small]  # noqa: E731
    a, b = part(exact), part(decoded)
    assert np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.85
    assert np.mean(agree) > 0.9


def test_small_gradients_are_not_lost():
    """An update of a 600th of the smallest step reaches the momentum on average."""
    g = jnp.concatenate([jnp.ones((64, 1)), jnp.full((64, 63), 1e-5)], axis=1)
    _, state = run(scale_by_sage(mu_dtype="int8", layout=TABLE), g, [g] * 300)
    decoded = decode(state.mu, state.mu_row_max, TABLE)
    expected = 1e-5 * (1 - 0.99**300)
    assert np.mean(decoded[:, 1:]) == pytest.approx(expected, rel=0.15)


def test_non_finite_gradients_spoil_their_row_alone():
    for bad in (jnp.nan, jnp.inf):
        g = jnp.ones((3, 4)).at[1, 2].set(bad)
        codes, row_max = encode_table(g, 1)
        decoded = decode_table(codes, row_max)
        assert not np.isfinite(row_max[1])
        assert not np.isfinite(decoded[1, 2])
        assert np.all(np.isfinite(np.asarray(decoded)[[0, 2]]))


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [
        ("Explicit", ("x", "y")),
        ("Explicit", (None, "y")),
        ("Explicit", (("x", "y"), None)),
        ("Auto", ("x", "y")),
    ],
    ids=str,
)
def test_sharded_equals_one_device(axis_type, spec):
    types = (getattr(jax.sharding.AxisType, axis_type),) * 2
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=types)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    x = {"embed": random_tree((16, 8))}
    tx = scale_by_sage(mu_dtype="int8")
    expected, expected_state = run(tx, x, [x] * 3)
    sharded = jax.device_put(x, sharding)
    updates, state = run(tx, sharded, [sharded] * 3)
    assert updates["embed"].sharding.is_equivalent_to(sharding, 2)
    assert state.mu["embed"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(updates["embed"], expected["embed"], rtol=1e-6)
    # Sums in another order move a few entries across a rounding threshold, by one level.
    difference = np.abs(
        np.asarray(state.mu["embed"], int) - np.asarray(expected_state.mu["embed"], int)
    )
    assert difference.max() <= 1
    assert difference.mean() < 0.02


def test_state_is_a_byte_an_entry():
    params = random_tree(SOME_TREE)
    state = scale_by_sage(mu_dtype=jnp.int8).init(params)
    entries = sum(x.size for x in jax.tree.leaves(params))
    assert sum(x.nbytes for x in jax.tree.leaves(state.mu)) == entries
