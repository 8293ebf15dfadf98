"""The loss: chunked and unchunked agree, masks, memory, the cross-entropy's own gradient."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.loss import CHUNK_BYTES, automatic_chunk, cross_entropy, next_token_loss
from examples.llama.model import apply, structure
from examples.llama.presets import PRESETS, LlamaConfig
from tests.llama.random_params import random_params

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    tie_embeddings=True,
)
UNTIED = LlamaConfig(**{**vars(CONFIG), "tie_embeddings": False})
BATCH, LENGTH = 3, 10


def setup(config=CONFIG, dtype=jnp.float32):
    graphdef = structure(config, scan_layers=False, dtype=dtype)
    params = jax.tree.map(jnp.asarray, random_params(config))
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, config.vocab_size)

    def loss(params, chunk=None, mask=None):
        return next_token_loss(apply(graphdef, params), tokens, chunk=chunk, mask=mask)

    return graphdef, params, tokens, loss


def test_against_optax():
    graphdef, params, tokens, loss = setup()
    logits = jax.jit(lambda p: apply(graphdef, p)(tokens[:, :-1]))(params)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    value, count = jax.jit(loss)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert count == BATCH * LENGTH
    assert value.dtype == count.dtype == jnp.float32


@pytest.mark.parametrize(
    ("config", "chunk"), [(CONFIG, 1), (CONFIG, 7), (UNTIED, 12), (UNTIED, 29)]
)
def test_chunked_equals_unchunked(config, chunk):
    """Chunks of 1, 2, 3 (padded: 10 positions) and 5 positions after rounding."""
    _, params, _, loss = setup(config)
    mask = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 3 != 1
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (value, count), gradient = grad(params, BATCH * LENGTH, mask)
    chex.assert_trees_all_close(
        grad(params, chunk, mask), ((value, count), gradient), rtol=1e-5, atol=1e-7
    )
    assert count == mask.sum()


def test_mask_weights_the_mean():
    graphdef, params, tokens, loss = setup()
    mask = jnp.zeros((BATCH, LENGTH)).at[1, 4].set(1.0).at[2, 0].set(3.0)
    logits = jax.jit(lambda p: apply(graphdef, p)(tokens[:, :-1]))(params)
    losses = cross_entropy(logits, tokens[:, 1:])
    value, count = jax.jit(lambda p: loss(p, None, mask))(params)
    np.testing.assert_allclose(value, (losses[1, 4] + 3 * losses[2, 0]) / 4, rtol=1e-6)
    assert count == 4


@pytest.mark.parametrize("chunk", [None, 3])
def test_empty_mask_gives_zero_loss_and_gradient(chunk):
    _, params, _, loss = setup()
    mask = np.zeros((BATCH, LENGTH), bool)
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (value, count), gradient = grad(params, chunk, mask)
    assert (float(value), float(count)) == (0.0, 0.0)
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.parametrize(("chunk", "largest"), [(6, 6), (None, BATCH * LENGTH)])
def test_no_array_exceeds_the_chunk(chunk, largest):
    """Reads the optimised program: the largest array with a vocabulary axis has `chunk` tokens."""
    _, params, _, loss = setup()
    grad = jax.jit(jax.grad(lambda p: loss(p, chunk)[0]))
    program = grad.lower(params).compile().as_text()
    assert program is not None
    sizes = [
        np.prod([int(n) for n in dims.split(",")]) // CONFIG.vocab_size
        for dims in re.findall(r"f32\[([\d,]+)\]", program)
        if str(CONFIG.vocab_size) in dims.split(",")
    ]
    # The gradient of the embedding is (vocabulary, hidden size).
    assert max(size for size in sizes if size != CONFIG.hidden_size) == largest


def test_automatic_chunk_bounds_the_logits():
    for config in PRESETS.values():
        chunk = automatic_chunk(131_072, config.vocab_size)
        assert CHUNK_BYTES / 2 < chunk * config.vocab_size * 4 <= CHUNK_BYTES
    assert automatic_chunk(2048, PRESETS["demo"].vocab_size) == 2048
    assert automatic_chunk(8, 10**12) == 1


def test_bfloat16_loss_is_float32():
    _, params, _, exact = setup()
    *_, loss = setup(dtype=jnp.bfloat16)
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (value, _), gradient = grad(params, 6)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, jax.jit(exact)(params)[0], rtol=1e-2)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def test_cross_entropy_gradient():
    logits = 30 * jax.random.normal(jax.random.key(0), (2, 3, 11))
    labels = jax.random.randint(jax.random.key(1), (2, 3), 0, 11)
    weights = jax.random.normal(jax.random.key(2), (2, 3))

    def plain(x):
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(x, labels) * weights)

    def ours(x):
        return jnp.sum(cross_entropy(x, labels) * weights)

    chex.assert_trees_all_close(
        jax.value_and_grad(ours)(logits), jax.value_and_grad(plain)(logits), rtol=1e-5, atol=1e-6
    )


def test_training_reduces_the_loss():
    _, params, _, loss = setup()
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    values = []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0] - 1.0


def test_errors():
    _, params, tokens, loss = setup()
    graphdef = setup()[0]
    model = apply(graphdef, params)
    with pytest.raises(ValueError, match="chunk must be positive, got 0"):
        loss(params, 0)
    with pytest.raises(ValueError, match=r"predicted tokens' shape \(3, 10\), got \(3, 11\)"):
        loss(params, None, np.ones((BATCH, LENGTH + 1)))
    with pytest.raises(ValueError, match=r"\(batch, time \+ 1\), got \(3, 1\)"):
        next_token_loss(model, tokens[:, :1])
    with pytest.raises(ValueError, match=r"\(batch, time \+ 1\), got \(11,\)"):
        next_token_loss(model, tokens[0])
