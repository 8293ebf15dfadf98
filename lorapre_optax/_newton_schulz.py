"""Orthogonalisation by the quintic Newton-Schulz iteration, in the parameter's own axes.

optax has this iteration only inside `optax.contrib.scale_by_muon`, which keeps a full momentum and reshapes its
input. Reshaping a sharded matrix is an error on a mesh of Explicit axes. The results here agree with optax's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from layout_optax.axes import sharding_without, subscripts
from layout_optax.layout import ParamLayout
from lorapre_optax._products import Narrow

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""K. Jordan's coefficients (https://kellerjordan.github.io/posts/muon/), tuned for slope at zero."""


def orthogonalize(
    x: jax.Array,
    layout: ParamLayout,
    steps: jax.Array | int = 5,
    eps: jax.Array | float = 1e-8,
    narrow: Narrow | None = None,
) -> jax.Array:
    """Approximates the nearest matrix with orthonormal rows or columns, per batch index.

    ``X <- a X + (b S + c S^2) X`` with ``S = X X^T``, starting from X over its Frobenius norm. With these
    coefficients the singular values do not converge to 1 but end between about 0.7 and 1.2. S is computed on
    the smaller side.

    Args:
      x: float32 or wider, any number of row, column and batch axes.
      layout: the layout of x with non-negative axes.
      steps: number of iterations; may be traced.
      eps: added to the norm, in units of the largest entry, so that tiny inputs are not shrunk.
      narrow: the dtype of the iteration if it is not x's; products then still sum in float32. The norm is
        computed in x's dtype.

    Returns:
      Shape and dtype of x.

    Example:
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
      >>> print(orthogonalize(x, ParamLayout("matrix", (1,), (0,))).round(1))
      [[1.1 0.  0. ]
       [0.  0.7 0. ]]
    """
    core = layout.row_axes + layout.column_axes
    sides = (layout.row_axes, layout.column_axes)
    small, large = sorted(sides, key=lambda axes: math.prod(x.shape[axis] for axis in axes))
    names, _, _ = subscripts(layout, x.ndim)
    second = {names[axis]: names[axis].upper() for axis in small}
    third = dict(zip(second, "zyxwvutsrqpo", strict=False))
    rename = lambda text, to: "".join(to.get(letter, letter) for letter in text)  # noqa: E731
    kept = "".join(letter for axis, letter in enumerate(names) if axis not in large)
    gram = kept + "".join(second.values())
    square = f"{kept + ''.join(third.values())},{rename(kept, third) + ''.join(second.values())}"
    sharding = sharding_without(x, ())
    batch_only = None  # S is whole on every device, but for its batch axes
    if sharding is not None:
        parts = dict(zip(names, sharding.spec, strict=True))
        spec = [None if names.find(letter) in (-1, *core) else parts[letter] for letter in gram]
        batch_only = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    a, b, c = COEFFICIENTS

    def iterate(_, y):
        s = jnp.einsum(f"{names},{rename(names, second)}->{gram}", y, y, out_sharding=batch_only)
        polynomial = b * s + c * jnp.einsum(f"{square}->{gram}", s, s, out_sharding=batch_only)
        equation = f"{gram},{rename(names, second)}->{names}"
        return a * y + jnp.einsum(equation, polynomial, y, out_sharding=sharding)

    largest = jnp.max(jnp.abs(x), axis=core, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=core, keepdims=True)) + jnp.asarray(eps, x.dtype))
    run = lambda x: jax.lax.fori_loop(0, steps, iterate, x)  # noqa: E731
    if narrow is None:
        return run(x)
    rounded = lambda x: run(x.astype(narrow.dtype)).astype(x.dtype)  # noqa: E731
    if narrow.everywhere:
        return rounded(x)
    return jax.lax.platform_dependent(x, cpu=run, default=rounded)
