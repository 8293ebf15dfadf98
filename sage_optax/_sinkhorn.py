"""Sinkhorn normalisation of a matrix whose iterate is never written: two scaling vectors on the gradient.

The loop of SinkGD (Scetbon et al., arXiv:2502.06742) divides rows and columns of a matrix by their norms
in turn. Its iterate is always ``diag(r) G diag(c)``, so all that changes is one number a row and one a
column. Each half-step here reads the gradient once, forms the entries of the iterate on the fly and
sums their squares; a matrix is written once, at the end.

What makes this harder than it sounds is range. An absolute ``eps`` multiplies the factor of a vanishing
row by ``1 / eps`` at every visit, and a gradient may hold rows at 1e+25 beside columns at 1e-25: the
factors leave float32 although every entry of the iterate lies in [-1, 1]. Factors are therefore kept as
a mantissa and an integer exponent, and `_iterate` applies them in an order in which no intermediate
result leaves the range between the gradient's entry and the iterate's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from layout_optax.axes import compute_dtype, zeros_without
from layout_optax.roles import ParamLayout

Variant = Literal["unit", "sqrt"]

# Raised by this power of two, entries of the iterate have squares that are normal numbers down to 2^-103
# (1e-31). None exceeds the square root of a row's or column's size, so the sums stay finite for matrices
# of up to 2^46 entries.
_LIFT = 40


class Scaling(NamedTuple):
    """One factor per row or per column, ``mantissa * 2**exponent``.

    Attributes:
      mantissa: float32 (float64 for a float64 gradient), the parameter's shape with size 1 along the
        axes that share a factor.
      exponent: int32, same shape.
    """

    mantissa: jax.Array
    exponent: jax.Array


def sinkhorn(
    g: jax.Array,
    layout: ParamLayout,
    *,
    iterations: jax.Array | int,
    eps: jax.Array | float,
    variant: Variant,
) -> jax.Array:
    """Normalises the rows, then the columns of a gradient, ``iterations`` times.

    ``X = G``, then repeatedly ``X_i. /= ||X_i.|| + eps`` for every row and ``X_.j /= ||X_.j|| + eps`` for
    every column; the sqrt variant multiplies rows by ``sqrt(n_columns)`` and columns by
    ``sqrt(n_rows)`` after dividing.

    Args:
      g: a gradient of any float dtype, any shape.
      layout: its layout with non-negative axes. Without row axes (a vector) it is a single row.
      iterations: number of sweeps, at least 1 (a smaller traced value counts as 1); may be traced.
      eps: added to each norm; may be traced.
      variant: ``"unit"`` or ``"sqrt"``.

    Returns:
      ``diag(r) G diag(c)``, shape of ``g``, float32 or wider. float32 subnormals count as zero.
    """
    dtype = compute_dtype(g.dtype)
    eps = jnp.asarray(eps, dtype)
    iterations = jnp.asarray(iterations)
    if jnp.issubdtype(iterations.dtype, jnp.floating):
        iterations = jnp.rint(iterations)
    iterations = jnp.maximum(iterations.astype(jnp.int32), 1)
    n_rows, n_columns = (
        math.prod(g.shape[axis] for axis in axes) for axes in (layout.row_axes, layout.column_axes)
    )
    # The carry is the sqrt variant's iterate, whose entries have root mean square 1 after each
    # half-step, so that neither factor drifts with the shape. The unit iterate is smaller by
    # sqrt(n_columns) where columns are divided and by sqrt(n_rows) where rows are (G itself at
    # first): an absolute eps on the smaller norm is a larger one on ours.
    row_eps, column_eps, gain = eps, eps, 1.0
    if variant == "unit":
        row_eps, column_eps = eps * math.sqrt(n_rows), eps * math.sqrt(n_columns)
        gain = 1 / math.sqrt(n_rows)

    # The first norms of the rows may lie anywhere in the range of the dtype, so they are taken of
    # rows scaled to a maximum in [1/2, 1). A power of two is exact, and eps is scaled along with it.
    peak = jnp.max(jnp.abs(g).astype(dtype), axis=layout.column_axes, keepdims=True, initial=0.0)
    _, exponent = jnp.frexp(peak)
    first_eps = eps * _power_of_two(-exponent, dtype)
    rows = Scaling(jnp.ones_like(peak), -exponent)
    zeros = jnp.expand_dims(zeros_without(g, layout.row_axes, dtype), layout.row_axes)
    columns = Scaling(zeros + 1, zeros.astype(jnp.int32))

    def sweep(step, carry):
        rows, columns = carry
        divisor = _norms(g, rows, columns, layout.column_axes)
        divisor += jnp.where(step == 0, first_eps, row_eps)
        rows = _divide(rows, divisor, math.sqrt(n_columns))
        divisor = _norms(g, rows, columns, layout.row_axes) + column_eps
        return rows, _divide(columns, divisor, math.sqrt(n_rows))

    rows, columns = jax.lax.fori_loop(0, iterations, sweep, (rows, columns))
    return _iterate(g, rows, columns, gain=gain)


def _norms(g: jax.Array, rows: Scaling, columns: Scaling, axes: Sequence[int]) -> jax.Array:
    """Norms of the iterate over ``axes``, kept with size 1."""
    lifted = _iterate(g, rows, columns, gain=2.0**_LIFT)
    return jnp.sqrt(jnp.sum(jnp.square(lifted), axis=tuple(axes), keepdims=True)) * 2.0**-_LIFT


def _divide(scaling: Scaling, divisor: jax.Array, gain: float) -> Scaling:
    """``gain * scaling / divisor``; where the divisor is 0 (eps = 0 and nothing there), it is 1."""
    quotient = scaling.mantissa * gain / jnp.where(divisor == 0, 1, divisor)
    mantissa, shift = jnp.frexp(quotient)
    return Scaling(mantissa, scaling.exponent + shift)


def _iterate(g: jax.Array, rows: Scaling, columns: Scaling, *, gain: float) -> jax.Array:
    """``gain * diag(r) G diag(c)``, entry by entry; XLA fuses it into whatever consumes it.

    Factors that raise an entry come first and those that lower it last, so no intermediate result is
    smaller than both the entry and the result. None is too large either: both ``r G`` and ``r G c`` are
    of the size of a norm, for which 18 bits are kept free.
    """
    dtype = rows.mantissa.dtype
    top = int(jnp.finfo(dtype).maxexp)
    raising = jnp.clip(rows.exponent, 0, top - 8) + jnp.minimum(rows.exponent + top - 18, 0)
    # The factor of a row of zeros grows without end; the bound keeps 0 * r from being 0 * inf.
    lowering = jnp.minimum(rows.exponent - raising, top - _LIFT - 8)
    half = columns.exponent // 2
    x = g.astype(dtype) * _power_of_two(raising, dtype)
    x = x * _power_of_two(half, dtype)
    x = x * (columns.mantissa * _power_of_two(columns.exponent - half, dtype))
    return x * (rows.mantissa * _power_of_two(lowering, dtype) * gain)


def _power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """``2**exponent``, exactly, the exponent clipped to the normal numbers of ``dtype``."""
    info = jnp.finfo(dtype)
    biased = jnp.clip(exponent, int(info.minexp), int(info.maxexp) - 1) - int(info.minexp) + 1
    bits = biased.astype(jnp.int64 if info.bits == 64 else jnp.int32) << info.nmant
    return jax.lax.bitcast_convert_type(bits, dtype)
