"""`describe` for a Llama in each naming style, against golden text, and routing that must never slip."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import lorapre_optax
import sage_optax
from layout_optax import ParamLayout, describe, infer_layout, state_bytes
from layout_optax.leaves import flatten_with_layout
from tests.layout.llama_trees import STYLES, D, F, L, V

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "describe"


@pytest.mark.parametrize("style", STYLES)
def test_describe_equals_the_golden_text(style):
    text = describe(STYLES[style]())
    assert text + "\n" == (GOLDEN / f"{style}.txt").read_text()


@pytest.mark.parametrize("style", STYLES)
def test_tables_and_vectors_never_reach_the_matrix_path(style):
    leaves = flatten_with_layout(None, STYLES[style]())
    tables = {"embedding": 0, "head": 0}
    for path, layout, leaf in zip(leaves.paths, leaves.layouts, leaves.leaves, strict=True):
        if leaf is None:
            assert layout is None
            continue
        assert layout is not None
        if V in leaf.shape:
            tables[layout.role] += 1
            assert [leaf.shape[axis] for axis in layout.row_axes] == [V], path
            assert [leaf.shape[axis] for axis in layout.column_axes] == [D], path
        elif path.endswith(("scale", "bias")) or "norm" in path:
            assert layout.role == "vector", path
            assert L not in [leaf.shape[axis] for axis in layout.column_axes], path
        else:
            assert layout.role == "matrix", path
            sizes = [leaf.shape[axis] for axis in layout.row_axes]
            if any(name in path for name in ("gate_proj", "up", "wi")):
                assert sizes == [F], path
    assert tables == {"embedding": 1, "head": 1}


def test_with_a_transformation_the_table_shows_its_state():
    params = STYLES["nnx_scanned"]()
    labels = lambda tree: jax.tree.map(  # noqa: E731
        lambda layout: "table" if layout.role in ("embedding", "head") else "rest",
        infer_layout(tree),
        is_leaf=lambda node: isinstance(node, ParamLayout),
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"table": optax.adam(1e-3), "rest": optax.sgd(1e-3)}, labels),
    )
    lines = describe(params, tx).splitlines()
    embedding = next(line for line in lines if line.startswith("embed_tokens"))
    assert "scale_by_adam" in embedding
    assert embedding.endswith(f"{2 * 4 * V * D:,}")
    kernel = next(line for line in lines if "up_proj" in line)
    assert "(stateless)" in kernel
    assert kernel.endswith(" 0")
    total = state_bytes(tx, params)
    assert lines[-1].endswith(f"{total:,}")
    assert total == 4 * (2 * 2 * V * D) + 4


def test_rules_show_as_the_reason():
    params = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 8, 16), jnp.float32)}}
    rule = (r"conv/kernel$", ParamLayout("matrix", (3,), (0, 1, 2)))
    text = describe(params, layout=functools.partial(infer_layout, rules=[rule]))
    assert "rule 'conv/kernel$'" in text
    assert "0,1,2" in text
    text = describe(params, layout=functools.partial(infer_layout, rules=[("conv", None)]))
    assert "(unmanaged)" in text


def test_a_bare_array_is_described():
    text = describe(jnp.ones((4, 6)), optax.adam(1e-3))
    assert "unnamed" in text
    assert text.splitlines()[-1].endswith(str(2 * 4 * 24 + 4))


def _column(text, name):
    lines = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines()]
    column = lines[0].index(name)
    return {line[0]: line[column] for line in lines[1:-2]}


def test_what_trains_a_leaf_is_named_even_where_it_has_no_state():
    params = STYLES["nnx_scanned"]()
    found = _column(describe(params, sage_optax.sage_hybrid(1e-3)), "transformation")
    assert found["embed_tokens/embedding"] == found["norm/scale"] == "sage"
    assert found["layers/mlp/up_proj/kernel"] == "sinkgd"
    found = _column(describe(params, lorapre_optax.lorapre_adamw(1e-3, 4)), "transformation")
    assert found["embed_tokens/embedding"] == found["norm/scale"] == "full_moment"
    assert found["layers/mlp/up_proj/kernel"] == "low_rank"
    fallback = describe(params, lorapre_optax.lorapre_adamw(1e-3, 99))
    assert _column(fallback, "transformation")["layers/mlp/up_proj/kernel"] == "full_moment"
    assert _column(fallback, "rank")["layers/mlp/up_proj/kernel"] == "full-rank fallback"


def test_frozen_leaves_are_told_from_those_trained_without_state():
    params = STYLES["nnx_scanned"]()
    labels = {"embed_tokens": "frozen", "layers": "sgd", "norm": "sgd", "lm_head": "sinkgd"}
    rules = {"frozen": optax.set_to_zero(), "sgd": optax.sgd(1e-3), "sinkgd": sage_optax.sinkgd(1)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(rules, labels))
    found = _column(describe(params, tx), "transformation")
    assert found["embed_tokens/embedding"] == "(frozen)"
    assert found["norm/scale"] == found["layers/mlp/up_proj/kernel"] == "(stateless)"
    assert found["lm_head/kernel"] == "sinkgd"


def test_an_update_that_asks_for_more_than_gradients_leaves_open_what_is_frozen():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: u * value, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    assert "(stateless)" in describe({"up": {"kernel": jnp.ones((4, 6))}}, tx)
