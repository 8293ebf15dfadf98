"""The Llama decoder in Flax NNX: scanned or not, float32 parameters, optional bf16 compute.

Parameter paths (a scanned model has one more leading axis of length `num_layers` under `layers`,
an unscanned one an integer component after `layers`):

    embed_tokens/embedding                        (V, d)
    layers/self_attn/{q,k,v,o}_proj/kernel        (in, out)
    layers/mlp/{gate,up,down}_proj/kernel         (in, out)
    layers/{input,post_attention}_layernorm/scale (d,)
    norm/scale                                    (d,)
    lm_head/kernel                                (d, V), absent when the head is tied
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from examples.llama.presets import LlamaConfig

Params = dict[str, Any]
"""A pure nested dict of arrays (or of `jax.ShapeDtypeStruct`), as `create` returns it."""


class Llama(nnx.Module):
    """A Llama decoder: embedding, pre-norm blocks, final norm, tied or untied head, no biases.

    Norm statistics, the softmax and the logits are float32 whatever the compute dtype. The same
    seed gives the same parameters scanned and unscanned.

    Args:
        config: The shape.
        scan_layers: Stack the blocks' parameters on axis 0 and scan over them, so that compile
            time does not grow with depth. Otherwise one sub-module a block.
        remat: Recompute each block's activations in the backward pass instead of keeping them.
        dtype: Dtype of the matrix products and of the residual stream; parameters are float32.
        rngs: Source of the initial parameters; `nnx.Rngs(0)` when None.

    >>> from examples.llama.presets import preset
    >>> model = Llama(preset("demo", vocab_size=32, hidden_size=16, num_layers=2))
    >>> model(jnp.zeros((1, 5), jnp.int32)).shape
    (1, 5, 32)
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        scan_layers: bool = True,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.config = config
        self.scan_layers = scan_layers
        self.remat = remat
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=jnp.float32,
            embedding_init=nnx.initializers.normal(config.init_std),
            rngs=rngs,
        )
        # One key a block, whichever form: that is what makes the two forms equal.
        keys = jax.random.split(rngs.params(), config.num_layers)
        block = partial(_make_block, config, self.dtype)
        if scan_layers:
            self.layers = nnx.vmap(block)(keys)
        else:
            self.layers = nnx.List([block(key) for key in keys])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, self.dtype)
        if not config.tie_embeddings:
            self.lm_head = _linear(config.hidden_size, config.vocab_size, config, self.dtype, rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Returns the float32 logits (B, T, V) of int32 tokens (B, T); see `hidden`."""
        return self.logits(self.hidden(tokens, positions))

    def hidden(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Runs embedding, blocks and final norm.

        Args:
            tokens: int32 (B, T). Attention is causal in the order of axis 1.
            positions: int32 (T,) or (B, T), the rotary position of each token; 0 .. T-1 when None.

        Returns:
            (B, T, d) in the compute dtype.

        Raises:
            ValueError: `tokens` is not 2-D or is longer than `config.max_seq_len`.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (batch, time), got {tokens.shape}")
        length = tokens.shape[1]
        if length > self.config.max_seq_len:
            raise ValueError(
                f"{length} tokens are more than max_seq_len ({self.config.max_seq_len}); "
                "raise max_seq_len in the configuration"
            )
        if positions is None:
            positions = jnp.arange(length)
        rotary = rotary_tables(self.config, positions)
        x = self.embed_tokens.embedding[...][tokens].astype(self.dtype)
        return self.norm(self._run_blocks(x, rotary))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Multiplies hidden states (..., d) by the head; float32 (..., V)."""
        spec, weight = (
            ("...d,vd->...v", self.embed_tokens.embedding[...])
            if self.config.tie_embeddings
            else ("...d,dv->...v", self.lm_head.kernel[...])
        )
        return jnp.einsum(
            spec, hidden, weight.astype(self.dtype), preferred_element_type=jnp.float32
        )

    def _run_blocks(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
        # Blocks are merged from pure arrays inside the body: to scan and to checkpoint they are
        # ordinary functions of arrays, and nothing of NNX crosses a trace.
        blocks = [self.layers] if self.scan_layers else list(self.layers)

        def run(graphdef, x, arrays, rotary):
            return nnx.merge(graphdef, arrays)(x, rotary)

        if self.remat:
            run = jax.checkpoint(run, static_argnums=(0,), prevent_cse=not self.scan_layers)
        for block in blocks:
            graphdef, state = nnx.split(block)
            arrays = nnx.to_pure_dict(state)
            if self.scan_layers:
                x, _ = jax.lax.scan(
                    lambda x, one, graphdef=graphdef: (run(graphdef, x, one, rotary), None),
                    x,
                    arrays,
                )
            else:
                x = run(graphdef, x, arrays, rotary)
        return x


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
        self.q_proj = _linear(config.hidden_size, heads, config, dtype, rngs)
        self.k_proj = _linear(config.hidden_size, kv_heads, config, dtype, rngs)
        self.v_proj = _linear(config.hidden_size, kv_heads, config, dtype, rngs)
        self.o_proj = _linear(heads, config.hidden_size, config, dtype, rngs)

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
        self.gate_proj = _linear(narrow, wide, config, dtype, rngs)
        self.up_proj = _linear(narrow, wide, config, dtype, rngs)
        self.down_proj = _linear(wide, narrow, config, dtype, rngs)

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


def create(
    config: LlamaConfig,
    seed: int | jax.Array = 0,
    *,
    scan_layers: bool = True,
    remat: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> tuple[nnx.GraphDef[Llama], Params]:
    """Initialises a model as static structure and a pure dict of arrays.

    The parameters may be created inside `jax.jit` (with `out_shardings`, so that a large model is
    born sharded): `jax.jit(lambda seed: create(config, seed)[1])`.

    Args:
        config: The shape.
        seed: Seed of the initial parameters, or a `jax.random.key`.
        scan_layers: See `Llama`.
        remat: See `Llama`.
        dtype: See `Llama`.

    Returns:
        `graphdef`, hashable and static, and `params`, a nested dict of float32 arrays. A training
        step is an ordinary function of `params`.

    >>> from examples.llama.presets import preset
    >>> graphdef, params = create(preset("demo", vocab_size=32, hidden_size=16, num_layers=2))
    >>> params["layers"]["mlp"]["gate_proj"]["kernel"].shape
    (2, 16, 512)
    >>> apply(graphdef, params)(jnp.zeros((1, 3), jnp.int32)).shape
    (1, 3, 32)
    """
    model = Llama(
        config, scan_layers=scan_layers, remat=remat, dtype=dtype, rngs=nnx.Rngs(params=seed)
    )
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract(config: LlamaConfig, *, scan_layers: bool = True) -> Params:
    """Returns the parameters' shapes and dtypes without allocating anything.

    Args:
        config: The shape.
        scan_layers: See `Llama`.

    Returns:
        `create`'s dict with `jax.ShapeDtypeStruct` leaves.

    >>> from examples.llama.presets import preset
    >>> abstract(preset("llama2_7b"))["lm_head"]["kernel"].shape
    (4096, 32000)
    """
    return jax.eval_shape(lambda: create(config, 0, scan_layers=scan_layers)[1])


def structure(
    config: LlamaConfig,
    *,
    scan_layers: bool = True,
    remat: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> nnx.GraphDef[Llama]:
    """Returns `create`'s graphdef alone, without allocating anything (for loaded parameters)."""
    return nnx.split(
        nnx.eval_shape(lambda: Llama(config, scan_layers=scan_layers, remat=remat, dtype=dtype))
    )[0]


def apply(graphdef: nnx.GraphDef[Llama], params: Params) -> Llama:
    """Binds parameters to a structure; cheap, made to be called inside a traced function."""
    return nnx.merge(graphdef, params)


def stack_layers(params: Params) -> Params:
    """Turns the pure dict of an unscanned model into that of a scanned one.

    Args:
        params: Parameters whose `layers` holds one dict a layer.

    Returns:
        The same with each block leaf stacked on axis 0; NumPy leaves stay NumPy.

    Raises:
        ValueError: `layers` is not indexed 0 .. n-1.
    """
    layers: Mapping[Any, Any] = {int(key): value for key, value in params["layers"].items()}
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(f"layers must be numbered from 0 without gaps, got {sorted(layers)}")

    def stack(*leaves: ArrayLike) -> ArrayLike:
        if all(isinstance(leaf, np.ndarray) for leaf in leaves):
            return np.stack(leaves)
        return jnp.stack(leaves)

    stacked = jax.tree.map(stack, *(layers[index] for index in range(len(layers))))
    return {**params, "layers": stacked}


def unstack_layers(params: Params) -> Params:
    """Turns the pure dict of a scanned model into that of an unscanned one.

    >>> from examples.llama.presets import preset
    >>> _, params = create(preset("demo", vocab_size=32, hidden_size=16, num_layers=2))
    >>> sorted(unstack_layers(params)["layers"])
    [0, 1]
    """
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(depth)}
    return {**params, "layers": layers}


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


def _make_block(config: LlamaConfig, dtype: DTypeLike, key: jax.Array) -> Block:
    return Block(config, dtype, nnx.Rngs(key))


def _linear(
    features_in: int, features_out: int, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.normal(config.init_std),
        rngs=rngs,
    )
