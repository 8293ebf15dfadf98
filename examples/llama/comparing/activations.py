"""Estimates the memory of a training step apart from parameters, gradients and state, from the model's trace.

The forward pass is traced on abstract arrays, and the arrays that its backward pass reads are counted. With B
sequences of T tokens that grows as c + t T + B (a T^2 + b T), and linearly with the layers, so traces of tiny
batches and two depths give every size exactly. The estimate adds the logits of a chunk with their gradient, and
the recomputed block.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import abstract, apply, structure
from examples.llama.model.loss import automatic_chunk

ComputeDtype = Literal["float32", "bfloat16"]

_LENGTH = 8
"""Tokens in the shortest trace."""


@dataclass(frozen=True)
class Activations:
    """Bytes of a step on one device that depend on its batch.

    Attributes:
        kept: Arrays that the forward pass of embedding, blocks and final norm keeps for the backward pass.
        block: Arrays that one block recomputes, and its gradients, during its backward pass.
        logits: Logits of a chunk of tokens and their gradient.
    """

    kept: int
    block: int
    logits: int

    def peak(self, gradients: int, head_gradient: int) -> int:
        """The peak apart from parameters, state and all gradients.

        While the logits exist, only the head's gradient does; in the blocks the logits are freed.

        >>> Activations(kept=100, block=10, logits=80).peak(gradients=50, head_gradient=20)
        150
        """
        at_head = self.kept + self.logits + head_gradient - gradients
        return max(self.kept + self.block, at_head)


def activations(
    model: LlamaConfig,
    *,
    rows: int,
    length: int,
    compute_dtype: ComputeDtype = "float32",
    remat: bool = False,
    flash: bool = False,
    tensor: int = 1,
    fsdp: int = 1,
) -> Activations:
    """Estimates the memory of one device for its share of a batch.

    Args:
        model: The shape.
        rows: Sequences on the device.
        length: Predicted tokens per sequence.
        compute_dtype: Dtype of the matrix products.
        remat: Whether each block is recomputed in the backward pass.
        flash: Whether attention writes no scores, as cuDNN's; it then keeps one float32 per query and head.
        tensor: Devices that split heads, MLP and vocabulary, where they divide them.
        fsdp: Devices that split the parameters and their copies in the compute dtype.

    Raises:
        ValueError: A number is not positive.

    >>> from examples.llama.model.config import preset
    >>> found = activations(preset("demo"), rows=16, length=128)
    >>> found.kept > activations(preset("demo"), rows=16, length=128, remat=True).kept
    True
    """
    for name, number in (("rows", rows), ("length", length), ("tensor", tensor), ("fsdp", fsdp)):
        if number < 1:
            raise ValueError(f"activations: {name} must be at least 1, got {number}")
    shard = _shard(model, tensor)
    per_device = functools.partial(
        _kept, shard, rows=rows, length=length, dtype=compute_dtype, flash=flash, fsdp=fsdp
    )
    one, two = per_device(layers=1), per_device(layers=2)
    block = two - one
    if remat:
        one, two = per_device(layers=1, remat=True), per_device(layers=2, remat=True)
    kept = one + (model.num_layers - 1) * (two - one)
    tokens = rows * length
    chunk = automatic_chunk(tokens, model.vocab_size)
    kept += tokens * model.hidden_size * jnp.dtype(compute_dtype).itemsize if chunk < tokens else 0
    # The chunks are equal (`next_token_loss`), and cut along time.
    steps = -(-length // max(1, chunk // rows))
    logits = 2 * 4 * rows * -(-length // steps) * shard.vocab_size
    if fsdp > 1:  # the weights of one block, and the head, are gathered for their use
        itemsize = jnp.dtype(compute_dtype).itemsize
        block += itemsize * _block_weights(shard)
        logits += itemsize * shard.vocab_size * shard.hidden_size
    return Activations(kept=kept, block=block, logits=logits)


def _block_weights(model: LlamaConfig) -> int:
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    return model.hidden_size * (heads + 3 * model.intermediate_size)


def _shard(model: LlamaConfig, tensor: int) -> LlamaConfig:
    """The model that one of several devices computes in each layer."""

    def part(size: int) -> int:
        return size // tensor if size % tensor == 0 else size

    heads = model.num_heads % tensor == 0 and model.num_kv_heads % tensor == 0
    return dataclasses.replace(
        model,
        vocab_size=part(model.vocab_size),
        intermediate_size=part(model.intermediate_size),
        num_heads=model.num_heads // tensor if heads else model.num_heads,
        num_kv_heads=model.num_kv_heads // tensor if heads else model.num_kv_heads,
        head_dim=model.head_dim,
    )


def _kept(
    model: LlamaConfig,
    *,
    layers: int,
    rows: int,
    length: int,
    dtype: ComputeDtype,
    flash: bool,
    fsdp: int,
    remat: bool = False,
) -> int:
    """Bytes that the forward pass keeps, from traces of one and two sequences of two lengths."""
    model = dataclasses.replace(model, num_layers=layers, max_seq_len=2 * _LENGTH)
    short, long = _LENGTH, 2 * _LENGTH
    size = {
        (b, t): _residual_bytes(model, b, t, dtype, remat) for b in (1, 2) for t in (short, long)
    }
    of_rows = {t: size[2, t] - size[1, t] for t in (short, long)}  # a T^2 + b T
    shared = {t: size[1, t] - of_rows[t] for t in (short, long)}  # c + t T
    square = (of_rows[long] - 2 * of_rows[short]) / (2 * short * short)
    line = (of_rows[short] - square * short * short) / short
    per_token = (shared[long] - shared[short]) / short
    constant = shared[short] - per_token * short
    if flash:
        # With remat neither the scores nor their log-sum are kept.
        square, line = 0.0, line + (4 * layers * model.num_heads if square and not remat else 0)
    return round(
        constant / fsdp + per_token * length + rows * (square * length * length + line * length)
    )


@functools.cache
def _residual_bytes(
    model: LlamaConfig, rows: int, length: int, dtype: ComputeDtype, remat: bool
) -> int:
    """Bytes of the arrays that the backward pass reads from the forward pass, without parameters."""
    graphdef = structure(model, remat=remat, dtype=dtype, attention="plain")
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def backward(params: Any, tokens: jax.Array) -> Any:
        return jax.vjp(lambda params: apply(graphdef, params).hidden(tokens), params)[1]

    traced: Any = jax.make_jaxpr(backward)(abstract(model), tokens).jaxpr
    given = set(traced.invars)
    kept = dict.fromkeys(v for v in traced.outvars if type(v).__name__ != "Literal")
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept if v not in given)
