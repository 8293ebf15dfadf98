"""LoRA-Pre on tables beside SinkGD on matrices: references per role, defaults, routing, state bytes."""

from __future__ import annotations

import functools
import inspect

import jax
import numpy as np
import optax
import pytest

from examples.llama.model.config import preset
from examples.llama.model.llama import abstract
from layout_optax import ParamLayout, WholeModel, adam_direction, by_role, state_bytes
from lorapre_optax import (
    RECOMMENDED,
    lorapre_adamw,
    lorapre_muon,
    lorapre_sinkgd,
    scale_by_lorapre_adam,
)
from sage_optax import sage_hybrid, scale_by_sage, scale_by_sinkhorn
from tests import reference, reference_lorapre
from tests.lorapre.aliases import (
    LEAVES,
    NOT_OURS,
    as_float32,
    check_injection,
    check_rates_and_decay,
    draw,
    owned,
    run,
)
from tests.lorapre.common import KERNEL, apart

GRADS = draw(1, 6)
TABLES = {"embedding": ParamLayout("embedding", (0,), (1,)), "head": ParamLayout("head", 1, 0)}
PAPER = {
    "bias_correction": "paper",
    "bound": None,
    "residual": None,
    "initial_subspace": "normal",
}
OPTIONS = PAPER | {"bias_correction": "exact", "bound": 1.0, "residual": 0.9}


def adam_directions(grads, b1=0.9, b2=0.95, eps=1e-8):
    mu = nu = np.zeros(grads.shape[1:])
    out = []
    for t, g in enumerate(grads, start=1):
        direction, mu, nu = reference.adam_step(g, mu, nu, t, b1, b2, eps)
        out.append(direction)
    return np.stack(out)


def sinkhorn(grads, layout, **options):
    """Sinkhorn's iterate of each gradient; the reference works in place, so on copies."""
    return np.stack([reference.sinkhorn(np.array(g), layout, **options) for g in grads])


def rights_of(state, leaf, layout):
    """The right factors of both moments of one table, as float64 matrices."""
    rights = []
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        if key.endswith(f"/right/{leaf}"):
            rights.append(reference_lorapre.factor_matrices(x, layout.resolve(2), 2, "right"))
    assert len(rights) == 2  # mu before nu
    return rights


@pytest.mark.parametrize(
    ("options", "oracle"),
    [(PAPER, {}), (OPTIONS, {"exact": True, "bound": 1.0, "kappa": 0.9})],
    ids=["paper", "options"],
)
def test_every_role_follows_its_reference(options, oracle):
    with jax.enable_x64(True):
        tx = lorapre_sinkgd(1.0, 3, scale=4.0, weight_decay=0.0, layout=NOT_OURS, **options)
        found, first, last = run(tx, draw(), GRADS)
    for role, leaf in (("embedding", "embed/embedding"), ("head", "lm_head/kernel")):
        grads, layout = LEAVES[role](GRADS), TABLES[role]
        directions, _ = reference_lorapre.adam(
            grads, *rights_of(first, leaf, layout), layout, **oracle
        )
        assert apart(LEAVES[role](found), -directions) < 1e-9, role
        assert owned(last, leaf) == [(3, 16), (3, 16), (3, 30), (3, 30)]
    assert apart(found["up"]["kernel"], -4 * sinkhorn(GRADS["up"]["kernel"], KERNEL)) < 1e-6
    assert not owned(last, "up/kernel")
    for role in ("vector", "other"):
        expected = -adam_directions(LEAVES[role](GRADS))
        assert apart(LEAVES[role](found), expected) < 1e-9, role
    assert owned(last, "norm/scale") == [(16,), (16,)]


@functools.cache
def updates(**options):
    """Updates and first state of the default composite, with options, on the small model."""
    tx = lorapre_sinkgd(1.0, 3, layout=NOT_OURS, weight_decay=0.0, **options)
    out, first, _ = run(tx, as_float32(draw()), as_float32(GRADS))
    return out, first


