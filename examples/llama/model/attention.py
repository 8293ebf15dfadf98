"""Grouped-query softmax attention with an implementation for each device: plain products, XLA's or cuDNN's."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Implementation = Literal["auto", "plain", "xla", "cudnn"]
"""`plain`: two batched products here, the fastest on a CPU. `xla`: `jax.nn.dot_product_attention`, on every
platform. `cudnn`: the same function with cuDNN's flash attention, which writes no scores; CUDA, 16 bits, cuDNN.
`auto`: see `chosen`."""

_SIXTEEN_BITS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_WIDEST_HEAD = 128  # cuDNN supports 256 from Hopper on, 128 before


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: Implementation = "auto"
) -> jax.Array:
    """Softmax attention in which a token sees itself and earlier tokens.

    Args:
        q: (B, T, heads, head_dim).
        k: (B, T, kv_heads, head_dim); heads are grouped consecutively.
        v: (B, T, kv_heads, head_dim).
        implementation: See `Implementation`.

    Returns:
        (B, T, heads, head_dim) in the dtype of `v`; the softmax is float32.

    Raises:
        ValueError: The implementation is unknown.
    """
    found = chosen(implementation, q, k, masked=False)
    if found == "plain":
        return plain_attention(q, k, v, jnp.tri(q.shape[1], dtype=bool)[None])
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=found)


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Softmax attention with a mask of visible keys for each query.

    Args:
        q: (B, T, heads, head_dim).
        k: (B, S, kv_heads, head_dim); heads are grouped consecutively.
        v: (B, S, kv_heads, head_dim).
        visible: bool (B, T, S) or (1, T, S); every query must see at least one key.
        implementation: See `Implementation`.

    Returns:
        (B, T, heads, head_dim) in the dtype of `v`; the softmax is float32.

    Raises:
        ValueError: The implementation is unknown.
    """
    found = chosen(implementation, q, k, masked=True)
    if found == "plain":
        return plain_attention(q, k, v, visible)
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation=found)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """`masked_attention` as two batched products with the scores in float32 between them.

    The heads that share a key head are folded into the time axis, so that keys are not repeated and both
    products are plain batched matrix products. This is twice as fast on CPU as an einsum over separate group
    axes at 8 x 256 tokens.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.transpose(0, 2, 1, 3).reshape(batch, kv_heads, group * length, head_dim)
    k = k.transpose(0, 2, 3, 1)
    v = v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q * head_dim**-0.5, k, preferred_element_type=jnp.float32)
    seen = jnp.tile(visible, (1, group, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    out = jnp.matmul(weights, v).reshape(batch, heads, length, head_dim)
    return out.transpose(0, 2, 1, 3)


def chosen(
    implementation: Implementation, q: jax.Array, k: jax.Array, *, masked: bool
) -> Literal["plain", "xla", "cudnn"]:
    """Resolves `auto`; any other implementation stays as it is.

    The choice is made when the function is traced, by the platform of the trace, and not in the compiled
    program, where a branch for each platform would keep the residuals of all of them for the backward pass. A
    program lowered for another platform keeps this choice; `plain` and `xla` lower for all.

    Raises:
        ValueError: The implementation is unknown.

    >>> q = jnp.zeros((1, 4, 2, 8))
    >>> chosen("auto", q, q, masked=False) if platform() == "cpu" else "plain"
    'plain'
    """
    if implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"attention: unknown implementation {implementation!r}; choose {names}")
    if implementation != "auto":
        return implementation
    if platform() == "cpu":
        return "plain"
    return "cudnn" if platform() == "cuda" and _fits_cudnn(q, k, masked) else "xla"


def platform() -> str:
    """The platform of a function that is traced now: `cpu`, `cuda`, `rocm` or `tpu`.

    It is that of the default device if there is one, else that of the default backend.
    """
    default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    named = default is None or isinstance(default, str)
    device: Any = jax.devices(default)[0] if named else default
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def _fits_cudnn(q: jax.Array, k: jax.Array, masked: bool) -> bool:
    head_dim = q.shape[-1]
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fits = head_dim % 8 == 0 and head_dim <= _WIDEST_HEAD
    return q.dtype in _SIXTEEN_BITS and fits and (even or not masked)
