"""Directions of Sinkhorn's algorithm on one leaf, compiled once for all tests, and their comparison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from layout_optax import ParamLayout
from sage_optax import scale_by_sinkhorn
from tests import reference

WEIGHT = ParamLayout("matrix", 0, 1)
KERNEL = ParamLayout("matrix", 1, 0)
TOLERANCE = 1e-6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@functools.cache
def compiled(layout, variant="unit"):
    """A jitted update of one leaf; iterations and eps are traced, so it compiles once a shape."""

    def update(g, iterations, eps):
        return scale_by_sinkhorn(iterations, eps, variant=variant, layout=layout).update(g, ())[0]

    return jax.jit(update)


def direction(g, layout=WEIGHT, *, iterations=5, eps=1e-8, variant="unit"):
    return compiled(layout, variant)(g, iterations, eps)


def check(g, layout=WEIGHT, tolerance=TOLERANCE, dtype=np.float32, **options):
    """Compares with the plain loop as a whole and entry by entry."""
    g = np.asarray(g, dtype)
    g[np.abs(g) < np.finfo(dtype).tiny] = 0  # XLA flushes them, NumPy does not
    found = np.asarray(direction(jnp.asarray(g), layout, **options), np.float64)
    expected = reference.sinkhorn(g, layout, **options)
    error = np.abs(found - expected)
    assert np.linalg.norm(error) <= tolerance * np.linalg.norm(expected)
    # Entries that underflow in float32 have no relative error to speak of.
    smallest = np.finfo(dtype).tiny * 1e6
    assert np.all(error <= tolerance * np.abs(expected) + smallest)
