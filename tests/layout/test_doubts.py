"""Silence is the fault: doubtful roles and axes warn once, with the rule to add; useless rules are errors."""

from __future__ import annotations

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import sage_optax
from layout_optax import LayoutWarning, ParamLayout, describe, doubts, infer_layout
from layout_optax.leaves import flatten_with_layout
from sage_optax import sage_hybrid
from tests.layout import trees


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(doubts, "_SAID", set())


def messages(params, rules=None, tx=sage_hybrid):
    """What initialising an optimizer warns of."""
    layout = None if rules is None else functools.partial(infer_layout, rules=rules)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(tx(1e-3, layout=layout).init, params)
    assert all(one.category is LayoutWarning for one in caught)
    return [str(one.message) for one in caught]


def offered(message):
    """The lists of rules that a message offers, as Python."""
    names = {"ParamLayout": ParamLayout}
    return [eval(text, names) for text in re.findall(r"rules=(\[.*?\)\])\)", message)]


def roles(params, rules):
    leaves = flatten_with_layout(functools.partial(infer_layout, rules=rules), params)
    return dict(zip(leaves.paths, leaves.layouts, strict=True))


V, D = 96, 16
TABLES = {
    "tok_table": (
        {"tok_table": shape(V, D), "up": {"kernel": shape(D, 40)}},
        ParamLayout("embedding", 0, 1),
    ),
    "out_proj_vocab": (
        {"out_proj_vocab": shape(D, V), "up": {"kernel": shape(D, 40)}},
        ParamLayout("head", 1, 0),
    ),
    "0/weight": (
        [{"weight": shape(V, D)}, {"weight": shape(40, D)}],
        ParamLayout("embedding", 0, 1),
    ),
    "Dense_2/kernel": (
        {
            "Embed_0": {"embedding": shape(V, D)},
            "Dense_1": {"kernel": shape(D, 40)},
            "Dense_2": {"kernel": shape(D, V)},
        },
        ParamLayout("head", 1, 0),
    ),
    "decode/weight": (
        {"embed": {"weight": shape(V, D)}, "decode": {"weight": shape(V, D)}},
        ParamLayout("head", 0, 1),
    ),
}


@pytest.mark.parametrize("path", TABLES)
def test_a_table_without_a_name_warns_with_the_right_rule(path):
    params, right = TABLES[path]
    (message,) = messages(params)
    assert f"'{path}'" in message
    rule, silence = offered(message)
    assert roles(params, rule)[path] == right
    assert messages(params, rule) == []
    # The second rule keeps the present reading, and is silent too.
    assert roles(params, silence)[path] == roles(params, [])[path]
    assert messages(params, silence) == []


def test_a_message_is_said_once_and_the_category_can_be_silenced():
    params, _ = TABLES["tok_table"]
    assert len(messages(params)) == 1
    assert messages(params) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(sage_hybrid(1e-3).init, params)
    with pytest.warns(LayoutWarning, match="no embedding"):
        sage_hybrid(1e-3).init({"a": jnp.ones((V + 1, D)), "b": jnp.ones((D, D))})


@pytest.mark.parametrize(
    "params",
    [
        {"layers": {"0": {"up": {"kernel": shape(D, 40)}, "down": {"kernel": shape(40, D)}}}},
        {"up": {"kernel": shape(D, 40)}},
        {"embed": shape(V, D), "layers_0": {"up": {"kernel": shape(D, V)}}},
        {"embed": shape(V, D), "up": {"kernel": shape(D, 40)}},
        {"norm": shape(D), "bias": shape(D)},
        [shape(D, 40), shape(40, D)],
        {"q": {"kernel": shape(D, D)}, "mlp": {"kernel": shape(D, 40)}},
    ],
    ids=[
        "fine-tuned",
        "one matrix",
        "a layer as wide as the vocabulary",
        "usual",
        "none",
        "bare",
        "q",
    ],
)
def test_usual_trees_are_silent(params):
    assert messages(params) == []


@pytest.mark.parametrize("framework", ["maxtext", "tunix", "haliax", "easydel"])
def test_whole_models_are_silent(framework):
    for name, leaves in trees.models(framework).items():
        assert messages(trees.tree(leaves)) == [], name


