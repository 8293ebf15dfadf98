"""Momentum in one byte per entry: a signed square root on 127 levels, and one float32 scale per row.

A row of momentum spans several orders of magnitude, so uniform steps would round most of it to zero. Steps on
the square root are fine near zero and coarse near the row's maximum. Rounding is stochastic and unbiased in
the momentum itself, not in its root. Small gradients therefore move the momentum on average, although one
update is far below a step. The random bits are a hash of path, step and coordinates (`layout_optax.keys`), so
no key is stored.
"""

import jax
import jax.numpy as jnp

from layout_optax.keys import element_bits
from layout_optax.layout import ParamLayout

LEVELS = 127


def encode(
    x: jax.Array, path: str, layout: ParamLayout, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Rounds an array to int8 codes and one scale per row.

    With :math:`u = 127^2 |x| / \max_{row} |x|` and :math:`k = \lfloor\sqrt u\rfloor`, the code is
    :math:`\pm(k + 1)` with probability :math:`(u - k^2) / (2k + 1)`, else :math:`\pm k`, so that `decode` gives
    ``x`` on average. The error of one entry is below ``row_max * (2k + 1) / 127**2``. Zeros, zero rows and a
    row's maximum are exact.

    Args:
      x: momentum of any float dtype, the parameter's shape.
      path: the leaf's path, which seeds the rounding.
      layout: the parameter's layout with non-negative axes; a row runs over its column axes.
      count: int32 step count, which seeds the rounding.

    Returns:
      int8 codes of ``x``'s shape, and float32 maxima of ``x``'s shape without column axes. A NaN or
        infinity in ``x`` makes its row's maximum NaN or infinite.

    Example:
      >>> vector = ParamLayout("vector", (), (0,))
      >>> x = jnp.array([0.0, -3.0, 127.0]) ** 2 / 127 * jnp.array([1.0, -1.0, 1.0])
      >>> encode(x, "scale", vector, jnp.int32(1))[0].tolist()
      [0, -3, 127]
    """
    x = x.astype(jnp.float32)
    size = jnp.abs(x)
    row_max = jnp.max(size, axis=layout.column_axes, keepdims=True, initial=0)
    u = size / jnp.where(row_max == 0, 1, row_max) * LEVELS**2
    floor = jnp.floor(jnp.sqrt(u))
    bits = element_bits(path, x.shape, layout, count)
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24  # 24 bits: exact, and below 1
    up = uniform * (2 * floor + 1) < u - jnp.square(floor)
    codes = jnp.sign(x) * jnp.minimum(floor + up.astype(jnp.float32), LEVELS)
    return codes.astype(jnp.int8), jnp.squeeze(row_max, layout.column_axes)


def decode(codes: jax.Array, row_max: jax.Array, layout: ParamLayout) -> jax.Array:
    """Returns the float32 array for codes and row maxima: ``sign(c) * (c / 127)**2 * row_max``.

    Args:
      codes: int8, the parameter's shape.
      row_max: float32, the parameter's shape without column axes.
      layout: the parameter's layout with non-negative axes.

    Returns:
      float32, the parameter's shape.
    """
    c = codes.astype(jnp.float32)
    return c * jnp.abs(c) / LEVELS**2 * jnp.expand_dims(row_max, layout.column_axes)
