"""The shapes of one small Llama in every naming style that the presets know, without allocating."""

from __future__ import annotations

import jax
import jax.numpy as jnp

V, D, F, L, H, K = 96, 16, 40, 3, 4, 4  # vocabulary, features, ffn, layers, heads, head_dim


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _nnx_layer(*lead: int):
    kernel = lambda rows, columns: {"kernel": _shape(*lead, rows, columns)}  # noqa: E731
    return {
        "input_layernorm": {"scale": _shape(*lead, D)},
        "self_attn": {f"{name}_proj": kernel(D, D) for name in "qkvo"},
        "post_attention_layernorm": {"scale": _shape(*lead, D)},
        "mlp": {"gate_proj": kernel(D, F), "up_proj": kernel(D, F), "down_proj": kernel(F, D)},
    }


def _nnx(layers):
    return {
        "embed_tokens": {"embedding": _shape(V, D)},
        "layers": layers,
        "norm": {"scale": _shape(D)},
        "lm_head": {"kernel": _shape(D, V)},
    }


def nnx_scanned():
    """Flax NNX, layers stacked on axis 0, two-dimensional kernels."""
    return _nnx(_nnx_layer(L))


def nnx_unscanned():
    """Flax NNX, layers in a list."""
    return _nnx({index: _nnx_layer() for index in range(2)})


def _linen_layer(*lead: int):
    qkv = {"kernel": _shape(*lead, D, H, K), "bias": _shape(*lead, H, K)}
    return {
        "attention_norm": {"scale": _shape(*lead, D)},
        "attention": {
            "query": qkv,
            "key": qkv,
            "value": qkv,
            "out": {"kernel": _shape(*lead, H, K, D), "bias": _shape(*lead, D)},
        },
        "mlp_norm": {"scale": _shape(*lead, D)},
        "mlp": {
            "gate": {"kernel": _shape(*lead, D, F)},
            "up": {"kernel": _shape(*lead, D, F)},
            "down": {"kernel": _shape(*lead, F, D)},
        },
    }


def linen():
    """Flax Linen with MultiHeadDotProductAttention's DenseGeneral kernels and biases, unscanned."""
    return {
        "params": {
            "embed": {"embedding": _shape(V, D)},
            "layers_0": _linen_layer(),
            "final_norm": {"scale": _shape(D)},
            "lm_head": {"kernel": _shape(D, V)},
        }
    }


def linen_scanned():
    """The same under `nn.scan`, layers on axis 0."""
    return {
        "params": {
            "embed": {"embedding": _shape(V, D)},
            "layers": _linen_layer(L),
            "final_norm": {"scale": _shape(D)},
            "lm_head": {"kernel": _shape(D, V)},
        }
    }


def maxtext():
    """MaxText: scanned layers on axis 1, DenseGeneral attention, an experts block beside the MLP."""
    attention = {name: {"kernel": _shape(D, L, H, K)} for name in ("query", "key", "value")}
    return {
        "params": {
            "token_embedder": {"embedding": _shape(V, D)},
            "decoder": {
                "layers": {
                    "pre_self_attention_layer_norm": {"scale": _shape(D, L)},
                    "self_attention": {**attention, "out": {"kernel": _shape(H, L, K, D)}},
                    "post_self_attention_layer_norm": {"scale": _shape(D, L)},
                    "mlp": {
                        "wi_0": {"kernel": _shape(D, L, F)},
                        "wi_1": {"kernel": _shape(D, L, F)},
                        "wo": {"kernel": _shape(F, L, D)},
                    },
                    "MoeBlock_0": {
                        "gate": {"kernel": _shape(D, L, 8)},
                        "wi_0": _shape(8, L, D, F),
                        "wi_1": _shape(8, L, D, F),
                        "wo": _shape(8, L, F, D),
                    },
                },
                "decoder_norm": {"scale": _shape(D)},
                "logits_dense": {"kernel": _shape(D, V)},
            },
        }
    }


def _torch_layer(*lead: int):
    weight = lambda out, inputs: {"weight": _shape(*lead, out, inputs)}  # noqa: E731
    return {
        "input_layernorm": {"weight": _shape(*lead, D)},
        "self_attn": {f"{name}_proj": weight(D, D) for name in "qkvo"},
        "post_attention_layernorm": {"weight": _shape(*lead, D)},
        "mlp": {"gate_proj": weight(F, D), "up_proj": weight(F, D), "down_proj": weight(D, F)},
    }


def hugging_face():
    """Hugging Face and Equinox: weights (out, in), layers in a list."""
    return {
        "model": {
            "embed_tokens": {"weight": _shape(V, D)},
            "layers": [_torch_layer()],
            "norm": {"weight": _shape(D)},
        },
        "lm_head": {"weight": _shape(V, D)},
    }


def equinox_stacked():
    """Equinox with the layers stacked by `jax.vmap` of the constructor, None where there is no bias."""
    layers = _torch_layer(L)
    layers["self_attn"]["q_proj"]["bias"] = None
    return {
        "embedding": {"weight": _shape(V, D)},
        "layers": layers,
        "norm": {"weight": _shape(D), "bias": None},
        "lm_head": {"weight": _shape(V, D), "bias": None},
    }


STYLES = {
    make.__name__: make
    for make in (
        nnx_scanned,
        nnx_unscanned,
        linen,
        linen_scanned,
        maxtext,
        hugging_face,
        equinox_stacked,
    )
}
