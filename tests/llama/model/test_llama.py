"""The Llama model: paths, the equality of its forms, attention, rotary, precision, sharding."""

import dataclasses
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.llama.model.attention import causal_attention
from examples.llama.model.blocks import (
    apply_rotary,
    flat_dot_general,
    rotary_frequencies,
    rotary_tables,
)
from examples.llama.model.config import LlamaConfig, RopeScaling
from examples.llama.model.llama import (
    Llama,
    abstract,
    apply,
    create,
    stack_layers,
    structure,
    unstack_layers,
)
from tests.llama.random_params import random_params

TIED = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
    rope_theta=500.0,
    rope_scaling=RopeScaling(original_max_position_embeddings=16),
    max_seq_len=32,
)
# Heads wider than hidden_size / num_heads, so that no two sizes of a kernel are equal.
UNTIED = LlamaConfig(
    vocab_size=36,
    hidden_size=12,
    intermediate_size=20,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
# All matrices 64 x 64: one random generator to compile.
SQUARE = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    init_std=0.05,
)
CONFIGS = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])


def tokens_for(config, batch=2, length=9, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)


@partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens, positions=None):
    return apply(graphdef, params)(tokens, positions)


def shapes(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}


def logits_and_gradient(graphdef, params, tokens):
    def loss(params):
        logits = apply(graphdef, params)(tokens)
        return jnp.mean(jnp.square(logits)) * 1e3, logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, gradient


def test_paths_and_shapes_unscanned():
    d, q, kv, wide = 12, 16, 8, 20
    expected = {
        "embed_tokens/embedding": (36, d),
        "norm/scale": (d,),
        "lm_head/kernel": (d, 36),
    }
    for i in range(2):
        expected |= {
            f"layers/{i}/self_attn/q_proj/kernel": (d, q),
            f"layers/{i}/self_attn/k_proj/kernel": (d, kv),
            f"layers/{i}/self_attn/v_proj/kernel": (d, kv),
            f"layers/{i}/self_attn/o_proj/kernel": (q, d),
            f"layers/{i}/mlp/gate_proj/kernel": (d, wide),
            f"layers/{i}/mlp/up_proj/kernel": (d, wide),
            f"layers/{i}/mlp/down_proj/kernel": (wide, d),
            f"layers/{i}/input_layernorm/scale": (d,),
            f"layers/{i}/post_attention_layernorm/scale": (d,),
        }
    assert shapes(abstract(UNTIED, scan_layers=False)) == expected


def test_paths_and_shapes_scanned():
    unscanned = shapes(abstract(UNTIED, scan_layers=False))
    scanned = shapes(abstract(UNTIED))
    expected = {path: shape for path, shape in unscanned.items() if "layers/" not in path}
    for path, shape in unscanned.items():
        if path.startswith("layers/0/"):
            expected[path.replace("/0/", "/")] = (2, *shape)
    assert scanned == expected
    assert "lm_head" not in abstract(TIED)


def test_forms_start_equal():
    scanned, unscanned = (create(SQUARE, 5, scan_layers=scan)[1] for scan in (True, False))
    chex.assert_trees_all_equal(stack_layers(unscanned), scanned)
    chex.assert_trees_all_equal(unstack_layers(scanned), unscanned)


