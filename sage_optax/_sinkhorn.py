"""Sinkhorn normalisation of a matrix by two scaling vectors; the matrix is written once, at the end.

The loop of SinkGD (Scetbon et al., arXiv:2502.06742) divides rows and columns of a matrix by their norms
in turn. Its iterate is always ``X = diag(r) G diag(c)``, and the squared norm of row i is
``r_i^2 sum_j G_ij^2 c_j^2``: a product of the squared gradient with a vector. So all ``2 L`` half-steps read
one matrix of squares, and only the factors r and c change.

What makes this harder than it sounds is range. An absolute ``eps`` multiplies the factor of a vanishing
row by ``1 / eps`` at every visit, a gradient may hold a row at 1e+25 beside a column at 1e-25, and
squares double every exponent: the factors leave float32 although the iterate lies in [-1, 1]. Therefore

* the squares are of a gradient scaled by powers of two, so that every row and column peaks near 1;
* factors are a mantissa and an integer exponent, and those of empty rows and columns are 0;
* `_scaled` applies factors in an order in which no intermediate result leaves the range between the
  gradient's entry and its own;
* the iterate is kept ``sqrt(columns / rows)`` larger after rows are divided than the loop's, counting
  those that are not empty. Otherwise r would grow and c shrink by that factor in every sweep.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from layout_optax.axes import compute_dtype, contract, zeros_without
from layout_optax.layout import ParamLayout

Variant = Literal["unit", "sqrt"]

# Powers of two by which factors are raised before they are squared. The window of float32 is centred on
# the factors that a gradient can give rise to: those of rows lie between 1e-28 (a row at 1e-36 against
# eps = 1e-8) and the root of the matrix's size, those of columns reach 1e+18 beside such rows.
_ROW_LIFT, _COLUMN_LIFT = 20, -12
_LARGEST_WEIGHT = 52  # exponent of a factor, after the lift; 2^22 squares of such can be summed
_PEAK_LIFT = 100  # so that a column down to 2^-226 (1e-68) of the other columns' size is not empty


class Scaling(NamedTuple):
    """One factor per row or per column, ``mantissa * 2**exponent``.

    Attributes:
      mantissa: float32 (float64 for a float64 gradient), the parameter's shape with size 1 along the
        axes that share a factor; 0 where the row or column is empty.
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
      g: a gradient of any float dtype and shape.
      layout: its layout with non-negative axes. Without row axes (a vector) it is a single row.
      iterations: number of sweeps, at least 1 (a smaller traced value counts as 1); may be traced.
      eps: added to each norm; may be traced.
      variant: ``"unit"`` or ``"sqrt"``.

    Returns:
      ``diag(r) G diag(c)``, shape of ``g``, float32 or wider. Subnormal numbers count as zero.
    """
    dtype = compute_dtype(g.dtype)
    eps = jnp.asarray(eps, dtype)
    if isinstance(iterations, Tracer):
        iterations = jnp.maximum(jnp.rint(iterations).astype(jnp.int32), 1)
    else:
        iterations = round(float(iterations))

    # No entry exceeds 2^row_peak 2^column_peak, and in each row and column one comes within a factor of 2.
    row_peak, column_peak, row_used, column_used = _peaks(g, layout, dtype)
    ones = jnp.expand_dims(zeros_without(g, layout.row_axes, dtype) + 1, layout.row_axes)
    flat = _scaled(
        g, Scaling(jnp.ones_like(row_peak, dtype), -row_peak), Scaling(ones, -column_peak)
    )
    squares = jnp.square(flat)
    used = _count(column_used, layout.column_axes, dtype) / _count(row_used, layout.row_axes, dtype)
    row_gain = jnp.sqrt(used)

    # eps as it stands beside the norms of our iterate. The loop's own is n^(1/2) times ours in the sqrt
    # variant, except that the first norms of the rows are those of G. There the factor of a row
    # starts as 2^row_peak, which is divided out so that no norm overflows.
    first_eps = eps * _power_of_two(-row_peak, dtype)
    row_eps, column_eps, gain = eps, eps * row_gain, 1.0
    if variant == "sqrt":
        gain, column_root = (
            math.sqrt(math.prod(g.shape[axis] for axis in axes))
            for axes in (layout.row_axes, layout.column_axes)
        )
        row_eps, column_eps = row_eps / gain, column_eps / column_root
    rows = Scaling(row_used.astype(dtype), jnp.zeros_like(row_peak))
    columns = Scaling(column_used.astype(dtype), column_peak)

    def sweep(step, carry):
        rows, columns = carry
        squared = _weighted(squares, columns, _COLUMN_LIFT, layout, over="columns")
        divisor = _times_root(rows, squared, _COLUMN_LIFT) + jnp.where(
            step == 0, first_eps, row_eps
        )
        rows = _divided(rows, divisor, row_gain)
        squared = _weighted(squares, rows, _ROW_LIFT, layout, over="rows")
        divisor = _times_root(columns, squared, _ROW_LIFT) + column_eps
        return rows, _divided(columns, divisor, 1.0)

    rows, columns = jax.lax.fori_loop(0, iterations, sweep, (rows, columns))
    rows = Scaling(rows.mantissa * gain, rows.exponent - row_peak)
    return _scaled(g, rows, Scaling(columns.mantissa, columns.exponent - column_peak))


def _peaks(g: jax.Array, layout: ParamLayout, dtype: Any):
    """Exponents of the largest entry of each row, of each column of the rows so scaled; where not 0."""
    row_peak = jnp.max(
        jnp.abs(g).astype(dtype), axis=layout.column_axes, keepdims=True, initial=0.0
    )
    row_used, (_, row_exponent) = row_peak != 0, jnp.frexp(row_peak)
    half = (_PEAK_LIFT - row_exponent) >> 1
    first, second = jax.lax.optimization_barrier(
        (_power_of_two(half, dtype), _power_of_two(_PEAK_LIFT - row_exponent - half, dtype))
    )
    # Not of |g|: XLA would write that, to share it.
    lifted = jnp.abs(g.astype(dtype) * first * second)
    column_peak = jnp.max(lifted, axis=layout.row_axes, keepdims=True, initial=0.0)
    column_used, (_, column_exponent) = column_peak != 0, jnp.frexp(column_peak)
    return row_exponent, column_exponent - _PEAK_LIFT, row_used, column_used


def _count(used: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """How many rows or columns of each matrix are not empty, at least 1."""
    return jnp.maximum(jnp.sum(used.astype(dtype), axis=axes, keepdims=True), 1)


def _weighted(
    squares: jax.Array, factors: Scaling, lift: int, layout: ParamLayout, over: str
) -> jax.Array:
    """Sums of the squares times ``(2^lift * factor)^2`` over rows or columns, kept with size 1."""
    dtype = squares.dtype
    exponent = jnp.minimum(factors.exponent + lift, _LARGEST_WEIGHT)
    weights = jnp.square(factors.mantissa * _power_of_two(exponent, dtype))
    axes, others = layout.column_axes, layout.row_axes
    if over == "rows":
        axes, others = others, axes
    if {*axes, *others} == {squares.ndim - 2, squares.ndim - 1} and axes and others:
        # A plain matrix, or a stack with the batch in front: a matrix-vector product as it stands.
        out = contract(squares, jnp.squeeze(weights, others), layout, over)
        return jnp.expand_dims(out, axes)
    # Elsewhere a product would transpose the squares in every half-step.
    terms = squares * weights
    if len(others) > 1:
        # All are positive. Without abs XLA:CPU sees a product after all, 20 times as slow for a query.
        terms = jnp.abs(terms)
    return jnp.sum(terms, axis=axes, keepdims=True)


def _times_root(scaling: Scaling, squared: jax.Array, lift: int) -> jax.Array:
    """``factor * sqrt(squared)``, the lift undone: the norms of the iterate."""
    factor = scaling.mantissa * _power_of_two(scaling.exponent, squared.dtype)
    return factor * (jnp.sqrt(squared) * 2.0**-lift)


def _divided(scaling: Scaling, divisor: jax.Array, gain: jax.Array | float) -> Scaling:
    """``gain * scaling / divisor``; where the divisor is 0 (nothing there, and eps is 0), it is 1."""
    quotient = scaling.mantissa * gain / jnp.where(divisor == 0, 1, divisor)
    mantissa, shift = jnp.frexp(quotient)
    return Scaling(mantissa, scaling.exponent + shift)


def _scaled(g: jax.Array, rows: Scaling, columns: Scaling) -> jax.Array:
    """``diag(r) G diag(c)``, entry by entry, with 2^18 to spare below the largest number.

    Factors that raise an entry come first and those that lower it last, so no intermediate result is
    smaller than both the entry and the result. None is too large either: both ``r G`` and ``r G c`` are
    of the size of a norm.
    """
    dtype = rows.mantissa.dtype
    top = int(jnp.finfo(dtype).maxexp)
    raising = jnp.clip(rows.exponent, 0, top - 8) + jnp.minimum(rows.exponent + top - 18, 0)
    lowering = rows.exponent - raising
    half = columns.exponent >> 1
    # Behind a barrier, or XLA computes the factors' bits once an entry instead of once a row or column.
    factors = jax.lax.optimization_barrier(
        (
            _power_of_two(raising, dtype),
            _power_of_two(half, dtype),
            columns.mantissa * _power_of_two(columns.exponent - half, dtype),
            rows.mantissa * _power_of_two(lowering, dtype),
        )
    )
    x = g.astype(dtype)
    for factor in factors:
        x = x * factor
    return x


def _power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """``2**exponent``, exactly, the exponent clipped to the normal numbers of ``dtype``."""
    info = jnp.finfo(dtype)
    biased = jnp.clip(exponent, int(info.minexp), int(info.maxexp) - 1) - int(info.minexp) + 1
    bits = biased.astype(jnp.int64 if info.bits == 64 else jnp.int32) << info.nmant
    return jax.lax.bitcast_convert_type(bits, dtype)
