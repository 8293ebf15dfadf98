"""Layouts, golden data and loops that the tests of this folder share."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from layout_optax import ParamLayout
from tests import reference_lorapre as reference

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TORCH = ParamLayout("matrix", (0,), (1,))
KERNEL = ParamLayout("matrix", (1,), (0,))
LAYOUTS = {
    "matrix": ((7, 9), KERNEL),
    "torch matrix": ((9, 7), TORCH),
    "query (d, heads, head_dim)": ((8, 3, 4), ParamLayout("matrix", (1, 2), (0,))),
    "output (heads, head_dim, d)": ((3, 4, 8), ParamLayout("matrix", (2,), (0, 1))),
    "stack": ((3, 6, 8), ParamLayout("matrix", (2,), (1,))),
    "layers on axis 1": ((8, 2, 3, 4), ParamLayout("matrix", (2, 3), (0,))),
    "layers on axis 1, output": ((3, 2, 4, 6), ParamLayout("matrix", (3,), (0, 2))),
    "stacked experts": ((2, 3, 5, 6), ParamLayout("matrix", (-1,), (-2,))),
}


def golden(name):
    with np.load(GOLDEN / f"lorapre_{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    return data, json.loads(str(data.pop("meta")))


def run(tx, grads, state, dtype=np.float32):
    """All updates (steps, ...) and the last state."""
    step = jax.jit(tx.update)
    out = []
    for g in grads:
        u, state = step(jnp.asarray(g, dtype), state)
        out.append(np.asarray(u))
    return np.stack(out), state


def run_tree(tx, grads, state):
    """All updates of a tree whose leaves are (steps, ...)."""
    return jax.jit(
        lambda state: jax.lax.scan(
            lambda state, g: tuple(reversed(tx.update(g, state))), state, grads
        )[1]
    )(state)


def apart(x, y):
    """||x - y|| / ||y||."""
    return np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)


def signal(shape, layout, steps=12, rank=2, noise=0.3, seed=0):
    """Gradients with a few drifting directions in noise, of a parameter with this layout."""
    rng = np.random.default_rng(seed)
    n, p, q = reference.to_matrices(np.zeros(shape), layout).shape
    u, v = rng.normal(size=(n, p, rank)), rng.normal(size=(n, rank, q))
    out = []
    for _ in range(steps):
        v = v + 0.05 * rng.normal(size=v.shape)
        matrices = u @ v + noise * rng.normal(size=(n, p, q))
        out.append(1e-3 * reference.from_matrices(matrices, layout, shape))
    return np.stack(out)


def filled(tx, params, seed=0, scale=1.0):
    """A state of the optimizer with random positive factors and full moments."""
    rng = np.random.default_rng(seed)

    def fill(x):
        values = scale * np.abs(rng.normal(size=x.shape)) if x.ndim else 3  # three steps taken
        return jnp.asarray(values, x.dtype)

    return jax.tree.map(fill, jax.eval_shape(tx.init, params))


def assert_fits(state, tx, params):
    """Structure, shapes and dtypes are those of ``tx.init``."""
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)  # noqa: E731
    assert kinds(state) == kinds(jax.eval_shape(tx.init, params))