@CONFIGS
def test_forms_compute_equal_logits(config):
    tokens, params = tokens_for(config), random_params(config)
    unscanned = forward(structure(config, scan_layers=False), params, tokens)
    assert unscanned.shape == (2, 9, config.vocab_size)
    scanned = forward(structure(config), stack_layers(params), tokens)
    np.testing.assert_allclose(scanned, unscanned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scan", "remat"), [(True, False), (True, True), (False, True)])
def test_forms_compute_equal_gradients(plain_gradient, scan, remat):
    graphdef = structure(TIED, scan_layers=scan, remat=remat)
    params = random_params(TIED, scan_layers=scan)
    gradient = logits_and_gradient(graphdef, params, tokens_for(TIED))[1]
    gradient = unstack_layers(gradient) if scan else gradient
    chex.assert_trees_all_close(gradient, plain_gradient, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def plain_gradient():
    graphdef = structure(TIED, scan_layers=False)
    return logits_and_gradient(graphdef, random_params(TIED), tokens_for(TIED))[1]


@pytest.mark.parametrize("scan", [True, False])
def test_remat_wraps_each_block(scan):
    def checkpoints(remat):
        graphdef = structure(TIED, scan_layers=scan, remat=remat)
        params = abstract(TIED, scan_layers=scan)
        jaxpr = jax.make_jaxpr(lambda p: apply(graphdef, p)(tokens_for(TIED)))(params)
        return sum("remat" in eqn.primitive.name for eqn in equations(jaxpr.jaxpr))

    assert checkpoints(remat=False) == 0
    assert checkpoints(remat=True) == (1 if scan else TIED.num_layers)


def test_scanned_program_does_not_grow_with_depth():
    def size(layers, scan):
        config = dataclasses.replace(TIED, num_layers=layers)
        graphdef = structure(config, scan_layers=scan)
        params = abstract(config, scan_layers=scan)
        jaxpr = jax.make_jaxpr(lambda p: apply(graphdef, p)(tokens_for(config)))(params)
        return sum(1 for _ in equations(jaxpr.jaxpr))

    assert size(2, True) == size(5, True)
    assert size(2, False) < size(5, False)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub)


def test_create_and_abstract_agree():
    for scan in (True, False):
        graphdef, params = create(SQUARE, 0, scan_layers=scan)
        expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        assert abstract(SQUARE, scan_layers=scan) == expected
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        assert graphdef == structure(SQUARE, scan_layers=scan)
        assert hash(graphdef) == hash(structure(SQUARE, scan_layers=scan))


def test_create_inside_jit_and_from_a_key():
    expected = create(SQUARE, 3)[1]
    inside = jax.jit(lambda seed: create(SQUARE, seed)[1])(3)
    chex.assert_trees_all_close(inside, expected, rtol=1e-5, atol=1e-8)
    chex.assert_trees_all_equal(create(SQUARE, jax.random.key(3))[1], expected)


def test_initial_values():
    params = create(SQUARE, 0)[1]
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1.0)
        else:
            # Five standard errors of the estimate.
            tolerance = 5 * 0.05 / math.sqrt(2 * leaf.size)
            assert abs(float(jnp.std(leaf)) - 0.05) < tolerance, path
            assert abs(float(jnp.mean(leaf))) < 5 * 0.05 / math.sqrt(leaf.size), path
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert not np.allclose(kernel, params["layers"]["mlp"]["gate_proj"]["kernel"])
    assert not np.allclose(kernel, create(SQUARE, 1)[1]["layers"]["mlp"]["up_proj"]["kernel"])


def test_default_rngs_are_seed_zero():
    params = nnx.to_pure_dict(nnx.state(Llama(SQUARE)))
    chex.assert_trees_all_equal(params, create(SQUARE, 0)[1])


def test_stack_layers_keeps_numpy_and_checks_indices():
    params = random_params(UNTIED)
    assert isinstance(stack_layers(params)["layers"]["mlp"]["up_proj"]["kernel"], np.ndarray)
    layers = {1: params["layers"][0], 2: params["layers"][1]}
    with pytest.raises(ValueError, match=r"numbered from 0 without gaps, got \[1, 2\]"):
        stack_layers({**params, "layers": layers})


@CONFIGS
def test_causal(config):
    graphdef, params = structure(config), random_params(config, scan_layers=True)
    tokens = tokens_for(config, batch=1, length=8)
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % config.vocab_size)
    before, after = (forward(graphdef, params, x) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (jnp.max(jnp.abs(before[:, 5:] - after[:, 5:]), axis=-1) > 0).all()


def test_only_relative_positions_matter():
    graphdef, params = structure(TIED), random_params(TIED, scan_layers=True)
    tokens = tokens_for(TIED)
    plain = forward(graphdef, params, tokens)
    same = jnp.broadcast_to(jnp.arange(9), (2, 9))
    np.testing.assert_allclose(forward(graphdef, params, tokens, same), plain, atol=1e-6)
    shifted = forward(graphdef, params, tokens, same + jnp.array([[0], [11]]))
    np.testing.assert_allclose(shifted, plain, atol=1e-5)
    stretched = forward(graphdef, params, tokens, 3 * same)
    assert jnp.max(jnp.abs(stretched - plain)) > 1e-3


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 4, 5), (4, 2, 7), (6, 1, 1)])
def test_attention_against_loops(heads, kv_heads, length):
    rng = np.random.default_rng(heads + length)
    q = rng.normal(size=(2, length, heads, 6))
    k, v = rng.normal(size=(2, 2, length, kv_heads, 6))
    expected = np.zeros_like(q)
    for b in range(2):
        for h in range(heads):
            group = h // (heads // kv_heads)
            for t in range(length):
                scores = k[b, : t + 1, group] @ q[b, t, h] / math.sqrt(6)
                weights = np.exp(scores - scores.max())
                expected[b, t, h] = weights / weights.sum() @ v[b, : t + 1, group]
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    np.testing.assert_allclose(causal_attention(*arrays), expected, rtol=1e-5, atol=1e-6)


