"""The registry: every optimizer by name, its options, its state, and what optax's own are given."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import lorapre_optax
import sage_optax
from examples.llama.model.config import preset
from examples.llama.model.llama import abstract
from examples.llama.optimizers.lorapre import adam_options
from examples.llama.optimizers.options import OPTION_NAMES, OptimizerOptions
from examples.llama.optimizers.registry import OPTIMIZERS, make_optimizer, optimizer_entry
from examples.llama.optimizers.sage import damper_arguments
from layout_optax import resolve_layout, state_bytes
from tests.llama import tiny
from tests.llama.random_params import random_params

NAMES = tuple(OPTIMIZERS)


def options_for(name, **fields):
    if OPTIMIZERS[name].has_rank:
        fields.setdefault("rank", 3)
    return OptimizerOptions(**fields)


def small_params(name):
    """One parameter a role, with stacked layers where the optimizer takes them."""
    block = {
        "mlp": {"up_proj": {"kernel": jnp.zeros((2, 6, 8))}},
        "input_layernorm": {"scale": jnp.zeros((2, 6))},
    }
    layers = (
        {i: jax.tree.map(lambda x, i=i: x[i], block) for i in (0, 1)}
        if OPTIMIZERS[name].needs_unscanned
        else block
    )
    head = {"kernel": jnp.zeros((6, 10))}
    shapes = {"embed_tokens": {"embedding": jnp.zeros((10, 6))}, "layers": layers, "lm_head": head}
    return random_like(shapes, 0)


def random_like(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), tree)


def quick_jit(function):
    """Compiles without the expensive passes: these functions run once."""
    return jax.jit(
        function,
        compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        },
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_update_follows_the_gradient_the_schedule_and_decay(name):
    params, rate, decay = small_params(name), 0.5, 0.25
    gradients = random_like(params, 1)

    @quick_jit
    def run(params, gradients):
        def updates(**fields):
            tx = make_optimizer(name, rate, options_for(name, **fields))
            return tx.update(gradients, tx.init(params), params)[0]

        scheduled = make_optimizer(name, lambda count: rate * (1 - count), options_for(name))
        first, state = scheduled.update(gradients, scheduled.init(params), params)
        second, _ = scheduled.update(gradients, state, params)
        decayed = updates(weight_decay=decay)
        spared = updates(weight_decay=decay, decay_vectors=False)
        return state, first, second, updates(), decayed, spared

    state, *trees = run(params, gradients)
    # What a checkpoint holds must not have arrays of size zero.
    assert all(leaf.size for leaf in jax.tree.leaves(state))
    assert all(jax.tree.structure(tree) == jax.tree.structure(params) for tree in trees)
    roles = [layout.role for layout in jax.tree.leaves(resolve_layout(None, params))]
    assert set(roles) == {"embedding", "head", "matrix", "vector"}
    rows = zip(roles, *map(jax.tree.leaves, (params, gradients, *trees)), strict=True)
    for role, p, gradient, first, second, plain, decayed, spared in rows:
        assert float(jnp.sum(plain * gradient)) < 0
        np.testing.assert_allclose(first, plain, atol=1e-6)
        assert not np.any(second)
        np.testing.assert_allclose(decayed - plain, -rate * decay * p, atol=1e-5)
        np.testing.assert_allclose(spared, plain if role == "vector" else decayed, atol=1e-6)


def test_state_of_the_demo_model_as_a_share_of_adamw():
    params = abstract(preset("demo"))
    total = state_bytes(make_optimizer("adamw", 1e-3), params)
    share = {
        name: state_bytes(make_optimizer(name, 1e-3, options_for(name)), params) / total
        for name in NAMES
        if not OPTIMIZERS[name].needs_unscanned
    }
    assert share["sage_hybrid"] == pytest.approx(0.235, abs=0.002)
    assert share["sage_hybrid_int8"] == pytest.approx(0.0605, abs=0.002)
    assert share["lion_hybrid"] == pytest.approx(0.235, abs=0.002)
    assert share["sinkgd_hybrid"] == pytest.approx(0.471, abs=0.002)
    assert share["lion"] == pytest.approx(0.5, abs=0.001)
    assert share["sage"] == pytest.approx(0.5, abs=0.005)
    assert share["sinkgd"] < 1e-5
    assert share["adafactor"] < 0.05
    # Factors of rank 3 are hardly more than nothing beside what the other roles keep.
    for name, whole in (("adamw", 1.0), ("muon", 1.0), ("lion", 0.5), ("sgd", 0.5)):
        tables = 0.471 * whole
        assert tables < share[f"lorapre_{name}"] < tables + 0.02
    assert share["lorapre_sinkgd"] < 0.02
    assert 0.5 < share["muon"] < 1


def test_adafactor_without_decay_is_optax_adafactor():
    params = {"up": {"kernel": jnp.ones((130, 140))}, "norm": {"scale": jnp.ones(3)}}
    gradients = random_like(params, 0)
    found, expected = make_optimizer("adafactor", 1e-2), optax.adafactor(1e-2)
    states = [found.init(params), expected.init(params)]
    for _ in range(3):
        ours, states[0] = found.update(gradients, states[0], params)
        theirs, states[1] = expected.update(gradients, states[1], params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_muon_orthogonalises_each_stacked_layer_by_itself():
    params = small_params("muon")
    gradients = random_like(params, 1)
    tx, adamw = make_optimizer("muon", 1.0), make_optimizer("adamw", 1.0)
    single = contrib.muon(1.0, consistent_rms=0.2)
    kernel = gradients["layers"]["mlp"]["up_proj"]["kernel"]

    @quick_jit
    def run():
        stacked = tx.update(gradients, tx.init(params), params)[0]
        one_by_one = [single.update(one, single.init(one), one)[0] for one in kernel]
        return stacked, one_by_one, adamw.update(gradients, adamw.init(params), params)[0]

    stacked, one_by_one, rest = run()
    found = stacked["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(found, np.stack(one_by_one), atol=2e-5)
    # Newton-Schulz leaves singular values between about 0.7 and 1.2.
    assert float(jnp.sqrt(jnp.mean(found**2))) == pytest.approx(0.2, rel=0.3)
    # Muon's AdamW uses Nesterov momentum, which at the first step is the same direction.
    a, b = (tree["embed_tokens"]["embedding"].ravel() for tree in (stacked, rest))
    assert float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.99


def test_galore_projects_matrices_only():
    params = small_params("galore")
    tx = make_optimizer("galore", 1.0, rank=3)
    gradients = random_like(params, 1)
    updates, state = quick_jit(tx.update)(gradients, tx.init(params), params)
    assert np.linalg.matrix_rank(updates["layers"][0]["mlp"]["up_proj"]["kernel"], rtol=1e-4) == 3
    assert np.linalg.matrix_rank(updates["embed_tokens"]["embedding"], rtol=1e-4) == 6
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (0, 0) not in shapes
    assert {(10, 6), (6, 10), (6,), (8, 3), (6, 3)} <= shapes


def test_role_multipliers_scale_direction_and_decay_of_one_role():
    params = small_params("sage_hybrid")
    gradients = random_like(params, 1)

    def updates(multipliers):
        tx = make_optimizer("sage_hybrid", 0.1, role_multipliers=multipliers, weight_decay=0.1)
        return tx.update(gradients, tx.init(params), params)[0]

    plain, changed = quick_jit(lambda: (updates(None), updates({"embedding": 0.5})))()
    a, b = (tree["embed_tokens"]["embedding"] for tree in (changed, plain))
    np.testing.assert_allclose(a, 0.5 * b, rtol=1e-5)
    np.testing.assert_array_equal(changed["lm_head"]["kernel"], plain["lm_head"]["kernel"])


def test_every_option_is_taken_by_some_optimizer_and_every_entry_is_described():
    assert {option for entry in OPTIMIZERS.values() for option in entry.options} == set(
        OPTION_NAMES
    )
    for entry in OPTIMIZERS.values():
        assert entry.description.endswith(".")
        assert entry.state
    assert len({entry.label for entry in OPTIMIZERS.values()}) == len(OPTIMIZERS)


USUAL = ("adamw", "galore", "sage_hybrid", "lorapre_adamw", "lorapre_muon")  # they have all options


@pytest.mark.parametrize(
    "name",
    [name if name in USUAL else pytest.param(name, marks=pytest.mark.extended) for name in NAMES],
)
def test_every_option_of_an_entry_changes_what_is_computed(name):
    values = {
        "b1": 0.8,
        "b2": 0.9,
        "eps": 1e-6,
        "damper": "ema",
        "eps_mode": "relative",
        "mu_dtype": "bfloat16",
        "head_rule": "matrix",
        "vector_rule": "adamw",
        "scale": 0.5,
        "sinkhorn_iterations": 3,
        "sinkhorn_variant": "sqrt",
        "rank": 2,
        "table_rank": 3,
        "table_rule": "factored_rms",
        "update_gap": 3,
        "option_set": "recommended",
        "bias_correction": "exact",
        "bound": 2.0,
        "residual": 0.5,
        "second_moment": "full",
        "initial_subspace": "gradient",
        "factor_dtype": "bfloat16",
        "damping": 1e-3,
        "role_multipliers": {"matrix": 2.0},
    }
    if name == "lorapre_sinkgd":  # whose own defaults these are
        values |= {"option_set": "paper", "bias_correction": "paper", "vector_rule": "sage"}
        values["initial_subspace"] = "normal"
    if name == "sinkgd":
        values["sinkhorn_variant"] = "unit"
    assert set(values) == set(OPTION_NAMES)
    params = small_params(name)

    def traced(**fields):
        tx = make_optimizer(name, 1e-2, options_for(name, **fields))
        return str(jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(params))

    plain = traced()
    assert traced() == plain
    for option in OPTIMIZERS[name].options:
        assert traced(**{option: values[option]}) != plain, option


def test_a_rate_for_a_role_scales_adamw_and_one_for_none_is_optax_adamw():
    params = small_params("adamw")
    gradients = random_like(params, 1)
    fields = {"weight_decay": 0.1, "decay_vectors": False, "b2": 0.9}

    def updates(rate, multipliers=None):
        tx = make_optimizer("adamw", rate, role_multipliers=multipliers, **fields)
        first, state = tx.update(gradients, tx.init(params), params)
        return first, tx.update(gradients, state, params)[0]

    def schedule(count):
        return 0.1 / (1 + count)

    plain, changed = quick_jit(
        lambda: (updates(schedule), updates(schedule, {"matrix": 0.25, "embedding": 4.0}))
    )()
    for one, other in zip(plain, changed, strict=True):
        factors = {"embedding": 4.0, "matrix": 0.25}
        layouts = jax.tree.leaves(resolve_layout(None, params))
        leaves = zip(layouts, jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        for layout, a, b in leaves:
            np.testing.assert_allclose(b, factors.get(layout.role, 1.0) * a, rtol=1e-5)
    state = [make_optimizer("adamw", 0.1, role_multipliers=m) for m in (None, {"matrix": 0.5})]
    sizes = [state_bytes(tx, params) for tx in state]
    assert sizes[0] == pytest.approx(sizes[1], abs=16)


def test_recommended_options_yield_to_those_given_and_can_be_switched_off():
    assert adam_options(OptimizerOptions(option_set="recommended")) == lorapre_optax.RECOMMENDED
    off = OptimizerOptions(
        option_set="recommended",
        bias_correction="paper",
        bound=math.inf,
        residual=0.0,
        initial_subspace="normal",
    )
    paper = OptimizerOptions(option_set="paper")
    nothing = {"bias_correction": "paper", "bound": None, "residual": None}
    nothing["initial_subspace"] = "normal"
    assert adam_options(off) == {**adam_options(paper), **nothing}
    assert adam_options(OptimizerOptions()) == {}
    with_rank = adam_options(OptimizerOptions(option_set="recommended", bound=3.0, rank=2))
    assert with_rank == {**lorapre_optax.RECOMMENDED, "bound": 3.0, "rank": 2}


def test_the_default_of_lorapre_is_the_papers_rule():
    params = small_params("lorapre_adamw")

    def traced(tx):
        return str(jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(params))

    plain = traced(make_optimizer("lorapre_adamw", 0.1, rank=3))
    assert plain == traced(make_optimizer("lorapre_adamw", 0.1, rank=3, option_set="paper"))
    assert plain == traced(lorapre_optax.lorapre_adamw(0.1, 3))
    assert plain != traced(make_optimizer("lorapre_adamw", 0.1, rank=3, option_set="recommended"))


def test_lorapre_sinkgd_is_recommended_unless_told_otherwise():
    params = small_params("lorapre_sinkgd")

    def traced(**fields):
        tx = make_optimizer("lorapre_sinkgd", 0.1, rank=2, **fields)
        return str(jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(params))

    own = lorapre_optax.lorapre_sinkgd(0.1, 2, weight_decay=0.0)
    assert traced() == str(jax.make_jaxpr(lambda p: own.update(p, own.init(p), p))(params))
    assert traced() == traced(option_set="recommended") != traced(option_set="paper")
    paper = lorapre_optax.lorapre_sinkgd(
        0.1,
        2,
        bias_correction="paper",
        bound=None,
        residual=None,
        initial_subspace="normal",
        weight_decay=0.0,
    )
    assert traced(option_set="paper") == str(
        jax.make_jaxpr(lambda p: paper.update(p, paper.init(p), p))(params)
    )


def test_damper_none_is_lion_hybrid():
    params = small_params("sage_hybrid")

    def traced(*arguments, **fields):
        tx = make_optimizer(*arguments, **fields)
        return str(jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(params))

    assert traced("sage_hybrid", 0.1, damper="none") == traced("lion_hybrid", 0.1)
    assert traced("sage_hybrid", 0.1) != traced("lion_hybrid", 0.1)


def test_errors_name_what_there_is():
    with pytest.raises(
        ValueError, match="unknown optimizer 'adam'; the optimizers are adamw, lion"
    ):
        optimizer_entry("adam")
    with pytest.raises(ValueError, match="adamw takes no damper; its options are b1"):
        make_optimizer("adamw", 1e-3, damper="ema")
    with pytest.raises(ValueError, match="adafactor takes no b1; it has none"):
        make_optimizer("adafactor", 1e-3, b1=0.9)
    with pytest.raises(ValueError, match="galore needs a rank"):
        make_optimizer("galore", 1e-3)
    for name in ("adamw", "lion", "sinkgd_hybrid"):
        with pytest.raises(ValueError, match=f"{name} has no int8 momentum"):
            make_optimizer(name, 1e-3, mu_dtype="int8")


def test_int8_by_name_and_by_option_are_one():
    params = abstract(tiny.MODEL)
    by_name = make_optimizer("sage_hybrid_int8", 1e-3)
    by_option = make_optimizer("sage_hybrid", 1e-3, mu_dtype="int8")
    assert state_bytes(by_name, params) == state_bytes(by_option, params)
    shapes = jax.tree.leaves(jax.eval_shape(by_name.init, params))
    assert jnp.dtype(jnp.int8) in {leaf.dtype for leaf in shapes}


def test_damper_arguments_are_those_of_the_damper():
    options = OptimizerOptions(b1=0.8, b2=0.95, eps=1e-6, damper="ema", scale=3.0)
    assert damper_arguments(options) == {"b2": 0.95, "eps": 1e-6, "damper": "ema"}


def test_the_recommended_sinkgd_hybrid_is_that_of_the_package():
    params = random_params(tiny.MODEL)
    recommended = sage_optax.RECOMMENDED_SINKGD
    for given, own in (
        ({"option_set": "recommended"}, recommended),
        ({"option_set": "recommended", "b2": 0.9}, {**recommended, "adam_b2": 0.9}),
        (
            {"option_set": "recommended", "table_rule": "others"},
            {**recommended, "table_rule": "adamw"},
        ),
        ({"table_rule": "factored_rms"}, {"table_rule": "factored_rms"}),
        ({"option_set": "paper"}, {}),
        ({"table_rule": "others"}, {}),
    ):
        theirs = make_optimizer("sinkgd_hybrid", 1e-2, **given)
        ours = sage_optax.sinkgd_hybrid(1e-2, weight_decay=0.0, **own)
        found, wanted = (
            jax.jit(one.update)(params, one.init(params), params)[0] for one in (theirs, ours)
        )
        chex.assert_trees_all_equal(found, wanted)
    with pytest.raises(ValueError, match=r"no table_rule sage_int8; use .*or take sage_hybrid"):
        make_optimizer("sinkgd_hybrid", 1e-2, table_rule="sage_int8")


def test_the_recommended_lorapre_muon_is_that_of_the_package():
    params = random_params(tiny.MODEL)
    least = lorapre_optax.RECOMMENDED_MUON
    sage = {
        **sage_optax.RECOMMENDED_WITH_MUON,
        "nesterov": False,
        "learning_rate_multipliers": {"embedding": 1 / 3, "head": 1 / 3},
    }
    for given, base, own in (
        ({}, least, {}),
        ({"table_rank": 2}, least, {"table_rule": "others", "table_rank": 2}),
        ({"table_rule": "sage_int8"}, sage, {}),
        ({"table_rule": "sage"}, sage, {"table_rule": "sage"}),
    ):
        theirs = make_optimizer("lorapre_muon", 1e-2, option_set="recommended", rank=2, **given)
        recommended = {**base, "rank": 2, **own}
        ours = lorapre_optax.lorapre_muon(1e-2, **recommended)
        found, wanted = (
            jax.jit(one.update)(params, one.init(params), params)[0] for one in (theirs, ours)
        )
        chex.assert_trees_all_equal(found, wanted)
