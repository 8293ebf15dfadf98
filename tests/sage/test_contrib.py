"""optax's own tests of contributed optimizers, run on ours.

The installed test module is executed once more with its list of optimizers exchanged, so that what is
tested follows the installed version of optax and nothing of it is copied here.
"""

import importlib.util
import inspect
from unittest import mock

import pytest
from absl.testing import parameterized

import sage_optax
from tests.contrib import is_repeated

RATE = 1e-3
OPTIMIZERS = {
    "sage": {"learning_rate": RATE},
    "sage_int8": {"learning_rate": RATE, "mu_dtype": "int8"},
    # On a vector SinkGD is sign descent, which circles Rosenbrock's valley at any fixed rate. An eps of
    # one turns it into gradient descent near the minimum.
    "sinkgd": {"learning_rate": RATE, "variant": "unit", "scale": 1.0, "iterations": 1, "eps": 1.0},
    "sage_hybrid": {"learning_rate": RATE},
    "lion_hybrid": {"learning_rate": RATE},
    "sinkgd_hybrid": {"learning_rate": RATE},
    "sinkgd_hybrid_factored": {"learning_rate": RATE, "table_rule": "factored_rms"},
}


def factory(name):
    """The optimizer, with annotations as objects: upstream reads the learning rate's."""
    function = getattr(sage_optax, name.removesuffix("_int8").removesuffix("_factored"))
    signature = inspect.signature(function, eval_str=True)

    def make(*args, **kwargs):
        return function(*args, **kwargs)

    setattr(make, "__signature__", signature)  # noqa: B010
    return make


def load():
    """The installed ``ContribTest`` with our optimizers for its own."""
    ours = [
        {"opt_name": name, "opt_kwargs": kwargs, "wrapper_name": None, "wrapper_kwargs": None}
        for name, kwargs in OPTIMIZERS.items()
    ]
    product = parameterized.product

    def exchanged(optimizers, **grid):
        assert all("opt_name" in optimizer for optimizer in optimizers)
        if "wrap" in grid:  # means nothing without a wrapper
            grid["wrap"] = [False]
        return product(ours, **grid)

    spec = importlib.util.find_spec("optax.contrib._common_test")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(parameterized, "product", exchanged):
        spec.loader.exec_module(module)
    setattr(module, "_get_opt_factory", factory)  # noqa: B010
    return module.ContribTest


ContribTest = load()
TESTS = [name for name in dir(ContribTest) if name.startswith("test_")]
REPEATED = [name for name in TESTS if is_repeated(ContribTest, name)]
for test in REPEATED:
    setattr(ContribTest, test, pytest.mark.extended(getattr(ContribTest, test)))


def test_everything_ran():
    assert len(TESTS) % len(OPTIMIZERS) == len(REPEATED) % len(OPTIMIZERS) == 0
    assert len(TESTS) >= 15 * len(OPTIMIZERS)
    assert len(REPEATED) <= 8 * len(OPTIMIZERS)
