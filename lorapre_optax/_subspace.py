"""The first subspace from the first gradient: a randomised range finder in the parameter's own axes.

The paper starts the right factor at random; its span then has to be found over many steps. Here it starts
as the leading row space of the first gradient (Halko, Martinsson and Tropp, 2011, algorithm 4.4 with one
power iteration, https://arxiv.org/abs/0909.4061).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layout_optax.axes import explicit_sharding, placed, sharding_without
from layout_optax.layout import ParamLayout
from lorapre_optax._factors import (
    broadcast,
    einsum_axes,
    factor_sharding,
    gram,
    normal_factor,
    rank_whole,
)
from lorapre_optax._solves import damped_inverse_roots

_DAMPING = 1e-4
_SEED = 7


class Start(NamedTuple):
    """A moment at its first step: whose it is, its target and the right factor from ``init``."""

    path: str
    layout: ParamLayout
    target: jax.Array
    right: jax.Array


def gradient_rights(starts: Sequence[Start]) -> list[jax.Array]:
    """Right factors whose rows span the leading row space of each target.

    Random combinations of the target's rows, made orthonormal by the Cholesky factor of their Gram matrix;
    one power iteration; orthonormal again. A target that is zero or not finite keeps the right factor
    it had, per batch index.

    Args:
      starts: any number of moments; their paths seed the combinations.

    Returns:
      One array for each moment, shaped like its right factor, of the target's dtype.
    """
    targets = [normalised(each.target, each.layout) for each in starts]
    rows = []
    for each, target in zip(starts, targets, strict=True):
        rank = each.right.shape[-2]
        noise = normal_factor(each.path, target, each.layout, rank, "left", _SEED)
        own = explicit_sharding(target)
        noise = placed(noise, factor_sharding(own, target.ndim, each.layout.column_axes))
        rows.append(rows_from(target, noise.astype(target.dtype), each.layout))
    rows = _orthonormal(rows, starts)
    rows = [
        rows_from(target, columns_from(target, row, each.layout), each.layout)
        for target, row, each in zip(targets, rows, starts, strict=True)
    ]
    rows = _orthonormal(rows, starts)
    return [_or_old(row, each) for row, each in zip(rows, starts, strict=True)]


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


def _orthonormal(rows: Sequence[jax.Array], starts: Sequence[Start]) -> list[jax.Array]:
    """The same spans with orthonormal rows, up to the damping."""
    names = [einsum_axes(each.layout, each.target.ndim) for each in starts]
    grams = [gram(row, n.right, n) for row, n in zip(rows, names, strict=True)]
    roots = damped_inverse_roots(grams, _DAMPING)
    return [
        jnp.einsum(
            f"{n.batch}zZ,{n.right.replace('z', 'Z')}->{n.right}",
            root,
            row,
            precision="highest",
            out_sharding=sharding_without(row, ()),
        )
        for root, row, each, n in zip(roots, rows, starts, names, strict=True)
    ]


def _or_old(rows: jax.Array, start: Start) -> jax.Array:
    """The new rows where they are finite and not all zero, else the old right factor."""
    names = einsum_axes(start.layout, start.target.ndim)
    axes = tuple(axis for axis, letter in enumerate(names.right) if letter not in names.batch)
    size = jnp.sum(jnp.abs(rows), axis=axes)
    usable = broadcast(jnp.isfinite(size) & (size > 0), names.right, names.batch)
    rows = placed(rows, explicit_sharding(start.right))
    return jnp.where(usable, rows, start.right.astype(rows.dtype))
