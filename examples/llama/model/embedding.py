"""The token embedding: its lookup, with a gradient by scatter or by products, and its use as a head."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples.llama.model.attention import platform

Gradient = Literal["auto", "scatter", "products"]
"""`scatter` adds rows to a float32 array one by one. `products` multiplies the rows by a one-hot matrix, chunk
by chunk, with 2 V d operations per token and no scatter. `auto` uses products on a TPU in 16 bits, else
scatter."""

CHUNK_BYTES = 128 * 2**20
"""Size of the one-hot matrix of one chunk."""


def lookup(
    table: jax.Array, tokens: jax.Array, dtype: DTypeLike, gradient: Gradient = "auto"
) -> jax.Array:
    """Looks up rows of an embedding.

    On a GPU a scatter moves a few bytes per number, while the products take as many operations as a third of
    the head's (7 % of the step of the 1.3B model of 128256 tokens), so `auto` uses the scatter there.

    Args:
        table: (V, d).
        tokens: int32 (B, T) in [0, V).
        dtype: Dtype of the result, and of the gradient's products.
        gradient: See `Gradient`.

    Returns:
        (B, T, d).

    >>> lookup(jnp.arange(6.0).reshape(3, 2), jnp.array([[2, 0]]), jnp.float32).tolist()
    [[[4.0, 5.0], [0.0, 1.0]]]
    """
    if gradient == "auto":
        small = jnp.dtype(dtype).itemsize == 2
        gradient = "products" if small and platform() == "tpu" else "scatter"
    if gradient == "products":
        return _lookup(table, tokens, np.dtype(dtype))
    return table[tokens].astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: jax.Array, tokens: jax.Array, dtype: np.dtype) -> jax.Array:
    return table[tokens].astype(dtype)


def _forward(table, tokens, dtype):
    # An empty slice carries the embedding's size and dtype to the backward pass.
    return _lookup(table, tokens, dtype), (tokens, table[:, :0])


def _backward(dtype, saved, cotangent):
    tokens, empty = saved
    batch, length, width = cotangent.shape
    vocab_size = empty.shape[0]
    # Along time, not across the batch: a batch that is split over devices stays split.
    size = max(1, min(length, CHUNK_BYTES // (vocab_size * batch * dtype.itemsize)))
    steps = -(-length // size)
    padding = (0, steps * size - length)
    # Token -1 is not a row: its one-hot is zero.
    tokens = jnp.pad(tokens, ((0, 0), padding), constant_values=-1)
    rows = jnp.pad(cotangent.astype(dtype), ((0, 0), padding, (0, 0)))
    tokens = jnp.moveaxis(tokens.reshape(batch, steps, size), 1, 0)
    rows = jnp.moveaxis(rows.reshape(batch, steps, size, width), 1, 0)

    def add(total, piece):
        one_hot = jax.nn.one_hot(piece[0], vocab_size, dtype=dtype)
        product = jnp.einsum("btv,btd->vd", one_hot, piece[1], preferred_element_type=jnp.float32)
        return total + product, None

    total, _ = jax.lax.scan(add, jnp.zeros((vocab_size, width), jnp.float32), (tokens, rows))
    return total.astype(empty.dtype), None


_lookup.defvjp(_forward, _backward)


def transposed(table: jax.Array) -> jax.Array:
    """The embedding (V, d) as the kernel (d, V) of a tied head, in the embedding's dtype.

    On a CPU its gradient is computed as (d, V) and transposed afterwards. XLA would fold the transposition into
    the product, which then reads the gradient of the logits (tokens, V) by columns and takes longer.

    >>> jax.grad(lambda table: transposed(table)[1, 2])(jnp.ones((3, 2))).tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    return _transposed(table) if platform() == "cpu" else table.T


@jax.custom_vjp
def _transposed(table: jax.Array) -> jax.Array:
    return table.T


_transposed.defvjp(
    lambda table: (table.T, None),
    lambda _, cotangent: (jax.lax.optimization_barrier(cotangent).T,),
)
