"""What every exported transformation does with odd leaves and with a state that is not of its parameters.

Empty arrays pass. Leaves that are no real floating-point arrays, and states that do not fit, are refused by
path.
"""

from __future__ import annotations

import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layout_optax
import lorapre_optax
import sage_optax
from tests.compatibility.test_strict_modes import CALLS, NAMES, NUMBERS

STATELESS = {"scale_by_sinkhorn", "sinkgd"}
PARAMS = {
    "embed": {"embedding": jnp.ones((12, 8))},
    "layers": {"up": {"kernel": jnp.ones((2, 8, 10))}, "norm": {"scale": jnp.ones((2, 8))}},
    "lm_head": {"kernel": jnp.ones((8, 12))},
}
EMPTY = {
    "bias": jnp.zeros(0),
    "embed": {"embedding": jnp.zeros((0, 8))},
    "down": {"kernel": jnp.zeros((8, 0))},
    "lm_head": {"kernel": jnp.zeros((0, 12))},
    "layers": {"norm": {"scale": jnp.zeros((2, 0))}, "up": {"kernel": jnp.zeros((0, 8, 10))}},
    "tokens": {"embedding": jnp.zeros((8, 0))},
    "up": {"kernel": jnp.ones((8, 10))},
}


def make(name, call=0):
    return CALLS[name][call](NUMBERS["number"])


def with_leaf(path, leaf):
    tree = jax.tree.map(lambda x: x, PARAMS)
    node = tree
    *above, last = path.split("/")
    for key in above:
        node = node[key]
    node[last] = leaf
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_empty_arrays_pass(name):
    """Their state has their shape and stays finite, and a leaf beside them steps as it does alone."""
    for call in range(len(CALLS[name])):
        tx = make(name, call)
        start = jax.jit(tx.init)(EMPTY)
        updates, state = jax.jit(tx.update)(EMPTY, start, EMPTY)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, EMPTY)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
        chex.assert_tree_all_finite((updates, state))
        if call == 0:
            alone = {"up": EMPTY["up"]}
            expected, _ = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g), g))(alone)
            np.testing.assert_allclose(updates["up"]["kernel"], expected["up"]["kernel"], rtol=1e-5)


def test_the_damper_of_an_empty_array_is_zero():
    tx = sage_optax.scale_by_sage()
    grads = {"embedding": jnp.zeros((0, 8))}
    damper = sage_optax.sage_damper(grads, tx.init(grads))
    np.testing.assert_array_equal(damper["embedding"], np.zeros(8))


@pytest.mark.parametrize("name", NAMES)
def test_leaves_that_cannot_be_trained_are_refused_by_path(name):
    tx = make(name)
    for path in ("embed/embedding", "layers/up/kernel", "layers/norm/scale"):
        shape = _leaf(path).shape
        for dtype in ("complex64", "int32", "bool"):
            message = f"'{path}' has dtype {dtype}: .*optax.masked"
            with pytest.raises(TypeError, match=message):
                tx.init(with_leaf(path, jnp.ones(shape, dtype)))
    with pytest.raises(TypeError, match="'layers/norm/scale' is a float, not an array"):
        tx.init(with_leaf("layers/norm/scale", 1.0))


def _leaf(path):
    node = PARAMS
    for key in path.split("/"):
        node = node[key]
    return node


def test_a_parameter_of_too_many_axes_is_refused_by_path():
    params = {"up": {"kernel": jnp.ones((1,) * 24 + (8, 8))}}
    layout = layout_optax.ParamLayout("matrix", -1, -2)
    for tx in (
        sage_optax.scale_by_sinkhorn(layout=layout),
        lorapre_optax.scale_by_lorapre_muon(2, layout=layout),
    ):
        with pytest.raises(ValueError, match=r"of 'up/kernel' has 26 axes.* Reshape its batch"):
            tx.init(params)


def test_masked_out_they_are_nobodys_business():
    params = PARAMS | {"steps": jnp.ones(3, jnp.int32)}
    tx = optax.masked(
        sage_optax.sage_hybrid(1e-3), jax.tree.map(lambda x: x.dtype == jnp.float32, params)
    )
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["steps"], params["steps"])


@pytest.mark.parametrize("name", sorted(set(NAMES) - STATELESS - {"by_role"}))
def test_a_state_of_other_parameters_is_refused_by_path(name):
    """The vocabulary was resized, a norm was added or is gone. (`by_role` has the state of its directions.)"""
    tx = make(name)
    state = tx.init(PARAMS)
    stateful = "layers/norm/scale" if name == "lorapre_sinkgd" else "embed/embedding"
    old = _leaf(stateful).shape
    new = (old[0] + 4, *old[1:])
    resized = with_leaf(stateful, jnp.ones(new))
    with pytest.raises(ValueError, match=re.escape(f"'{stateful}'")) as found:
        tx.update(resized, state, resized)
    message = str(found.value)
    assert str(new) in message
    assert "init(params)" in message
    # The leaf's shape, its factor's or its row statistic's.
    assert any(shape in message for shape in (str(old), f"(2, {old[0]})", f"({old[0]},)"))
    added = PARAMS | {"norm": {"scale": jnp.ones(8)}}
    with pytest.raises(ValueError, match=r"nothing for 'norm/scale'.* init\(params\)"):
        tx.update(added, state, added)
    with pytest.raises(ValueError, match="'norm/scale', which the gradients do not have"):
        tx.update(PARAMS, tx.init(added), PARAMS)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATELESS])
