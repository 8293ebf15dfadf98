"""Roles and axes of whole models, as frameworks name them, without a rule of the user's."""

from __future__ import annotations

import re

import pytest

from layout_optax.leaves import flatten_with_layout
from tests.layout import trees

MAXTEXT, TUNIX, HALIAX, EASYDEL, HUGGING_FACE = (
    trees.models(name) for name in ("maxtext", "tunix", "haliax", "easydel", "hugging_face")
)

EXPLAINED = {
    "heads in the output": r"self_attention_(local|global)/(query|key|value)/kernel$",
    "heads in the input": r"(self_attention_(local|global)|layers_\d+/attention)/out/kernel$",
    "q, k and v apart, heads in the output": r"self_attention/qkv_proj/kernel$",
    "a table of tokens": r"embed_tokens_per_layer$",
    "added, not multiplied": r"position_bias$",
    "one number a layer": r"layer_scalar$",
}
"""Where the answer is not MaxText's (docs/frameworks.md says why), by what it is instead."""


def found(leaves):
    """Path, leaf and layout of every leaf of a model."""
    flat = flatten_with_layout(None, trees.tree(leaves))
    by_path = {leaf.path.removesuffix("/0"): leaf for leaf in leaves}
    assert len(by_path) == len(leaves)
    assert set(flat.paths) == set(by_path)
    for path, layout in zip(flat.paths, flat.layouts, strict=True):
        yield path, by_path[path], layout


def sizes(leaf, axes):
    return tuple(leaf.shape[axis] for axis in axes)


def is_vector(path):
    words = r"(norm(_\d+)?|ln_\w+|scale(_\d+)?|bias|scalar|sinks|A_log|_beta|hc_base|conv1d|shared_expert_gate)"
    return re.search(rf"{words}(/(scale|kernel|weight|bias|w))?$", path) is not None


@pytest.mark.parametrize("model", MAXTEXT)
def test_maxtext_equals_its_own_muon_numbers(model):
    for path, leaf, layout in found(MAXTEXT[model]):
        if any(re.search(pattern, path) for pattern in EXPLAINED.values()):
            continue
        if leaf.numbers is None:
            assert layout.role != "matrix", path
        else:
            assert layout.role == "matrix", path
            assert (layout.column_axes, layout.row_axes) == leaf.numbers, path


@pytest.mark.parametrize("model", MAXTEXT)
def test_maxtext_explained_differences_are_what_they_are_said_to_be(model):
    expected = {
        "heads in the output": ("matrix", (-2, -1), (0,)),
        "q, k and v apart, heads in the output": ("matrix", (-2, -1), (0,)),
        "heads in the input": ("matrix", (-1,), (0, -2)),
        "a table of tokens": ("embedding", (0,), (1,)),
        "added, not multiplied": ("vector", (), (-1,)),
        "one number a layer": ("vector", (), (0,)),
    }
    for path, leaf, layout in found(MAXTEXT[model]):
        for reason, pattern in EXPLAINED.items():
            if re.search(pattern, path):
                role, rows, columns = expected[reason]
                count = len(leaf.shape)
                rows, columns = (tuple(a % count for a in axes) for axes in (rows, columns))
                assert (layout.role, layout.row_axes, layout.column_axes) == (role, rows, columns)


@pytest.mark.parametrize("model", MAXTEXT)
def test_maxtext_roles_and_batches(model):
    roles = []
    for path, leaf, layout in found(MAXTEXT[model]):
        roles.append(layout.role)
        assert (layout.role == "vector") == is_vector(path), path
        # Layers lie on axis 1, and then on axis 2 where scanned blocks hold scanned layers.
        scanned = re.search(r"decoder/(\w+_)?(layers|blocks)/", path)
        depth = 0 if scanned is None else 1 + ("/local_layers/" in path)
        layers = set(range(1, 1 + depth))
        batch = set(layout.batch_axes(len(leaf.shape)))
        assert layers <= batch, path
        if layout.role != "vector":
            grouped = re.search(r"/(wi_\d|wo|gate_up_proj)$|o_a_proj/kernel$", path)
            apart = {1 + depth} if path.endswith("qkv_proj/kernel") else set()
            assert batch - layers == ({0} if grouped else apart), path
    assert roles.count("embedding") == 1 + model.startswith(("gemma4-e2b", "gpt3"))
    assert roles.count("head") <= 1


