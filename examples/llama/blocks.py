"""The pieces of a Llama block: norm, rotary embedding, grouped-query attention and SwiGLU."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from examples.llama.presets import LlamaConfig


class Block(nnx.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Maps the residual stream (B, T, d) to the next."""
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary embeddings."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        heads = config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, heads, config, dtype, rngs)
        self.k_proj = linear(config.hidden_size, kv_heads, config, dtype, rngs)
        self.v_proj = linear(config.hidden_size, kv_heads, config, dtype, rngs)
        self.o_proj = linear(heads, config.hidden_size, config, dtype, rngs)

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Maps (B, T, d) to (B, T, d)."""
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).reshape(batch, length, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = causal_attention(apply_rotary(q, rotary), apply_rotary(k, rotary), v)
        return self.o_proj(out.reshape(batch, length, -1))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        wide, narrow = config.intermediate_size, config.hidden_size
        self.gate_proj = linear(narrow, wide, config, dtype, rngs)
        self.up_proj = linear(narrow, wide, config, dtype, rngs)
        self.down_proj = linear(wide, narrow, config, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, d) to (B, T, d)."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; returns `dtype`."""

    def __init__(self, features: int, eps: float, dtype: DTypeLike) -> None:
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises (..., d)."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...]).astype(self.dtype)


def rotary_tables(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, float32 (..., T, 1, head_dim / 2)."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angular frequencies theta^(-2i / head_dim), float32 (head_dim / 2,), rescaled if asked.

    Llama 3.1's scaling divides the frequency by `factor` where the wavelength exceeds the original
    context over `low_freq_factor`, keeps it where it is below the context over `high_freq_factor`
    and interpolates between the two linearly in (context / wavelength).
    """
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (keep + (1.0 - keep) / scaling.factor)
    return frequencies.astype(np.float32)


def apply_rotary(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates (B, T, heads, head_dim); feature i is paired with i + head_dim / 2 (halves)."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention in which a token sees itself and earlier tokens.

    The heads that share a key head are folded into the time axis, so that keys are not repeated
    and both products are plain batched matrix products (twice as fast on CPU as an einsum over
    separate group axes at 8 x 256 tokens).

    Args:
        q: (B, T, heads, head_dim).
        k: (B, T, kv_heads, head_dim); heads are grouped consecutively.
        v: (B, T, kv_heads, head_dim).

    Returns:
        (B, T, heads, head_dim) in the dtype of `v`; the softmax is float32.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.transpose(0, 2, 1, 3).reshape(batch, kv_heads, group * length, head_dim)
    k = k.transpose(0, 2, 3, 1)
    v = v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q * head_dim**-0.5, k, preferred_element_type=jnp.float32)
    seen = jnp.tile(jnp.tri(length, dtype=bool), (group, 1))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    out = jnp.matmul(weights, v).reshape(batch, heads, length, head_dim)
    return out.transpose(0, 2, 1, 3)


def flat_dot_general(
    x: jax.Array,
    weight: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.dot_general` of (..., d) and a matrix, with the leading axes folded into one.

    With two leading axes the gradient of the weight contracts over both; XLA's CPU backend then
    transposes and copies both operands, which made a block's backward pass 1.6 times slower.
    """
    (contracted_x, contracted_weight), batch = dimension_numbers
    if contracted_x != (x.ndim - 1,) or batch != ((), ()):
        raise ValueError(f"only the last axis can be contracted, got {dimension_numbers}")
    flat = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        weight,
        (((1,), contracted_weight), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
        **kwargs,
    )
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


def linear(
    features_in: int, features_out: int, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A projection without bias: float32 kernel (in, out), N(0, init_std^2) at the start."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.normal(config.init_std),
        dot_general=flat_dot_general,
        rngs=rngs,
    )