def test_the_docstring_tells_how_to_undo_every_recommended_option():
    own = inspect.signature(lorapre_sinkgd).parameters
    papers = inspect.signature(scale_by_lorapre_adam).parameters
    for name, value in RECOMMENDED.items():
        assert own[name].default == value
        assert f"{name}={papers[name].default!r}".replace("'", '"') in lorapre_sinkgd.__doc__
        assert PAPER[name] == papers[name].default


def test_the_defaults_are_the_recommended_options():
    found, _ = updates()
    tx = scale_by_lorapre_adam(3, layout=NOT_OURS, **RECOMMENDED)
    expected, _, _ = run(tx, as_float32(draw()), as_float32(GRADS))
    paper, _ = updates(**PAPER)
    for role in TABLES:
        leaf = LEAVES[role]
        np.testing.assert_allclose(leaf(found), -leaf(expected), rtol=2e-4, atol=1e-6)
        assert apart(leaf(paper), np.asarray(leaf(found), np.float64)) > 1e-2


def composed(**directions):
    """Updates and first state of the composite written out, with other directions for some roles."""
    table = scale_by_lorapre_adam(3, layout=NOT_OURS, **RECOMMENDED)
    matrix = optax.chain(scale_by_sinkhorn(layout=NOT_OURS), optax.scale(10.0))
    rules = {"embedding": table, "matrix": matrix, "vector": adam_direction(b2=0.95)}
    rules |= {"other": adam_direction(b2=0.95)} | directions
    out, first, _ = run(by_role(rules, 1.0, layout=NOT_OURS), as_float32(draw()), as_float32(GRADS))
    return out, first


def test_it_is_a_call_of_by_role():
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        composed()[0],
        updates()[0],
    )


@pytest.mark.parametrize("rule", ["matrix", "adamw"])
def test_another_rule_for_the_head(rule):
    matrix = optax.chain(scale_by_sinkhorn(layout=NOT_OURS), optax.scale(10.0))
    found, first = composed(head=matrix if rule == "matrix" else adam_direction(b2=0.95))
    grads = LEAVES["head"](GRADS)
    if rule == "matrix":
        expected = -10 * sinkhorn(grads, TABLES["head"])
        assert not owned(first, "lm_head/kernel")
    else:
        expected = -adam_directions(grads)
        assert owned(first, "lm_head/kernel") == [(16, 30)] * 2
    assert apart(LEAVES["head"](found), expected) < 1e-5


def test_sage_for_vectors():
    found, first = composed(vector=scale_by_sage(layout=NOT_OURS))
    sage, _, _ = run(scale_by_sage(layout=NOT_OURS), as_float32(draw()), as_float32(GRADS))
    np.testing.assert_allclose(found["norm"]["scale"], -sage["norm"]["scale"], rtol=1e-5)
    np.testing.assert_allclose(found["odd"], updates()[0]["odd"], rtol=1e-5)  # still AdamW
    assert owned(first, "norm/scale") == [(16,), (16,)]  # momentum and magnitude


def test_options_of_sinkhorn():
    options = {"iterations": 2, "variant": "sqrt"}
    found, _ = updates(**options, scale=0.5)
    expected = -0.5 * sinkhorn(GRADS["up"]["kernel"], KERNEL, **options)
    assert apart(found["up"]["kernel"], expected) < 1e-5


def test_rates_and_decay():
    check_rates_and_decay(lambda *args, **options: lorapre_sinkgd(*args, rank=3, **options))
    params = as_float32(draw())
    tx = lorapre_sinkgd(1.0, 3, layout=NOT_OURS)
    decayed, _, _ = run(tx, params, as_float32(GRADS))
    jax.tree.map(  # 0.01 is the default
        lambda a, b, p: np.testing.assert_allclose(a, b - 0.01 * p, rtol=1e-4, atol=1e-6),
        decayed,
        updates()[0],
        params,
    )


