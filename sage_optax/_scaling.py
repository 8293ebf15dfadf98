"""Row and column factors beyond the range of floats: a mantissa and an integer exponent each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_ZERO = -(2**20)  # exponent of zero: below all others, and a sum of a few stays in int32


class Scaling(NamedTuple):
    """Non-negative numbers ``mantissa * 2**exponent``, one per row or per column.

    Attributes:
      mantissa: float32 (float64 for a float64 gradient), the parameter's shape with size 1 along the
        axes that share a factor; 0 where the row or column is empty.
      exponent: int32, same shape.
    """

    mantissa: jax.Array
    exponent: jax.Array

    def shifted(self, power: jax.Array | int) -> Scaling:
        """The numbers times ``2**power``."""
        return Scaling(self.mantissa, self.exponent + power)


def scaling(x: jax.Array, exponent: jax.Array | int = 0) -> Scaling:
    """The numbers ``x * 2**exponent`` with mantissas in [1/2, 1); zeros have the lowest exponent.

    Example:
      >>> scaling(jnp.float32(12.0), 100)
      Scaling(mantissa=Array(0.75, dtype=float32), exponent=Array(104, dtype=int32))
    """
    mantissa, shift = _split(x)
    return Scaling(mantissa, jnp.where(mantissa == 0, _ZERO, shift + exponent))


def total(a: Scaling, b: Scaling) -> Scaling:
    """``a + b``, not rescaled; the smaller summand loses digits by rounding, as in float addition."""
    top = jnp.maximum(a.exponent, b.exponent)
    return Scaling(
        a.mantissa * power_of_two(a.exponent - top, a.mantissa.dtype)
        + b.mantissa * power_of_two(b.exponent - top, b.mantissa.dtype),
        top,
    )


def divided(
    factors: Scaling, norms: Scaling, eps: Scaling, gain: jax.Array | float = 1.0
) -> Scaling:
    """``gain * factors / (factors * norms + eps)``; a divisor of 0 counts as 1.

    This is the half-step of Sinkhorn's algorithm: ``factors * norms`` are the norms of the iterate's rows or
    columns. An empty row or column keeps the factor 0.

    Example:
      >>> two, three = scaling(jnp.float32(2)), scaling(jnp.float32(3))
      >>> float(divided(two, three, eps=two).mantissa)
      0.5
    """
    current = Scaling(factors.mantissa * norms.mantissa, factors.exponent + norms.exponent)
    divisor = total(current, eps)
    zero = divisor.mantissa == 0
    return scaling(
        factors.mantissa * gain / jnp.where(zero, 1, divisor.mantissa),
        factors.exponent - jnp.where(zero, 0, divisor.exponent),
    )


def as_float(factors: Scaling, highest: int | None = None) -> jax.Array:
    """The factors as floats, their exponents clipped to ``highest`` and to the normal numbers."""
    exponent = factors.exponent
    if highest is not None:
        exponent = jnp.minimum(exponent, highest)
    return factors.mantissa * power_of_two(exponent, factors.mantissa.dtype)


def scaled(g: jax.Array, rows: Scaling, columns: Scaling) -> jax.Array:
    """``diag(rows) G diag(columns)``, entry by entry, with a margin of 2^18 below the largest float.

    Factors that raise an entry come first and factors that lower it come last, so no intermediate result is
    smaller than both the entry and the result. Where both ``rows G`` and the result have the size of a norm, no
    intermediate result is too large.
    """
    dtype = rows.mantissa.dtype
    top = int(jnp.finfo(dtype).maxexp)
    raising = jnp.clip(rows.exponent, 0, top - 8) + jnp.minimum(rows.exponent + top - 18, 0)
    lowering = rows.exponent - raising
    half = columns.exponent >> 1
    # Without the barrier XLA computes the factors' bits once per entry instead of once per row or column.
    factors = jax.lax.optimization_barrier(
        (
            power_of_two(raising, dtype),
            power_of_two(half, dtype),
            columns.mantissa * power_of_two(columns.exponent - half, dtype),
            rows.mantissa * power_of_two(lowering, dtype),
        )
    )
    x = g.astype(dtype)
    for factor in factors:
        x = x * factor
    return x


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`jnp.frexp` of non-negative numbers in a third of its operations; subnormal ones count as zero."""
    info = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.int64 if info.bits == 64 else jnp.int32)
    half = 1 - int(info.minexp) - 1  # the field of numbers in [1/2, 1)
    field = (bits >> info.nmant) & (2 * half + 3)
    mantissa = (bits & ((1 << info.nmant) - 1)) | (half << info.nmant)
    mantissa = jax.lax.bitcast_convert_type(mantissa, x.dtype)
    mantissa = jnp.where(field == 0, 0, jnp.where(field == 2 * half + 3, x, mantissa))
    return mantissa, (field - half).astype(jnp.int32)


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """``2**exponent``, exactly, the exponent clipped to the normal numbers of ``dtype``.

    Example:
      >>> power_of_two(jnp.array([-3, 0, 1000]), jnp.float32)
      Array([1.2500000e-01, 1.0000000e+00, 1.7014118e+38], dtype=float32)
    """
    info = jnp.finfo(dtype)
    biased = jnp.clip(exponent, int(info.minexp), int(info.maxexp) - 1) - int(info.minexp) + 1
    bits = biased.astype(jnp.int64 if info.bits == 64 else jnp.int32) << info.nmant
    return jax.lax.bitcast_convert_type(bits, dtype)
