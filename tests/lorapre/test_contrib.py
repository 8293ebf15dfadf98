"""optax's own suite for contributed optimizers, run on ours, and convergence where factors are at work."""

from __future__ import annotations

import functools
import importlib.util
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import lorapre_optax
from lorapre_optax import ParamLayout
from tests.contrib import is_repeated

TABLE = ParamLayout("head", (-1,), (-2,))  # lorapre_sinkgd keeps factors of tables alone
OPTIMIZERS = (
    {"opt_name": "lorapre_adamw", "opt_kwargs": {"learning_rate": 1e-3, "rank": 8}},
    {
        "opt_name": "lorapre_adamw",
        "opt_kwargs": {
            "learning_rate": 1e-3,
            "rank": 2,
            "bias_correction": "exact",
            "residual": 0.9,
            "bound": 1.0,
            "initial_subspace": "gradient",
            "full_rank_fallback": False,
            "others": "sage",
        },
    },
    {"opt_name": "lorapre_muon", "opt_kwargs": {"learning_rate": 1e-3, "rank": 8}},
    {"opt_name": "lorapre_sgd", "opt_kwargs": {"learning_rate": 1e-3, "rank": 8}},
    {
        "opt_name": "lorapre_lion",
        "opt_kwargs": {"learning_rate": 1e-3, "rank": 2, "full_rank_fallback": False},
    },
    {"opt_name": "lorapre_sinkgd", "opt_kwargs": {"learning_rate": 1e-3, "rank": 8}},
)
ENTRIES = [entry | {"wrapper_name": None, "wrapper_kwargs": None} for entry in OPTIMIZERS]


@functools.cache
def suite():
    """A fresh copy of optax's test module whose list of optimizers is ours."""
    product = parameterized.product

    def ours(*sequences, **named):
        return product(*([ENTRIES] * len(sequences)), **named)

    spec = importlib.util.find_spec("optax.contrib._common_test")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    parameterized.product = ours
    try:
        spec.loader.exec_module(module)
    finally:
        parameterized.product = product
    vars(module)["_get_opt_factory"] = lambda name: getattr(lorapre_optax, name)
    return module


NAMES = sorted(name for name in dir(suite().ContribTest) if name.startswith("test"))
REPEATED = [name for name in NAMES if is_repeated(suite().ContribTest, name)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.extended) if name in REPEATED else name
        for name in NAMES
    ],
)
def test_optax_contrib_suite(name):
    result = unittest.TestResult()
    suite().ContribTest(name).run(result)
    assert result.testsRun == 1
    assert not result.skipped
    assert not result.failures + result.errors, (result.failures + result.errors)[0][1]


def test_the_suite_ran_ours():
    # Eight tests; the convergence test has four targets, three others run per dtype or wrapping.
    assert len(NAMES) == len(OPTIMIZERS) * (2 + 4 + 1 + 2 + 2 + 4 + 1)
    # A wrap, three targets, and one or two dtypes of each of three tests.
    assert len(REPEATED) == len(OPTIMIZERS) * (1 + 3 + 1 + 1 + 2)


@pytest.mark.filterwarnings("ignore::layout_optax.LayoutWarning")  # there is no table here
@pytest.mark.parametrize(
    ("name", "options", "rate", "steps"),
    [
        # Without a bound a single entry can throw a run off the target, whichever way rounding
        # falls: 4 runs of 256 at 3e-2, none at 3e-3 in three times the steps (benchmarks.convergence).
        ("lorapre_adamw", {}, 3e-3, 4500),
        ("lorapre_adamw", {"bound": 1.0}, 3e-2, 1500),
        ("lorapre_adamw", {"residual": 0.9, "bias_correction": "exact", "bound": 1.0}, 3e-2, 1500),
        ("lorapre_muon", {}, 3e-2, 1500),
        ("lorapre_sgd", {"momentum": 0.5}, 3e-2, 1500),
        ("lorapre_lion", {}, 3e-2, 1500),
        ("lorapre_lion", {"residual": 0.9}, 3e-2, 1500),
        ("lorapre_sinkgd", {"weight_decay": 0.0, "layout": TABLE}, 3e-2, 1500),
    ],
)
def test_convergence_with_factors_at_work(name, options, rate, steps):
    rng = np.random.default_rng(0)
    target = {
        "q": {"kernel": rng.normal(size=(24, 40))},
        "layers": {"up": {"kernel": rng.normal(size=(2, 24, 40))}},
    }
    target = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), target)
    schedule = optax.cosine_decay_schedule(rate, steps)
    tx = getattr(lorapre_optax, name)(schedule, 4, **options)
    params = jax.tree.map(jnp.zeros_like, target)
    state = jax.jit(tx.init)(params)
    sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert {(4, 40), (4, 24), (2, 4, 40), (2, 4, 24)} <= sizes
    assert (24, 40) not in sizes

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.subtract, params, target)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    params, state = run((params, state))
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True):
        assert jnp.max(jnp.abs(found - wanted)) < 3e-2
