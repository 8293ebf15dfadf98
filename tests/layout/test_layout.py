"""`ParamLayout` itself, axes arithmetic, and random bits that belong to a parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from layout_optax import ParamLayout
from layout_optax.axes import contract, rms, shape_without, sharding_without, zeros_without
from layout_optax.keys import element_bits, leaf_seeds, split_path
from tests.reference import from_matrices, to_matrices

LAYOUTS = [
    ((7, 5), ParamLayout("matrix", 0, 1)),
    ((5, 7), ParamLayout("matrix", 1, 0)),
    ((3, 5, 7), ParamLayout("matrix", -1, -2)),
    ((5, 3, 2, 4), ParamLayout("matrix", (2, 3), 0)),  # layers on axis 1, DenseGeneral
    ((2, 3, 4, 5), ParamLayout("matrix", 3, (1, 2))),
    ((3, 5), ParamLayout("vector", (), 1)),
    ((3, 4), ParamLayout("vector", (), (0, 1))),
]


def test_layouts_are_frozen_hashable_leaves():
    layout = ParamLayout("matrix", 0, 1)
    assert layout == ParamLayout("matrix", (0,), (1,))
    assert len({layout, ParamLayout("matrix", 0, 1)}) == 1
    assert jax.tree.leaves({"a": layout}) == [layout]
    with pytest.raises(AttributeError):
        layout.role = "head"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dense", 0, 1), "role must be one of"),
        (("matrix", 0, 0), "named twice"),
        (("vector", 0, 1), "column axes only"),
        (("head", (), 1), "needs row and column axes"),
    ],
)
def test_impossible_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParamLayout(*arguments)


def test_resolve_checks_the_parameter():
    assert ParamLayout("matrix", -1, -2).resolve(4) == ParamLayout("matrix", 3, 2)
    with pytest.raises(ValueError, match="'a/b'"):
        ParamLayout("matrix", 2, 0).resolve(2, "a/b")
    with pytest.raises(ValueError, match="twice"):
        ParamLayout("matrix", -1, 1).resolve(2)


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_contract_and_rms_agree_with_the_reference_route(shape, layout):
    layout = layout.resolve(len(shape))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    matrices = to_matrices(x, layout)
    np.testing.assert_array_equal(from_matrices(matrices, layout, shape), x)
    np.testing.assert_allclose(
        np.ravel(rms(jnp.asarray(x), layout.column_axes)),
        np.ravel(
            from_matrices(
                np.sqrt(np.mean(matrices**2, axis=2, keepdims=True)),
                layout,
                [1 if i in layout.column_axes else n for i, n in enumerate(shape)],
            )
        ),
        rtol=1e-5,
    )
    if layout.role == "vector":
        return
    weights = np.random.default_rng(1).normal(size=shape_without(shape, layout.row_axes))
    full = np.broadcast_to(np.expand_dims(weights, layout.row_axes), shape)
    expected = np.sum(x * full, axis=layout.column_axes)
    result = contract(jnp.asarray(x), jnp.asarray(weights, jnp.float32), layout, "columns")
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_zeros_project_an_explicit_sharding_and_ignore_an_auto_one():
    explicit = jax.make_mesh((2, 4), ("x", "y"))
    x = jax.device_put(jnp.ones((8, 3, 16)), NamedSharding(explicit, P("x", None, "y")))
    assert jax.typeof(zeros_without(x, (0,), jnp.float32)).sharding.spec == P(None, "y")
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    projected = sharding_without(abstract, (1,))
    assert projected is not None
    assert projected.spec == P("x", "y")
    auto = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    y = jax.device_put(jnp.ones((8, 16)), NamedSharding(auto, P("x", "y")))
    assert sharding_without(y, ()) is None
    assert zeros_without(y, (1,), jnp.bfloat16).sharding.is_equivalent_to(
        NamedSharding(auto, P("x")), 1
    )


def test_paths_split_into_names_and_stack_indices():
    assert split_path("layers/3/experts/2/w1") == ("layers/experts/w1", (3, 2))
    assert split_path("decoder_layers_12/wi_0") == ("decoder_layers/wi_0", (12,))


def test_a_layer_draws_the_same_bits_in_a_list_and_in_a_stack():
    matrix, stack = ParamLayout("matrix", 1, 0), ParamLayout("matrix", 2, 1)
    seed = jnp.uint32(5)
    bits = jax.jit(element_bits, static_argnums=(0, 1, 2))
    stacked = bits("layers/w1", (6, 4, 5), stack, seed)
    for layer in (0, 3, 5):
        for path in (f"layers/{layer}/w1", f"layers_{layer}/w1"):
            one = bits(path, (4, 5), matrix, seed)
            np.testing.assert_array_equal(one, stacked[layer])
    middle = bits("layers/w1", (4, 6, 5), ParamLayout("matrix", 2, 0), seed)
    np.testing.assert_array_equal(middle, jnp.moveaxis(stacked, 0, 1))
    experts = leaf_seeds("layers/experts/w", (6, 2, 4, 5), ParamLayout("matrix", 3, 2), 5)
    alone = leaf_seeds("layers/4/experts/1/w", (4, 5), matrix, 5)
    assert experts[4, 1] == alone


@given(st.integers(0, 2**32 - 1))
def test_bits_are_uniform_and_differ_between_leaves_and_seeds(seed):
    layout, shape = ParamLayout("matrix", 0, 1), (64, 128)
    draw = lambda path, s: np.asarray(element_bits(path, shape, layout, s), np.float64)  # noqa: E731
    bits = draw("a/w", jnp.uint32(seed))
    uniform = bits / 2**32
    others = [draw("b/w", jnp.uint32(seed)), draw("a/w", jnp.uint32(seed) + jnp.uint32(1))]
    others += [np.roll(bits, 1, axis=0), np.roll(bits, 1, axis=1), np.roll(bits, (1, 1), (0, 1))]
    # Standard errors over 8192 draws: 0.0032 for the mean, 0.011 for a correlation.
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.std() - 12**-0.5) < 0.02
    for other in others:
        assert abs(np.corrcoef(bits.ravel(), other.ravel())[0, 1]) < 0.06
