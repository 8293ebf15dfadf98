"""JAX's strict modes: every exported transformation starts and steps under each, and no dtype drifts.

The transformations are those of the three packages' public lists, by their return types: a new one without an
entry in `CALLS` fails here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layout_optax
import lorapre_optax
import sage_optax
from layout_optax.promotion import with_standard_promotion

KINDS = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)
SHAPES = {
    "embed": {"embedding": (12, 8)},
    "layers": {"up": {"kernel": (2, 8, 10)}, "norm": {"scale": (2, 8)}},
    "lm_head": {"kernel": (8, 12)},
    "temperature": (),
}
DIRECTIONS = {role: optax.scale_by_sign() for role in ("embedding", "head", "matrix", "vector")}


def whole(factory, *static, **options):
    """Calls of a whole-model optimizer: as it comes, and with a schedule for every number that takes one."""
    return [
        lambda number: factory(number(1e-3), *static),
        lambda number: factory(
            number(1e-3),
            *static,
            weight_decay=number(0.1),
            matrix_learning_rate=number(1e-2),
            learning_rate_multipliers={"vector": 0.5},
            **{name: number(value) for name, value in options.items()},
        ),
    ]


LOW_RANK = {"scale": 0.5, "residual": 0.5, "damping": 1e-4}
CALLS = {
    "adam_direction": [
        lambda number: layout_optax.adam_direction(),
        lambda number: layout_optax.adam_direction(number(0.9), number(0.99), number(1e-8)),
    ],
    "by_role": whole(functools.partial(layout_optax.by_role, DIRECTIONS)),
    "unboxed": [lambda number: layout_optax.unboxed(sage_optax.sage(number(1e-3)))],
    "scale_by_sage": [
        lambda number: sage_optax.scale_by_sage(mu_dtype="int8"),
        lambda number: sage_optax.scale_by_sage(
            number(0.9), number(0.99), number(1e-8), mu_dtype="bfloat16", eps_mode="relative"
        ),
        lambda number: sage_optax.scale_by_sage(number(0.9), number(0.99), damper=None),
        lambda number: sage_optax.scale_by_sage(b2=number(0.99), row_damper=number(0.5)),
    ],
    "sage": [
        lambda number: sage_optax.sage(1e-3),
        lambda number: sage_optax.sage(
            number(1e-3), number(0.9), number(0.99), number(1e-8), weight_decay=number(0.1)
        ),
    ],
    "scale_by_factored_rms": [lambda number: sage_optax.scale_by_factored_rms()],
    "scale_by_sinkhorn": [
        lambda number: sage_optax.scale_by_sinkhorn(),
        lambda number: sage_optax.scale_by_sinkhorn(variant="sqrt", vectors_dtype="bfloat16"),
    ],
    "sinkgd": [lambda number: sage_optax.sinkgd(number(1e-3), weight_decay=0.1)],
    "sage_hybrid": [
        *whole(sage_optax.sage_hybrid, b1=0.9, b2=0.99, eps=1e-8, scale=10.0),
        lambda number: sage_optax.sage_hybrid(
            number(1e-3), head_rule="adamw", vector_rule="adamw", adam_b1=number(0.9)
        ),
    ],
    "lion_hybrid": whole(sage_optax.lion_hybrid, b1=0.9, b2=0.99, scale=10.0),
    "sinkgd_hybrid": [
        *whole(sage_optax.sinkgd_hybrid, adam_b1=0.9, adam_b2=0.99, adam_eps=1e-8),
        lambda number: sage_optax.sinkgd_hybrid(number(1e-3), table_rule="factored_rms"),
    ],
    "scale_by_lorapre_adam": [
        lambda number: lorapre_optax.scale_by_lorapre_adam(
            2, number(0.9), initial_subspace="gradient"
        ),
    ],
    "lorapre_adamw": [
        *whole(lorapre_optax.lorapre_adamw, 2, b1=0.9, b2=0.95, eps=1e-8, bound=1.0, **LOW_RANK),
        lambda number: lorapre_optax.lorapre_adamw(number(1e-3), 2, **lorapre_optax.RECOMMENDED),
    ],
    "scale_by_lorapre_lion": [
        lambda number: lorapre_optax.scale_by_lorapre_lion(2, damping_kind="absolute")
    ],
    "lorapre_lion": whole(lorapre_optax.lorapre_lion, 2, b1=0.9, b2=0.99, gamma=0.1, **LOW_RANK),
    "scale_by_lorapre_muon": [
        lambda number: lorapre_optax.scale_by_lorapre_muon(
            2, nesterov=True, ns_steps=number(5.0), consistent_rms=number(0.2)
        )
    ],
    "lorapre_muon": [
        *whole(lorapre_optax.lorapre_muon, 2, mu=0.9, eps=1e-8, **LOW_RANK),
        lambda number: lorapre_optax.lorapre_muon(
            number(1e-2), 2, table_rank=2, whole_matrices=True
        ),
        lambda number: lorapre_optax.lorapre_muon(number(1e-2), 2, table_rule="factored_rms"),
    ],
    "lorapre_sgd": whole(lorapre_optax.lorapre_sgd, 2, momentum=0.9, **LOW_RANK),
    "lorapre_sinkgd": whole(lorapre_optax.lorapre_sinkgd, 2, b1=0.9, b2=0.95, eps=1e-8),
    "low_rank_ema": [
        lambda number: lorapre_optax.low_rank_ema(0.9, 2),
        lambda number: lorapre_optax.low_rank_ema(
            number(0.9), 2, gamma=number(0.1), residual=number(0.5)
        ),
    ],
    "low_rank_trace": [
        lambda number: lorapre_optax.low_rank_trace(0.9, 2, nesterov=True),
        lambda number: lorapre_optax.low_rank_trace(number(0.9), 2, residual=number(0.5)),
    ],
}


def exported():
    """The names in the public lists that make a transformation."""
    for package in (layout_optax, sage_optax, lorapre_optax):
        for name in package.__all__:
            made = getattr(package, name)
            returned = inspect.isfunction(made) and inspect.signature(made, eval_str=True)
            if returned and returned.return_annotation in KINDS:
                yield name


NAMES = sorted(set(exported()))
NUMBERS = {
    "number": lambda value: value,
    "NumPy's": np.float64,
    "array": jnp.asarray,
    # The widest dtype there is: float64 under x64, as optax's cosine schedule gives it.
    "schedule": lambda value: lambda count: jnp.asarray(value, float) + 0 * count.astype(float),
}
TRACED = [
    ("number", jnp.float32, False),
    ("NumPy's", jnp.float32, True),
    ("array", jnp.bfloat16, False),
    ("schedule", jnp.bfloat16, True),
]


def drawn(dtype, seed=0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@contextlib.contextmanager
def strict(x64=False):
    """All strict modes at once; each of them refuses what it would refuse alone."""
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
    ):
        yield


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def check_kinds(params, states, updates):
    for state in states[1:]:
        assert kinds(state) == kinds(states[0])
    for update in updates:
        assert kinds(update) == kinds(params)


def test_the_table_holds_every_exported_transformation():
    assert sorted(CALLS) == NAMES
    assert len(NAMES) == 21


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "x64"),
    [
        (jnp.bfloat16, False),
        pytest.param(jnp.float32, True, marks=pytest.mark.extended),  # traced in every run
    ],
    ids=["bfloat16", "float32-x64"],
)
def test_two_steps_in_every_strict_mode(name, dtype, x64):
    """Compiled, schedules for numbers; once bfloat16, once float32 under x64."""
    with strict(x64):
        tx = CALLS[name][-1](NUMBERS["schedule"])
        params, first, second = (drawn(dtype, seed) for seed in range(3))

        @jax.jit
        def two_steps(params, first, second):
            start = tx.init(params)
            one, middle = tx.update(first, start, params)
            two, end = tx.update(second, middle, params)
            return (start, middle, end), (one, two)

        states, updates = two_steps(params, first, second)
        check_kinds(params, states, updates)
        chex.assert_tree_all_finite((states, updates))


@pytest.mark.parametrize("name", NAMES)
def test_every_call_traces_in_every_strict_mode(name):
    """Numbers of every kind, both dtypes, with and without x64: promotion shows while tracing."""
    for call in CALLS[name]:
        for number, dtype, x64 in TRACED:
            with strict(x64):
                params = drawn(dtype)
                tx = call(NUMBERS[number])
                state = jax.eval_shape(tx.init, params)
                updates, after = jax.eval_shape(tx.update, params, state, params)
                check_kinds(params, [state, after], [updates])


@pytest.mark.parametrize("name", ["sage_hybrid", "lorapre_adamw", "lorapre_muon", "lorapre_lion"])
def test_gradients_of_zero_make_no_nan_on_the_way(name):
    """Without jit ``jax_debug_nans`` looks at every operation."""
    with strict():
        tx = CALLS[name][0](NUMBERS["number"])
        zeros = jax.tree.map(jnp.zeros_like, drawn(jnp.float32))
        updates, _ = tx.update(zeros, tx.init(zeros), zeros)
        chex.assert_trees_all_equal(updates, zeros)


def test_what_the_page_says_of_optax_around_ours():
    """docs/numerics.md: clipping and finiteness checks bear the strict modes, `optax.MultiSteps` does not."""
    params = drawn(jnp.bfloat16)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), sage_optax.sage_hybrid(1e-3))
    good = optax.apply_if_finite(clipped, 5)
    bad = optax.MultiSteps(clipped, 2).gradient_transformation()
    with strict():
        jax.eval_shape(good.update, params, good.init(params), params)
        state = bad.init(params)
        with pytest.raises(ValueError, match="strict"):
            jax.eval_shape(bad.update, params, state, params)
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(bad.update, params, state, params)


def test_optax_refuses_what_the_wrapper_lets_pass():
    """Why `with_standard_promotion` is there; it can go when optax's Adam bears strict promotion."""
    gradient = jnp.ones(3)
    with strict():
        bare, wrapped = optax.scale_by_adam(), with_standard_promotion(optax.scale_by_adam())
        state = bare.init(gradient)
        with pytest.raises(ValueError, match="strict"):
            bare.update(gradient, state)
        found, _ = wrapped.update(gradient, wrapped.init(gradient))
    expected, _ = bare.update(gradient, state)
    np.testing.assert_array_equal(found, expected)
