"""The initial subspace from the first gradient: a randomised range finder in the parameter's own axes.

The paper starts the right factor at random, and its span takes many steps to adapt. Here it starts as the
leading row space of the first gradient (Halko, Martinsson and Tropp, 2011, algorithm 4.4 with one power
iteration, https://arxiv.org/abs/0909.4061).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layout_optax.axes import explicit_sharding, placed, sharding_without
from layout_optax.layout import ParamLayout
from lorapre_optax._factor_sharding import factor_sharding, rank_whole
from lorapre_optax._factors import EinsumAxes, broadcast, einsum_axes, gram, normal_factor
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


def gradient_rights(starts: Sequence[Start]) -> list[jax.Array]:
    """Returns right factors whose rows span the leading row spaces of the targets.

    It takes random combinations of a target's rows and makes them orthonormal by the Cholesky factor of their
    Gram matrix, before and after one power iteration. If a target is zero or not finite, its right factor
    does not change, per batch index. The combinations are divided by the target's largest entry, which avoids
    scaling the large target itself.

    Args:
      starts: moments; their paths seed the random combinations. All Gram matrices of a rank are factorised at
        once.

    Returns:
      An array like ``start.right`` for each.
    """
    opened = [_Open(start) for start in starts]
    found = _orthonormal([each.rows(each.noise()) for each in opened], opened)
    powers = [each.rows(each.columns(right)) for each, right in zip(opened, found, strict=True)]
    found = _orthonormal(powers, opened)
    return [_or_old(*each) for each in zip(found, starts, strict=True)]


class _Open:
    """A target with its largest entry per batch index; products of its quotient with factors."""

    def __init__(self, start: Start):
        self.start, self.layout = start, start.layout
        self.target = start.target(start.leaf.astype(start.right.dtype))
        self.names = einsum_axes(self.layout, self.target.ndim)
        self.core = self.layout.row_axes + self.layout.column_axes
        largest = jnp.max(jnp.abs(self.target), axis=self.core, keepdims=True)
        self.unit = jnp.squeeze(jnp.where(largest > 0, largest, 1), self.core)

    def noise(self) -> jax.Array:
        """A left factor of normal numbers."""
        start, target = self.start, self.target
        rank = start.right.shape[-2]
        noise = normal_factor(start.path, target, self.layout, rank, "left", _SEED)
        own = explicit_sharding(target)
        sharding = factor_sharding(own, target.ndim, self.layout.column_axes)
        return placed(noise, sharding).astype(target.dtype)

    def rows(self, left: jax.Array) -> jax.Array:
        """B^T G over the largest entry."""
        unit = broadcast(self.unit, self.names.left, self.names.batch)
        return rows_from(self.target, left / unit, self.layout)

    def columns(self, right: jax.Array) -> jax.Array:
        """G A^T over the largest entry."""
        unit = broadcast(self.unit, self.names.right, self.names.batch)
        return columns_from(self.target, right / unit, self.layout)


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


def _orthonormal(rows: Sequence[jax.Array], opened: Sequence[_Open]) -> list[jax.Array]:
    """Rows with the same spans, orthonormal up to the damping."""
    grams = [gram(x, each.names.right, each.names) for x, each in zip(rows, opened, strict=True)]
    roots = damped_inverse_roots(grams, _DAMPING)

    def product(root: jax.Array, rows: jax.Array, names: EinsumAxes) -> jax.Array:
        equation = f"{names.batch}zZ,{names.right.replace('z', 'Z')}->{names.right}"
        return exact_product(equation, root, rows, sharding_without(rows, ()))

    names = [each.names for each in opened]
    return [product(*each) for each in zip(roots, rows, names, strict=True)]


def _or_old(rows: jax.Array, start: Start) -> jax.Array:
    """The new rows if they are finite and not all zero, else the old right factor."""
    names = einsum_axes(start.layout, start.leaf.ndim)
    axes = tuple(axis for axis, letter in enumerate(names.right) if letter not in names.batch)
    size = jnp.sum(jnp.abs(rows), axis=axes)
    usable = broadcast(jnp.isfinite(size) & (size > 0), names.right, names.batch)
    rows = placed(rows, explicit_sharding(start.right))
    return jnp.where(usable, rows, start.right.astype(rows.dtype))
