"""The loss: chunked and unchunked agree, masks, memory, the cross-entropy's own gradient."""

import dataclasses
import math
import re
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.model.config import PRESETS, LlamaConfig
from examples.llama.model.llama import Llama, apply, structure
from examples.llama.model.loss import (
    CHUNK_BYTES,
    automatic_chunk,
    cross_entropy,
    document_positions,
    next_token_loss,
)
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
BATCH, LENGTH = 3, 10


class Bigram:
    """Stands for the model where only embedding and head matter; far quicker to compile."""

    config = CONFIG

    def __init__(self, params, dtype):
        self.params = params
        self.dtype = dtype

    def hidden(self, tokens):
        return self.params["table"][tokens].astype(self.dtype)

    def logits(self, hidden):
        head = self.params["head"].astype(self.dtype)
        return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def setup(dtype=jnp.float32):
    """Parameters, tokens, the loss and its compiled gradient (static second argument: chunk)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1))
    params = {
        "table": jnp.asarray(rng.normal(size=(CONFIG.vocab_size, 8)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(8, CONFIG.vocab_size)), jnp.float32),
    }

    def loss(params, chunk=None, mask=None):
        model = cast(Llama, Bigram(params, dtype))
        return next_token_loss(model, tokens, chunk=chunk, mask=mask)

    return params, tokens, loss, jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)


def all_losses(params, tokens):
    logits = params["table"][tokens[:, :-1]] @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens[:, 1:]))


def test_against_optax():
    params, tokens, _, grad = setup()
    (value, count), gradient = grad(params)
    expected = jax.value_and_grad(lambda p: all_losses(p, tokens).mean())(params)
    chex.assert_trees_all_close((value, gradient), expected, rtol=1e-5, atol=1e-7)
    assert count == BATCH * LENGTH
    assert value.dtype == count.dtype == jnp.float32


@pytest.mark.parametrize("chunk", [1, 7, 12, 29])
def test_chunked_equals_unchunked(chunk):
    """Chunks of 1, 2, 3 (padded: 10 positions) and 5 positions after rounding."""
    params, _, _, grad = setup()
    mask = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 3 != 1
    (value, count), gradient = grad(params, BATCH * LENGTH, mask)
    chex.assert_trees_all_close(
        grad(params, chunk, mask), ((value, count), gradient), rtol=1e-5, atol=1e-7
    )
    assert count == mask.sum()


def test_mask_weights_the_mean():
    params, tokens, _, grad = setup()
    mask = jnp.zeros((BATCH, LENGTH)).at[1, 4].set(1.0).at[2, 0].set(3.0)
    losses = all_losses(params, tokens)
    (value, count), _ = grad(params, None, mask)
    np.testing.assert_allclose(value, (losses[1, 4] + 3 * losses[2, 0]) / 4, rtol=1e-6)
    assert count == 4


@pytest.mark.parametrize("chunk", [None, 3])
def test_empty_mask_gives_zero_loss_and_gradient(chunk):
    params, _, _, grad = setup()
    mask = np.zeros((BATCH, LENGTH), bool)
    (value, count), gradient = grad(params, chunk, mask)
    assert (float(value), float(count)) == (0.0, 0.0)
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.full_codegen
@pytest.mark.parametrize(("chunk", "largest"), [(6, 6), (None, BATCH * LENGTH)])
def test_no_array_exceeds_the_chunk(chunk, largest):
    """Reads the optimised program: the largest array with a vocabulary axis has `chunk` tokens."""
    params, _, _, grad = setup()
    program = grad.lower(params, chunk).compile().as_text()
    assert program is not None
    sizes = [
        math.prod(int(n) for n in dims.split(",")) // CONFIG.vocab_size
        for dims in re.findall(r"f32\[([\d,]+)\]", program)
        if str(CONFIG.vocab_size) in dims.split(",")
    ]
    # The parameters themselves are (vocabulary, hidden size).
    assert max(size for size in sizes if size != CONFIG.hidden_size) == largest


def test_automatic_chunk_bounds_the_logits():
    for config in PRESETS.values():
        chunk = automatic_chunk(131_072, config.vocab_size)
        assert CHUNK_BYTES / 2 < chunk * config.vocab_size * 4 <= CHUNK_BYTES
    assert automatic_chunk(2048, PRESETS["demo"].vocab_size) == 2048
    assert automatic_chunk(8, 10**12) == 1


def test_bfloat16_loss_is_float32():
    params, tokens, _, grad = setup(jnp.bfloat16)
    (value, _), gradient = grad(params, 6)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, all_losses(params, tokens).mean(), rtol=2e-2)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def test_cross_entropy_gradient():
    logits = 30 * jax.random.normal(jax.random.key(0), (2, 3, 11))
    labels = jax.random.randint(jax.random.key(1), (2, 3), 0, 11)
    weights = jnp.arange(-3.0, 3.0).reshape(2, 3)

    def total(function):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(function(x, labels) * weights)))(logits)

    chex.assert_trees_all_close(
        total(cross_entropy),
        total(optax.softmax_cross_entropy_with_integer_labels),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_training_of_the_model_reduces_the_loss(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    graphdef = structure(config, scan_layers=False)
    tokens = setup()[1]
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            return next_token_loss(apply(graphdef, params), tokens, chunk=12)[0]

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.asarray, random_params(config))
    state = tx.init(params)
    values = []
    for _ in range(40):
        params, state, value = step(params, state)
        values.append(float(value))
    assert abs(values[0] - math.log(CONFIG.vocab_size)) < 0.5
    assert values[-1] < values[0] - 1.0


def test_errors():
    params, tokens, loss, _ = setup()
    with pytest.raises(ValueError, match="chunk must be positive, got 0"):
        loss(params, 0)
    with pytest.raises(ValueError, match=r"predicted tokens' shape \(3, 10\), got \(3, 11\)"):
        loss(params, None, np.ones((BATCH, LENGTH + 1)))
    model = cast(Llama, Bigram(params, jnp.float32))
    with pytest.raises(ValueError, match=r"\(batch, time \+ 1\), got \(3, 1\)"):
        next_token_loss(model, tokens[:, :1])
    with pytest.raises(ValueError, match=r"\(batch, time \+ 1\), got \(11,\)"):
        next_token_loss(model, tokens[0])


def test_a_chunked_gradient_multiplies_the_head_three_times():
    """Once for the logits and once for each operand's gradient; making the logits again would be a fourth."""
    params, _, _, grad = setup()

    def products(chunk):
        text = grad.lower(params, chunk).as_text()
        return len(re.findall(r"stablehlo\.dot_general", text))

    assert products(6) == products(None) == 3


def test_weights_have_a_gradient_too():
    params, tokens, loss, _ = setup()
    mask = jnp.linspace(0.5, 1.5, BATCH * LENGTH).reshape(BATCH, LENGTH)

    def value(chunk):
        return jax.jit(jax.grad(lambda mask: loss(params, chunk, mask)[0]))(mask)

    np.testing.assert_allclose(value(6), value(None), rtol=1e-4, atol=1e-6)
    del tokens


def test_positions_begin_anew_in_every_document():
    documents = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert document_positions(documents).tolist() == expected
