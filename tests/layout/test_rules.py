"""Inference: user's rules, presets, stacks, unnamed leaves, boxes, and the loud error."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import sage_optax
from layout_optax import ParamLayout, infer_layout, resolve_layout, rules
from layout_optax.leaves import flatten_with_layout
from layout_optax.stacks import find_stack
from tests.layout.trees import Keyless


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def infer(path: str, *sizes: int, rules=()) -> ParamLayout:
    tree = shape(*sizes)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return jax.tree.leaves(infer_layout(tree, rules), is_leaf=lambda x: isinstance(x, ParamLayout))[
        0
    ]


M, E, HEAD, VEC = "matrix", "embedding", "head", "vector"


@pytest.mark.parametrize(
    ("path", "sizes", "expected"),
    [
        ("embed_tokens/embedding", (96, 16), (E, (0,), (1,))),
        ("model/embed_tokens/weight", (96, 16), (E, (0,), (1,))),
        ("token_embedder/embedding", (96, 16), (E, (0,), (1,))),
        ("transformer/wte", (96, 16), (E, (0,), (1,))),
        ("embed", (96, 16), (E, (0,), (1,))),
        ("lm_head/kernel", (16, 96), (HEAD, (1,), (0,))),
        ("lm_head/weight", (96, 16), (HEAD, (0,), (1,))),
        ("lm_head", (16, 96), (HEAD, (1,), (0,))),
        ("output/weight", (96, 16), (HEAD, (0,), (1,))),
        ("unembed/kernel", (16, 96), (HEAD, (1,), (0,))),
        ("layers/0/attention/output/dense/kernel", (16, 16), (M, (1,), (0,))),
        ("layers/q", (3, 16, 4, 4), (M, (2, 3), (1,))),
        ("layers/o", (3, 4, 4, 16), (M, (3,), (1, 2))),
        ("layers/w1", (3, 16, 40), (M, (2,), (1,))),
        ("layers/norm/scale", (3, 16), (VEC, (), (1,))),
        ("layers/attn_norm", (3, 16), (VEC, (), (1,))),
        ("layers/skip_gain", (3,), (VEC, (), ())),
        ("layers_0/attention/value/bias", (4, 4), (VEC, (), (0, 1))),
        ("blocks/attention/value/bias", (3, 4, 4), (VEC, (), (1, 2))),
        ("layers/0/experts/w_in", (8, 16, 40), (M, (2,), (1,))),
        ("layers/experts/w_in", (3, 8, 16, 40), (M, (3,), (2,))),
        ("layers/0/moe/experts/weight", (8, 40, 16), (M, (1,), (2,))),
        ("layers/0/mlp/router/kernel", (16, 8), (M, (1,), (0,))),
        ("layers/0/input_layernorm/weight", (16,), (VEC, (), (0,))),
        ("embed_norm/scale", (16,), (VEC, (), (0,))),
        ("temperature", (), (VEC, (), ())),
        ("w", (16, 40), (M, (1,), (0,))),
        ("rotary_embed/inv_freq", (8,), (VEC, (), (0,))),
        ("lm_head/bias", (96,), (VEC, (), (0,))),
        ("encoder_layers/mlp/kernel", (3, 16, 40), (M, (2,), (1,))),
        ("params/decoder/layers/self_attention/query/bias", (4, 3, 4), (VEC, (), (0, 2))),
    ],
)
def test_presets(path, sizes, expected):
    assert infer(path, *sizes) == ParamLayout(*expected)


@pytest.mark.parametrize(
    ("path", "sizes", "expected"),
    [
        # Gemma, Qwen 3 MoE and LoRA factors, as Tunix and google-deepmind/gemma name them; EasyDeL's norms.
        ("layers/0/attn/q_einsum/w", (8, 64, 16), (M, (0, 2), (1,))),
        ("layers/0/attn/k_einsum/w", (2, 64, 16), (M, (0, 2), (1,))),
        ("layers/0/attn/kv_einsum/w", (2, 2, 64, 16), (M, (1, 3), (2,))),
        ("layers/0/attn/qkv_einsum/w", (3, 8, 64, 16), (M, (1, 3), (2,))),
        ("layers/0/attn/attn_vec_einsum/w", (8, 16, 64), (M, (2,), (0, 1))),
        ("layers/attn/q_einsum/w", (3, 8, 64, 16), (M, (1, 3), (2,))),
        ("layer_0/mlp/gating_einsum", (2, 128, 64), (M, (1,), (2,))),
        ("layer_0/mlp/gating_einsum", (2, 64, 128), (M, (2,), (1,))),
        ("layer_0/mlp/linear", (128, 64), (M, (1,), (0,))),
        ("embedder/per_layer_input_embedding", (256, 3, 16), (E, (0,), (1, 2))),
        ("layers/1/mlp/gate_proj", (4, 64, 128), (M, (2,), (1,))),
        ("layers/1/mlp/down_proj", (4, 128, 64), (M, (2,), (1,))),
        ("layers/mlp/down_proj", (3, 128, 64), (M, (2,), (1,))),
        ("layers/0/attn/q_proj/w_lora_b", (4, 8, 16), (M, (1, 2), (0,))),
        ("layers/0/attn/o_proj/w_lora_a", (8, 16, 4), (M, (2,), (0, 1))),
        ("model/layers/0/input_layernorm/kernel", (32,), (VEC, (), (0,))),
        # MaxText, scanned (layers on axis 1) and not.
        ("decoder/layers/moe_block/gate/kernel", (64, 3, 8), (M, (2,), (0,))),
        ("decoder/dense_layers/self_attention/wkv_a/kernel", (64, 3, 48), (M, (2,), (0,))),
        ("decoder/dense_layers/self_attention/wkv_b/kernel", (32, 3, 4, 16), (M, (2, 3), (0,))),
        (
            "decoder/moe_layers/DeepSeekMoeBlock_0/shared_experts/wi_0/kernel",
            (64, 3, 96),
            (M, (2,), (0,)),
        ),
        ("decoder/moe_layers_0/self_attention/query/kernel", (64, 4, 16), (M, (1, 2), (0,))),
        ("decoder/moe_layers_0/self_attention/out/kernel", (4, 16, 64), (M, (2,), (0, 1))),
        ("decoder/layers/layers_0/GptOssAttention/query/kernel", (64, 2, 4, 16), (M, (2, 3), (0,))),
        ("decoder/layers/layers_0/GptOssAttention/out/kernel", (4, 2, 16, 64), (M, (3,), (0, 2))),
        ("decoder/layers/layers_0/GptOssMlp/gate/kernel", (64, 2, 8), (M, (2,), (0,))),
        ("decoder/layers/layers_0/GptOssMlp/wi_0", (8, 2, 64, 96), (M, (3,), (2,))),
        ("decoder/layers_0/GptOssMlp/wi_0", (8, 64, 96), (M, (2,), (1,))),
        ("decoder/layers_0/GptOssMlp/wi_0_bias", (8, 96), (VEC, (), (1,))),
        # The flat names of a state dictionary.
        ("model.layers.0.self_attn.q_proj.weight", (32, 16), (M, (0,), (1,))),
        ("model.embed_tokens.weight", (96, 16), (E, (0,), (1,))),
    ],
)
def test_presets_of_frameworks(path, sizes, expected):
    assert infer(path, *sizes) == ParamLayout(*expected)


@pytest.mark.parametrize(
    ("path", "sizes", "expected"),
    [
        ("embeddings/token_embeddings/weight", (128, 32), (E, (0,), (1,))),
        ("lm_head/weight", (128, 32), (HEAD, (0,), (1,))),
        ("transformer/norm/weight", (32,), (VEC, (), (0,))),
        ("layers/stacked/self_attn/q_proj/weight", (2, 2, 2, 8, 32), (M, (1, 2, 3), (4,))),
        ("layers/stacked/self_attn/k_proj/weight", (2, 2, 8, 32), (M, (1, 2), (3,))),
        ("layers/stacked/self_attn/o_proj/weight", (2, 32, 4, 8), (M, (1,), (2, 3))),
        ("layers/stacked/self_attn/q_proj/bias", (2, 2, 2, 8), (VEC, (), (1, 2, 3))),
        ("layers/stacked/mlp/gate_proj/weight", (2, 64, 32), (M, (1,), (2,))),
        ("layers/stacked/mlp/experts/w1/weight", (2, 4, 32, 64), (M, (3,), (2,))),
        ("layers/stacked/input_layernorm/weight", (2, 32), (VEC, (), (1,))),
    ],
)
def test_the_node_around_a_haliax_array_adds_nothing_to_its_path(path, sizes, expected):
    tree = Keyless(shape(*sizes))
    for name in reversed(path.split("/")):
        tree = {name: tree}
    leaves = flatten_with_layout(None, tree)
    assert leaves.paths == [path]
    assert leaves.layouts == [ParamLayout(*expected)]
    # The optimizer's state is a tree of the same nodes: initialised, updated, described by the same path.
    assert path in sage_optax.describe(tree, optax.adam(1e-3))


@pytest.mark.parametrize(
    ("path", "sizes"),
    [
        ("conv/kernel", (3, 3, 8, 16)),
        ("layers/fused_qkv/kernel", (3, 16, 3, 4, 4)),
        ("layers/0/mlp/wo", (8, 40, 16)),
        ("layers/mlp/kernel", (16, 40)),  # a kernel that cannot be a stack of kernels
        ("patch_embed/kernel", (4, 4, 3, 16)),
        ("bank", (2, 16, 40)),
    ],
)
def test_an_unexplained_leaf_is_an_error_that_names_path_and_rule(path, sizes):
    with pytest.raises(ValueError, match="no rule explains") as error:
        infer(path, *sizes)
    assert path in str(error.value)
    assert "rules=[" in str(error.value)
    assert infer(path, *sizes, rules=[(path, "matrix")]).role == "matrix"


def test_the_users_rules_come_first_and_the_first_match_wins():
    rules = [("up", ParamLayout(M, (-2,), (-1,))), ("up/kernel", VEC)]
    assert infer("layers/0/up/kernel", 4, 6, rules=rules) == ParamLayout(M, (0,), (1,))
    assert infer("head/kernel", 6, 4, rules=[("head", E)]) == ParamLayout(E, (0,), (1,))
    with pytest.raises(ValueError, match="unknown role 'dense'"):
        infer("w", 4, 6, rules=[("w", "dense")])
    with pytest.raises(ValueError, match="'w'"):
        infer("w", 4, 6, rules=[("w", ParamLayout(M, (2,), (0,)))])


def test_none_in_a_rule_means_not_ours_and_survives_as_a_layout_tree():
    params = {"a": {"kernel": shape(4, 6)}, "b": {"kernel": shape(4, 6)}}
    tree = infer_layout(params, rules=[("^a/", None)])
    assert isinstance(tree["a"]["kernel"], optax.MaskedNode)
    assert resolve_layout(tree, params) == tree
    # None in a layout tree, in contrast, asks for inference.
    again = resolve_layout({"a": None, "b": optax.MaskedNode()}, params)
    assert again["a"]["kernel"].role == M
    assert isinstance(again["b"]["kernel"], optax.MaskedNode)


def test_unnamed_leaves():
    expect = [
        ParamLayout(VEC, (), ()),
        ParamLayout(VEC, (), (0,)),
        ParamLayout(M, (1,), (0,)),
        ParamLayout(M, (2,), (1,)),
        ParamLayout(M, (3,), (2,)),
    ]
    leaves = [shape(*(2, 3, 4, 5)[:ndim]) for ndim in range(5)]
    assert infer_layout(leaves) == expect
    assert infer_layout(leaves[3]) == expect[3]


def test_stack_detection():
    assert find_stack("layers/q/kernel", 3).axes == (0,)
    assert find_stack("model/decoder_blocks/q/kernel", 3).axes == (0,)
    assert find_stack("layers/norm_scale", 0).axes == ()
    for path in ("layers/0/q", "layers_0/q", "block/q", "my/kernel", "layers", "layers/blocks/0/q"):
        assert find_stack(path, 3).axes == (), path


def test_maxtext_keeps_layers_on_axis_1_and_nests_them():
    assert find_stack("params/decoder/layers/mlp/wi_0/kernel", 3).axes == (1,)
    assert find_stack("decoder/layers/local_layers/attention/A_log", 3).axes == (1, 2)
    assert find_stack("decoder/layers_0/mlp/wi_0/kernel", 2).axes == ()
    # Other names under a decoder say nothing of MaxText.
    other = find_stack("decoder/layers/mlp/up_proj/kernel", 3)
    assert other.axes == (0,)
    assert "MaxText" in other.guess


def test_layout_trees_prefixes_callables_and_dimension_numbers():
    params = {"layers": {"a": shape(3, 4, 6), "b": shape(3, 6, 4)}, "x": None}
    one = ParamLayout(M, (-2,), (-1,))
    assert resolve_layout(one, params["layers"])["a"] == ParamLayout(M, (1,), (2,))
    assert resolve_layout({"layers": one, "x": None}, params)["layers"]["b"].row_axes == (1,)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
    assert resolve_layout({"layers": numbers}, params)["layers"]["a"] == ParamLayout(M, (1,), (2,))
    assert resolve_layout(lambda tree: {"layers": one}, params)["x"] is None
    with pytest.raises(ValueError, match="no entry for 'layers/b'"):
        resolve_layout({"layers": {"a": one}}, params)
    with pytest.raises(TypeError, match="'layers/a'"):
        resolve_layout({"layers": {"a": 3, "b": one}}, params)


def test_a_layout_tree_is_masked_inside_partition_and_masked():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((5,)), "none": None}
    tree = {"a": ParamLayout(M, 0, 1), "b": ParamLayout(VEC, (), 0), "none": None}
    seen = []

    def init(tree_in):
        seen.append(flatten_with_layout(tree, tree_in).layouts)
        return optax.EmptyState()

    tx = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
    optax.partition({"m": tx, "v": tx}, {"a": "m", "b": "v", "none": "v"}).init(params)
    assert seen == [[tree["a"], None, None], [None, tree["b"], None]]


def test_placeholder_trees_of_map_params_have_no_leaves():
    tx = optax.GradientTransformation(
        lambda p: flatten_with_layout({"w": None}, p).map(lambda path, layout, leaf: leaf),
        lambda g, s, p=None: (g, s),
    )
    params = {"w": jnp.ones((2, 3))}
    assert optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))["w"][0, 0] == 2


def test_nnx_paths_are_the_same_at_init_and_update():
    model = nnx.MultiHeadAttention(
        num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0), use_bias=True
    )
    state = nnx.state(model, nnx.Param)
    boxed = flatten_with_layout(None, state)
    pure = flatten_with_layout(None, nnx.to_pure_dict(state))
    assert dict(zip(boxed.paths, boxed.layouts, strict=True)) == dict(
        zip(pure.paths, pure.layouts, strict=True)
    )
    layouts = dict(zip(pure.paths, pure.layouts, strict=True))
    assert layouts["value/kernel"] == ParamLayout(M, (1, 2), (0,))
    assert layouts["out/kernel"] == ParamLayout(M, (2,), (0, 1))
    assert layouts["value/bias"] == ParamLayout(VEC, (), (0, 1))


def test_linen_boxes_lose_only_their_own_value():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, (None, "x"))
            return nn.Dense(6, kernel_init=init, name="value")(x)

    params = Model().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert isinstance(params["value"]["kernel"], nn.Partitioned)
    assert flatten_with_layout(None, params).paths == ["value/bias", "value/kernel"]


def test_rules_reach_a_transformation_as_a_partial():
    params = {"w": shape(4, 6)}
    layout = functools.partial(infer_layout, rules=[("w", ParamLayout(M, 0, 1))])
    assert resolve_layout(layout, params)["w"] == ParamLayout(M, (0,), (1,))


def test_a_leaf_is_inferred_once_however_often_an_optimizer_asks():
    """Init and update ask for roles, rates and directions; the rules are tried once a leaf."""
    width = 37  # a shape that no other test has
    params = {
        "embed_tokens": {"embedding": jnp.ones((width, 8))},
        "layers": {str(i): {"up": {"kernel": jnp.ones((8, width))}} for i in range(9)},
    }
    tx = sage_optax.sage_hybrid(1e-3, matrix_learning_rate=1e-4)
    before = rules._infer.cache_info().misses
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state, params)
    assert rules._infer.cache_info().misses - before == 10
