"""Next-token cross-entropy whose memory does not grow with tokens times vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama.model.llama import Llama

CHUNK_BYTES = 256 * 2**20
"""Size of the float32 logits of one automatic chunk."""


def next_token_loss(
    model: Llama,
    tokens: jax.Array | np.ndarray,
    *,
    chunk: int | None = None,
    mask: jax.Array | np.ndarray | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of each token given those before it.

    The logits are computed for `chunk` tokens at a time, directly followed by their gradient. At most two
    (chunk, V) float32 arrays exist at once, and the head is multiplied once forward and twice backward, as
    without chunks (`_chunked`). Chunks are cut along time, not across the batch, so that a batch sharded over
    devices stays sharded in every chunk.

    Args:
        model: The model, often from `apply` inside the differentiated function.
        tokens: int32 (B, T + 1); positions 0 .. T-1 are read, 1 .. T are predicted.
        chunk: Tokens whose logits exist at once (at least B; rounded so that chunks are equal). None uses
            `automatic_chunk`; B * T or more computes all logits at once.
        mask: (B, T), boolean or number, the weight of each predicted token; all ones when None.
        positions: int32 (B, T), rotary positions of the tokens read; 0 .. T-1 when None.
        segments: int32 (B, T), their documents; see `Llama.hidden`.

    Returns:
        The weighted mean loss and the sum of the weights (the token count), both float32 scalars.
        A mask of zeros gives loss 0.

    Raises:
        ValueError: A shape does not fit, or `chunk` is not positive.

    >>> from examples.llama.model.llama import Llama
    >>> from examples.llama.model.config import preset
    >>> model = Llama(preset("demo", vocab_size=32, hidden_size=16, num_layers=1))
    >>> loss, count = next_token_loss(model, jnp.arange(12).reshape(2, 6))
    >>> round(float(loss), 1), float(count)
    (3.5, 10.0)
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must have shape (batch, time + 1), got {tokens.shape}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    tokens = jnp.asarray(tokens)
    labels = tokens[:, 1:]
    batch, length = labels.shape
    if mask is None:
        mask = jnp.ones(labels.shape, jnp.float32)
    elif mask.shape != labels.shape:
        raise ValueError(
            f"mask must have the predicted tokens' shape {labels.shape}, got {mask.shape}"
        )
    weights = jnp.asarray(mask, jnp.float32)
    if chunk is None:
        chunk = automatic_chunk(batch * length, model.config.vocab_size)
    placed = {"positions": positions, "segments": segments}
    given = {name: array for name, array in placed.items() if array is not None}
    hidden = model.hidden(tokens[:, :-1], **given)
    steps = math.ceil(length / max(1, chunk // batch))

    if steps == 1:
        total: Any = jnp.sum(cross_entropy(model.logits(hidden), labels) * weights)
    else:
        # Values that the head closes over (its traced weight) become arguments, since `_chunked` differentiates
        # them.
        logits, constants = jax.closure_convert(model.logits, _cut(hidden, steps)[0])
        total = jnp.asarray(_chunked(logits, steps, hidden, constants, labels, weights))
    count = jnp.sum(weights)
    return total / jnp.where(count > 0, count, 1.0), count


def document_positions(documents: jax.Array) -> jax.Array:
    """The position of each token in its document, from document numbers (B, T).

    >>> document_positions(jnp.array([[1, 1, 2, 2, 2, 0]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    place = jnp.arange(documents.shape[1])
    first = documents != jnp.pad(documents, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return place - jax.lax.cummax(jnp.where(first, place, 0), axis=1)


def automatic_chunk(tokens: int, vocab_size: int, batch_shards: int = 1) -> int:
    """The number of tokens whose float32 logits fill `CHUNK_BYTES` on each device, or all if there are fewer.

    Args:
        tokens: Number of tokens.
        vocab_size: Size of the vocabulary.
        batch_shards: Number of devices that the tokens are spread over.

    >>> automatic_chunk(2048, 8192)
    2048
    >>> automatic_chunk(131072, 32000)
    2097
    """
    return min(tokens, max(1, batch_shards * CHUNK_BYTES // (4 * vocab_size)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    logits: Callable[..., jax.Array],
    steps: int,
    hidden: jax.Array,
    constants: Sequence[jax.Array],
    labels: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """The weighted sum of all tokens' losses, chunk by chunk.

    The gradient of a sum of losses is known up to a factor once the sum is. If it is needed, the forward pass
    computes it with the loss, chunk by chunk, and the backward pass multiplies it by the cotangent. The forward
    pass keeps the gradient of the hidden states in their dtype and that of the head in float32. Recomputing the
    logits in the backward pass would keep the hidden states and take a fourth product.
    """

    def add(total, piece):
        return total + _summed(logits, piece[0], constants, *piece[1:]), None

    pieces = tuple(_cut(array, steps) for array in (hidden, labels, weights))
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), pieces)[0]


def _chunked_forward(logits, steps, hidden, constants, labels, weights):
    def add(carry, piece):
        total, sums = carry
        hidden, labels, weights = piece
        summed = partial(_summed, logits)
        loss, pull = jax.vjp(
            lambda hidden, constants, weights: summed(hidden, constants, labels, weights),
            hidden,
            constants,
            weights,
        )
        of_hidden, of_constants, of_weights = pull(jnp.ones((), jnp.float32))
        return (total + loss, jax.tree.map(jnp.add, sums, of_constants)), (of_hidden, of_weights)

    start = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, constants)
    pieces = tuple(_cut(array, steps) for array in (hidden, labels, weights))
    (total, of_constants), (of_hidden, of_weights) = jax.lax.scan(add, start, pieces)
    length = hidden.shape[1]
    return total, (_join(of_hidden, length), of_constants, _join(of_weights, length))


def _chunked_backward(logits, steps, saved, cotangent):
    of_hidden, of_constants, of_weights = jax.tree.map(
        lambda gradient: (gradient * cotangent).astype(gradient.dtype), saved
    )
    return of_hidden, of_constants, None, of_weights


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _summed(logits, hidden, constants, labels, weights):
    return jnp.sum(cross_entropy(logits(hidden, *constants), labels) * weights)


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood log(sum(exp(logits))) - logits[label], in float32.

    It keeps the logits and one number per token for the backward pass, which computes the gradient
    softmax(logits) - onehot(label) in one array and without a scatter.

    Args:
        logits: (..., V) float32.
        labels: (...) integers in [0, V).

    Returns:
        (...) float32.

    >>> float(cross_entropy(jnp.zeros(4), jnp.array(1))) == float(jnp.log(4.0))
    True
    """
    return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits, labels):
    logits = logits.astype(jnp.float32)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return log_sum - picked, (logits, log_sum, labels)


def _cross_entropy_backward(saved, cotangent):
    logits, log_sum, labels = saved
    index = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    softmax = jnp.exp(logits - log_sum[..., None])
    return (softmax - (index == labels[..., None])) * cotangent[..., None], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _cut(array: jax.Array, steps: int) -> jax.Array:
    """(B, T, ...) to (steps, B, ceil(T / steps), ...), padded with zeros (weight 0) at the end."""
    batch, length = array.shape[:2]
    size = math.ceil(length / steps)
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, steps * size - length)
    array = jnp.pad(array, padding).reshape(batch, steps, size, *array.shape[2:])
    return jnp.moveaxis(array, 1, 0)


def _join(pieces: jax.Array, length: int) -> jax.Array:
    """Inverts `_cut` without the padding: (steps, B, size, ...) to (B, length, ...)."""
    joined = jnp.moveaxis(pieces, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
