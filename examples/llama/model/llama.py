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

from examples.llama.model.attention import Implementation
from examples.llama.model.blocks import (
    Block,
    Constrain,
    KVCache,
    RMSNorm,
    flat_dot_general,
    linear,
    rotary_tables,
    unconstrained,
)
from examples.llama.model.config import LlamaConfig
from examples.llama.model.embedding import lookup, transposed

Params = dict[str, Any]
"""A pure nested dict of arrays (or of `jax.ShapeDtypeStruct`), as from `create`."""


class Llama(nnx.Module):
    """A Llama decoder: embedding, pre-norm blocks, final norm, tied or untied head, no biases.

    Norm statistics, the softmax and the logits are float32 for any compute dtype. The same seed gives the same
    parameters scanned and unscanned.

    Args:
        config: The shape.
        scan_layers: Whether to stack the blocks' parameters on axis 0 and scan over them, so that compile time
            does
            not grow with depth. Otherwise there is one submodule per block.
        remat: Recompute each block's activations in the backward pass instead of keeping them.
        dtype: Dtype of the matrix products and of the residual stream; parameters are float32.
        constrain: Constrains activations on a mesh, often `examples.llama.devices.mesh.Activations`; hashable.
        attention: The attention implementation; see `examples.llama.model.attention`.
        rngs: Random numbers for the initial parameters; `nnx.Rngs(0)` when None.

    >>> from examples.llama.model.config import preset
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
        constrain: Constrain = unconstrained,
        attention: Implementation = "auto",
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.config = config
        self.constrain = constrain
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
        # One key per block in both forms, which makes the two forms equal.
        keys = jax.random.split(rngs.params(), config.num_layers)
        block = partial(_make_block, config, self.dtype, constrain, attention)
        if scan_layers:
            self.layers = nnx.vmap(block)(keys)
        else:
            self.layers = nnx.List([block(key) for key in keys])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, self.dtype)
        if not config.tie_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, config, self.dtype, rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Returns the float32 logits (B, T, V) of int32 tokens (B, T); see `hidden`."""
        return self.logits(self.hidden(tokens, positions))

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Runs embedding, blocks and final norm.

        Args:
            tokens: int32 (B, T). Attention is causal in the order of axis 1.
            positions: int32 (T,) or (B, T), the rotary position of each token; 0 .. T-1 when None.
            segments: int32 (B, T), the document of each token; a token sees only its own document.
                None means one document per row.

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
        visible = None
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]
            visible = same & jnp.tri(length, dtype=bool)
        return self.norm(self._run_blocks(self._embed(tokens), rotary, visible))

    def cached(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        visible: jax.Array,
        cache: KVCache,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, KVCache]:
        """Runs tokens after those in a cache, and adds their keys and values to it.

        Args:
            tokens: int32 (B, T).
            positions: int32 (B, T), the rotary positions.
            visible: bool (B, T, S), the slots that each token sees, its own included.
            cache: From `init_cache` or an earlier call.
            slot: Slot of the first token; the others follow. `slot + T` must not exceed S.

        Returns:
            Hidden states (B, T, d) in the compute dtype and the next cache.
        """
        rotary = rotary_tables(self.config, positions)
        x = self._embed(tokens)

        def run(graphdef, carry, arrays, layer):
            x, cache = carry
            return nnx.merge(graphdef, arrays).cached(x, rotary, visible, cache, layer, slot)

        if isinstance(self.layers, Block):
            graphdef, state = nnx.split(self.layers)
            arrays = (nnx.to_pure_dict(state), jnp.arange(self.config.num_layers))
            (x, cache), _ = jax.lax.scan(
                lambda carry, one: (run(graphdef, carry, *one), None), (x, cache), arrays
            )
        else:
            for layer, block in enumerate(self.layers):
                x, cache = block.cached(x, rotary, visible, cache, layer, slot)
        return self.norm(x), cache

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of `slots` tokens for each of `batch` sequences."""
        config = self.config
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        return KVCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Multiplies hidden states (..., d) by the head; float32 (..., V)."""
        if self.config.tie_embeddings:
            weight = transposed(jnp.asarray(self.embed_tokens.embedding[...]))
        else:
            weight = self.lm_head.kernel[...]
        logits = flat_dot_general(
            hidden,
            weight.astype(self.dtype),
            (((hidden.ndim - 1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return self.constrain(logits, "batch", *(None,) * (hidden.ndim - 2), "vocab")

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # A traced array cannot index a NumPy embedding (parameters from a file). On a mesh its features are
        # gathered, not its tokens: each device looks up those it has.
        table = self.constrain(jnp.asarray(self.embed_tokens.embedding[...]), "vocab", None)
        return self.constrain(lookup(table, tokens, self.dtype), "batch", None, None)

    def _run_blocks(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        visible: jax.Array | None = None,
    ) -> jax.Array:
        # Blocks are merged from pure arrays inside the body: for scan and checkpoint they are ordinary
        # functions of arrays, and no NNX object crosses a trace.
        blocks = [self.layers] if isinstance(self.layers, Block) else list(self.layers)

        def run(graphdef, x, arrays, rotary, visible):
            return nnx.merge(graphdef, arrays)(x, rotary, visible)

        if self.remat:
            run = jax.checkpoint(run, static_argnums=(0,), prevent_cse=not self.scan_layers)
        for block in blocks:
            graphdef, state = nnx.split(block)
            arrays = nnx.to_pure_dict(state)
            if self.scan_layers:
                x, _ = jax.lax.scan(
                    lambda x, one, graphdef=graphdef: (
                        run(graphdef, x, one, rotary, visible),
                        None,
                    ),
                    x,
                    arrays,
                )
            else:
                x = run(graphdef, x, arrays, rotary, visible)
        return x


def create(
    config: LlamaConfig,
    seed: int | jax.Array = 0,
    *,
    scan_layers: bool = True,
    remat: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> tuple[nnx.GraphDef[Llama], Params]:
    """Initialises a model as static structure and a pure dict of arrays.

    The parameters may be created inside `jax.jit` with `out_shardings`, so that a large model is created
    sharded: `jax.jit(lambda seed: create(config, seed)[1])`.

    Args:
        config: The shape.
        seed: Seed of the initial parameters, or a `jax.random.key`.
        scan_layers: See `Llama`.
        remat: See `Llama`.
        dtype: See `Llama`.

    Returns:
        `graphdef`, hashable and static, and `params`, a nested dict of float32 arrays. A training step is an
        ordinary function of `params`.

    >>> from examples.llama.model.config import preset
    >>> graphdef, params = create(preset("demo", vocab_size=32, hidden_size=16, num_layers=2))
    >>> params["layers"]["mlp"]["gate_proj"]["kernel"].shape
    (2, 16, 512)
    >>> apply(graphdef, params)(jnp.zeros((1, 3), jnp.int32)).shape
    (1, 3, 32)
    """
    rngs = nnx.Rngs(_as_key(seed))
    model = Llama(config, scan_layers=scan_layers, remat=remat, dtype=dtype, rngs=rngs)
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract(config: LlamaConfig, *, scan_layers: bool = True) -> Params:
    """Returns the parameters' shapes and dtypes without allocating anything.

    Args:
        config: The shape.
        scan_layers: See `Llama`.

    Returns:
        `create`'s dict with `jax.ShapeDtypeStruct` leaves.

    >>> from examples.llama.model.config import preset
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
    constrain: Constrain = unconstrained,
    attention: Implementation = "auto",
) -> nnx.GraphDef[Llama]:
    """Returns only `create`'s graphdef, without allocating anything (for loaded parameters)."""
    options = {"remat": remat, "dtype": dtype, "constrain": constrain, "attention": attention}
    return nnx.split(nnx.eval_shape(lambda: Llama(config, scan_layers=scan_layers, **options)))[0]


def apply(graphdef: nnx.GraphDef[Llama], params: Params) -> Llama:
    """Binds parameters to a structure; cheap, for use inside a traced function."""
    return nnx.merge(graphdef, params)


def stack_layers(params: Params) -> Params:
    """Turns the pure dict of an unscanned model into that of a scanned one.

    Args:
        params: Parameters whose `layers` holds one dict per layer.

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

    >>> from examples.llama.model.config import preset
    >>> _, params = create(preset("demo", vocab_size=32, hidden_size=16, num_layers=2))
    >>> sorted(unstack_layers(params)["layers"])
    [0, 1]
    """
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(depth)}
    return {**params, "layers": layers}


def _as_key(seed: int | jax.Array) -> jax.Array:
    """A key unchanged, or an integer, traced or not, as a key."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    return jax.random.key(seed)


def _make_block(
    config: LlamaConfig,
    dtype: DTypeLike,
    constrain: Constrain,
    attention: Implementation,
    key: jax.Array,
) -> Block:
    return Block(config, dtype, nnx.Rngs(key), constrain, attention)


def parameter_count(config: LlamaConfig) -> int:
    """Counts the parameters of a model without allocating any of them.

    Args:
        config: The shape.

    Returns:
        The number of parameters; a tied embedding counts once.

    >>> from examples.llama.model.config import preset
    >>> parameter_count(preset("llama2_7b"))
    6738415616
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))
