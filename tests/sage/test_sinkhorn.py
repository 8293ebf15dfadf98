"""Sinkhorn's algorithm against a float64 plain loop, at the ends of float32, and its fixed point."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from tests.sage.common import LAYOUTS
from tests.sage.directions import KERNEL, TOLERANCE, WEIGHT, check, direction, normal

SETTINGS = {
    "unit": {},
    "sqrt": {"variant": "sqrt"},
    "one sweep": {"iterations": 1},
    "many sweeps": {"iterations": 12, "variant": "sqrt"},
    "large eps": {"eps": 1e-2, "variant": "sqrt"},
    "tiny eps": {"eps": 1e-20},
}


# Against the float64 plain loop


@pytest.mark.parametrize(
    ("name", "variant"), list(zip(LAYOUTS, itertools.cycle(["unit", "sqrt"]), strict=False))
)
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
    "one entry": np.pad([[-3.0]], ((2, 21), (4, 35))),
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
    if EXTREMES[name].shape == (24, 40):
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
