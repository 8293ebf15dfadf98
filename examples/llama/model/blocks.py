"""The pieces of a Llama block: norm, rotary embedding, grouped-query attention and SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from examples.llama.model.attention import Implementation, causal_attention, masked_attention
from examples.llama.model.config import LlamaConfig

Constrain = Callable[..., jax.Array]
"""A function that constrains an activation on a mesh, given the name, or None, of each of its dimensions."""


def unconstrained(x: jax.Array, *names: str | None) -> jax.Array:
    """Returns the activation; without a mesh there is no constraint."""
    del names
    return x


class KVCache(NamedTuple):
    """Keys (rotated) and values of the tokens so far, in all layers.

    Attributes:
        keys: (layers, B, S, kv_heads, head_dim) in the compute dtype; S slots, written in order.
        values: Likewise.
    """

    keys: jax.Array
    values: jax.Array


class Block(nnx.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: LlamaConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        constrain: Constrain = unconstrained,
        attention: Implementation = "auto",
    ) -> None:
        self.constrain = constrain
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs, constrain, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs, constrain)

    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Maps the residual stream (B, T, d) to the next; `visible` as in `masked_attention`."""
        attended = self.self_attn(self.input_layernorm(x), rotary, visible)
        return self._add(x, attended)

    def cached(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        visible: jax.Array,
        cache: KVCache,
        layer: jax.Array | int,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, KVCache]:
        """The same for tokens in slots `slot` .. `slot + T - 1` of a layer's cache."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), rotary)
        keys, values = (
            jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (layer, 0, slot, 0, 0))
            for old, new in zip(cache, (k, v), strict=True)
        )
        attended = self.self_attn.mix(q, keys[layer], values[layer], visible)
        return self._add(x, attended), KVCache(keys, values)

    def _add(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = x + self.constrain(attended, "batch", None, None)
        return x + self.constrain(self.mlp(self.post_attention_layernorm(x)), "batch", None, None)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary embeddings."""

    def __init__(
        self,
        config: LlamaConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        constrain: Constrain = unconstrained,
        attention: Implementation = "auto",
    ) -> None:
        self.constrain = constrain
        self.attention: Implementation = attention
        self.head_dim = config.head_dim
        heads = config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, heads, config, dtype, rngs)
        self.k_proj = linear(config.hidden_size, kv_heads, config, dtype, rngs)
        self.v_proj = linear(config.hidden_size, kv_heads, config, dtype, rngs)
        self.o_proj = linear(heads, config.hidden_size, config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Maps (B, T, d) to (B, T, d), causally or with the mask `visible`."""
        return self.mix(*self.project(x, rotary), visible)

    def project(
        self, x: jax.Array, rotary: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (B, T, heads, head_dim) of (B, T, d), the first two rotated."""
        batch, length, _ = x.shape
        q, k, v = (
            self.constrain(
                projection(x).reshape(batch, length, -1, self.head_dim), "batch", None, heads, None
            )
            for projection, heads in (
                (self.q_proj, "heads"),
                (self.k_proj, "kv_heads"),
                (self.v_proj, "kv_heads"),
            )
        )
        return apply_rotary(q, rotary), apply_rotary(k, rotary), v

    def mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None = None
    ) -> jax.Array:
        """Attention and the output projection, (B, T, d)."""
        if visible is None:
            out = causal_attention(q, k, v, self.attention)
        else:
            out = masked_attention(q, k, v, visible, self.attention)
        return self.o_proj(out.reshape(*q.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        config: LlamaConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        constrain: Constrain = unconstrained,
    ) -> None:
        self.constrain = constrain
        wide, narrow = config.intermediate_size, config.hidden_size
        self.gate_proj = linear(narrow, wide, config, dtype, rngs)
        self.up_proj = linear(narrow, wide, config, dtype, rngs)
        self.down_proj = linear(wide, narrow, config, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, d) to (B, T, d)."""
        gate, up = (
            self.constrain(projection(x), "batch", None, "mlp")
            for projection in (self.gate_proj, self.up_proj)
        )
        return self.down_proj(jax.nn.silu(gate) * up)


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
    """Angular frequencies theta^(-2i / head_dim), float32 (head_dim / 2,), with optional rescaling.

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


def flat_dot_general(
    x: jax.Array,
    weight: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.dot_general` of (..., d) and a matrix, with the leading axes folded into one.

    With two leading axes the gradient of the weight contracts over both. XLA's CPU backend then transposes and
    copies both operands, which made a block's backward pass 1.6 times slower.
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
    """A projection without bias: float32 kernel (in, out), initialised from N(0, init_std^2)."""
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
