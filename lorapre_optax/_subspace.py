"""The initial subspace from the first gradient: a randomised range finder in the parameter's own axes.

The paper starts the right factor at random, and its span takes many steps to adapt. Here it starts as the
leading row space of the first gradient (Halko, Martinsson and Tropp, 2011, algorithm 4.4 with one power
iteration, https://arxiv.org/abs/0909.4061).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layout_optax.axes import explicit_sharding, placed, sharding_without
from layout_optax.layout import ParamLayout
from lorapre_optax._factor_sharding import factor_sharding, rank_whole
from lorapre_optax._factors import broadcast, einsum_axes, gram, normal_factor
from lorapre_optax._products import exact_product
from lorapre_optax._solves import damped_inverse_roots

_DAMPING = 1e-4
_SEED = 7


class Start(NamedTuple):
    """A moment at its first step: its parameter, its target and the right factor from ``init``."""

    path: str
    layout: ParamLayout
    leaf: jax.Array
    target: Callable[[jax.Array], jax.Array]
    right: jax.Array


def gradient_right(start: Start) -> jax.Array:
    """Returns a right factor whose rows span the leading row space of the target.

    It takes random combinations of the target's rows and makes them orthonormal by the Cholesky factor of their
    Gram matrix, before and after one power iteration. If the target is zero or not finite, the right factor
    does not change, per batch index. The combinations are divided by the target's largest entry, which avoids
    scaling the large target itself.

    Args:
      start: a moment; its path seeds the random combinations.

    Returns:
      An array like ``start.right``.
    """
    layout, right = start.layout, start.right
    target = start.target(start.leaf.astype(right.dtype))
    names = einsum_axes(layout, target.ndim)
    core = layout.row_axes + layout.column_axes
    largest = jnp.max(jnp.abs(target), axis=core, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1)

    def rows(left: jax.Array) -> jax.Array:
        """B^T G over the largest entry."""
        scale = jnp.squeeze(unit, core)
        return rows_from(target, left / broadcast(scale, names.left, names.batch), layout)

    noise = normal_factor(start.path, target, layout, right.shape[-2], "left", _SEED)
    own = explicit_sharding(target)
    noise = placed(noise, factor_sharding(own, target.ndim, layout.column_axes))
    found = _orthonormal(rows(noise.astype(target.dtype)), start, target)
    found = _orthonormal(rows(_columns(target, found, unit, layout)), start, target)
    return _or_old(found, start, target.ndim)


def _columns(
    target: jax.Array, right: jax.Array, unit: jax.Array, layout: ParamLayout
) -> jax.Array:
    """G A^T over the largest entry of G."""
    names = einsum_axes(layout, target.ndim)
    scale = broadcast(
        jnp.squeeze(unit, layout.row_axes + layout.column_axes), names.right, names.batch
    )
    return columns_from(target, right / scale, layout)


def normalised(target: jax.Array, layout: ParamLayout) -> jax.Array:
    """The target over its largest entry, per batch index."""
    largest = jnp.max(jnp.abs(target), axis=layout.row_axes + layout.column_axes, keepdims=True)
    return target / jnp.where(largest > 0, largest, 1)


def rows_from(target: jax.Array, left: jax.Array, layout: ParamLayout) -> jax.Array:
    """B^T G, shaped like a right factor, its rank whole on each device."""
    names = einsum_axes(layout, target.ndim)
    sharding = factor_sharding(explicit_sharding(target), target.ndim, layout.row_axes)
    equation = f"{names.param},{names.left}->{names.right}"
    return rank_whole(jnp.einsum(equation, target, left, out_sharding=sharding))


def columns_from(target: jax.Array, right: jax.Array, layout: ParamLayout) -> jax.Array:
    """G A^T, shaped like a left factor, its rank whole on each device."""
    names = einsum_axes(layout, target.ndim)
    sharding = factor_sharding(explicit_sharding(target), target.ndim, layout.column_axes)
    equation = f"{names.param},{names.right}->{names.left}"
    return rank_whole(jnp.einsum(equation, target, right, out_sharding=sharding))


def _orthonormal(rows: jax.Array, start: Start, target: jax.Array) -> jax.Array:
    """Rows with the same span, orthonormal up to the damping."""
    names = einsum_axes(start.layout, target.ndim)
    root = damped_inverse_roots(gram(rows, names.right, names), _DAMPING)
    equation = f"{names.batch}zZ,{names.right.replace('z', 'Z')}->{names.right}"
    return exact_product(equation, root, rows, sharding_without(rows, ()))


def _or_old(rows: jax.Array, start: Start, ndim: int) -> jax.Array:
    """The new rows if they are finite and not all zero, else the old right factor."""
    names = einsum_axes(start.layout, ndim)
    axes = tuple(axis for axis, letter in enumerate(names.right) if letter not in names.batch)
    size = jnp.sum(jnp.abs(rows), axis=axes)
    usable = broadcast(jnp.isfinite(size) & (size > 0), names.right, names.batch)
    rows = placed(rows, explicit_sharding(start.right))
    return jnp.where(usable, rows, start.right.astype(rows.dtype))
