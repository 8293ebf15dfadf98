"""`by_role`: a direction, a decay and a rate per role; one signature for every optimizer of a whole model."""

from __future__ import annotations

import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorapre_optax
import sage_optax
from layout_optax import ParamLayout, WholeModel, adam_direction, by_role, infer_layout
from layout_optax.routing import takes_whole_model

ALIASES = [
    sage_optax.sage_hybrid,
    sage_optax.lion_hybrid,
    sage_optax.sinkgd_hybrid,
    lorapre_optax.lorapre_adamw,
    lorapre_optax.lorapre_muon,
    lorapre_optax.lorapre_sgd,
    lorapre_optax.lorapre_lion,
    lorapre_optax.lorapre_sinkgd,
]
PARAMS = {
    "embed_tokens": {"embedding": jnp.full((6, 4), 2.0)},
    "up": {"kernel": jnp.full((4, 8), 2.0)},
    "norm": {"scale": jnp.full(4, 2.0)},
    "lm_head": {"kernel": jnp.full((4, 6), 2.0)},
    "odd": {"kernel": jnp.full((4, 4), 2.0)},
}
SIGN = {role: optax.scale_by_sign() for role in ("embedding", "matrix", "vector")}


def excluded(tree):
    return infer_layout(tree, rules=[("^odd/", None)])


def step(tx):
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return {path: float(jnp.ravel(jax.tree.leaves(tree)[0])[0]) for path, tree in updates.items()}


def test_rates_multipliers_decay_and_mask_by_role():
    tx = by_role(
        {**SIGN, "other": optax.scale(3.0)},
        lambda count: 0.1 / (count + 1),
        layout=excluded,
        matrix_learning_rate=0.01,
        learning_rate_multipliers={"vector": 0.5, "other": 10.0},
        weight_decay=0.25,
        weight_decay_mask={name: name != "norm" for name in PARAMS},
    )
    found = step(tx)
    # rate (direction + decay times 2), the head with the embedding's direction
    expected = {
        "embed_tokens": -0.1 * 1.5,
        "up": -0.01 * 1.5,
        "norm": -0.05 * 1.0,
        "lm_head": -0.1 * 1.5,
        "odd": -1.0 * 3.5,
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_unmanaged_leaves_get_adam_unless_told_otherwise():
    assert step(by_role(SIGN, 0.1, layout=excluded))["odd"] == pytest.approx(-0.1, rel=1e-5)


def test_updates_keep_the_gradients_dtype_with_injected_numbers():
    def make(learning_rate):
        return by_role(SIGN, learning_rate)

    tx = optax.inject_hyperparams(make, hyperparam_dtype=jnp.dtype("float32"))(0.1)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    updates, _ = tx.update(params, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"learning_rate": None},
            TypeError,
            "learning_rate must be a number or a schedule, got None",
        ),
        (
            {"learning_rate": "1e-3"},
            TypeError,
            "learning_rate must be a number or a schedule, got '1e-3'",
        ),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite, got nan"),
        ({"matrix_learning_rate": float("inf")}, ValueError, "matrix_learning_rate must be finite"),
        ({"learning_rate_multipliers": {"dense": 2.0}}, ValueError, "unknown role 'dense'"),
        ({"learning_rate_multipliers": {"matrix": "x"}}, TypeError, r"multipliers\['matrix'\]"),
        (
            {"learning_rate_multipliers": {"head": 2.0}, "head_learning_rate": 0.1},
            ValueError,
            "head has both head_learning_rate and a multiplier",
        ),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0, got -1.0"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be at least 0, got nan"),
        ({"weight_decay_mask": True}, ValueError, "STATIC_ARGS"),
        (
            {"directions": {**SIGN, "dense": optax.identity()}},
            ValueError,
            "unknown role 'dense' in",
        ),
        ({"directions": {"matrix": optax.identity()}}, ValueError, "no entry for 'embedding'"),
    ],
)
def test_bad_input_is_refused_at_construction(change, kind, message):
    with pytest.raises(kind, match=message):
        by_role(**{"directions": SIGN, "learning_rate": 0.1, **change})


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.__name__)
def test_every_alias_shows_the_keywords_of_a_whole_model(alias):
    hints = typing.get_type_hints(WholeModel)
    parameters = inspect.signature(alias).parameters
    for name, annotation in hints.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].annotation == annotation
        assert f"\n  {name}: " in inspect.getdoc(
            alias
        )  # Python 3.13 takes the indentation off by itself
        default = parameters[name].default
        assert default in (0.0, 0.01) if name == "weight_decay" else default is None
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert "**whole_model" not in alias.__doc__


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.__name__)
def test_every_alias_refuses_a_keyword_that_it_lacks_and_rates_that_are_none(alias):
    with pytest.raises(TypeError, match=rf"{alias.__name__}: .*unexpected keyword argument 'lr'"):
        alias(1e-3, lr=1.0)
    with pytest.raises(TypeError, match="learning_rate must be a number or a schedule"):
        alias(None)
    with pytest.raises(ValueError, match="weight_decay must be at least 0"):
        alias(1e-3, weight_decay=-3.0)


def test_inject_hyperparams_sees_every_keyword():
    static = sage_optax.STATIC_ARGS
    tx = optax.inject_hyperparams(sage_optax.sage_hybrid, static_args=static)(
        1e-3, matrix_learning_rate=optax.linear_schedule(0.0, 1.0, 10)
    )
    state = tx.init(PARAMS)
    assert {"learning_rate", "matrix_learning_rate", "weight_decay"} <= set(state.hyperparams)
    assert float(state.hyperparams["weight_decay"]) == np.float32(0.01)


def test_the_default_of_the_decay_is_the_aliases_own():
    @takes_whole_model(weight_decay=0.5)
    def alias(learning_rate, **whole_model: typing.Unpack[WholeModel]):
        """Short."""
        return by_role(SIGN, learning_rate, **whole_model)

    assert step(alias(0.1))["up"] == pytest.approx(-0.1 * 2.0)
    assert step(alias(0.1, weight_decay=0.0))["up"] == pytest.approx(-0.1)


def test_adam_direction_takes_schedules():
    plain, scheduled = adam_direction(b1=0.5), adam_direction(b1=lambda count: 0.5)
    outs = []
    for tx in (plain, scheduled):
        update = jax.jit(tx.update)
        _, state = update(PARAMS, tx.init(PARAMS))
        outs.append(update(PARAMS, state)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), *outs)


def test_a_layout_decides_the_roles():
    layout = {name: ParamLayout("vector", (), (0, 1)) for name in PARAMS}
    layout["norm"] = ParamLayout("vector", (), 0)
    found = step(by_role({**SIGN, "vector": optax.scale(2.0)}, 0.1, layout=layout))
    assert list(found.values()) == pytest.approx([-0.2] * len(PARAMS))