def test_injection():
    check_injection(lorapre_sinkgd)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "b1 must be in"),
        ({"eps": -1.0}, "eps"),
        ({"residual": 1.5}, "residual"),
        ({"bound": -1.0}, "bound"),
        ({"bias_correction": "none"}, "bias_correction"),
        ({"second_moment": "none"}, "second_moment"),
        ({"iterations": 0}, "iterations"),
        ({"variant": "sqr"}, "variant must be"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"learning_rate_multipliers": {"dense": 2.0}}, "unknown role 'dense'"),
        (
            {"learning_rate_multipliers": {"head": 2.0}, "head_learning_rate": 1.0},
            "head has both head_learning_rate and a multiplier",
        ),
        ({"weight_decay_mask": True}, "STATIC_ARGS"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        lorapre_sinkgd(1e-3, 4, **options)


def test_it_takes_what_its_two_methods_are_made_of():
    """Sixteen keywords of its own; rules for single roles and rarer numbers are a call of `by_role`."""
    own = set(inspect.signature(lorapre_sinkgd).parameters) - set(WholeModel.__annotations__)
    assert own == {
        *("learning_rate", "rank", "b1", "b2", "eps", "layout"),
        *("bias_correction", "bound", "residual", "second_moment", "initial_subspace"),
        *("damping", "factor_dtype", "scale", "iterations", "variant"),
    }
    with pytest.raises(TypeError, match=r"lorapre_sinkgd: got an unexpected keyword.*'head_rule'"):
        lorapre_sinkgd(1e-3, head_rule="matrix")


# State bytes of the 1.3B Llama of the SAGE paper: 24 layers of width 2048, tied embedding

D, FFN, KV, LAYERS, VOCABULARY = 2048, 5461, 512, 24, 128256
TABLE = VOCABULARY * D
VECTORS = (2 * LAYERS + 1) * D
MATRICES = LAYERS * (2 * D * D + 2 * D * KV + 3 * D * FFN)


def factors(rank, *, kv_in_full=False):
    """Numbers of one low-rank moment of all matrices; at rank 512 keys and values stay full."""
    kv = D * KV if kv_in_full else rank * (D + KV)
    return LAYERS * (2 * rank * (D + D) + 2 * kv + 3 * rank * (D + FFN))


@pytest.mark.parametrize(
    ("tx", "numbers", "counters", "gib"),
    [
        (optax.adamw(1e-3), 2 * (MATRICES + TABLE + VECTORS), 1, 9.832),
        # A magnitude for each column of the table and of every vector; a count for each of three
        # roles, and for Adam on leaves that are not ours.
        (sage_hybrid(1e-3), TABLE + VECTORS + D + VECTORS, 4, 0.979),
        # Two moments of five roles, each with a count.
        (
            lorapre_adamw(1e-3, 512),
            2 * (factors(512, kv_in_full=True) + TABLE + VECTORS),
            10,
            5.145,
        ),
        (lorapre_adamw(1e-3, 64), 2 * (factors(64) + TABLE + VECTORS), 10, 2.368),
        # SinkGD has not even a count.
        (lorapre_sinkgd(1e-3, 64), 2 * (64 * (VOCABULARY + D) + VECTORS), 8, 0.063),
        # One moment of the matrices, two of four other roles.
        (
            lorapre_muon(1e-3, 64, table_rank=64),
            factors(64) + 2 * (64 * (VOCABULARY + D) + VECTORS),
            9,
            0.268,
        ),
    ],
    ids=[
        "adamw",
        "sage_hybrid",
        "lorapre_adamw 512",
        "lorapre_adamw 64",
        "lorapre_sinkgd 64",
        "lorapre_muon 64, tables 64",
    ],
)
def test_state_bytes_of_a_1_3b_llama(tx, numbers, counters, gib):
    params = abstract(preset("sage_1.3b"))
    assert MATRICES + TABLE + VECTORS == 1_319_684_096
    found = state_bytes(tx, params)
    assert found == 4 * (numbers + counters)
    assert round(found / 2**30, 3) == gib
    if gib == 0.063:
        assert found == 66_715_648 + 802_816 + 32  # factors, vectors, counts: 67.5 MB
