"""Adapters: the start, merging, forms, DoRA against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.finetuning.adapters import (
    TARGETS,
    AdapterSpec,
    adapted_structure,
    column_norms,
    init_adapters,
    merge_adapters,
)
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import apply, stack_layers, structure, unstack_layers
from examples.llama.model.subtrees import merge_trees, split_params, trainable_patterns
from tests.llama.random_params import random_params

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    tie_embeddings=True,
)
KINDS = pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
TOKENS = jnp.arange(18).reshape(2, 9) % CONFIG.vocab_size


def perturbed(adapters, seed=0):
    """Adapters after some training: B no longer zero, magnitudes moved."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), adapters)


def adapted(spec, params, adapters, **form):
    graphdef = adapted_structure(CONFIG, spec, **form)
    return apply(graphdef, merge_trees(params, adapters))(TOKENS)


@KINDS
def test_training_starts_from_the_model(kind):
    spec = AdapterSpec(kind, rank=3)
    params = random_params(CONFIG, scan_layers=True)
    logits = adapted(spec, params, init_adapters(params, spec, 0))
    np.testing.assert_allclose(logits, apply(structure(CONFIG), params)(TOKENS), atol=1e-5)


@KINDS
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj")])
def test_merged_model_computes_the_same(kind, targets):
    spec = AdapterSpec(kind, rank=3, alpha=5.0, targets=targets)
    params = random_params(CONFIG, scan_layers=True)
    adapters = perturbed(init_adapters(params, spec, 0))
    merged = merge_adapters(params, adapters, spec)
    plain = apply(structure(CONFIG), merged)(TOKENS)
    np.testing.assert_allclose(adapted(spec, params, adapters), plain, atol=2e-5)
    before = apply(structure(CONFIG), params)(TOKENS)
    assert np.abs(plain - before).max() > 1e-2
    for name in set(TARGETS) - set(targets):
        part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        same = (tree["layers"][part][name]["kernel"] for tree in (merged, params))
        np.testing.assert_array_equal(*same)


def test_scanned_and_unscanned_layers_agree():
    spec = AdapterSpec("dora", rank=3)
    params = random_params(CONFIG)
    adapters = init_adapters(params, spec, 7)
    stacked = init_adapters(stack_layers(params), spec, 7)
    assert jax.tree.all(jax.tree.map(np.array_equal, stack_layers(adapters), stacked))
    stacked = perturbed(stacked)
    unscanned = adapted(spec, params, unstack_layers(stacked), scan_layers=False)
    np.testing.assert_allclose(adapted(spec, stack_layers(params), stacked), unscanned, atol=1e-5)


def test_layers_and_targets_start_differently():
    spec = AdapterSpec(rank=3)
    layers = init_adapters(random_params(CONFIG, scan_layers=True), spec, 0)["layers"]
    query, key = (layers["self_attn"][name]["lora"]["lora_a"] for name in ("q_proj", "k_proj"))
    assert not np.array_equal(query[0], query[1])
    assert not np.array_equal(query, key)


def test_dora_is_its_definition():
    """Gradients too: the norm is a constant in them."""
    rng = np.random.default_rng(0)
    w, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5), (6, 2), (2, 5)))
    np.testing.assert_allclose(
        column_norms(w, a, b, 0.7), np.linalg.norm(w + 0.7 * a @ b, axis=0), rtol=1e-5
    )


def test_gradient_of_dora_keeps_the_norm_constant():
    spec = AdapterSpec("dora", rank=2)
    params = random_params(CONFIG, scan_layers=True)
    adapters = perturbed(init_adapters(params, spec, 0))
    graphdef = adapted_structure(CONFIG, spec)

    def loss(adapters):
        return jnp.sum(apply(graphdef, merge_trees(params, adapters))(TOKENS) ** 2)

    gradient = jax.grad(loss)(adapters)["layers"]["mlp"]["up_proj"]
    # Along B itself the direction of each column still turns; along m the output is linear, so
    # m's gradient must equal the directional derivative of scaling the column.
    step = 1e-3
    moved = jax.tree.map(lambda x: x, adapters)
    place = moved["layers"]["mlp"]["up_proj"]
    place["magnitude"] = place["magnitude"] * (1 + step)
    numeric = (loss(moved) - loss(adapters)) / step
    exact = jnp.sum(gradient["magnitude"] * adapters["layers"]["mlp"]["up_proj"]["magnitude"])
    np.testing.assert_allclose(numeric, exact, rtol=2e-2)
    assert np.abs(gradient["lora"]["lora_a"]).max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "ia3"}, "unknown adapter 'ia3'"),
        ({"rank": 0}, "must be positive"),
        ({"alpha": -1.0}, "must be positive"),
        ({"targets": ("qkv",)}, "choose among q_proj"),
        ({"targets": ()}, "choose among q_proj"),
    ],
)
def test_specifications_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdapterSpec(**arguments)


@pytest.mark.parametrize("scan", [True, False])
def test_matrices_are_attention_and_mlp(scan):
    params = random_params(CONFIG, scan_layers=scan)
    trained, frozen = split_params(params, trainable_patterns("matrices"))
    rest = jax.tree_util.tree_flatten_with_path(frozen)[0]
    assert {path[-1].key for path, _ in rest} == {"embedding", "scale"}
    kernels = jax.tree_util.tree_flatten_with_path(trained)[0]
    assert {path[-2].key for path, _ in kernels} == set(TARGETS)
    joined = merge_trees(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, joined, params))


def test_an_untied_head_is_no_matrix():
    params = {"layers": {"mlp": {"up_proj": {"kernel": 1}}}, "lm_head": {"kernel": 2}}
    assert split_params(params, trainable_patterns("matrices"))[1] == {"lm_head": {"kernel": 2}}


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter matches 'layers/attn/\*'; they are"):
        split_params(random_params(CONFIG), ["layers/attn/*"])
    with pytest.raises(ValueError, match="both trees hold 'x'"):
        merge_trees({"a": {"x": 1}}, {"a": {"x": 1}})
