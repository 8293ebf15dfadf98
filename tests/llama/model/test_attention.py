"""Attention's implementations: equal values and gradients, the choice by platform, lowering, sharding."""

import dataclasses
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.model import attention
from examples.llama.model.attention import causal_attention, chosen, masked_attention
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import apply, structure
from examples.llama.model.loss import next_token_loss
from tests.llama.random_params import random_params

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=32,
)


def arrays(heads=4, kv_heads=2, length=12, slots=12, dtype=jnp.float32):
    rng = np.random.default_rng(heads + length)
    shapes = [(2, length, heads, 8), (2, slots, kv_heads, 8), (2, slots, kv_heads, 8)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def value_and_gradient(function, given):
    def loss(q, k, v):
        out = function(q, k, v).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)


SEGMENTS = np.array([[0] * 5 + [1] * 7, [0] * 2 + [1] * 1 + [2] * 9])
PACKED = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & np.tri(12, dtype=bool)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("visible", [None, PACKED], ids=["causal", "packed"])
def test_xla_is_plain_within_rounding(heads, kv_heads, visible):
    given = arrays(heads, kv_heads)

    def run(implementation):
        def function(q, k, v):
            if visible is None:
                return causal_attention(q, k, v, implementation)
            return masked_attention(q, k, v, jnp.asarray(visible), implementation)

        return value_and_gradient(function, given)

    chex.assert_trees_all_close(run("xla"), run("plain"), rtol=2e-5, atol=2e-6)


def test_one_query_over_a_cache():
    given = arrays(length=1, slots=9)
    visible = jnp.asarray(np.arange(9) < 6)[None, None]
    found = [masked_attention(*given, visible, which) for which in ("xla", "plain")]
    np.testing.assert_allclose(*found, rtol=2e-5, atol=2e-6)
    changed = given[1].at[:, 6:].set(9.0)
    np.testing.assert_array_equal(
        masked_attention(given[0], changed, given[2], visible, "xla"), found[0]
    )


def test_bfloat16_is_within_its_rounding_of_float32():
    exact = value_and_gradient(lambda q, k, v: causal_attention(q, k, v, "plain"), arrays())
    for which in ("xla", "plain"):
        near = value_and_gradient(
            lambda q, k, v, which=which: causal_attention(q, k, v, which),
            arrays(dtype=jnp.bfloat16),
        )
        for a, b in zip(jax.tree.leaves(near), jax.tree.leaves(exact), strict=True):
            error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
            assert error < 2e-2


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "length", "masked", "expected"),
    [
        ("cpu", jnp.bfloat16, 64, 8, False, "plain"),
        ("cpu", jnp.float32, 64, 8, True, "plain"),
        ("cuda", jnp.bfloat16, 64, 8, False, "cudnn"),
        ("cuda", jnp.float16, 128, 8, True, "cudnn"),
        ("cuda", jnp.float32, 64, 8, False, "xla"),
        ("cuda", jnp.bfloat16, 36, 8, False, "xla"),
        ("cuda", jnp.bfloat16, 256, 8, False, "xla"),
        ("cuda", jnp.bfloat16, 64, 7, True, "xla"),
        ("cuda", jnp.bfloat16, 64, 7, False, "cudnn"),
        ("rocm", jnp.bfloat16, 64, 8, False, "xla"),
        ("tpu", jnp.bfloat16, 64, 8, False, "xla"),
    ],
)
def test_auto(monkeypatch, platform, dtype, head_dim, length, masked, expected):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    q = jnp.zeros((1, length, 2, head_dim), dtype)
    assert chosen("auto", q, q, masked=masked) == expected
    assert chosen("xla", q, q, masked=masked) == "xla"


def test_what_cudnn_is_asked_for(monkeypatch):
    """There is no cuDNN here: the call is what can be seen."""
    monkeypatch.setattr(attention, "platform", lambda: "cuda")
    q, k, v = arrays(dtype=jnp.bfloat16)
    with mock.patch("jax.nn.dot_product_attention") as call:
        causal_attention(q, k, v)
        masked_attention(q, k, v, jnp.asarray(PACKED))
    causal, masked = call.call_args_list
    assert causal.kwargs == {"is_causal": True, "implementation": "cudnn"}
    assert masked.kwargs["implementation"] == "cudnn"
    assert masked.kwargs["mask"].shape == (2, 1, 12, 12)
    assert causal.args[1].shape[2] == 2  # key heads are not repeated


def test_platform_is_that_of_the_default_device():
    assert attention.platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[3]):
        assert attention.platform() == "cpu"


def test_unknown_implementation():
    with pytest.raises(
        ValueError, match=r"attention: unknown implementation 'flash'; choose auto,"
    ):
        causal_attention(*arrays(), "flash")


def loss_and_gradient(which, scan_layers=True, segments=None, params=None, tokens=None):
    graphdef = structure(CONFIG, scan_layers=scan_layers, attention=which)
    rng = np.random.default_rng(0)
    given = rng.integers(0, 40, (4, 13)) if tokens is None else tokens
    params = random_params(CONFIG, scan_layers=scan_layers) if params is None else params

    def loss(params, tokens):
        return next_token_loss(apply(graphdef, params), tokens, segments=segments)[0]

    return jax.jit(jax.value_and_grad(loss))(params, given)


@pytest.mark.parametrize("packed", [False, True])
def test_the_models_loss_and_gradient(packed):
    segments = jnp.asarray(np.concatenate([SEGMENTS, SEGMENTS])) if packed else None
    chex.assert_trees_all_close(
        loss_and_gradient("xla", segments=segments),
        loss_and_gradient("plain", segments=segments),
        rtol=1e-4,
        atol=1e-6,
    )


def test_sharded_equals_unsharded():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=kinds)
    spec, sharding = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    tokens = np.random.default_rng(0).integers(0, 40, (4, 13))
    params = random_params(CONFIG, scan_layers=True)
    expected = loss_and_gradient("plain", params=params, tokens=tokens)

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        axes: list = [None] * leaf.ndim
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            axes[-1] = "tensor"
        return jax.device_put(leaf, sharding(mesh, spec(*axes)))

    split = jax.tree_util.tree_map_with_path(place, params)
    placed = jax.device_put(tokens, sharding(mesh, spec("data")))
    found = loss_and_gradient("xla", params=split, tokens=placed)
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("which", ["auto", "xla"])
def test_a_gradient_lowers_for_other_platforms(platform, which):
    config = dataclasses.replace(CONFIG, num_layers=1)
    graphdef = structure(config, attention=which, dtype=jnp.bfloat16)

    def loss(params, tokens):
        return next_token_loss(apply(graphdef, params), tokens, chunk=8)[0]

    params = random_params(config, scan_layers=True)
    tokens = jax.ShapeDtypeStruct((4, 13), jnp.int32)
    traced = jax.jit(jax.value_and_grad(loss)).trace(params, tokens)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text