def test_the_state_of_another_optimizer_is_refused(name):
    tx = make(name)
    other = optax.sgd(1e-3, momentum=0.9).init(PARAMS)
    with pytest.raises((TypeError, ValueError), match=r"another optimizer|same in chain"):
        tx.update(PARAMS, other, PARAMS)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATELESS])
def test_the_state_of_other_containers_is_refused(name):
    tx = make(name)
    leaves = jax.tree.leaves(PARAMS)
    with pytest.raises(
        ValueError, match=r"has another structure than the gradients .*init\(params\)"
    ):
        tx.update(tuple(leaves), tx.init(leaves), tuple(leaves))


def test_states_of_other_options_are_refused():
    grads = {"embedding": jnp.ones((12, 8))}
    with_damper = sage_optax.scale_by_sage().init(grads)
    with pytest.raises(ValueError, match="has one field for damper, but this optimizer needs none"):
        sage_optax.scale_by_sage(damper=None).update(grads, with_damper)
    with pytest.raises(ValueError, match='has no field for mu_dtype="int8"'):
        sage_optax.scale_by_sage(mu_dtype="int8").update(grads, with_damper)
    by_row = sage_optax.scale_by_sage(row_damper=0.5)
    with pytest.raises(TypeError, match="expected the RowDamperState that its init makes"):
        by_row.update(grads, with_damper)
    resized = {"embedding": jnp.ones((16, 8))}
    with pytest.raises(ValueError, match=r"'embedding' has shape \(12, 8\).*\(16, 8\)"):
        by_row.update(resized, by_row.init(grads))


def test_a_leaf_that_was_not_ours_before_is_refused_by_path():
    excluded = {"embedding": optax.MaskedNode()}
    grads = {"embedding": jnp.ones((12, 8))}
    for make_one in (sage_optax.scale_by_sage, lorapre_optax.scale_by_lorapre_lion):
        state = make_one(layout=excluded).init(grads)
        with pytest.raises(ValueError, match="nothing for 'embedding', whose gradient"):
            make_one().update(grads, state)


def test_factors_name_both_shapes():
    tx = lorapre_optax.low_rank_ema(0.9, 2)
    state = tx.init(PARAMS)
    resized = with_leaf("embed/embedding", jnp.ones((16, 8)))
    message = (
        "'embed/embedding' has shape (2, 12) and (2, 8), but its gradient has shape (16, 8), which needs "
        "(2, 16) and (2, 8)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.jit(tx.update)(resized, state)


REQUIRED = {
    "directions": {role: optax.scale_by_sign() for role in ("embedding", "matrix", "vector")},
    "learning_rate": 1e-3,
    "rank": 2,
    "decay": 0.9,
}
OPTIONAL = {"gamma", "gamma1", "gamma2", "residual", "bound", "consistent_rms", "row_damper"}
"""Numbers whose default is None, beside the rates of single roles."""


def numbers_of(parameters):
    """The names of a factory's arguments that are numbers."""
    for name, parameter in parameters.items():
        default = parameter.default
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        rate = name == "decay" or name.endswith("learning_rate")
        if name != "rank" and (number or rate or (default is None and name in OPTIONAL)):
            yield name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "unboxed"])
def test_numbers_are_finite_numbers_at_construction(name):
    """Every number of every signature: the message names the argument."""
    packages = (layout_optax, sage_optax, lorapre_optax)
    factory = next(filter(None, (getattr(package, name, None) for package in packages)))
    parameters = inspect.signature(factory).parameters
    given = {each: value for each, value in REQUIRED.items() if each in parameters}
    factory(**given)
    for argument in numbers_of(parameters):
        for value in (float("nan"), float("inf"), "1e-3", [1.0], True):
            with pytest.raises((ValueError, TypeError), match=rf"\b{argument}\b"):
                factory(**(given | {argument: value}))


def test_dtypes_of_the_state_are_floats():
    for factory in (lorapre_optax.lorapre_adamw, lorapre_optax.lorapre_muon):
        for dtype in ("int8", "float33", jnp.complex64):
            with pytest.raises(ValueError, match="factor_dtype must be None or a float dtype"):
                factory(1e-3, 2, factor_dtype=dtype)
    with pytest.raises(ValueError, match="mu_dtype must be None or a float dtype"):
        layout_optax.adam_direction(mu_dtype="int8")
    with pytest.raises(ValueError, match="factor_dtype arrived as an array"):
        lorapre_optax.low_rank_ema(0.9, 2, factor_dtype=jnp.float32(0))


def test_measuring_needs_a_transformation_first():
    for measure in (layout_optax.state_bytes, layout_optax.memory_report):
        with pytest.raises(TypeError, match=f"{measure.__name__}: expected an optax.* got a dict"):
            measure(PARAMS, optax.adam(1e-3))
        with pytest.raises(TypeError, match="Call the optimizer first"):
            measure(optax.adam, PARAMS)


def test_the_damper_of_another_state_is_refused():
    state = sage_optax.scale_by_sage().init(PARAMS)
    resized = with_leaf("embed/embedding", jnp.ones((12, 6)))
    with pytest.raises(ValueError, match=r"'embed/embedding' has shape \(8,\).*needs \(6,\)"):
        sage_optax.sage_damper(resized, state)
    with pytest.raises(TypeError, match="sage_damper: expected the SageState"):
        sage_optax.sage_damper(PARAMS, optax.sgd(1e-3).init(PARAMS))
