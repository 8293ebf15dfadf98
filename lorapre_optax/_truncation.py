"""Factors of a given rank from a product of factors or from a whole matrix, by truncated decompositions.

Updates stay in the parameter's axes. These functions work on (batch, rows, columns) matrices with unsharded
axes instead, since QR and singular value decompositions support nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from layout_optax.axes import shape_without
from layout_optax.layout import ParamLayout
from lorapre_optax._factor_sharding import with_rank
from lorapre_optax._factors import INIT_STD, EinsumAxes, einsum_axes, power_of_two


@functools.partial(jax.jit, static_argnames=("layout", "shape"))
def truncated_product(
    left: jax.Array,
    right: jax.Array,
    noise: jax.Array,
    layout: ParamLayout,
    shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """The best approximation of B A by factors of a smaller rank, per batch index.

    QR of both thin factors, then the singular value decomposition of the r x r core.

    Args:
      left: B, float32 or wider, unsharded like all arguments.
      right: A.
      noise: standard normal numbers shaped like the new right factor; their rank is the new one.
      layout: the parameter's layout with non-negative axes.
      shape: the parameter's shape.

    Returns:
      The new factors, U sqrt(S) and sqrt(S) V^T. Where the product has fewer directions than the rank, the left
      factor has zeros and the right factor noise.
    """
    names = einsum_axes(layout, len(shape))
    scales = [
        power_of_two(factor, side, names.batch)
        for factor, side in ((left, names.left), (right, names.right))
    ]
    (left_q, left_r), (right_q, right_r) = (
        jnp.linalg.qr(_as_matrices(factor, side, names.batch, "z") / scale[..., None, None])
        for factor, side, scale in zip(
            (left, right), (names.left, names.right), scales, strict=True
        )
    )
    u, s, vt = jnp.linalg.svd(_matmul(left_r, jnp.swapaxes(right_r, -1, -2)), full_matrices=False)
    # Take the roots separately: the product of the two scales may leave the range of float32.
    unit = jnp.sqrt(scales[0]) * jnp.sqrt(scales[1])
    u, v = _matmul(left_q, u), _matmul(right_q, jnp.swapaxes(vt, -1, -2))
    return _from_directions(u, s, v, unit, noise, layout, shape, names)


@functools.partial(jax.jit, static_argnames=("layout", "shape"))
def truncated_matrix(
    full: jax.Array, noise: jax.Array, layout: ParamLayout, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The best approximation of whole matrices by factors; see `truncated_product`."""
    names = einsum_axes(layout, len(shape))
    scale = power_of_two(full, names.param, names.batch)
    columns = "".join(names.param[axis] for axis in layout.column_axes)
    matrix = _as_matrices(full, names.param, names.batch, columns) / scale[..., None, None]
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    v = jnp.swapaxes(vt, -1, -2)
    return _from_directions(u, s, v, jnp.sqrt(scale), noise, layout, shape, names)


def _from_directions(
    u: jax.Array,
    s: jax.Array,
    v: jax.Array,
    unit: jax.Array,
    noise: jax.Array,
    layout: ParamLayout,
    shape: tuple[int, ...],
    names: EinsumAxes,
) -> tuple[jax.Array, jax.Array]:
    """Factors from singular triplets; ``unit`` is the root of the scale that was divided out of ``s``."""
    rank = noise.shape[-2]
    noise = _as_matrices(noise, names.right, names.batch, "z").astype(v.dtype)
    rounding = s.shape[-1] * jnp.finfo(s.dtype).eps * s[..., :1]
    u, s, v = u[..., :rank], s[..., :rank], v[..., :rank]
    alive = s > rounding
    root = jnp.where(alive, jnp.sqrt(s), 0) * unit[..., None]
    # A row of zeros would never learn, so missing directions start as the paper's factors do, at the scale of
    # the other rows.
    square = jnp.sum(jnp.square(root), axis=-1) / jnp.maximum(jnp.sum(alive, axis=-1), 1)
    scale = jnp.sqrt(square / max(1, v.shape[-2]))
    scale = jnp.where(scale > 0, scale, INIT_STD)[..., None, None]
    left = u * root[..., None, :]
    right = jnp.where(alive[..., None, :], v * root[..., None, :], scale * noise)
    left_shape, right_shape = (
        with_rank(shape_without(shape, axes), rank)
        for axes in (layout.column_axes, layout.row_axes)
    )
    return (
        _from_matrices(left, left_shape, names.left, names.batch, "z"),
        _from_matrices(right, right_shape, names.right, names.batch, "z"),
    )


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _order(names: str, batch: str, last: str) -> list[int]:
    """Axis positions: batch axes, then the axes that are in neither group, then ``last``."""
    middle = [name for name in names if name not in batch + last]
    return [names.index(name) for name in (*batch, *middle, *last)]


def _as_matrices(x: jax.Array, names: str, batch: str, last: str) -> jax.Array:
    """An array with its batch axes first and two axes after them; ``last`` makes up the second."""
    x = jnp.transpose(x, _order(names, batch, last))
    kept = x.shape[: len(batch)]
    columns = math.prod(x.shape[x.ndim - len(last) :])
    return x.reshape(*kept, math.prod(x.shape[len(batch) : x.ndim - len(last)]), columns)


def _from_matrices(
    x: jax.Array, shape: Sequence[int], names: str, batch: str, last: str
) -> jax.Array:
    """The inverse of `_as_matrices`."""
    order = _order(names, batch, last)
    back = [order.index(axis) for axis in range(len(order))]
    return jnp.transpose(x.reshape([shape[axis] for axis in order]), back)
