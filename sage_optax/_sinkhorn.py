"""Sinkhorn normalisation of a matrix by two scaling vectors; the matrix is written once, at the end.

The loop of SinkGD (Scetbon et al., arXiv:2502.06742) divides rows and columns of a matrix by their norms
in turn. Its iterate is always ``X = diag(r) G diag(c)``, and the squared norm of row i is
``r_i^2 sum_j G_ij^2 c_j^2``. So all ``2 L`` half-steps only read the gradient, and only r and c change.

Range makes this harder than it looks. An absolute ``eps`` multiplies the factor of a vanishing row by
``1 / eps`` in every sweep, a gradient may hold a row at 1e+25 beside a column at 1e-25, and squares double
every exponent. Factors therefore carry an integer exponent (`_scaling.py`), and two forms keep their squares
in range:

* `_by_products`, for a CPU, reads the gradient once for the peaks of the rows and once for those of the
  columns. It writes the squares of the gradient scaled by the peaks once, and every half-step multiplies them
  by a vector.
* `_by_sums`, for accelerators, squares while it reads and needs no stored squares and no peaks. The first
  sweep sums squares at three scales in one read and gets all norms. Later sweeps sum the squares of the
  iterate itself. In all it reads the gradient ``2 L + 1`` times and writes the direction once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from layout_optax.axes import compute_dtype, contract, zeros_without
from layout_optax.layout import ParamLayout
from sage_optax._scaling import Scaling, as_float, divided, power_of_two, scaled, scaling

Variant = Literal["unit", "sqrt"]

# Squares of factors stay in float32 for rows between 2^-93 (a row at 1e-36 against eps = 1e-8) and the root
# of the matrix's size, and for columns up to the 2^60 that they reach beside such rows: the factors of
# the rows start at 2^30, those of the columns at 2^-30.
_START = 30
_LARGEST_WEIGHT = 52  # exponent of a factor; 2^22 squares of such can be summed
_PEAK_LIFT = 100  # so that a column down to 2^-226 (1e-68) of the other columns' size is not empty

# Where squares are summed as they are read: room below the first norms of columns, below an
# iterate whose columns lie far apart, and below its norms (eps may exceed those by far).
_FIRST_LIFT, _ROW_LIFT, _NORM_LIFT = 100, 70, 30
_LARGEST_GAIN = 26  # a factor never exceeds 2^26 over the norm of its row at first
# Up to this many sweeps, if their number is known, are unrolled: XLA:CUDA transposes what a loop carries.
_UNROLLED = 8


class _Rule(NamedTuple):
    """The two divisions of a sweep; eps is scaled for norms of an iterate with columns of norm 1."""

    first_eps: Scaling  # for rows, in the first sweep
    row_eps: Scaling
    column_eps: Scaling
    row_gain: jax.Array | float = 1.0

    def gauged(self, rows: Scaling, columns: Scaling, layout: ParamLayout) -> _Rule:
        """Keeps rows ``sqrt(columns / rows)`` larger after dividing, counting only those that are not empty.

        Otherwise r would grow and c would shrink by that factor in every sweep.
        """
        gain = jnp.sqrt(
            _count(columns.mantissa, layout.column_axes) / _count(rows.mantissa, layout.row_axes)
        )
        eps = scaling(self.column_eps.mantissa * gain, self.column_eps.exponent)
        return self._replace(row_gain=gain, column_eps=eps)

    def sweep(self, norms: Callable[..., Scaling], *, later: bool = False):
        """Returns the loop body over (rows, columns); ``norms`` computes those of G diag(c) or diag(r) G.

        ``later`` says that the loop does not take the first sweep.
        """

        def body(step, factors: tuple[Scaling, Scaling]) -> tuple[Scaling, Scaling]:
            rows, columns = factors
            eps = self.row_eps
            if not later:
                eps = jax.tree.map(lambda a, b: jnp.where(step == 0, a, b), self.first_eps, eps)
            rows = divided(rows, norms(rows, columns, "columns"), eps, self.row_gain)
            return rows, divided(columns, norms(rows, columns, "rows"), self.column_eps)

        return body


def sinkhorn(
    g: jax.Array,
    layout: ParamLayout,
    *,
    iterations: jax.Array | int,
    eps: jax.Array | float,
    variant: Variant,
    vectors_dtype: Any = None,
) -> jax.Array:
    """Normalises the rows, then the columns of a gradient, ``iterations`` times.

    ``X = G``, then repeatedly ``X_i. /= ||X_i.|| + eps`` for every row and ``X_.j /= ||X_.j|| + eps`` for
    every column; the sqrt variant multiplies rows by ``sqrt(n_columns)`` and columns by
    ``sqrt(n_rows)`` after dividing.

    Args:
      g: a gradient of any float dtype and shape.
      layout: the gradient's layout with non-negative axes. A vector, without row axes, is a single row.
      iterations: number of sweeps, at least 1 (a smaller traced value counts as 1); may be traced.
      eps: added to each norm; may be traced.
      variant: ``"unit"`` or ``"sqrt"``.
      vectors_dtype: on an accelerator, the dtype of a copy that all sweeps but the last read; None makes all
        sweeps read the gradient.

    Returns:
      ``diag(r) G diag(c)``, shape of ``g``, float32 or wider. Subnormal numbers count as zero.
    """
    options = {"layout": layout, "variant": variant, "vectors_dtype": vectors_dtype}
    if isinstance(iterations, Tracer):
        traced = jnp.maximum(jnp.rint(iterations).astype(jnp.int32), 1)
        return _direction(g, eps, traced, **options)
    return _direction(g, eps, known=round(float(iterations)), **options)


@functools.partial(jax.jit, static_argnames=("known", "layout", "variant", "vectors_dtype"))
def _direction(
    g: jax.Array,
    eps: jax.Array | float,
    traced: jax.Array | None = None,
    *,
    known: int | None = None,
    layout: ParamLayout,
    variant: Variant,
    vectors_dtype: Any,
) -> jax.Array:
    """The direction; traced and lowered once for all gradients of one shape."""
    dtype = compute_dtype(g.dtype)
    iterations = traced if known is None else known
    n_rows, n_columns = (
        math.prod(g.shape[axis] for axis in axes) for axes in (layout.row_axes, layout.column_axes)
    )
    roots, gain = (1.0, 1.0, 1.0), 1.0
    if variant == "sqrt":  # the loop's iterate is n^(1/2) times this one, except the gradient
        roots, gain = (1.0, n_rows**0.5, n_columns**0.5), n_rows**0.5
    first, row, column = (scaling(jnp.asarray(eps, dtype) / root) for root in roots)
    rule = _Rule(first, row, column)

    def by_products(g: jax.Array) -> tuple[Scaling, Scaling]:
        return _by_products(g, layout, iterations, rule)

    def by_sums(g: jax.Array) -> tuple[Scaling, Scaling]:
        return _by_sums(g, layout, iterations, rule, vectors_dtype)

    if n_rows == n_columns == 1:  # the other form gave NaN for single numbers on XLA:CPU
        by_sums = by_products
    # Chosen at lowering, so that one machine can compile for another.
    rows, columns = jax.lax.platform_dependent(g, cpu=by_products, default=by_sums)
    return scaled(g, Scaling(rows.mantissa * gain, rows.exponent), columns)


# CPU


def _by_products(g: jax.Array, layout: ParamLayout, iterations: Any, rule: _Rule):
    """Computes both vectors by products with a matrix of squares, which is written once."""
    dtype = compute_dtype(g.dtype)
    row_peak, column_peak, row_used, column_used = _peaks(g, layout, dtype)
    ones = jnp.expand_dims(zeros_without(g, layout.row_axes, dtype) + 1, layout.row_axes)
    one = Scaling(jnp.ones_like(row_peak, dtype), -row_peak)
    squares = jnp.square(scaled(g, one, Scaling(ones, -column_peak)))
    rows = Scaling(row_used.astype(dtype), row_peak + _START)
    columns = Scaling(column_used.astype(dtype), column_peak - _START)

    def norms(rows: Scaling, columns: Scaling, over: str) -> Scaling:
        weights = jnp.square(as_float(columns if over == "columns" else rows, _LARGEST_WEIGHT))
        return scaling(jnp.sqrt(_weighted(squares, weights, layout, over)))

    body = rule.gauged(rows, columns, layout).sweep(norms)
    rows, columns = jax.lax.fori_loop(0, iterations, body, (rows, columns))
    return rows.shifted(-row_peak), columns.shifted(-column_peak)


def _peaks(g: jax.Array, layout: ParamLayout, dtype: Any):
    """Exponents of the largest entry of each row, and of each column of the scaled rows; which are not 0."""
    row_peak = jnp.max(
        jnp.abs(g).astype(dtype), axis=layout.column_axes, keepdims=True, initial=0.0
    )
    row_used = row_peak != 0
    # The exponent of 0 is 0. JAX 0.12's frexp drops the exponents' sharding, and a choice by the sharded
    # mask restores it.
    row_exponent = jnp.where(row_used, jnp.frexp(row_peak)[1], 0)
    half = (_PEAK_LIFT - row_exponent) >> 1
    first, second = jax.lax.optimization_barrier(
        (power_of_two(half, dtype), power_of_two(_PEAK_LIFT - row_exponent - half, dtype))
    )
    # Not of |g|: XLA would write |g| to share it.
    lifted = jnp.abs(g.astype(dtype) * first * second)
    column_peak = jnp.max(lifted, axis=layout.row_axes, keepdims=True, initial=0.0)
    column_used = column_peak != 0
    column_exponent = jnp.where(column_used, jnp.frexp(column_peak)[1], 0)
    return row_exponent, column_exponent - _PEAK_LIFT, row_used, column_used


def _weighted(squares: jax.Array, weights: jax.Array, layout: ParamLayout, over: str) -> jax.Array:
    """Sums of the squares times weights over rows or columns, kept with size 1."""
    axes, others = layout.column_axes, layout.row_axes
    if over == "rows":
        axes, others = others, axes
    if {*axes, *others} == {squares.ndim - 2, squares.ndim - 1} and axes and others:
        # A plain matrix, or a stack with the batch in front, needs no transposition for a matrix-vector
        # product.
        out = contract(squares, jnp.squeeze(weights, others), layout, over)
        return jnp.expand_dims(out, axes)
    # Elsewhere a product would transpose the squares in every half-step.
    terms = squares * weights
    if len(others) > 1:
        # All terms are positive. Without abs XLA:CPU sees a product, 20 times as slow for a query.
        terms = jnp.abs(terms)
    return jnp.sum(terms, axis=axes, keepdims=True)


# Accelerators


def _by_sums(
    g: jax.Array, layout: ParamLayout, iterations: Any, rule: _Rule, vectors_dtype: Any = None
):
    """Computes both vectors by sums of squares that are never written: ``2 L`` reads of the gradient.

    If ``vectors_dtype`` is narrower than the gradient, all sweeps but the last read a copy. The last reads the
    gradient, so that rows and columns end with exact norms.
    """
    copy = g
    if vectors_dtype is not None and jnp.finfo(vectors_dtype).bits < jnp.finfo(g.dtype).bits:
        # Without the barrier every sweep would read the gradient and round it.
        copy = jax.lax.optimization_barrier(g.astype(vectors_dtype))
    return _sweeps(g, copy, layout, iterations, rule)


def _sweeps(g: jax.Array, copy: jax.Array, layout: ParamLayout, iterations: Any, rule: _Rule):
    """Runs all sweeps: the last over the gradient, those before it over a copy."""
    known = not isinstance(iterations, Tracer)
    source = copy if known and iterations > 1 else g
    rows, columns, lift = _first_sweep(source, layout, rule)
    rule = rule.gauged(rows, columns, layout)

    def sweeps(source: jax.Array, start: Any, stop: Any, factors: tuple[Scaling, Scaling]):
        def norms(rows: Scaling, columns: Scaling, over: str) -> Scaling:
            return _norms(source, rows, columns, lift, layout, over)

        body = rule.sweep(norms, later=True)
        if known and iterations <= _UNROLLED:
            once = jax.jit(body)  # traced once for all sweeps
            for step in range(start, stop):
                factors = once(jnp.int32(step), factors)
            return factors
        return jax.lax.fori_loop(start, stop, body, factors)

    last = max(iterations - 1, 1) if known else jnp.maximum(iterations - 1, 1)
    return sweeps(g, last, iterations, sweeps(copy, 1, last, (rows, columns)))


def _first_sweep(g: jax.Array, layout: ParamLayout, rule: _Rule):
    """Returns the factors after one sweep over any gradient, and a power of two for the row factors.

    Multiplied by that power the row factors stay in range for all sweeps, with room below.
    """
    dtype = compute_dtype(g.dtype)
    norms = _all_sizes(g.astype(dtype), layout.column_axes)
    used = norms.mantissa != 0
    rows = divided(
        Scaling(used.astype(dtype), jnp.zeros_like(norms.exponent)), norms, rule.first_eps
    )
    half = (rows.exponent + _FIRST_LIFT) >> 1
    first, second = jax.lax.optimization_barrier(
        (
            power_of_two(half, dtype),
            rows.mantissa * power_of_two(rows.exponent + _FIRST_LIFT - half, dtype),
        )
    )
    largest = jnp.max(jnp.where(used, -norms.exponent, 0), axis=layout.row_axes, keepdims=True)
    norms = _all_sizes(g.astype(dtype) * first * second, layout.row_axes).shifted(-_FIRST_LIFT)
    columns = Scaling((norms.mantissa != 0).astype(dtype), jnp.zeros_like(norms.exponent))
    lift = jnp.minimum(_ROW_LIFT, int(jnp.finfo(dtype).maxexp) - _LARGEST_GAIN - largest)
    return rows, divided(columns, norms, rule.column_eps), lift


def _all_sizes(x: jax.Array, axes: tuple[int, ...]) -> Scaling:
    """Norms over some axes, kept with size 1, of numbers whose squares may be out of range.

    One read sums the squares at three scales, and the finest that does not overflow keeps all digits.
    """
    half = int(jnp.finfo(x.dtype).maxexp) // 2
    shifts = (half, 0, -half - 12)
    # XLA fuses three sums; for one reduction with three results XLA:CUDA would write the squares.
    sums = jax.lax.optimization_barrier(
        [jnp.sum(jnp.square(x * 2.0**shift), axis=axes, keepdims=True) for shift in shifts]
    )
    limit = 2.0 ** (2 * half - 8)
    found, shift = sums[2], jnp.full_like(sums[2], shifts[2], jnp.int32)
    for each, finer in zip(sums[1::-1], shifts[1::-1], strict=True):
        fits = each <= limit
        found, shift = jnp.where(fits, each, found), jnp.where(fits, finer, shift)
    return scaling(jnp.sqrt(found), -shift)


def _norms(
    g: jax.Array, rows: Scaling, columns: Scaling, lift: jax.Array, layout: ParamLayout, over: str
) -> Scaling:
    """Norms of the rows of ``G diag(columns)``, or of the columns of ``diag(rows) G``.

    The squares are those of the iterate itself, except for mantissas of the factor that a sum shares,
    and times ``2^_NORM_LIFT``: no larger than a norm, however far apart rows and columns are.
    """
    dtype = compute_dtype(g.dtype)
    rows, columns = rows.shifted(lift), columns.shifted(_NORM_LIFT - lift)
    shared, other = (rows, columns) if over == "columns" else (columns, rows)
    axes, back = (
        (layout.column_axes, lift - _NORM_LIFT) if over == "columns" else (layout.row_axes, -lift)
    )
    top = int(jnp.finfo(dtype).maxexp) - 2
    power = jnp.clip(shared.exponent, -top, top)
    factors = {over: as_float(other)}
    factors["rows" if over == "columns" else "columns"] = power_of_two(power, dtype)
    # With the gradient: otherwise XLA widens a narrow one before the loop and every sweep reads the wide copy.
    g, first, second = jax.lax.optimization_barrier((g, factors["rows"], factors["columns"]))
    squares = jnp.square(g.astype(dtype) * first * second)
    return scaling(jnp.sqrt(jnp.sum(squares, axis=axes, keepdims=True)), back - power)


def _count(used: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The number of non-empty rows or columns of each matrix, at least 1."""
    return jnp.maximum(jnp.sum((used != 0).astype(used.dtype), axis=axes, keepdims=True), 1)
