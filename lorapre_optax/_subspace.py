"""The first subspace from the first gradient: a randomised range finder in the parameter's own axes.

The paper starts the right factor at random; its span then has to be found over many steps. Here it starts
as the leading row space of the first gradient (Halko, Martinsson and Tropp, 2011, algorithm 4.4 with one
power iteration, https://arxiv.org/abs/0909.4061).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from layout_optax.layout import ParamLayout
from lorapre_optax._batching import Task, damped_inverse_roots
from lorapre_optax._factors import factor_sharding, gram, letters, normal_factor, spread

_DAMPING = 1e-4
_SEED = 7


def gradient_rights(paths: Sequence[str], tasks: Sequence[Task]) -> list[jax.Array]:
    """Right factors whose rows span the leading row space of each target.

    Random combinations of the target's rows, made orthonormal by the Cholesky factor of their Gram matrix;
    one power iteration; orthonormal again. A target that is zero or not finite keeps the right factor
    it had, per batch index.

    Args:
      paths: the leaves' paths in normal form, which seed the combinations.
      tasks: the moments; only ``layout``, ``target`` and ``right`` are read.

    Returns:
      One array per task, shaped like its right factor, of the target's dtype.
    """
    targets = [normalised(task.target, task.layout) for task in tasks]
    rows = []
    for path, task, target in zip(paths, tasks, targets, strict=True):
        rank = task.right.shape[-2]
        noise = normal_factor(path, target, task.layout, rank, "left", _SEED)
        rows.append(rows_from(target, noise.astype(target.dtype), task.layout))
    rows = _orthonormal(rows, tasks)
    rows = [
        rows_from(target, columns_from(target, row, task.layout), task.layout)
        for target, row, task in zip(targets, rows, tasks, strict=True)
    ]
    rows = _orthonormal(rows, tasks)
    return [_or_old(row, task) for row, task in zip(rows, tasks, strict=True)]


def normalised(target: jax.Array, layout: ParamLayout) -> jax.Array:
    """The target over its largest entry, per batch index."""
    largest = jnp.max(jnp.abs(target), axis=layout.row_axes + layout.column_axes, keepdims=True)
    return target / jnp.where(largest > 0, largest, 1)


def rows_from(target: jax.Array, left: jax.Array, layout: ParamLayout) -> jax.Array:
    """B^T G, shaped like a right factor."""
    names = letters(layout, target.ndim)
    sharding = factor_sharding(target, layout.row_axes)
    equation = f"{names.param},{names.left}->{names.right}"
    return jnp.einsum(equation, target, left, out_sharding=sharding)


def columns_from(target: jax.Array, right: jax.Array, layout: ParamLayout) -> jax.Array:
    """G A^T, shaped like a left factor."""
    names = letters(layout, target.ndim)
    sharding = factor_sharding(target, layout.column_axes)
    equation = f"{names.param},{names.right}->{names.left}"
    return jnp.einsum(equation, target, right, out_sharding=sharding)


def _orthonormal(rows: Sequence[jax.Array], tasks: Sequence[Task]) -> list[jax.Array]:
    """The same spans with orthonormal rows, up to the damping."""
    names = [letters(task.layout, task.target.ndim) for task in tasks]
    grams = [gram(row, n.right, n) for row, n in zip(rows, names, strict=True)]
    roots = damped_inverse_roots(grams, _DAMPING)
    return [
        jnp.einsum(
            f"{n.batch}zZ,{n.right.replace('z', 'Z')}->{n.right}",
            root,
            row,
            precision="highest",
            out_sharding=factor_sharding(task.target, task.layout.row_axes),
        )
        for root, row, task, n in zip(roots, rows, tasks, names, strict=True)
    ]


def _or_old(rows: jax.Array, task: Task) -> jax.Array:
    """The new rows where they are finite and not all zero, else the old right factor."""
    names = letters(task.layout, task.target.ndim)
    axes = tuple(axis for axis, letter in enumerate(names.right) if letter not in names.batch)
    size = jnp.sum(jnp.abs(rows), axis=axes)
    usable = spread(jnp.isfinite(size) & (size > 0), names.right, names.batch)
    return jnp.where(usable, rows, task.right.astype(rows.dtype))
