"""The embedding's gradient without a scatter: the same numbers, what the program holds, and the tied head's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.model import embedding
from examples.llama.model.embedding import lookup, transposed


def gradient(how, dtype, tokens, table, chunk_bytes=None, monkeypatch=None):
    if chunk_bytes is not None:
        monkeypatch.setattr(embedding, "CHUNK_BYTES", chunk_bytes)

    def loss(table):
        rows = lookup(table, tokens, dtype, how).astype(jnp.float32)
        return jnp.sum(jnp.sin(3 * rows))

    return jax.jit(jax.grad(loss))(table)


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 50 * 4 * 4, 2**30])
def test_products_are_the_scatter_within_rounding(monkeypatch, chunk_bytes):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 50, (3, 11)))
    table = jnp.asarray(rng.normal(size=(50, 6)), jnp.float32)
    found = gradient("products", jnp.float32, tokens, table, chunk_bytes, monkeypatch)
    expected = gradient("scatter", jnp.float32, tokens, table)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    unused = sorted(set(range(50)) - set(np.asarray(tokens).ravel().tolist()))
    assert unused
    np.testing.assert_array_equal(found[np.array(unused)], 0)


def test_bfloat16_rows_are_added_in_float32():
    table = jnp.zeros((4, 2), jnp.float32)
    found = gradient("products", jnp.bfloat16, jnp.zeros((1, 1000), jnp.int32), table)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0], 3000.0)  # a bfloat16 sum of threes would stop at 768


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_lowered_gradient_holds_no_scatter(platform):
    def text(how):
        def loss(table, tokens):
            return jnp.sum(lookup(table, tokens, jnp.bfloat16, how).astype(jnp.float32) ** 2)

        shapes = (
            jax.ShapeDtypeStruct((64, 8), jnp.float32),
            jax.ShapeDtypeStruct((2, 5), jnp.int32),
        )
        traced = jax.jit(jax.grad(loss)).trace(*shapes)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.scatter" in text("scatter")
    assert "stablehlo.scatter" not in text("products")


def test_auto_takes_products_on_a_tpu_in_sixteen_bits_only(monkeypatch):
    def products(platform, dtype):
        monkeypatch.setattr(embedding, "platform", lambda: platform)
        jaxpr = jax.make_jaxpr(lambda table: lookup(table, jnp.zeros((1, 2), int), dtype))
        return "custom_vjp" in str(jaxpr(jnp.zeros((4, 2))))

    assert products("tpu", jnp.bfloat16)
    assert not products("tpu", jnp.float32)
    assert not products("cuda", jnp.bfloat16)
    assert not products("cpu", jnp.bfloat16)


def test_the_tied_heads_gradient_is_the_products():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(50, 6)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)

    def gradient_of(head):
        return jax.jit(jax.grad(lambda table: jnp.sum(jnp.sin(hidden @ head(table)))))(table)

    found, expected = gradient_of(transposed), gradient_of(lambda table: table.T)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_table_has_a_bfloat16_gradient():
    found = jax.grad(lambda table: jnp.sum(transposed(table)).astype(jnp.float32))(
        jnp.ones((3, 2), jnp.bfloat16)
    )
    assert (found.shape, found.dtype) == ((3, 2), jnp.bfloat16)