def test_rotary_pairs_halves():
    config = LlamaConfig(**{**vars(UNTIED), "rope_theta": 100.0})
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8))
    positions = jnp.array([0, 1, 7])
    rotated = apply_rotary(jnp.asarray(x, jnp.float32), rotary_tables(config, positions))
    turned = np.zeros_like(x)
    for t, position in enumerate([0, 1, 7]):
        for i in range(4):
            angle = position * 100.0 ** (-2 * i / 8)
            pair = (x[0, t, :, i] + 1j * x[0, t, :, i + 4]) * np.exp(1j * angle)
            turned[0, t, :, i], turned[0, t, :, i + 4] = pair.real, pair.imag
    np.testing.assert_allclose(rotated, turned, rtol=1e-5, atol=1e-6)


def test_llama31_frequencies_follow_the_three_cases():
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    config = LlamaConfig(**{**vars(TIED), "head_dim": 32, "rope_scaling": scaling})
    plain = LlamaConfig(**{**vars(config), "rope_scaling": None})
    cases = set()
    for scaled, frequency in zip(
        rotary_frequencies(config), rotary_frequencies(plain), strict=True
    ):
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4.0:
            case, expected = "kept", frequency
        elif wavelength > 64 / 1.0:
            case, expected = "stretched", frequency / 8.0
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            case, expected = "between", (1 - smooth) * frequency / 8.0 + smooth * frequency
        cases.add(case)
        assert scaled == pytest.approx(expected, rel=1e-6)
    assert cases == {"kept", "between", "stretched"}


@pytest.mark.parametrize("scan", [True, False])
def test_bfloat16_compute(scan):
    tokens = tokens_for(TIED)
    graphdef = structure(TIED, scan_layers=scan, dtype=jnp.bfloat16)
    params = random_params(TIED, scan_layers=scan)
    hidden = jax.eval_shape(lambda p: apply(graphdef, p).hidden(tokens), params)
    assert hidden.dtype == jnp.bfloat16
    logits = forward(graphdef, params, tokens)
    assert logits.dtype == jnp.float32
    exact = forward(structure(TIED, scan_layers=scan), params, tokens)
    assert 0 < jnp.max(jnp.abs(logits - exact)) < 0.03 * jnp.max(jnp.abs(exact))
    # Norms (rsqrt), the softmax (exp) and rotary angles are float32; projections are not.
    jaxpr = jax.make_jaxpr(lambda p: apply(graphdef, p)(tokens))(params)
    seen = {}
    for eqn in equations(jaxpr.jaxpr):
        inputs = {str(operand.aval.dtype) for operand in eqn.invars}
        seen[eqn.primitive.name] = seen.get(eqn.primitive.name, set()) | inputs
    assert seen["rsqrt"] == seen["exp"] == seen["reduce_max"] == seen["cos"] == {"float32"}
    assert seen["dot_general"] == {"bfloat16"}


def test_rejects_what_it_cannot_read():
    model = apply(structure(TIED), random_params(TIED, scan_layers=True))
    with pytest.raises(ValueError, match=r"33 tokens are more than max_seq_len \(32\)"):
        model(jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ValueError, match=r"shape \(batch, time\), got \(5,\)"):
        model(jnp.zeros((5,), jnp.int32))
    with pytest.raises(ValueError, match="only the last axis can be contracted"):
        flat_dot_general(jnp.ones((2, 3)), jnp.ones((2, 3)), (((0,), (0,)), ((), ())))


def test_sharded_equals_unsharded():
    """Batch over one mesh axis, output or input features over the other."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = [None] * leaf.ndim
        if "kernel" in name:
            axes[-2 if "o_proj" in name or "down_proj" in name else -1] = "model"
        elif "embedding" in name:
            axes[0] = "model"
        return jax.device_put(leaf, NamedSharding(mesh, P(*axes)))

    tokens = tokens_for(TIED, batch=4)
    graphdef, params = structure(TIED), random_params(TIED, scan_layers=True)
    expected = logits_and_gradient(graphdef, params, tokens)
    sharded = jax.tree_util.tree_map_with_path(place, params)
    split = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    chex.assert_trees_all_close(
        jax.device_get(logits_and_gradient(graphdef, sharded, split)),
        jax.device_get(expected),
        rtol=1e-4,
        atol=1e-5,
    )