@pytest.mark.parametrize("model", HALIAX)
def test_levanter_equals_its_modules_own_axes(model):
    roles = []
    for path, leaf, layout in found(HALIAX[model]):
        roles.append(layout.role)
        if leaf.numbers is None:
            assert layout.role == ("embedding" if "embeddings" in path else "vector"), path
        elif path.endswith("c_attn/weight"):  # q, k and v are apart
            assert layout == type(layout)("matrix", (3, 4), (1,))
        else:
            assert layout.role == ("head" if path == "lm_head/weight" else "matrix"), path
            assert (layout.column_axes, layout.row_axes) == leaf.numbers, path
    assert roles.count("embedding") == 1 + (model == "gpt2")


@pytest.mark.parametrize("model", [name for name in TUNIX if "Qwix" not in name])
def test_tunix_reads_features_where_its_einsums_do(model):
    leaves = TUNIX[model]
    (table,) = [leaf for leaf in leaves if leaf.path == "embedder/input_embedding"]
    vocabulary, features = table.shape
    for path, leaf, layout in found(leaves):
        if is_vector(path):
            assert layout.role == "vector", path
            continue
        rows, columns = sizes(leaf, layout.row_axes), sizes(leaf, layout.column_axes)
        if vocabulary in leaf.shape:
            assert layout.role == ("head" if path == "lm_head/w" else "embedding"), path
            assert rows == (vocabulary,), path
            continue
        assert layout.role == "matrix", path
        if re.search(r"(attn_vec_einsum/w|o_proj/w|down_proj(/kernel)?|moe/linear)$", path):
            assert rows == (features,), path
        elif path.endswith("per_layer_projection/w"):
            assert (rows, columns) == ((features,), (256,))
        else:
            assert columns == (features,), path
        batch = sizes(leaf, layout.batch_axes(len(leaf.shape)))
        expected = (
            (re.search(r"(^|/)kv_einsum", path) and (2,))
            or (re.search(r"(^|/)qkv_einsum", path) and (3,))
            or (path.endswith("moe/gating_einsum") and (128, 2))
            or (re.search(r"(mlp/\w+_proj|moe/linear)$", path) and (128,))
            or ()
        )  # fmt: skip
        assert batch == expected, path


@pytest.mark.parametrize("model", [name for name in TUNIX if "Qwix" in name])
def test_qwix_factors_read_the_rank_as_their_inner_axis(model):
    for path, leaf, layout in found(TUNIX[model]):
        assert layout.role == "matrix", path
        axes = layout.row_axes if path.endswith("lora_a") else layout.column_axes
        assert sizes(leaf, axes) == (8,), path
        assert not layout.batch_axes(len(leaf.shape)), path


@pytest.mark.parametrize("model", EASYDEL)
def test_easydel_kernels_are_in_out_and_its_norms_are_vectors(model):
    roles = []
    for path, leaf, layout in found(EASYDEL[model]):
        roles.append(layout.role)
        if is_vector(path):
            assert layout.role == "vector", path
            continue
        count = len(leaf.shape)
        named = {"model/embed_tokens/embedding": "embedding", "lm_head/kernel": "head"}
        assert layout.role == named.get(path, "matrix"), path
        if layout.role != "embedding":
            assert (layout.row_axes, layout.column_axes) == ((count - 1,), (count - 2,)), path
            assert count == 2 + ("experts/" in path and "shared" not in path), path
    assert roles.count("embedding") == 1
    assert roles.count("head") == 1


# The one tree whose names leave two readings; test_doubts.py has the warning.
@pytest.mark.filterwarnings("ignore:.*GPT-OSS has its experts:layout_optax.LayoutWarning")
@pytest.mark.parametrize("model", HUGGING_FACE)
def test_hugging_face_equals_its_linear_modules(model):
    for path, leaf, layout in found(HUGGING_FACE[model]):
        if is_vector(path.replace(".", "/")):
            assert layout.role == "vector", path
        elif "embed_tokens" in path:
            assert (layout.role, layout.row_axes, layout.column_axes) == ("embedding", (0,), (1,))
        elif path == "lm_head.weight":
            assert (layout.role, layout.row_axes, layout.column_axes) == ("head", (0,), (1,))
        elif len(leaf.shape) == 3:  # experts in one parameter
            in_first = model == "Llama4"
            assert layout == type(layout)("matrix", *((2, 1) if in_first else (1, 2))), path
        else:  # a linear module, or a router as one
            assert leaf.numbers in (None, ((1,), (0,))), path
            assert (layout.role, layout.row_axes, layout.column_axes) == ("matrix", (0,), (1,))
