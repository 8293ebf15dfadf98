"""A small model with every role, and what each alias must do with rates, masks, decay and injection."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layout_optax import infer_layout
from lorapre_optax import STATIC_ARGS

SHAPES = {
    "embed": {"embedding": (30, 16)},
    "up": {"kernel": (16, 24)},
    "norm": {"scale": (16,)},
    "lm_head": {"kernel": (16, 30)},
    "odd": (2, 3, 4),
}
NOT_OURS = functools.partial(infer_layout, rules=[("odd", None)])
LEAVES = {
    "embedding": lambda tree: tree["embed"]["embedding"],
    "matrix": lambda tree: tree["up"]["kernel"],
    "vector": lambda tree: tree["norm"]["scale"],
    "head": lambda tree: tree["lm_head"]["kernel"],
    "other": lambda tree: tree["odd"],
}


def draw(seed=0, steps=None, shapes=None, dtype=np.float64):
    """A tree of normal arrays, or of ``steps`` of them along a leading axis; read-only, to be shared."""
    rng = np.random.default_rng(seed)
    lead = () if steps is None else (steps,)

    def make(shape):
        x = np.asarray(rng.normal(size=lead + shape), dtype)
        x.setflags(write=False)
        return x

    return jax.tree.map(make, shapes or SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(tx, params, grads):
    """All updates of gradients (steps, ...), at fixed parameters, and the first and last state."""
    first = jax.jit(tx.init)(params)
    step = lambda state, g: tuple(reversed(tx.update(g, state, params)))  # noqa: E731
    last, updates = jax.jit(lambda state: jax.lax.scan(step, state, grads))(first)
    return updates, first, last


def owned(state, leaf):
    """Sorted shapes of the arrays that a state keeps for one leaf, by its path."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    key = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return sorted(x.shape for path, x in flat if key(path).endswith(f"/{leaf}"))


def check_rates_and_decay(factory):
    """Each role's rate multiplies direction and decay; the mask spares what it names."""
    params = as_float32(draw())
    grads = as_float32(draw(1, 2))
    rates = {"embedding": 0.1, "head": 0.2, "vector": 0.3, "matrix": 0.4, "other": 0.5}
    plain, _, _ = run(factory(1.0, layout=NOT_OURS, weight_decay=0.0), params, grads)
    own = {f"{role}_learning_rate": rate for role, rate in rates.items() if role != "matrix"}
    own["head_learning_rate"] = optax.constant_schedule(rates["head"])
    tx = factory(
        2.0,
        layout=NOT_OURS,
        weight_decay=0.25,
        weight_decay_mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        learning_rate_multipliers={"matrix": rates["matrix"] / 2.0},
        **own,
    )
    found, _, _ = run(tx, params, grads)
    for role, leaf in LEAVES.items():
        decay = 0.0 if role == "vector" else 0.25 * leaf(params)
        expected = rates[role] * (leaf(plain) - decay)
        np.testing.assert_allclose(leaf(found), expected, rtol=1e-5, atol=1e-7, err_msg=role)


def check_injection(factory):
    """Every number may arrive as an array; the static arguments are the documented ones."""
    params = as_float32(draw())
    grads = as_float32(draw(1, 2))
    assert set(STATIC_ARGS) <= set(inspect.signature(factory).parameters)
    mask = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
    options = {"residual": 0.5, "layout": NOT_OURS, "weight_decay": 0.1, "weight_decay_mask": mask}
    plain, _, _ = run(factory(1e-3, 2, **options), params, grads)
    tx = optax.inject_hyperparams(factory, static_args=STATIC_ARGS)(1e-3, 2, **options)
    injected, _, state = run(tx, params, grads)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-8)
    jax.tree.map(close, injected, plain)
    assert {"learning_rate", "residual", "scale", "damping", "weight_decay"} <= set(
        state.hyperparams
    )
