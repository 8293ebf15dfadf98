"""Layouts and gradients that the tests of this folder share."""

from typing import Any

import jax
import numpy as np

from layout_optax import ParamLayout

LAYOUTS = {
    "embedding": (ParamLayout("embedding", 0, 1), (7, 5)),
    "head kernel": (ParamLayout("head", 1, 0), (5, 7)),
    "kernel": (ParamLayout("matrix", 1, 0), (4, 6)),
    "query (d, heads, head_dim)": (ParamLayout("matrix", (1, 2), 0), (6, 2, 3)),
    "output (heads, head_dim, d)": (ParamLayout("matrix", 2, (0, 1)), (2, 3, 6)),
    "layers on axis 0": (ParamLayout("matrix", 2, 1), (3, 4, 5)),
    "layers on axis 1": (ParamLayout("matrix", 2, 0), (4, 3, 5)),
    "experts in layers": (ParamLayout("matrix", 3, 2), (2, 3, 4, 5)),
    "vector": (ParamLayout("vector", (), 0), (6,)),
    "stacked norm": (ParamLayout("vector", (), 1), (3, 6)),
    "bias (heads, head_dim)": (ParamLayout("vector", (), (0, 1)), (2, 3)),
    "scalar": (ParamLayout("vector", (), ()), ()),
}

SMALL = {
    "embed": (6, 4),
    "up": {"kernel": (4, 5)},
    "norm": {"scale": (4,)},
    "lm_head": {"kernel": (4, 6)},
}
"""One parameter of each role."""

SOME_TREE = {
    "embed_tokens": {"embedding": (10, 6)},
    "layers": {"norm": {"scale": (3, 6)}, "mlp": {"up": {"kernel": (3, 6, 8)}}},
    "lm_head": {"kernel": (6, 10)},
}


def random_gradients(shape, steps, seed=0):
    """Float64 gradients whose columns span six decades, around and far above eps = 1e-8."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((steps, *shape)) * 10.0 ** rng.uniform(-8, -2, shape)


def random_tree(shapes, seed=0, dtype=np.float32):
    """A tree of normal arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jax.numpy.asarray(rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(tx, params, gradients, update=None) -> tuple[Any, Any]:
    """Final updates and state of a transformation after some steps at fixed parameters."""
    update = update or jax.jit(tx.update)
    state, updates = tx.init(params), None
    for g in gradients:
        updates, state = update(g, state, params)
    return updates, state