def test_a_direction_for_all_parameters_does_not_ask_for_tables():
    params, _ = TABLES["tok_table"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(sage_optax.scale_by_sage().init, params)
        jax.eval_shape(
            optax.masked(sage_hybrid(1e-3), {"tok_table": True, "up": False}).init, params
        )


def test_layers_that_may_lie_on_another_axis_warn_with_the_right_rule():
    params = {
        "embed": shape(V, D),
        "decoder": {
            "layers": {"mlp": {"up_proj": {"kernel": shape(D, 3, 40)}}, "gain": shape(D, 3)}
        },
    }
    (message,) = messages(params)
    assert "axis 1" in message
    other, same = offered(message)
    path = "decoder/layers/mlp/up_proj/kernel"
    assert roles(params, other)[path] == ParamLayout("matrix", 2, 0)
    assert roles(params, other)["decoder/layers/gain"] == ParamLayout("vector", (), 0)
    assert messages(params, other) == []
    assert roles(params, same) == roles(params, [])


def test_experts_of_two_readings_warn_with_the_other():
    model = trees.tree(trees.models("hugging_face")["GptOss"])
    (message,) = [text for text in messages(model) if "GPT-OSS" in text]
    other, _ = offered(message)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    assert roles(model, other)[path] == ParamLayout("matrix", 2, 1)


def test_a_vector_beside_stacks_warns_with_the_right_rule():
    params = {
        "embed": shape(V, D),
        "h": {"experts": {"up": shape(3, D, 40)}, "skip": shape(3, D), "mix": shape(D, D)},
    }
    (message,) = messages(params)
    assert "'h/skip'" in message
    rule, silence = offered(message)
    assert roles(params, rule)["h/skip"] == ParamLayout("vector", (), 1)
    assert messages(params, rule) == messages(params, silence) == []


@pytest.mark.parametrize(
    ("path", "sizes", "right"),
    [
        ("attn/fold/kernel", (4, D, 8), ParamLayout("matrix", (0, 2), 1)),
        ("attn/join/kernel", (4, 8, D), ParamLayout("matrix", 2, (0, 1))),
        ("layers/attn/fold/kernel", (3, 4, D, 8), ParamLayout("matrix", (1, 3), 2)),
        ("mlp/wo", (8, 40, D), ParamLayout("matrix", 2, 1)),
        ("conv/kernel", (3, 3, 8, 12), ParamLayout("matrix", 3, (0, 1, 2))),
    ],
)
def test_an_unexplained_leaf_is_told_the_axes_of_this_leaf(path, sizes, right):
    params = shape(*sizes)
    for name in reversed(path.split("/")):
        params = {name: params}
    params["embed"] = shape(V, D)
    with pytest.raises(ValueError, match="no rule explains") as error:
        sage_hybrid(1e-3).init(params)
    (rule,) = offered(str(error.value))
    assert roles(params, rule)[path] == right


def test_axes_that_nothing_tells_are_left_to_the_reader():
    with pytest.raises(ValueError, match="row_axes=OUTPUTS, column_axes=INPUTS"):
        infer_layout({"attn": {"fold": {"kernel": shape(4, 12, 8)}}})


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (r"tok_tbl$", "matches no parameter; the nearest path is 'tok_table'"),
        (r"up/kernal", "matches no parameter; the nearest path is 'up/kernel'"),
        (r"tok_(table", "is not a regular expression"),
    ],
)
def test_a_rule_without_use_is_an_error_that_names_it(rule, said):
    params, _ = TABLES["tok_table"]
    layout = functools.partial(infer_layout, rules=[(rule, "embedding")])
    with pytest.raises(ValueError, match=re.escape(repr(rule))) as error:
        sage_hybrid(1e-3, layout=layout).init(params)
    assert said in str(error.value)
    with pytest.raises(ValueError, match=re.escape(repr(rule))):
        describe(params, layout=layout)


def test_rules_are_counted_on_whole_trees_only():
    """Inside `optax.partition` and `optax.masked` a rule's parameters may be somebody else's."""
    params = {"odd": jnp.ones((4, 6)), "up": {"kernel": jnp.ones((4, 6))}}
    layout = functools.partial(infer_layout, rules=[("^odd", "embedding")])
    tx = optax.masked(sage_optax.scale_by_sage(layout=layout), {"odd": False, "up": True})
    tx.update(params, tx.init(params), params)


def test_describe_marks_guesses():
    params = {
        "embed": shape(V, D),
        "mix": shape(D, D),
        "layers": {"up": {"kernel": shape(3, D, 40)}},
    }
    lines = describe(params).splitlines()
    assert [line.split("|")[0].strip() for line in lines if "guess: " in line] == ["mix"]
